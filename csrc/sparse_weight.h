// Weights that keep only the values other than zero, made from dense ones (kernels/kernel.h: WeightStorage).
#pragma once

#include "kernels/kernel.h"
#include "memory.h"
#include "threads.h"

namespace fastserve {

// Whether the kernels have a form of such a weight with this storage.
bool can_be_stored(const PackedWeight& weight, WeightStorage storage);

// The share of zeros among the values of a dense weight of integers without offsets; 0 of others.
double share_of_zeros(const PackedWeight& dense, ThreadPool& pool);

// What `dense`, which can be stored so, is then, but the panels.
PackedWeight describe_sparse(const PackedWeight& dense, WeightStorage storage);

struct Panels {
  AlignedArray<uint8_t> data;
  int64_t num_bytes;
};

// The panels of a weight described so, from those of a dense one.
Panels make_sparse(const PackedWeight& dense, const PackedWeight& sparse, ThreadPool& pool);

// How many bytes the panels at `panels`, of which `num_bytes` can be read, say that they have; 0 where they are none of
// a weight described so. Masks and starts are compared: kernels never read beyond panels that pass.
int64_t sparse_bytes(const PackedWeight& sparse, const uint8_t* panels, int64_t num_bytes);

}  // namespace fastserve
