#include "cores.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fastserve {
namespace {

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<int> affinity_mask() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
#endif
  if (cpus.empty())
    for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu)
      cpus.push_back(static_cast<int>(cpu));
  return cpus;
}

// Sets of siblings; a CPU of which the system tells nothing is a core of its own.
int count_physical(const std::string& root, const std::vector<int>& cpus) {
  std::set<std::string> cores;
  for (int cpu : cpus) {
    const std::string folder = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const std::string siblings = read_line(folder + "thread_siblings_list");
    cores.insert(siblings.empty() ? "cpu " + std::to_string(cpu) : siblings);
  }
  return static_cast<int>(cores.size());
}

int count_nodes(const std::string& root, const std::vector<int>& cpus) {
  int count = 0;
  const std::string folder = root + "/sys/devices/system/node/";
  for (int node : parse_cpu_list(read_line(folder + "has_cpu"))) {
    const std::vector<int> of_node = parse_cpu_list(read_line(folder + "node" + std::to_string(node) + "/cpulist"));
    count += std::any_of(cpus.begin(), cpus.end(), [&](int cpu) {
      return std::find(of_node.begin(), of_node.end(), cpu) != of_node.end();
    });
  }
  return std::max(1, count);
}

// Of one group: "max 100000" or "150000 100000" in version 2, two files in version 1. 0: no limit.
double group_quota(const std::string& folder) {
  double quota = 0, period = 0;
  std::istringstream(read_line(folder + "/cpu.max")) >> quota >> period;
  if (quota <= 0 || period <= 0) {
    quota = std::atof(read_line(folder + "/cpu.cfs_quota_us").c_str());
    period = std::atof(read_line(folder + "/cpu.cfs_period_us").c_str());
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The least of this process' groups and of all above them. Lines of /proc/self/cgroup: number:controllers:path.
double count_quota(const std::string& root) {
  double least = 0;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controllers != ",," && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (controllers == ",," ? "" : "/cpu");
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      const double quota = group_quota(mount + path);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    int low = 0, high = 0;
    char dash = 0;
    std::istringstream range(part);
    if (!(range >> low)) continue;
    if (!(range >> dash >> high)) high = low;
    for (int number = low; number <= high; ++number) numbers.push_back(number);
  }
  return numbers;
}

int Cores::num_threads() const {
  const int fed = quota > 0 ? std::max(1, static_cast<int>(quota)) : num_cores;
  return std::min(num_cores, fed);
}

Cores count_cores(const std::string& root, std::vector<int> cpus) {
  if (cpus.empty()) cpus = affinity_mask();
  Cores cores;
  cores.num_cpus = static_cast<int>(cpus.size());
  cores.num_cores = count_physical(root, cpus);
  cores.num_nodes = count_nodes(root, cpus);
  cores.quota = count_quota(root);
  return cores;
}

}  // namespace fastserve
