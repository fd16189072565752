// The calls of a mixture of experts: rows are routed, then gathered by expert, so that each expert's weights are read
// once for all of its rows; what the experts make of them is combined row by row.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "linear_calls.h"
#include "row_writer.h"
#include "rowwise_calls.h"
#include "step.h"
#include "weight.h"

namespace fastserve {

// Which experts the rows of a step go to. A place is where a row lies among those gathered for one of its experts.
struct Routing {
  // Places [begin, end) of one expert, at most kRowBlock.
  struct Block {
    int32_t expert, begin, end;
  };

  std::vector<int32_t> experts;  // [rows][top_k], those with the largest shares first
  std::vector<float> shares;     // [rows][top_k]
  std::vector<int32_t> places;   // [rows][top_k]
  std::vector<Block> blocks;
};

// What the calls of one mixture share.
struct MixtureInputs {
  Rows rows;
  int32_t num_experts;
  int32_t top_k;
  std::shared_ptr<Routing> routing;  // of the step that runs

  // The most blocks that so many rows make.
  int max_blocks(const Step& step) const {
    const int32_t places = step.num_rows(rows) * top_k;
    return places / kRowBlock + std::min(places, num_experts);
  }
};

// The first part: who goes where, in the order of rows.
class RouteExpertsCall : public Call {
 public:
  RouteExpertsCall(MixtureInputs inputs, bool is_normalized, Matrix logits)
      : inputs_(std::move(inputs)), is_normalized_(is_normalized), logits_(logits) {}

  const char* name() const override { return "route_experts"; }
  Cost cost(const Step& step) const override {
    return {4 * static_cast<int64_t>(step.num_rows(inputs_.rows)) * inputs_.num_experts, 0};
  }
  int num_tiles(const Step& step) const override { return step.num_rows(inputs_.rows) > 0 ? 1 : 0; }
  int64_t scratch_floats() const override { return inputs_.num_experts; }
  void run_tile(const Step& step, int, float* scratch) const override {
    Routing& routing = *inputs_.routing;
    const int32_t num_rows = step.num_rows(inputs_.rows);
    const std::size_t num_places = static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(inputs_.top_k);
    routing.experts.resize(num_places);
    routing.shares.resize(num_places);
    routing.places.resize(num_places);
    for (int32_t row = 0; row < num_rows; ++row) {
      const std::size_t at = static_cast<std::size_t>(row) * static_cast<std::size_t>(inputs_.top_k);
      choose(step.row(logits_, row), scratch, routing.experts.data() + at, routing.shares.data() + at);
    }
    gather(routing);
  }

 private:
  // The experts of one row, and their shares. Of equal ones the first; a NaN among the logits makes all shares NaN.
  void choose(const float* logits, float* weights, int32_t* experts, float* shares) const {
    const float largest = *std::max_element(logits, logits + inputs_.num_experts);
    float total = 0;
    for (int32_t e = 0; e < inputs_.num_experts; ++e) total += weights[e] = std::exp(logits[e] - largest);
    float chosen = 0;
    for (int32_t k = 0; k < inputs_.top_k; ++k) {
      const auto e = static_cast<int32_t>(std::max_element(weights, weights + inputs_.num_experts) - weights);
      experts[k] = e;
      chosen += shares[k] = weights[e];
      weights[e] = -1.0f;  // below every other
    }
    const float divisor = is_normalized_ && total == total ? chosen : total;
    for (int32_t k = 0; k < inputs_.top_k; ++k) shares[k] /= divisor;
  }

  // Places expert by expert, within one in the order of rows; an expert that a row of NaN chose twice has two.
  void gather(Routing& routing) const {
    std::vector<int32_t> ends(static_cast<std::size_t>(inputs_.num_experts), 0);
    for (int32_t e : routing.experts) ++ends[static_cast<std::size_t>(e)];
    routing.blocks.clear();
    int32_t end = 0;
    for (int32_t e = 0; e < inputs_.num_experts; ++e) {
      int32_t& count = ends[static_cast<std::size_t>(e)];
      const int32_t begin = end;
      end += count;
      count = begin;
      for (int32_t place = begin; place < end; place += kRowBlock)
        routing.blocks.push_back({e, place, std::min(end, place + kRowBlock)});
    }
    for (std::size_t i = 0; i < routing.experts.size(); ++i)
      routing.places[i] = ends[static_cast<std::size_t>(routing.experts[i])]++;
  }

  MixtureInputs inputs_;
  bool is_normalized_;
  Matrix logits_;
};

// Copies every row, quantized where `out` is, to its places. Matrices of places have a row for each.
class GatherExpertRowsCall : public RowwiseCall {
 public:
  GatherExpertRowsCall(MixtureInputs inputs, Matrix x, Matrix out)
      : RowwiseCall(x), inputs_(std::move(inputs)), places_(out), place_writer_(out) {}

  const char* name() const override { return "gather_expert_rows"; }
  void run_rows(const Step& step, int32_t begin, int32_t end, float*) const override {
    const auto bytes = static_cast<std::size_t>(places_.is_quantized() ? QuantizedLayout(places_).row_bytes
                                                                       : 4 * static_cast<int64_t>(places_.width));
    for (int32_t row = begin; row < end; ++row) {
      const int32_t* places = inputs_.routing->places.data() + row * inputs_.top_k;
      const float* x = step.row(out_, row);
      const auto* first = reinterpret_cast<const uint8_t*>(step.row(places_, places[0]));
      if (places_.is_quantized()) place_writer_.finish(step, places[0], 0, places_.width, x);
      else first = reinterpret_cast<const uint8_t*>(x);
      for (int32_t k = places_.is_quantized() ? 1 : 0; k < inputs_.top_k; ++k)
        std::copy_n(first, bytes, reinterpret_cast<uint8_t*>(step.row(places_, places[k])));
    }
  }

 protected:
  void run_row(const Step&, int32_t, float*) const override {}

 private:
  MixtureInputs inputs_;
  Matrix places_;
  RowWriter place_writer_;
};

// What calls of products of gathered rows with their experts' weights share: tiles of a panel and a block.
class ExpertProductCall : public Call {
 public:
  ExpertProductCall(MixtureInputs inputs, Matrix x, std::vector<const Weight*> weights, Matrix out)
      : inputs_(std::move(inputs)), x_(x), weights_(std::move(weights)), out_(out), writer_(out) {}

  std::string shape() const override {
    const PackedWeight& w = weights_.front()->packed();
    return std::to_string(w.rows) + "x" + std::to_string(w.depth) + " of " + std::to_string(inputs_.num_experts);
  }
  Cost cost(const Step& step) const override {
    const PackedWeight& w = weights_.front()->packed();
    Cost total;
    int32_t last = -1;
    for (const Routing::Block& block : inputs_.routing->blocks) {
      if (block.expert != last) total.bytes += weights_[static_cast<std::size_t>(block.expert)]->num_bytes();
      last = block.expert;
    }
    total.operations = 2 * static_cast<int64_t>(step.num_rows(inputs_.rows)) * inputs_.top_k * w.rows * w.depth;
    return total;
  }
  int num_tiles(const Step& step) const override {
    return (out_.width + kPanel - 1) / kPanel * inputs_.max_blocks(step);
  }
  int64_t scratch_floats() const override { return 2 * kRowBlock * kPanel; }
  void run_tile(const Step& step, int tile, float* scratch) const override {
    const int max_blocks = inputs_.max_blocks(step), index = tile % max_blocks;
    if (index < static_cast<int>(inputs_.routing->blocks.size()))
      run_panel(step, inputs_.routing->blocks[static_cast<std::size_t>(index)], tile / max_blocks, scratch);
  }

 protected:
  virtual void run_panel(const Step& step, const Routing::Block& block, int32_t panel, float* scratch) const = 0;

  void multiply(const Step& step, const std::vector<const Weight*>& weights, const Routing::Block& block,
                int32_t panel, float* out, int64_t out_stride) const {
    LinearArgs args = linear_args(step, x_, *weights[static_cast<std::size_t>(block.expert)], block.begin);
    args.first_channel = panel * kPanel;
    args.out = out;
    args.out_stride = out_stride;
    step.kernels.linear(args, 0, block.end - block.begin, panel, panel + 1);
  }

  MixtureInputs inputs_;
  Matrix x_;
  std::vector<const Weight*> weights_;
  Matrix out_;
  RowWriter writer_;
};

// kind(gates(x)) * ups(x), a panel at a time. Groups of columns that share a scale make whole panels.
class ExpertGatedActivationCall : public ExpertProductCall {
 public:
  ExpertGatedActivationCall(MixtureInputs inputs, ActivationKind kind, Matrix x, std::vector<const Weight*> gates,
                            std::vector<const Weight*> ups, Matrix out)
      : ExpertProductCall(std::move(inputs), x, std::move(gates), out), kind_(kind), ups_(std::move(ups)) {}

  const char* name() const override { return "expert_gated_activation"; }
  Cost cost(const Step& step) const override {
    const Cost half = ExpertProductCall::cost(step);
    return {2 * half.bytes, 2 * half.operations};
  }

 protected:
  void run_panel(const Step& step, const Routing::Block& block, int32_t panel, float* scratch) const override {
    const int32_t column = panel * kPanel, width = std::min(kPanel, out_.width - column);
    const int32_t count = (block.end - block.begin) * width;
    multiply(step, weights_, block, panel, scratch, width);
    multiply(step, ups_, block, panel, scratch + count, width);
    step.kernels.gated_activation(kind_, scratch, scratch + count, count, scratch);
    for (int32_t place = block.begin; place < block.end; ++place) {
      const float* row = scratch + (place - block.begin) * width;
      if (out_.is_quantized()) writer_.finish(step, place, column, width, row);
      else std::copy_n(row, width, step.row(out_, place) + column);
    }
  }

 private:
  ActivationKind kind_;
  std::vector<const Weight*> ups_;
};

class ExpertLinearCall : public ExpertProductCall {
 public:
  using ExpertProductCall::ExpertProductCall;

  const char* name() const override { return "expert_linear"; }

 protected:
  void run_panel(const Step& step, const Routing::Block& block, int32_t panel, float*) const override {
    multiply(step, weights_, block, panel, step.row(out_, block.begin) + panel * kPanel, out_.stride);
  }
};

// The last part: the sum of what a row's experts made, by their shares, in the order of these.
class CombineExpertsCall : public RowwiseCall {
 public:
  CombineExpertsCall(MixtureInputs inputs, Matrix results, Matrix out)
      : RowwiseCall(out), inputs_(std::move(inputs)), results_(results) {}

  const char* name() const override { return "combine_experts"; }

 protected:
  void run_row(const Step& step, int32_t row, float* out) const override {
    const Routing& routing = *inputs_.routing;
    for (int32_t k = 0; k < inputs_.top_k; ++k) {
      const std::size_t at = static_cast<std::size_t>(row * inputs_.top_k + k);
      float* result = step.row(results_, routing.places[at]);
      step.kernels.scale(result, routing.shares[at], out_.width, k > 0 ? result : out);
      if (k > 0) step.kernels.add(out, result, out_.width, out);
    }
  }

 private:
  MixtureInputs inputs_;
  Matrix results_;
};

}  // namespace fastserve
