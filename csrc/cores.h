// The cores that this process may use: what the machine has, within the affinity mask and the quota of its cgroups.
#pragma once

#include <string>
#include <vector>

namespace fastserve {

struct Cores {
  int num_cpus = 1;   // hardware threads of the affinity mask
  int num_cores = 1;  // physical cores that they belong to: siblings (SMT) share one
  int num_nodes = 1;  // NUMA nodes that they lie in
  double quota = 0;   // CPUs' worth of time that the cgroups grant; 0: no limit

  // One for each physical core, as far as the quota feeds them: siblings share the units that kernels keep busy.
  int num_threads() const;
};

// Looks at `root` in place of the system's own /proc and /sys, and at `cpus` in place of the affinity mask, where they
// are given. What the system does not tell is counted as if there were nothing to tell.
Cores count_cores(const std::string& root = "", std::vector<int> cpus = {});

// The numbers of a list as Linux writes them: "0-2,8" is 0, 1, 2, 8.
std::vector<int> parse_cpu_list(const std::string& text);

}  // namespace fastserve
