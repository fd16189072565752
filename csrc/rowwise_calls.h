// The calls that work row by row, and the op and the kernel of each.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "row_writer.h"
#include "step.h"
#include "weight.h"

namespace fastserve {

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
  EmbeddingCall(IdSource ids, const Weight& weight, int32_t offset, float scale, Matrix out)
      : RowwiseCall(out), ids_(ids), weight_(weight), offset_(offset), scale_(scale) {}

  const char* name() const override { return "embedding"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const int32_t* ids = ids_ == IdSource::token_ids   ? step.batch.token_ids
                         : ids_ == IdSource::positions ? step.batch.positions
                                                       : step.token_types.data();
    step.kernels.embedding(weight_.packed(), std::max(ids[row] + offset_, 0), out);
    if (scale_ != 1.0f) step.kernels.scale(out, scale_, out_.width, out);
  }

 private:
  IdSource ids_;
  const Weight& weight_;
  int32_t offset_;
  float scale_;
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

// Every so many columns of a row as there are weights are normed by themselves.
class RmsNormCall : public RowwiseCall {
 public:
  RmsNormCall(Matrix x, std::vector<float> weight, float eps, Matrix out)
      : RowwiseCall(out), x_(x), weight_(std::move(weight)), eps_(eps) {}

  const char* name() const override { return "rms_norm"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const auto group = static_cast<int32_t>(weight_.size());
    const float* x = step.row(x_, row);
    for (int32_t column = 0; column < out_.width; column += group)
      step.kernels.rms_norm(x + column, weight_.data(), eps_, group, out + column);
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

// A gate of one column is for the whole row.
class GatedActivationCall : public RowwiseCall {
 public:
  GatedActivationCall(ActivationKind kind, Matrix gate, Matrix up, Matrix out)
      : RowwiseCall(out), kind_(kind), gate_(gate), up_(up) {}

  const char* name() const override { return "gated_activation"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const float *gate = step.row(gate_, row), *up = step.row(up_, row);
    if (gate_.width == out_.width) return step.kernels.gated_activation(kind_, gate, up, out_.width, out);
    float factor;
    step.kernels.activation(kind_, gate, 1, &factor);
    step.kernels.scale(up, factor, out_.width, out);
  }

 private:
  ActivationKind kind_;
  Matrix gate_, up_;
};

class SoftCapCall : public RowwiseCall {
 public:
  SoftCapCall(Matrix x, float cap, Matrix out) : RowwiseCall(out), x_(x), cap_(cap) {}

  const char* name() const override { return "soft_cap"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.soft_cap(step.row(x_, row), cap_, out_.width, out);
  }

 private:
  Matrix x_;
  float cap_;
};

class ScaleCall : public RowwiseCall {
 public:
  ScaleCall(Matrix x, float factor, Matrix out) : RowwiseCall(out), x_(x), factor_(factor) {}

  const char* name() const override { return "scale"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    step.kernels.scale(step.row(x_, row), factor_, out_.width, out);
  }

 private:
  Matrix x_;
  float factor_;
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
