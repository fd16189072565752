// How the attention of one step is cut into tasks, the same for all of its layers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel.h"

namespace fastserve {

struct Batch;

// What of a plan's attention the cutting depends on.
struct AttentionShape {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;

  bool operator==(const AttentionShape&) const = default;
  int32_t tokens_per_task() const;
};

struct AttentionSchedule {
  std::vector<AttentionTask> tasks;  // of one key head, longest first
  // Rows to be stored before, a block each; the rows of sequences with one task are stored by it.
  std::vector<AttentionTask> stores;
  // Where not empty, every task is one split, and leaves partial results to be merged: those of sequence s have the
  // indices [first_partials[s], first_partials[s + 1]).
  std::vector<int32_t> first_partials;

  int32_t num_partials() const { return first_partials.empty() ? 0 : first_partials.back(); }
};

int32_t num_splits(int32_t num_keys);

// Replaces `schedule`. A step of few rows, which would leave threads idle, is cut by its keys as well; results do not
// depend on it.
void schedule_attention(const Batch& batch, const AttentionShape& shape, int num_threads, AttentionSchedule* schedule);

// The same of attention over the batch's sources, which are stored already.
void schedule_source_attention(const Batch& batch, const AttentionShape& shape, int num_threads,
                               AttentionSchedule* schedule);

}  // namespace fastserve
