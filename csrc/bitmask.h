// Bitmask weights made from dense ones (kernels/kernel.h: WeightStorage).
#pragma once

#include "kernels/kernel.h"
#include "memory.h"
#include "threads.h"

namespace fastserve {

// Whether the kernels have a bitmask form of such weights.
bool can_be_bitmask(const PackedWeight& weight);

// The share of zeros among the values of a dense weight that can be a bitmask.
double share_of_zeros(const PackedWeight& dense, ThreadPool& pool);

// What `dense` is as a bitmask, but the panels.
PackedWeight describe_bitmask(const PackedWeight& dense);

struct Panels {
  AlignedArray<uint8_t> data;
  int64_t num_bytes;
};

// The panels of a weight described so, from those of a dense one that can be a bitmask.
Panels make_bitmask(const PackedWeight& dense, const PackedWeight& bitmask, ThreadPool& pool);

// How many bytes the panels at `panels`, of which `num_bytes` can be read, say that they have; 0 where they are none of
// a weight described so.
int64_t bitmask_bytes(const PackedWeight& bitmask, const uint8_t* panels, int64_t num_bytes);

}  // namespace fastserve
