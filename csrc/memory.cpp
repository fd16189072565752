#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "cores.h"
#endif

namespace fastserve {

#if defined(__linux__)
namespace {

constexpr std::uintptr_t kPage = 4096;
constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;

// The NUMA nodes that have memory, a bit each; 0 where there is but one. Threads claim tiles as they come, so that any
// of them may read any panel: pages are dealt out in turn.
unsigned long nodes_to_interleave() {
  static const unsigned long nodes = [] {
    std::string list;
    std::getline(std::ifstream("/sys/devices/system/node/has_memory"), list);
    unsigned long mask = 0;
    for (int node : parse_cpu_list(list))
      if (node < 64) mask |= 1ul << node;
    return (mask & (mask - 1)) != 0 && count_cores().num_nodes > 1 ? mask : 0;
  }();
  return nodes;
}

}  // namespace

void place_pages(void* begin, std::size_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(begin), last = first + bytes;
  const auto inside = [&](std::uintptr_t unit) { return (first + unit - 1) / unit * unit; };
  // What fails changes speed alone: old kernels and containers refuse either.
  if (const unsigned long nodes = nodes_to_interleave()) {
    constexpr int kInterleave = 3;  // MPOL_INTERLEAVE of linux/mempolicy.h
    const std::uintptr_t at = inside(kPage);
    if (at < last) (void)syscall(SYS_mbind, at, (last - at) / kPage * kPage, kInterleave, &nodes, 64ul, 0u);
  }
  const std::uintptr_t at = inside(kHugePage);
  if (at < last) (void)madvise(reinterpret_cast<void*>(at), (last - at) / kHugePage * kHugePage, MADV_HUGEPAGE);
}
#else
void place_pages(void*, std::size_t) {}
#endif

}  // namespace fastserve
