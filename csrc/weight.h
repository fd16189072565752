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
ScaleFormat parse_scale_format(const std::string& name);
WeightStorage parse_weight_storage(const std::string& name);
const char* to_name(WeightStorage storage);
WeightOffset parse_weight_offset(const std::string& name);
KvFormat parse_kv_format(const std::string& name);
ActivationKind parse_activation(const std::string& name);

// How a matrix is packed; of integer formats, group sizes of 0 mean one scale for a whole row. float16 scales are those
// of stored groups, or blocks of 32 columns (q8_0, q5_0, iq4_nl: int8; q4_0: int4; q4_1: int4 with minimums), which are
// kept as they are.
struct WeightScheme {
  WeightFormat format;
  ScaleFormat scale_format;
  WeightOffset offset;
  int32_t group_size;
  int32_t activation_group_size;
  WeightStorage storage = WeightStorage::dense;
};

// Names the way in which panels are laid out and rounded: two builds of the same name make the same panels, on whatever
// instruction set.
const char* packed_layout();

// Owns a PackedWeight, or borrows the panels of one.
// Throws std::invalid_argument where sources disagree in depth, are cut short or do not fit the scheme, or the scheme
// has sizes or a combination that the kernels do not have.
class Weight {
 public:
  Weight(const std::vector<StoredMatrix>& sources, const WeightScheme& scheme, const Kernels& kernels,
         ThreadPool& pool);
  // Over `num_bytes` of panels, 64-byte aligned, that another weight [rows, depth] of this scheme was packed into and
  // that outlive this one.
  Weight(const uint8_t* panels, int64_t num_bytes, int32_t rows, int32_t depth, const WeightScheme& scheme);
  // The values of a dense weight, stored in another way.
  Weight(const Weight& dense, WeightStorage storage, ThreadPool& pool);
  const PackedWeight& packed() const { return packed_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  void store_sparse(const PackedWeight& dense, WeightStorage storage, ThreadPool& pool);
  void describe(int64_t rows, int32_t depth, const WeightScheme& scheme);

  PackedWeight packed_{};
  int64_t num_bytes_ = 0;
  AlignedArray<uint8_t> panels_;
};

}  // namespace fastserve
