// The calls of low-rank products that adapters add to a linear: tiles of a panel and a run of rows with one adapter.
// Rows without an adapter, and weights that it does not change, cost nothing.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "adapter.h"
#include "step.h"
#include "weight.h"

namespace fastserve {

// What the two halves share. A unit is a panel of an adapter's matrices for the weight.
class AdapterCall : public StripCall {
 public:
  AdapterCall(const AdapterTable& table, Matrix x, Matrix out) : table_(table), x_(x), out_(out) {}

  std::string shape() const override {
    return std::to_string(table_.rows()) + "x" + std::to_string(table_.depth());
  }
  Cost cost(const Step& step) const override {
    Cost total;
    for (const AdapterRun& run : runs(step)) add_cost(table_.at(run.slot), run.end - run.begin, &total);
    return total;
  }
  int num_tiles(const Step& step) const override {
    int count = 0;
    for (const AdapterRun& run : runs(step)) count += num_units(table_.at(run.slot));
    return count;
  }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    for (const AdapterRun& run : runs(step)) {
      const AdapterTable::Slot& slot = table_.at(run.slot);
      const int units = num_units(slot);
      if (tile < units) return run_unit(step, slot, run.begin, run.end, tile, scratch);
      tile -= units;
    }
  }
  Rows rows() const override { return out_.rows; }
  void run_rows(const Step& step, int32_t begin, int32_t end, float* scratch) const override {
    for (const AdapterRun& run : runs(step)) {
      const int32_t first = std::max(begin, run.begin), last = std::min(end, run.end);
      if (first >= last) continue;
      const AdapterTable::Slot& slot = table_.at(run.slot);
      for (int unit = 0; unit < num_units(slot); ++unit) run_unit(step, slot, first, last, unit, scratch);
    }
  }

 protected:
  virtual int num_units(const AdapterTable::Slot& slot) const = 0;
  // At most kRowBlock rows.
  virtual void run_unit(const Step& step, const AdapterTable::Slot& slot, int32_t row_begin, int32_t row_end, int unit,
                        float* scratch) const = 0;
  virtual void add_cost(const AdapterTable::Slot& slot, int64_t num_rows, Cost* total) const = 0;

  static int num_panels(const Weight& weight) { return (weight.packed().rows + kPanel - 1) / kPanel; }
  static void add_product(const Weight& weight, int64_t num_rows, Cost* total) {
    total->bytes += weight.num_bytes();
    total->operations += 2 * num_rows * weight.packed().rows * weight.packed().depth;
  }
  // One panel of out = x @ weight.T, whose first column is that of the panel.
  void multiply(const Step& step, const Weight& weight, const float* x, int32_t num_rows, int panel, float* out,
                int64_t out_stride) const {
    LinearArgs args{};
    args.weight = &weight.packed();
    args.x = x;
    args.x_stride = x_.stride;
    args.out = out;
    args.out_stride = out_stride;
    args.first_channel = panel * kPanel;
    step.kernels.linear(args, 0, num_rows, panel, panel + 1);
  }

  const AdapterTable& table_;
  Matrix x_, out_;

 private:
  const std::vector<AdapterRun>& runs(const Step& step) const { return step.adapter_runs->of(out_.rows); }
};

// The first half: out = down * x.
class AdapterDownCall : public AdapterCall {
 public:
  using AdapterCall::AdapterCall;

  const char* name() const override { return "adapter_down"; }

 protected:
  int num_units(const AdapterTable::Slot& slot) const override { return slot.down ? num_panels(*slot.down) : 0; }
  void run_unit(const Step& step, const AdapterTable::Slot& slot, int32_t row_begin, int32_t row_end, int unit,
                float*) const override {
    multiply(step, *slot.down, step.row(x_, row_begin), row_end - row_begin, unit,
             step.row(out_, row_begin) + unit * kPanel, out_.stride);
  }
  void add_cost(const AdapterTable::Slot& slot, int64_t num_rows, Cost* total) const override {
    if (slot.down) add_product(*slot.down, num_rows, total);
  }
};

// The second: out = factor * out + shift + up * x, where x is what the first gave.
class AdapterUpCall : public AdapterCall {
 public:
  using AdapterCall::AdapterCall;

  const char* name() const override { return "adapter_up"; }
  int64_t scratch_floats() const override { return kRowBlock * kPanel; }

 protected:
  int num_units(const AdapterTable::Slot& slot) const override {
    int count = 0;
    for (const AdapterTable::Part& part : slot.parts) count += num_panels(*part.up);
    return count;
  }
  void run_unit(const Step& step, const AdapterTable::Slot& slot, int32_t row_begin, int32_t row_end, int unit,
                float* scratch) const override {
    for (const AdapterTable::Part& part : slot.parts) {
      if (unit < num_panels(*part.up)) return add_panel(step, part, row_begin, row_end, unit, scratch);
      unit -= num_panels(*part.up);
    }
  }
  void add_cost(const AdapterTable::Slot& slot, int64_t num_rows, Cost* total) const override {
    for (const AdapterTable::Part& part : slot.parts) add_product(*part.up, num_rows, total);
  }

 private:
  void add_panel(const Step& step, const AdapterTable::Part& part, int32_t row_begin, int32_t row_end, int panel,
                 float* scratch) const {
    const int32_t column = panel * kPanel, width = std::min(kPanel, part.up->packed().rows - column);
    multiply(step, *part.up, step.row(x_, row_begin) + part.first_rank, row_end - row_begin, panel, scratch, width);
    for (int32_t row = row_begin; row < row_end; ++row) {
      float* out = step.row(out_, row) + part.first_row + column;
      if (!part.factors.empty()) rescale(part.factors.data() + column, part.shifts.data() + column, width, out);
      step.kernels.add(out, scratch + (row - row_begin) * width, width, out);
    }
  }

  static void rescale(const float* factors, const float* shifts, int32_t width, float* out) {
    for (int32_t i = 0; i < width; ++i) out[i] = factors[i] * out[i] + shifts[i];
  }
};

}  // namespace fastserve
