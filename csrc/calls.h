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
class RowwiseCall : public Call {
 public:
  explicit RowwiseCall(const Matrix& out)
      : out_(out), writer_(out), rows_per_tile_(std::max(1, 4096 / std::max(1, out.width))) {}

  int64_t scratch_floats() const override { return writer_.scratch_floats(); }

  int num_tiles(const Step& step) const override {
    return (step.num_rows(out_.rows) + rows_per_tile_ - 1) / rows_per_tile_;
  }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int32_t end = std::min(step.num_rows(out_.rows), (tile + 1) * rows_per_tile_);
    for (int32_t row = tile * rows_per_tile_; row < end; ++row) {
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

class LinearCall : public Call {
 public:
  LinearCall(Matrix x, const Weight& weight, std::vector<float> bias, Matrix out)
      : x_(x), weight_(weight), bias_(std::move(bias)), out_(out) {}

  const char* name() const override { return "linear"; }
  std::string shape() const override {
    return std::to_string(weight_.packed().rows) + "x" + std::to_string(weight_.packed().depth);
  }
  Cost cost(const Step& step) const override {
    const PackedWeight& w = weight_.packed();
    return {weight_.num_bytes(), 2 * static_cast<int64_t>(step.num_rows(out_.rows)) * w.rows * w.depth};
  }
  int num_tiles(const Step& step) const override { return num_panels() * num_row_blocks(step); }

  void run_tile(const Step& step, int tile, float*) const override {
    const PackedWeight& w = weight_.packed();
    LinearArgs args{};
    args.weight = &w;
    if (is_integer(w.format)) {
      const QuantizedLayout layout(w.depth, w.activation_group_size);
      args.quantized = {reinterpret_cast<const int8_t*>(step.row(x_, 0)), layout.row_bytes, layout.scales_offset,
                        layout.corrections_offset};
    } else {
      args.x = step.row(x_, 0);
      args.x_stride = x_.stride;
    }
    args.bias = bias_.empty() ? nullptr : bias_.data();
    args.out = step.row(out_, 0);
    args.out_stride = out_.stride;
    const int32_t panel = tile / num_row_blocks(step), block = tile % num_row_blocks(step);
    const int32_t row_end = std::min(step.num_rows(out_.rows), (block + 1) * kRowBlock);
    step.kernels.linear(args, block * kRowBlock, row_end, panel, panel + 1);
  }

 private:
  int num_panels() const { return (weight_.packed().rows + kPanel - 1) / kPanel; }
  int num_row_blocks(const Step& step) const { return (step.num_rows(out_.rows) + kRowBlock - 1) / kRowBlock; }

  Matrix x_;
  const Weight& weight_;
  std::vector<float> bias_;
  Matrix out_;
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
  using Table = std::shared_ptr<const std::vector<float>>;
  RopeCall(Matrix x, Table cosines, Table sines, int32_t dim, int32_t head_dim, Matrix out)
      : RowwiseCall(out),
        x_(x),
        cosines_(std::move(cosines)),
        sines_(std::move(sines)),
        dim_(dim),
        head_dim_(head_dim) {}

  const char* name() const override { return "rope"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const int64_t at = static_cast<int64_t>(step.batch.positions[row]) * (dim_ / 2);
    step.kernels.rope(step.row(x_, row), cosines_->data() + at, sines_->data() + at, dim_, head_dim_,
                      out_.width / head_dim_, out);
  }

 private:
  Matrix x_;
  Table cosines_, sines_;
  int32_t dim_, head_dim_;
};

// The first half of `attention`: this step's keys and values into their blocks.
class StoreKvCall : public RowwiseCall {
 public:
  StoreKvCall(Matrix k, Matrix v, const KvPool& pool, int32_t layer)
      : RowwiseCall(k), k_(k), v_(v), pool_(pool), layer_(layer) {}

  const char* name() const override { return "store_kv"; }

 protected:
  void run_row(const Step& step, int32_t row, float*) const override {
    const int32_t position = step.batch.positions[row];
    const int64_t table = static_cast<int64_t>(step.row_sequences[row]) * step.batch.block_table_width;
    const int64_t at =
        step.batch.block_tables[table + position / kBlock] * pool_.block_elements() * pool_.element_bytes();
    step.kernels.store_kv(pool_.format(), step.row(k_, row), step.row(v_, row), pool_.num_kv_heads(), pool_.head_dim(),
                          pool_.padded_head_dim(), position % kBlock, pool_.keys(layer_) + at,
                          pool_.values(layer_) + at);
  }

 private:
  Matrix k_, v_;
  const KvPool& pool_;
  int32_t layer_;
};

class AttentionCall : public Call {
 public:
  AttentionCall(Matrix q, const KvPool& pool, int32_t layer, float scale, bool causal, Matrix out)
      : q_(q), pool_(pool), layer_(layer), scale_(scale), causal_(causal), out_(out) {}

  const char* name() const override { return "attention"; }
  Cost cost(const Step& step) const override {
    Cost total;
    for (const AttentionTask& task : step.attention_tasks) {
      const int64_t keys = causal_ ? task.first_position + task.num_rows : task.context_length;
      total.bytes += 2 * keys * pool_.num_kv_heads() * pool_.head_dim() * pool_.element_bytes();
      total.operations += 4 * keys * task.num_rows * q_.width;
    }
    return total;
  }
  int num_tiles(const Step& step) const override {
    return static_cast<int>(step.attention_tasks.size()) * pool_.num_kv_heads();
  }
  void run_tile(const Step& step, int tile, float*) const override {
    AttentionArgs args{};
    args.q = step.row(q_, 0);
    args.q_stride = q_.stride;
    args.out = step.row(out_, 0);
    args.out_stride = out_.stride;
    args.keys = pool_.keys(layer_);
    args.values = pool_.values(layer_);
    args.block_elements = pool_.block_elements();
    args.num_heads = q_.width / pool_.head_dim();
    args.num_kv_heads = pool_.num_kv_heads();
    args.head_dim = pool_.head_dim();
    args.padded_head_dim = pool_.padded_head_dim();
    args.scale = scale_;
    args.causal = causal_;
    AttentionTask task = step.attention_tasks[static_cast<std::size_t>(tile / pool_.num_kv_heads())];
    task.kv_head = tile % pool_.num_kv_heads();
    step.kernels.attention(pool_.format(), args, task);
  }

 private:
  Matrix q_;
  const KvPool& pool_;
  int32_t layer_;
  float scale_;
  bool causal_;
  Matrix out_;
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
