// Weights of linears: stored tensors, stacked along their rows, packed into panels.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "memory.h"
#include "threads.h"

namespace fastserve {

// A tensor [rows, depth] as it is stored, row-major.
struct StoredMatrix {
  StoredFormat format;
  const uint8_t* data;
  int64_t num_bytes;
  int32_t rows;
  int32_t depth;
};

// Bytes of `count` consecutive elements; count must be a multiple of the format's block.
int64_t stored_bytes(StoredFormat format, int64_t count);
int32_t stored_block(StoredFormat format);

StoredFormat parse_stored_format(const std::string& name);
WeightFormat parse_weight_format(const std::string& name);
KvFormat parse_kv_format(const std::string& name);
ActivationKind parse_activation(const std::string& name);

// Owns a PackedWeight. group_size 0 means one scale for a whole row.
// Throws std::invalid_argument where sources disagree in depth or are cut short, or the group size is not one.
class Weight {
 public:
  Weight(const std::vector<StoredMatrix>& sources, WeightFormat format, int32_t group_size, const Kernels& kernels,
         ThreadPool& pool);
  const PackedWeight& packed() const { return packed_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  PackedWeight packed_{};
  int64_t num_bytes_ = 0;
  AlignedArray<uint8_t> panels_;
  AlignedArray<uint16_t> scales_;
};

}  // namespace fastserve
