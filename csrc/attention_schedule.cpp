#include "attention_schedule.h"

#include <algorithm>

#include "step.h"

namespace fastserve {
namespace {

// Tiles for each thread that even out what threads take.
constexpr int kTilesPerThread = 4;

// What the rows of each sequence attend to.
struct Keys {
  const int32_t* block_tables;
  int32_t table_width;
  const int32_t* lengths;
  bool are_stored;  // before the step; else the last of them are those of its rows
};

// Keys that the task goes through, rows times; what its tiles are sorted by.
int64_t work_of(const AttentionTask& task) {
  const int32_t keys = std::min(task.end_split * kSplit, task.context_length) - task.first_split * kSplit;
  return static_cast<int64_t>(keys) * task.num_rows;
}

void schedule_over(const Keys& keys, const Batch& batch, const AttentionShape& shape, int num_threads,
                   AttentionSchedule* schedule) {
  schedule->tasks.clear();
  schedule->stores.clear();
  schedule->first_partials.clear();
  if (shape.num_heads == 0) return;
  const int32_t tokens_per_task = shape.tokens_per_task();
  const bool is_decode = batch.num_tokens == batch.num_sequences;
  const bool is_split = is_decode && num_threads > 1 &&
                        static_cast<int64_t>(batch.num_tokens) * shape.num_kv_heads < kTilesPerThread * num_threads &&
                        *std::max_element(keys.lengths, keys.lengths + batch.num_sequences) > kSplit;
  if (is_split) schedule->first_partials.push_back(0);
  for (int32_t s = 0; s < batch.num_sequences; ++s) {
    const int32_t begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    const int32_t splits = num_splits(keys.lengths[s]);
    AttentionTask all{keys.block_tables + static_cast<int64_t>(s) * keys.table_width,
                      begin,
                      end - begin,
                      batch.positions[begin],
                      keys.lengths[s],
                      0,
                      splits,
                      !keys.are_stored && end - begin <= tokens_per_task,
                      -1};
    const auto rows_of = [&](int32_t row, int32_t row_end) {
      AttentionTask part = all;
      part.first_row = row;
      part.num_rows = row_end - row;
      part.first_position = batch.positions[row];
      return part;
    };
    if (is_split) {
      const int32_t first = schedule->first_partials.back();
      for (int32_t split = 0; split < splits; ++split) {
        AttentionTask part = all;
        part.first_split = split;
        part.end_split = split + 1;
        part.stores = !keys.are_stored && split + 1 == splits;
        part.partial_index = first + split;
        schedule->tasks.push_back(part);
      }
      schedule->first_partials.push_back(first + splits);
      continue;
    }
    for (int32_t row = begin; row < end; row += tokens_per_task)
      schedule->tasks.push_back(rows_of(row, std::min(end, row + tokens_per_task)));
    if (all.stores || keys.are_stored) continue;
    for (int32_t row = begin; row < end;) {
      const int32_t row_end = std::min(end, row + kBlock - batch.positions[row] % kBlock);
      schedule->stores.push_back(rows_of(row, row_end));
      row = row_end;
    }
  }
  // Threads that take the longest first end together. Causal tasks see the more keys the later their rows are.
  std::stable_sort(schedule->tasks.begin(), schedule->tasks.end(), [](const AttentionTask& a, const AttentionTask& b) {
    const int64_t work_a = work_of(a), work_b = work_of(b);
    return work_a != work_b ? work_a > work_b : a.first_position > b.first_position;
  });
}

}  // namespace

int32_t num_splits(int32_t num_keys) { return (num_keys + kSplit - 1) / kSplit; }

int32_t AttentionShape::tokens_per_task() const {
  const int32_t group = num_heads / num_kv_heads;
  return std::max(1, kAttentionRows / group);
}

void schedule_attention(const Batch& batch, const AttentionShape& shape, int num_threads, AttentionSchedule* schedule) {
  const Keys keys{batch.block_tables, batch.block_table_width, batch.context_lengths, false};
  schedule_over(keys, batch, shape, num_threads, schedule);
}

void schedule_source_attention(const Batch& batch, const AttentionShape& shape, int num_threads,
                               AttentionSchedule* schedule) {
  const Keys keys{batch.source_block_tables, batch.source_table_width, batch.source_lengths, true};
  schedule_over(keys, batch, shape, num_threads, schedule);
}

}  // namespace fastserve
