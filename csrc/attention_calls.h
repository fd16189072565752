// The calls of attention: storing keys and values, tasks of one key head, merging what was cut by its keys.
#pragma once

#include <algorithm>
#include <utility>

#include "attention_schedule.h"
#include "kv_pool.h"
#include "row_writer.h"
#include "step.h"

namespace fastserve {

// What the calls of one attention share.
struct AttentionInputs {
  Matrix q, k, v;
  const KvPool& pool;
  int32_t layer;
  RopeTables rope;
  AttentionScores scores;
  int32_t max_context;
  bool reads_source = false;  // keys and values are those of the batch's sources: k and v are nothing

  const AttentionSchedule& schedule(const Step& step) const {
    return reads_source ? step.source_attention : step.attention;
  }
  int32_t num_heads() const { return q.width / pool.layout().head_dim; }
  int32_t group() const { return num_heads() / pool.layout().num_kv_heads; }
  // Columns of q, and of the result, that belong to one key head.
  int32_t group_width() const { return group() * pool.layout().head_dim; }

  // Rows of tasks are counted from `first_row`.
  AttentionArgs args(const Step& step, int32_t first_row) const {
    return {pool.layout(),
            pool.keys(layer),
            pool.values(layer),
            step.row(q, first_row),
            q.stride,
            step.row(k, first_row),
            k.stride,
            step.row(v, first_row),
            v.stride,
            rope.dim > 0 ? rope.cosines->data() : nullptr,
            rope.dim > 0 ? rope.sines->data() : nullptr,
            rope.dim,
            num_heads(),
            scores.scale,
            scores.keys_before,
            scores.keys_after,
            scores.soft_cap,
            scores.bias ? scores.bias->data() : nullptr,
            AttentionScores::bias_stride(max_context),
            max_context - 1,
            scores.first_key};
  }
};

// Calls f(task) for the whole of every sequence among rows [begin, end) of a step, rows counted from `begin`.
template <class Function>
void each_whole_sequence(const Step& step, int32_t begin, int32_t end, Function f) {
  const Batch& b = step.batch;
  const int32_t* starts = b.sequence_starts;
  for (auto s = std::lower_bound(starts, starts + b.num_sequences, begin) - starts; starts[s] < end; ++s)
    f(AttentionTask{b.block_tables + s * b.block_table_width, starts[s] - begin, starts[s + 1] - starts[s],
                    b.positions[starts[s]], b.context_lengths[s], 0, num_splits(b.context_lengths[s]), false, -1});
}

// The first part of `attention`: keys and values of the sequences that have several tasks, which all read them; in a
// strip, of all sequences.
class StoreKvCall : public StripCall {
 public:
  explicit StoreKvCall(AttentionInputs inputs) : inputs_(std::move(inputs)) {}

  const char* name() const override { return "store_kv"; }
  Cost cost(const Step& step) const override {
    int64_t rows = 0;
    for (const AttentionTask& task : step.attention.stores) rows += task.num_rows;
    const KvLayout& kv = inputs_.pool.layout();
    return {2 * rows * (inputs_.k.width * static_cast<int64_t>(sizeof(float)) + kv.block_bytes / kBlock), 0};
  }
  int num_tiles(const Step& step) const override {
    return static_cast<int>(step.attention.stores.size()) * inputs_.pool.layout().num_kv_heads;
  }
  int64_t scratch_floats() const override { return attention_scratch_floats(inputs_.pool.layout().padded_head_dim); }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int32_t num_kv_heads = inputs_.pool.layout().num_kv_heads;
    const AttentionTask& task = step.attention.stores[static_cast<std::size_t>(tile / num_kv_heads)];
    step.kernels.store_kv(inputs_.args(step, 0), task, tile % num_kv_heads, scratch);
  }
  bool needs_whole_sequences() const override { return true; }
  Rows rows() const override { return Rows::tokens; }
  void run_rows(const Step& step, int32_t begin, int32_t end, float* scratch) const override {
    const AttentionArgs args = inputs_.args(step, begin);
    each_whole_sequence(step, begin, end, [&](const AttentionTask& task) {
      for (int32_t head = 0; head < args.kv.num_kv_heads; ++head) step.kernels.store_kv(args, task, head, scratch);
    });
  }

 private:
  AttentionInputs inputs_;
};

// All keys and values of the sequences, which are sources: what an encoder leaves to a decoder.
class StoreSourceCall : public Call {
 public:
  explicit StoreSourceCall(AttentionInputs inputs) : inputs_(std::move(inputs)) {}

  const char* name() const override { return "store_source"; }
  Cost cost(const Step& step) const override {
    const int64_t rows = step.batch.num_tokens;
    const KvLayout& kv = inputs_.pool.layout();
    return {2 * rows * (inputs_.k.width * static_cast<int64_t>(sizeof(float)) + kv.block_bytes / kBlock), 0};
  }
  int num_tiles(const Step& step) const override {
    return step.batch.num_sequences * inputs_.pool.layout().num_kv_heads;
  }
  int64_t scratch_floats() const override { return attention_scratch_floats(inputs_.pool.layout().padded_head_dim); }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int32_t num_kv_heads = inputs_.pool.layout().num_kv_heads, s = tile / num_kv_heads;
    const Batch& b = step.batch;
    each_whole_sequence(step, b.sequence_starts[s], b.sequence_starts[s + 1], [&](const AttentionTask& task) {
      step.kernels.store_kv(inputs_.args(step, b.sequence_starts[s]), task, tile % num_kv_heads, scratch);
    });
  }

 private:
  AttentionInputs inputs_;
};

class AttentionCall : public StripCall {
 public:
  AttentionCall(AttentionInputs inputs, Matrix out) : inputs_(std::move(inputs)), out_(out), writer_(out) {}

  const char* name() const override { return inputs_.reads_source ? "cross_attention" : "attention"; }
  Cost cost(const Step& step) const override {
    const KvLayout& kv = inputs_.pool.layout();
    Cost total;
    for (const AttentionTask& task : inputs_.schedule(step).tasks) {
      const int32_t last = task.first_position + task.num_rows - 1;
      const int32_t first = std::max(inputs_.scores.first_key, task.first_position - inputs_.scores.keys_before);
      const int32_t seen = last + 1 + std::min(inputs_.scores.keys_after, task.context_length - 1 - last);
      const int32_t begin = std::max(task.first_split * kSplit, first), end = std::min(task.end_split * kSplit, seen);
      const int64_t keys = std::max(0, end - begin);
      total.bytes += 2 * keys * kv.block_bytes / kBlock;
      total.operations += 4 * keys * task.num_rows * inputs_.q.width;
    }
    return total;
  }
  int num_tiles(const Step& step) const override {
    return static_cast<int>(inputs_.schedule(step).tasks.size()) * inputs_.pool.layout().num_kv_heads;
  }
  int64_t scratch_floats() const override { return out_floats() + attention_scratch_floats(padded_head_dim()); }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int32_t num_kv_heads = inputs_.pool.layout().num_kv_heads, kv_head = tile % num_kv_heads;
    const AttentionTask& task = inputs_.schedule(step).tasks[static_cast<std::size_t>(tile / num_kv_heads)];
    const AttentionArgs args = inputs_.args(step, 0);
    if (task.partial_index >= 0) {
      const int64_t first = static_cast<int64_t>(task.partial_index) * args.num_heads + kv_head * inputs_.group();
      float* partials = step.attention_partials + first * partial_floats(padded_head_dim());
      step.kernels.attention(args, task, kv_head, scratch, nullptr, 0, partials);
      return;
    }
    run_task(step, args, 0, task, kv_head, scratch);
  }
  bool needs_whole_sequences() const override { return true; }
  Rows rows() const override { return Rows::tokens; }
  void run_rows(const Step& step, int32_t begin, int32_t end, float* scratch) const override {
    const AttentionArgs args = inputs_.args(step, begin);
    each_whole_sequence(step, begin, end, [&](const AttentionTask& whole) {
      const int32_t num_parts = (whole.num_rows + tokens_per_task() - 1) / tokens_per_task();
      for (int32_t part = 0; part < num_parts; ++part) {
        const int32_t first = whole.num_rows * part / num_parts;
        AttentionTask task = whole;
        task.first_row += first;
        task.first_position += first;
        task.num_rows = whole.num_rows * (part + 1) / num_parts - first;
        for (int32_t head = 0; head < args.kv.num_kv_heads; ++head) run_task(step, args, begin, task, head, scratch);
      }
    });
  }

 private:
  // The task's rows are counted from `first_row`.
  void run_task(const Step& step, const AttentionArgs& args, int32_t first_row, const AttentionTask& task,
                int32_t kv_head, float* scratch) const {
    const int32_t width = inputs_.group_width(), column = kv_head * width, row = first_row + task.first_row;
    float* out = writer_.begin(step, row, column, scratch);
    const int64_t stride = out_.is_quantized() ? width : out_.stride;
    step.kernels.attention(args, task, kv_head, scratch + out_floats(), out, stride, nullptr);
    for (int32_t r = 0; r < task.num_rows; ++r) writer_.finish(step, row + r, column, width, out + r * stride);
  }
  int32_t padded_head_dim() const { return inputs_.pool.layout().padded_head_dim; }
  // Scratch memory of a tile's result, before it is quantized.
  int64_t out_floats() const {
    return out_.is_quantized() ? static_cast<int64_t>(tokens_per_task()) * inputs_.group_width() : 0;
  }
  int32_t tokens_per_task() const {
    return AttentionShape{inputs_.num_heads(), inputs_.pool.layout().num_kv_heads}.tokens_per_task();
  }

  AttentionInputs inputs_;
  Matrix out_;
  RowWriter writer_;
};

// The last part of `attention`, of steps that are cut by their keys; strips are not.
class MergeAttentionCall : public StripCall {
 public:
  MergeAttentionCall(AttentionInputs inputs, Matrix out) : inputs_(std::move(inputs)), writer_(out) {}

  const char* name() const override { return "merge_attention"; }
  Cost cost(const Step& step) const override {
    return {inputs_.schedule(step).num_partials() * inputs_.num_heads() *
                partial_floats(inputs_.pool.layout().padded_head_dim) * static_cast<int64_t>(sizeof(float)),
            0};
  }
  int num_tiles(const Step& step) const override {
    return inputs_.schedule(step).num_partials() > 0 ? step.batch.num_sequences * inputs_.pool.layout().num_kv_heads : 0;
  }
  int64_t scratch_floats() const override { return writer_.scratch_floats(); }
  bool needs_whole_sequences() const override { return true; }
  Rows rows() const override { return Rows::tokens; }
  void run_rows(const Step&, int32_t, int32_t, float*) const override {}
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const KvLayout& kv = inputs_.pool.layout();
    const int32_t sequence = tile / kv.num_kv_heads, kv_head = tile % kv.num_kv_heads;
    const std::vector<int32_t>& firsts = inputs_.schedule(step).first_partials;
    const int32_t first = firsts[static_cast<std::size_t>(sequence)];
    const int32_t end = firsts[static_cast<std::size_t>(sequence) + 1];
    const int32_t row = step.batch.sequence_starts[sequence], column = kv_head * inputs_.group_width();
    const int64_t floats = partial_floats(kv.padded_head_dim);
    float* out = writer_.begin(step, row, column, scratch);
    for (int32_t h = 0; h < inputs_.group(); ++h) {
      const int64_t at = static_cast<int64_t>(first) * inputs_.num_heads() + kv_head * inputs_.group() + h;
      step.kernels.merge_attention(step.attention_partials + at * floats, inputs_.num_heads() * floats, end - first,
                                   kv.head_dim, kv.padded_head_dim, out + h * kv.head_dim);
    }
    writer_.finish(step, row, column, inputs_.group_width(), out);
  }

 private:
  AttentionInputs inputs_;
  RowWriter writer_;
};

}  // namespace fastserve
