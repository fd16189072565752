// The calls of products with weights: tiles of a panel and a block of rows.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "row_writer.h"
#include "step.h"
#include "weight.h"

namespace fastserve {

// All arguments of a product with a weight but the result's; rows are counted from `row_begin`.
inline LinearArgs linear_args(const Step& step, const Matrix& x, const Weight& weight, int32_t row_begin) {
  const PackedWeight& w = weight.packed();
  LinearArgs args{};
  args.weight = &w;
  if (is_integer(w.format)) {
    const QuantizedLayout layout(w.depth, w.activation_group_size);
    args.quantized = {reinterpret_cast<const int8_t*>(step.row(x, row_begin)), layout.row_bytes, layout.scales_offset,
                      layout.corrections_offset};
  } else {
    args.x = step.row(x, row_begin);
    args.x_stride = x.stride;
  }
  return args;
}

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

  LinearArgs inputs(const Step& step, int32_t row_begin) const {
    LinearArgs args = linear_args(step, x_, weight_, row_begin);
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

}  // namespace fastserve
