// The calls a plan is made of: how each op's work is cut into tiles, and which kernel does a tile.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "plan.h"

namespace fastserve {

// Writes rows of a call's result, whole or by parts, as its matrix has them: floats where they lie; quantized, by way
// of scratch memory.
class RowWriter {
 public:
  explicit RowWriter(const Matrix& out) : out_(out), layout_(out) {}

  int64_t scratch_floats() const { return out_.is_quantized() ? out_.width : 0; }
  // Where to put the row's floats from `column` on; `finish` must follow.
  float* begin(const Step& step, int32_t row, int32_t column, float* scratch) const {
    return out_.is_quantized() ? scratch : step.row(out_, row) + column;
  }
  // `column` and, short of the row's end, `width` are multiples of the group size.
  void finish(const Step& step, int32_t row, int32_t column, int32_t width, const float* written) const {
    if (!out_.is_quantized()) return;
    auto* data = reinterpret_cast<int8_t*>(step.row(out_, row));
    const int32_t padded_width = column + width < out_.width ? width : layout_.padded_depth - column;
    const int32_t group = column / layout_.group_size;
    step.kernels.quantize_row(written, width, padded_width, layout_.group_size, data + column,
                              reinterpret_cast<float*>(data + layout_.scales_offset) + group,
                              reinterpret_cast<int32_t*>(data + layout_.corrections_offset) + group);
  }

 private:
  Matrix out_;
  QuantizedLayout layout_;
};

// Calls that work row by row: a tile is as many rows as make some 16 KB.
class RowwiseCall : public StripCall {
 public:
  explicit RowwiseCall(const Matrix& out)
      : out_(out), writer_(out), rows_per_tile_(std::max(1, 4096 / std::max(1, out.width))) {}

  int64_t scratch_floats() const override { return writer_.scratch_floats(); }

  int num_tiles(const Step& step) const override {
    return (step.num_rows(out_.rows) + rows_per_tile_ - 1) / rows_per_tile_;
  }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    run_rows(step, tile * rows_per_tile_, std::min(step.num_rows(out_.rows), (tile + 1) * rows_per_tile_), scratch);
  }
  Rows rows() const override { return out_.rows; }
  void run_rows(const Step& step, int32_t begin, int32_t end, float* scratch) const override {
    for (int32_t row = begin; row < end; ++row) {
      float* out = writer_.begin(step, row, 0, scratch);
      run_row(step, row, out);
      writer_.finish(step, row, 0, out_.width, out);
    }
  }
  // Reads about as much as it writes; its arithmetic hides behind that.
  Cost cost(const Step& step) const override {
    const int64_t elements = static_cast<int64_t>(step.num_rows(out_.rows)) * out_.width;
    return {2 * elements * static_cast<int64_t>(sizeof(float)), 0};
  }

 protected:
  virtual void run_row(const Step& step, int32_t row, float* out) const = 0;

  Matrix out_;

 private:
  RowWriter writer_;
  int32_t rows_per_tile_;
};

class EmbeddingCall : public RowwiseCall {
 public:
  EmbeddingCall(IdSource ids, const Weight& weight, Matrix out) : RowwiseCall(out), ids_(ids), weight_(weight) {}

  const char* name() const override { return "embedding"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const int32_t* ids = ids_ == IdSource::token_ids   ? step.batch.token_ids
                         : ids_ == IdSource::positions ? step.batch.positions
                                                       : step.token_types.data();
    step.kernels.embedding(weight_.packed(), ids[row], out);
  }

 private:
  IdSource ids_;
  const Weight& weight_;
};

class QuantizeRowsCall : public RowwiseCall {
 public:
  QuantizeRowsCall(Matrix x, Matrix out) : RowwiseCall(out), x_(x) {}

  const char* name() const override { return "quantize_rows"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    std::copy_n(step.row(x_, row), out_.width, out);
  }

 private:
  Matrix x_;
};

class LinearCall : public StripCall {
 public:
  LinearCall(Matrix x, const Weight& weight, std::vector<float> bias, Matrix out)
      : x_(x), weight_(weight), bias_(std::move(bias)), out_(out) {}

  const char* name() const override { return "linear"; }
  std::string shape() const override {
    const PackedWeight& w = weight_.packed();
    const std::string size = std::to_string(w.rows) + "x" + std::to_string(w.depth);
    return w.storage == WeightStorage::dense ? size : size + " " + to_name(w.storage);
  }
  Cost cost(const Step& step) const override {
    const PackedWeight& w = weight_.packed();
    return {weight_.num_bytes(), 2 * static_cast<int64_t>(step.num_rows(out_.rows)) * w.rows * w.depth};
  }
  int num_tiles(const Step& step) const override { return num_panels() * num_row_blocks(step); }

  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int32_t panel = tile / num_row_blocks(step), block = tile % num_row_blocks(step);
    const int32_t row_end = std::min(step.num_rows(out_.rows), (block + 1) * kRowBlock);
    run_panels(step, block * kRowBlock, row_end, panel, panel + 1, scratch);
  }
  Rows rows() const override { return out_.rows; }
  void run_rows(const Step& step, int32_t begin, int32_t end, float* scratch) const override {
    run_panels(step, begin, end, 0, num_panels(), scratch);
  }

 protected:
  virtual void run_panels(const Step& step, int32_t row_begin, int32_t row_end, int32_t panel_begin,
                          int32_t panel_end, float*) const {
    LinearArgs args = inputs(step, row_begin);
    args.out = step.row(out_, row_begin);
    args.out_stride = out_.stride;
    step.kernels.linear(args, 0, row_end - row_begin, panel_begin, panel_end);
  }

  // All arguments but the result's; rows are counted from `row_begin`.
  LinearArgs inputs(const Step& step, int32_t row_begin) const {
    const PackedWeight& w = weight_.packed();
    LinearArgs args{};
    args.weight = &w;
    if (is_integer(w.format)) {
      const QuantizedLayout layout(w.depth, w.activation_group_size);
      args.quantized = {reinterpret_cast<const int8_t*>(step.row(x_, row_begin)), layout.row_bytes,
                        layout.scales_offset, layout.corrections_offset};
    } else {
      args.x = step.row(x_, row_begin);
      args.x_stride = x_.stride;
    }
    args.bias = bias_.empty() ? nullptr : bias_.data();
    return args;
  }

  Matrix x_;
  const Weight& weight_;
  std::vector<float> bias_;
  Matrix out_;

 private:
  // Of the result, which may be narrower than the weight has rows.
  int num_panels() const { return (out_.width + kPanel - 1) / kPanel; }
  int num_row_blocks(const Step& step) const { return (step.num_rows(out_.rows) + kRowBlock - 1) / kRowBlock; }
};

// linear, then an activation, quantized: a panel of a block of rows at a time, while it is in the nearest cache. Groups
// of columns that share a scale make whole panels. Where it is gated, the weight's first half of rows makes the gate,
// its second half what is gated; halves are whole panels.
class LinearActivationCall : public LinearCall {
 public:
  LinearActivationCall(ActivationKind kind, bool is_gated, Matrix x, const Weight& weight, std::vector<float> bias,
                       Matrix out)
      : LinearCall(x, weight, std::move(bias), out), kind_(kind), is_gated_(is_gated), writer_(out) {}

  const char* name() const override { return is_gated_ ? "linear_gated_activation" : "linear_activation"; }
  int64_t scratch_floats() const override { return (is_gated_ ? 2 : 1) * kRowBlock * kPanel; }

 protected:
  void run_panels(const Step& step, int32_t row_begin, int32_t row_end, int32_t panel_begin, int32_t panel_end,
                  float* scratch) const override {
    for (int32_t panel = panel_begin; panel < panel_end; ++panel)
      for (int32_t row = row_begin; row < row_end; row += kRowBlock)
        run_panel(step, row, std::min(row_end, row + kRowBlock), panel, scratch);
  }

 private:
  void run_panel(const Step& step, int32_t row_begin, int32_t row_end, int32_t panel, float* scratch) const {
    const int32_t column = panel * kPanel, width = std::min(kPanel, out_.width - column);
    const int32_t num_rows = row_end - row_begin, count = num_rows * width;
    LinearArgs args = inputs(step, row_begin);
    args.out_stride = width;
    const auto multiply = [&](int32_t first_channel, float* out) {
      args.out = out;
      args.first_channel = first_channel;
      step.kernels.linear(args, 0, num_rows, first_channel / kPanel, first_channel / kPanel + 1);
    };
    multiply(column, scratch);
    if (is_gated_) {
      float* gated = scratch + count;
      multiply(out_.width + column, gated);
      step.kernels.gated_activation(kind_, scratch, gated, count, scratch);
    } else {
      step.kernels.activation(kind_, scratch, count, scratch);
    }
    for (int32_t row = row_begin; row < row_end; ++row)
      writer_.finish(step, row, column, width, scratch + (row - row_begin) * width);
  }

  ActivationKind kind_;
  bool is_gated_;
  RowWriter writer_;
};

class RmsNormCall : public RowwiseCall {
 public:
  RmsNormCall(Matrix x, std::vector<float> weight, float eps, Matrix out)
      : RowwiseCall(out), x_(x), weight_(std::move(weight)), eps_(eps) {}

  const char* name() const override { return "rms_norm"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.rms_norm(step.row(x_, row), weight_.data(), eps_, out_.width, out);
  }

 private:
  Matrix x_;
  std::vector<float> weight_;
  float eps_;
};

class LayerNormCall : public RowwiseCall {
 public:
  LayerNormCall(Matrix x, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out)
      : RowwiseCall(out), x_(x), weight_(std::move(weight)), bias_(std::move(bias)), eps_(eps) {}

  const char* name() const override { return "layer_norm"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.layer_norm(step.row(x_, row), weight_.data(), bias_.data(), eps_, out_.width, out);
  }

 private:
  Matrix x_;
  std::vector<float> weight_, bias_;
  float eps_;
};

class AddCall : public RowwiseCall {
 public:
  AddCall(Matrix x, Matrix y, Matrix out) : RowwiseCall(out), x_(x), y_(y) {}

  const char* name() const override { return "add"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.add(step.row(x_, row), step.row(y_, row), out_.width, out);
  }

 private:
  Matrix x_, y_;
};

// add, then a norm of the sum while it is in the cache. Where nobody reads the sum it is made in `out` itself: the
// norms read a whole row before they write it.
class AddNormCall : public RowwiseCall {
 public:
  AddNormCall(Matrix x, Matrix y, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out_sum,
              Matrix out)
      : RowwiseCall(out),
        x_(x),
        y_(y),
        weight_(std::move(weight)),
        bias_(std::move(bias)),
        eps_(eps),
        out_sum_(out_sum) {}

  const char* name() const override { return bias_.empty() ? "add_rms_norm" : "add_layer_norm"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    float* sum = out_sum_.width > 0 ? step.row(out_sum_, row) : out;
    step.kernels.add(step.row(x_, row), step.row(y_, row), out_.width, sum);
    if (bias_.empty()) step.kernels.rms_norm(sum, weight_.data(), eps_, out_.width, out);
    else step.kernels.layer_norm(sum, weight_.data(), bias_.data(), eps_, out_.width, out);
  }

 private:
  Matrix x_, y_;
  std::vector<float> weight_, bias_;
  float eps_;
  Matrix out_sum_;
};

class RopeCall : public RowwiseCall {
 public:
  RopeCall(Matrix x, RopeTables tables, int32_t head_dim, Matrix out)
      : RowwiseCall(out), x_(x), tables_(std::move(tables)), head_dim_(head_dim) {}

  const char* name() const override { return "rope"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const int64_t at = static_cast<int64_t>(step.batch.positions[row]) * (tables_.dim / 2);
    step.kernels.rope(step.row(x_, row), tables_.cosines->data() + at, tables_.sines->data() + at, tables_.dim,
                      head_dim_, out_.width / head_dim_, out);
  }

 private:
  Matrix x_;
  RopeTables tables_;
  int32_t head_dim_;
};

// What the calls of one attention share.
struct AttentionInputs {
  Matrix q, k, v;
  const KvPool& pool;
  int32_t layer;
  RopeTables rope;
  float scale;
  bool causal;

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
            scale,
            causal};
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

class AttentionCall : public StripCall {
 public:
  AttentionCall(AttentionInputs inputs, Matrix out) : inputs_(std::move(inputs)), out_(out), writer_(out) {}

  const char* name() const override { return "attention"; }
  Cost cost(const Step& step) const override {
    const KvLayout& kv = inputs_.pool.layout();
    Cost total;
    for (const AttentionTask& task : step.attention.tasks) {
      const int32_t seen = inputs_.causal ? task.first_position + task.num_rows : task.context_length;
      const int64_t keys = std::min(task.end_split * kSplit, seen) - task.first_split * kSplit;
      total.bytes += 2 * keys * kv.block_bytes / kBlock;
      total.operations += 4 * keys * task.num_rows * inputs_.q.width;
    }
    return total;
  }
  int num_tiles(const Step& step) const override {
    return static_cast<int>(step.attention.tasks.size()) * inputs_.pool.layout().num_kv_heads;
  }
  int64_t scratch_floats() const override { return out_floats() + attention_scratch_floats(padded_head_dim()); }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int32_t num_kv_heads = inputs_.pool.layout().num_kv_heads, kv_head = tile % num_kv_heads;
    const AttentionTask& task = step.attention.tasks[static_cast<std::size_t>(tile / num_kv_heads)];
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
    return {step.attention.num_partials() * inputs_.num_heads() *
                partial_floats(inputs_.pool.layout().padded_head_dim) * static_cast<int64_t>(sizeof(float)),
            0};
  }
  int num_tiles(const Step& step) const override {
    return step.attention.num_partials() > 0 ? step.batch.num_sequences * inputs_.pool.layout().num_kv_heads : 0;
  }
  int64_t scratch_floats() const override { return writer_.scratch_floats(); }
  bool needs_whole_sequences() const override { return true; }
  Rows rows() const override { return Rows::tokens; }
  void run_rows(const Step&, int32_t, int32_t, float*) const override {}
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const KvLayout& kv = inputs_.pool.layout();
    const int32_t sequence = tile / kv.num_kv_heads, kv_head = tile % kv.num_kv_heads;
    const int32_t first = step.attention.first_partials[static_cast<std::size_t>(sequence)];
    const int32_t end = step.attention.first_partials[static_cast<std::size_t>(sequence) + 1];
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

class ActivationCall : public RowwiseCall {
 public:
  ActivationCall(ActivationKind kind, Matrix x, Matrix out) : RowwiseCall(out), kind_(kind), x_(x) {}

  const char* name() const override { return "activation"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.activation(kind_, step.row(x_, row), out_.width, out);
  }

 private:
  ActivationKind kind_;
  Matrix x_;
};

class GatedActivationCall : public RowwiseCall {
 public:
  GatedActivationCall(ActivationKind kind, Matrix gate, Matrix up, Matrix out)
      : RowwiseCall(out), kind_(kind), gate_(gate), up_(up) {}

  const char* name() const override { return "gated_activation"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.gated_activation(kind_, step.row(gate_, row), step.row(up_, row), out_.width, out);
  }

 private:
  ActivationKind kind_;
  Matrix gate_, up_;
};

class GatherRowsCall : public RowwiseCall {
 public:
  GatherRowsCall(Matrix x, Matrix out) : RowwiseCall(out), x_(x) {}

  const char* name() const override { return "gather_rows"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const float* from = step.row(x_, step.batch.output_rows[row]);
    std::copy_n(from, out_.width, out);
  }

 private:
  Matrix x_;
};

class PoolCall : public RowwiseCall {
 public:
  PoolCall(PoolKind kind, Matrix x, Matrix out) : RowwiseCall(out), kind_(kind), x_(x) {}

  const char* name() const override { return "pool"; }

 protected:
  void run_row(const Step& step, int32_t sequence, float* out) const override {
    const int32_t begin = step.batch.sequence_starts[sequence], end = step.batch.sequence_starts[sequence + 1];
    std::copy_n(step.row(x_, kind_ == PoolKind::last ? end - 1 : begin), out_.width, out);
    if (kind_ != PoolKind::mean) return;
    for (int32_t row = begin + 1; row < end; ++row) step.kernels.add(out, step.row(x_, row), out_.width, out);
    const float count = static_cast<float>(end - begin);
    for (int32_t i = 0; i < out_.width; ++i) out[i] /= count;
  }

 private:
  PoolKind kind_;
  Matrix x_;
};

class L2NormalizeCall : public RowwiseCall {
 public:
  L2NormalizeCall(Matrix x, float eps, Matrix out) : RowwiseCall(out), x_(x), eps_(eps) {}

  const char* name() const override { return "l2_normalize"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.l2_normalize(step.row(x_, row), eps_, out_.width, out);
  }

 private:
  Matrix x_;
  float eps_;
};

}  // namespace fastserve
