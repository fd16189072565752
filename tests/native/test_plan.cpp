// Plans of small models: in strips and out of them, with ops fused and apart, on any number of threads the same bits;
// and how steps are cut into stages and strips. Without Python, so that it runs under emulators and sanitizers.
//
//   test_plan [ISA ...]: fails where a named instruction set does not run here.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "plan.h"
#include "small_plan.h"
#include "stage_schedule.h"
#include "threads.h"

namespace fastserve::test {
namespace {

constexpr int kInner = 131, kLayers = 2;
constexpr int kGroup = 64;  // columns of quantized activations that share a scale
constexpr int kStripRows = 48, kSequenceStripRows = 64;

enum class InStrips { no, rows, sequences };

// The weights of either model; all layers have the same.
class Parameters {
 public:
  Parameters(const WeightScheme& scheme, const Kernels& kernels, ThreadPool& pool)
      : table(make_weight(kFloatScheme, kVocab, kWidth, 1, kernels, pool)),
        qkv(make_weight(scheme, 3 * kWidth, kWidth, 2, kernels, pool)),
        q_kv(make_weight(scheme, kWidth + 2 * kHeadDim, kWidth, 2, kernels, pool)),
        out(make_weight(scheme, kWidth, kWidth, 3, kernels, pool)),
        up(make_weight(scheme, kInner, kWidth, 4, kernels, pool)),
        gate_up(make_weight(scheme, 2 * kInner, kWidth, 5, kernels, pool)),
        down(make_weight(scheme, kWidth, kInner, 6, kernels, pool)) {
    std::vector<float> cosines, sines;
    for (int i = 0; i < kMaxContext * (kHeadDim / 2); ++i) {
      cosines.push_back(std::cos(0.1f * static_cast<float>(i % 63)));
      sines.push_back(std::sin(0.1f * static_cast<float>(i % 63)));
    }
    rope = {std::make_shared<std::vector<float>>(cosines), std::make_shared<std::vector<float>>(sines),
            kHeadDim / 2 * 2};
  }

  Weight table, qkv, q_kv, out, up, gate_up, down;
  std::vector<float> norm = random_vector(kWidth, 7), bias = random_vector(kWidth, 8);
  std::vector<float> up_bias = random_vector(kInner, 9);
  RopeTables rope;
};

// Who reads a value: calls of its chain of rows, of its chain of sequences, or others too.
enum class Readers { chain_of_rows, chain_of_sequences, others };

// Gives every value a place of its own, in the arena and, where its readers allow it, in strips.
class Places {
 public:
  explicit Places(InStrips in_strips) : in_strips_(in_strips) {}

  Matrix add(Readers readers, int width, int group_size = Matrix::kFloats, Rows rows = Rows::tokens) {
    const bool is_quantized = group_size != Matrix::kFloats;
    const auto stride =
        is_quantized ? static_cast<int32_t>(QuantizedLayout(width, group_size).row_bytes / 4) : width;
    Matrix m{arena_bytes, stride, width, rows, group_size};
    arena_bytes += 4 * static_cast<int64_t>(stride) * kMaxTokens;
    const bool is_within = readers == Readers::chain_of_rows ? in_strips_ != InStrips::no
                                                             : readers == Readers::chain_of_sequences &&
                                                                   in_strips_ == InStrips::sequences;
    if (!is_within) return m;
    m.strip_offset_bytes = strip_bytes;
    m.needs_whole_sequences = readers == Readers::chain_of_sequences;
    strip_bytes += 4 * static_cast<int64_t>(stride) * kSequenceStripRows;
    return m;
  }

  int64_t arena_bytes = 0, strip_bytes = 0;

 private:
  InStrips in_strips_;
};

Matrix columns(Matrix m, int begin, int width) {
  m.offset_bytes += 4 * begin;
  if (m.is_in_strips()) m.strip_offset_bytes += 4 * begin;
  m.width = width;
  return m;
}

// A model's plan, and what it runs on.
class Model {
 public:
  Model(const Kernels& kernels, int num_threads, const WeightScheme& scheme, InStrips in_strips, bool is_fused)
      : pool_(num_threads),
        parameters_(scheme, kernels, pool_),
        kv_(kLayers, kSequenceBlocks * kMaxSequences, kHeads, kHeadDim, KvFormat::f16),
        shared_kv_(kLayers, kSequenceBlocks * kMaxSequences, 1, kHeadDim, KvFormat::f16),
        kernels_(kernels),
        in_strips_(in_strips),
        is_fused_(is_fused),
        places_(in_strips) {}

  // A sentence encoder: attention to all of a sequence, layer norms after the sums, GELU; sequences' means.
  void build_encoder() {
    struct Layer {
      Matrix quantized, qkv, attended, attended_quantized, projected, mixed, mixed_quantized, inner, activated, down, out;
    };
    const Matrix embedded = places_.add(Readers::chain_of_sequences, kWidth);
    std::vector<Layer> layers;
    for (int i = 0; i < kLayers; ++i)
      layers.push_back({places_.add(Readers::chain_of_rows, kWidth, kGroup),
                        places_.add(Readers::chain_of_sequences, 3 * kWidth),
                        places_.add(Readers::chain_of_sequences, kWidth),
                        places_.add(Readers::chain_of_rows, kWidth, kGroup),
                        places_.add(Readers::chain_of_rows, kWidth),
                        places_.add(Readers::chain_of_rows, kWidth),
                        places_.add(Readers::chain_of_rows, kWidth, kGroup),
                        places_.add(Readers::chain_of_rows, kInner),
                        places_.add(Readers::chain_of_rows, kInner, kGroup),
                        places_.add(Readers::chain_of_rows, kWidth),
                        places_.add(i + 1 < kLayers ? Readers::chain_of_sequences : Readers::others, kWidth)});
    const Matrix pooled = places_.add(Readers::others, kWidth, Matrix::kFloats, Rows::sequences);
    result_ = places_.add(Readers::others, kWidth, Matrix::kFloats, Rows::sequences);
    Plan& plan = make_plan(true);
    const Parameters& p = parameters_;
    if (in_strips_ == InStrips::sequences) plan.start_sequence_chain(kSequenceStripRows, places_.strip_bytes);
    start_chain();
    plan.embedding(IdSource::token_ids, p.table, embedded);
    Matrix x = embedded;
    for (int i = 0; i < kLayers; ++i) {
      const Layer& l = layers[static_cast<std::size_t>(i)];
      plan.quantize_rows(x, l.quantized);
      plan.linear(l.quantized, p.qkv, {}, l.qkv);
      end_chain();
      plan.attention(columns(l.qkv, 0, kWidth), columns(l.qkv, kWidth, kWidth), columns(l.qkv, 2 * kWidth, kWidth), kv_,
                     i, {0.3f, kAllKeys, kAllKeys}, l.attended);
      start_chain();
      plan.quantize_rows(l.attended, l.attended_quantized);
      plan.linear(l.attended_quantized, p.out, p.bias, l.projected);
      plan.add_layer_norm(l.projected, x, p.norm, p.bias, 1e-5f, no_matrix(), l.mixed);
      plan.quantize_rows(l.mixed, l.mixed_quantized);
      add_linear_activation(ActivationKind::gelu, l.mixed_quantized, l.inner, l.activated);
      plan.linear(l.activated, p.down, {}, l.down);
      plan.add_layer_norm(l.down, l.mixed, p.norm, p.bias, 1e-5f, no_matrix(), l.out);
      x = l.out;
    }
    end_chain();
    if (in_strips_ == InStrips::sequences) plan.end_sequence_chain();
    plan.pool(PoolKind::mean, x, pooled);
    plan.l2_normalize(pooled, 1e-12f, result_);
  }

  // A decoder: rotary attention to what came before, by one key head, RMS norms before the products, gated SiLU; rows
  // of outputs.
  void build_decoder() {
    struct Layer {
      Matrix qkv, attended, projected, mixed, mixed_quantized, gate_up, activated, down, out, normed;
    };
    const Matrix embedded = places_.add(Readers::others, kWidth);
    const Matrix first_normed = places_.add(Readers::chain_of_rows, kWidth, kGroup);
    std::vector<Layer> layers;
    for (int i = 0; i < kLayers; ++i)
      layers.push_back({places_.add(Readers::others, kWidth + 2 * kHeadDim),
                        places_.add(Readers::others, kWidth, kGroup),
                        places_.add(Readers::chain_of_rows, kWidth), places_.add(Readers::chain_of_rows, kWidth),
                        places_.add(Readers::chain_of_rows, kWidth, kGroup),
                        places_.add(Readers::chain_of_rows, 2 * kInner),
                        places_.add(Readers::chain_of_rows, kInner, kGroup),
                        places_.add(Readers::chain_of_rows, kWidth), places_.add(Readers::others, kWidth),
                        places_.add(Readers::chain_of_rows, kWidth, kGroup)});
    result_ = places_.add(Readers::others, kWidth, Matrix::kFloats, Rows::outputs);
    Plan& plan = make_plan(false);
    const Parameters& p = parameters_;
    start_chain();
    plan.embedding(IdSource::token_ids, p.table, embedded);
    plan.rms_norm(embedded, p.norm, 1e-5f, first_normed);
    Matrix x = embedded, normed = first_normed;
    for (int i = 0; i < kLayers; ++i) {
      const Layer& l = layers[static_cast<std::size_t>(i)];
      plan.linear(normed, p.q_kv, {}, l.qkv);
      end_chain();
      plan.rope_attention(columns(l.qkv, 0, kWidth), columns(l.qkv, kWidth, kHeadDim),
                          columns(l.qkv, kWidth + kHeadDim, kHeadDim), p.rope, shared_kv_, i, {0.3f}, l.attended);
      start_chain();
      plan.linear(l.attended, p.out, p.bias, l.projected);
      plan.add_rms_norm(l.projected, x, p.norm, 1e-5f, l.mixed, l.mixed_quantized);
      plan.linear(l.mixed_quantized, p.gate_up, {}, l.gate_up);
      plan.gated_activation(ActivationKind::silu, columns(l.gate_up, 0, kInner), columns(l.gate_up, kInner, kInner),
                            l.activated);
      plan.linear(l.activated, p.down, {}, l.down);
      plan.add(l.down, l.mixed, l.out);
      plan.rms_norm(l.out, p.norm, 1e-5f, l.normed);
      x = l.out, normed = l.normed;
    }
    end_chain();
    plan.gather_rows(x, result_);
  }

  std::vector<float> run(const Batch& batch) {
    plan_->run(batch, nullptr, nullptr, nullptr);
    const float* data = plan_->data(result_);
    return {data, data + batch.num_sequences * kWidth};
  }

 private:
  static Matrix no_matrix() { return {0, 0, 0, Rows::tokens}; }

  Plan& make_plan(bool needs_whole_sequences) {
    const PlanLimits limits{kMaxTokens, kMaxTokens, kMaxSequences, kv_.num_blocks(), kMaxContext, kVocab, 1,
                            needs_whole_sequences};
    plan_ = std::make_unique<Plan>(places_.arena_bytes, limits, kernels_, pool_);
    return *plan_;
  }
  void start_chain() {
    if (in_strips_ != InStrips::no) plan_->start_chain(kStripRows, places_.strip_bytes);
  }
  void end_chain() {
    if (in_strips_ != InStrips::no) plan_->end_chain();
  }
  void add_linear_activation(ActivationKind kind, Matrix x, Matrix inner, Matrix out) {
    if (is_fused_) return plan_->linear_activation(kind, x, parameters_.up, parameters_.up_bias, out);
    plan_->linear(x, parameters_.up, parameters_.up_bias, inner);
    plan_->activation(kind, inner, out);
  }

  ThreadPool pool_;
  Parameters parameters_;
  KvPool kv_, shared_kv_;
  const Kernels& kernels_;
  InStrips in_strips_;
  bool is_fused_;
  Places places_;
  Matrix result_{};
  std::unique_ptr<Plan> plan_;
};

// A mixture of experts of embedded tokens.
class Mixture {
 public:
  static constexpr int kExperts = 5, kTopK = 2;

  Mixture(const Kernels& kernels, int num_threads, const WeightScheme& scheme) : pool_(num_threads) {
    const auto make = [&](const WeightScheme& as, int rows, int depth) {
      const auto seed = static_cast<unsigned>(weights_.size());
      weights_.push_back(std::make_unique<Weight>(make_weight(as, rows, depth, seed, kernels, pool_)));
      return weights_.back().get();
    };
    const Weight *table = make(kFloatScheme, kVocab, kWidth), *router = make(kFloatScheme, kExperts, kWidth);
    Plan::Experts experts;
    for (int e = 0; e < kExperts; ++e) {
      experts.gates.push_back(make(scheme, kInner, kWidth));
      experts.ups.push_back(make(scheme, kInner, kWidth));
      experts.downs.push_back(make(scheme, kWidth, kInner));
    }
    Places places(InStrips::no);
    const auto add = [&](int width, int group_size = Matrix::kFloats) {
      return places.add(Readers::others, width, group_size);
    };
    const auto add_expert_rows = [&](int width, int group_size) {
      const Matrix first = add(width, group_size);
      for (int k = 1; k < kTopK; ++k) add(width, group_size);
      return first;
    };
    const int group_size = is_integer(scheme.format) ? scheme.activation_group_size : Matrix::kFloats;
    const Matrix x = add(kWidth), logits = add(kExperts), gathered = add_expert_rows(kWidth, group_size),
                 inner = add_expert_rows(kInner, group_size), results = add_expert_rows(kWidth, Matrix::kFloats);
    out_ = add(kWidth);
    const PlanLimits limits{kMaxTokens,  kMaxTokens, kMaxSequences, kSequenceBlocks * kMaxSequences,
                            kMaxContext, kVocab,     1,             false};
    plan_ = std::make_unique<Plan>(places.arena_bytes, limits, kernels, pool_);
    plan_->embedding(IdSource::token_ids, *table, x);
    plan_->linear(x, *router, {}, logits);
    plan_->mixture_of_experts(ActivationKind::silu, x, logits, experts, kTopK, true, gathered, inner, results, out_);
  }

  // The results of all tokens.
  std::vector<float> run(const Batch& batch) {
    plan_->run(batch, nullptr, nullptr, nullptr);
    return {plan_->data(out_), plan_->data(out_) + batch.num_tokens * kWidth};
  }

 private:
  ThreadPool pool_;
  std::vector<std::unique_ptr<Weight>> weights_;
  Matrix out_{};
  std::unique_ptr<Plan> plan_;
};

std::string sizes_of(const std::vector<int>& numbers) {
  std::string text;
  for (int number : numbers) (text += ' ') += std::to_string(number);
  return text;
}

const std::vector<std::vector<int>>& batches() {
  static const std::vector<std::vector<int>> all{
      {33, 33, 33, 33, 33, 33, 33, 33, 33, 33, 33, 33, 33, 33, 33, 33},
      {64, 5, 41, 17, 1, 60, 33, 2, 50, 29, 64, 12, 48, 63, 20, 31, 7, 39},
      {64, 65, 300, 1},
      {577 - 300, 300},
      {3, 1, 7},
  };
  return all;
}

void test_models(const Kernels& kernels, const WeightScheme& scheme, const std::vector<int>& numbers_of_threads) {
  const auto make = [&](int threads, InStrips in_strips, bool is_fused, bool is_encoder) {
    auto model = std::make_unique<Model>(kernels, threads, scheme, in_strips, is_fused);
    is_encoder ? model->build_encoder() : model->build_decoder();
    return model;
  };
  const auto plain_encoder = make(1, InStrips::no, false, true), plain_decoder = make(1, InStrips::no, false, false);
  for (int threads : numbers_of_threads)
    for (InStrips in_strips : {InStrips::no, InStrips::rows, InStrips::sequences})
      for (bool is_encoder : {true, false}) {
        if (!is_encoder && in_strips == InStrips::sequences) continue;
        const auto model = make(threads, in_strips, true, is_encoder);
        for (const std::vector<int>& lengths : batches()) {
          const Sequences sequences(lengths);
          const auto expected = (is_encoder ? plain_encoder : plain_decoder)->run(sequences.batch());
          expect_same(model->run(sequences.batch()), expected,
                      std::string(kernels.name) + (is_encoder ? " encoder" : " decoder") + " in strips " +
                          std::to_string(int(in_strips)) + ", threads " + std::to_string(threads) + ", format " +
                          std::to_string(int(scheme.format)) + ", sequences" + sizes_of(lengths));
        }
      }
}

// A token has the same bits wherever it is, in any batch and on any number of threads.
void test_mixtures(const Kernels& kernels, const WeightScheme& scheme, const std::vector<int>& numbers_of_threads) {
  std::vector<std::vector<float>> of_token(kVocab);
  for (int threads : numbers_of_threads) {
    Mixture mixture(kernels, threads, scheme);
    for (const std::vector<int>& lengths : batches()) {
      const Sequences sequences(lengths);
      const std::vector<float> results = mixture.run(sequences.batch());
      for (std::size_t row = 0; row < sequences.token_ids.size(); ++row) {
        const auto first = results.begin() + static_cast<std::ptrdiff_t>(row) * kWidth;
        const std::vector<float> result(first, first + kWidth);
        std::vector<float>& expected = of_token[static_cast<std::size_t>(sequences.token_ids[row])];
        if (expected.empty()) expected = result;
        expect_same(result, expected, std::string(kernels.name) + " mixture, threads " + std::to_string(threads) +
                                          ", format " + std::to_string(int(scheme.format)) + ", row " +
                                          std::to_string(row) + " of sequences" + sizes_of(lengths));
      }
    }
  }
}

// An encoder that stores its sources, and a decoder that reads them: one layer of attention to them and nothing else.
class Translator {
 public:
  Translator(const Kernels& kernels, int threads)
      : pool_(threads),
        kv_(1, kMaxSequences * kSequenceBlocks, kHeads, kHeadDim, KvFormat::f32),
        table_(make_weight(kFloatScheme, kVocab, 3 * kWidth, 3, kernels, pool_)),
        encoder_(kBytes, limits(true), kernels, pool_),
        decoder_(kBytes, limits(false), kernels, pool_) {
    encoder_.embedding(IdSource::token_ids, table_, qkv());
    encoder_.store_source(part(1), part(2), kv_, 0);
    decoder_.embedding(IdSource::token_ids, table_, qkv());
    decoder_.cross_attention(part(0), kv_, 0, kScale, out());
  }

  void encode(const Sequences& sources) { encoder_.run(sources.batch(), nullptr, nullptr, nullptr); }
  std::vector<float> run(const Sequences& targets, const Sequences& sources) {
    Batch batch = targets.batch();
    batch.source_table_width = kSequenceBlocks;
    batch.source_lengths = sources.lengths.data();
    batch.source_block_tables = sources.block_tables.data();
    decoder_.run(batch, nullptr, nullptr, nullptr);
    return {decoder_.data(out()), decoder_.data(out()) + batch.num_tokens * kWidth};
  }
  // Without sources; it is refused.
  void run(const Sequences& targets) { decoder_.run(targets.batch(), nullptr, nullptr, nullptr); }

  // Of queries, keys and values that runs have left behind, row by row and key by key.
  std::vector<double> expect(const Sequences& targets, const Sequences& sources) const {
    std::vector<double> results;
    for (std::size_t s = 0; s < targets.lengths.size(); ++s)
      for (int32_t row = targets.starts[s]; row < targets.starts[s + 1]; ++row)
        for (int32_t head = 0; head < kHeads; ++head) {
          const float* q = decoder_.data(part(0)) + row * 3 * kWidth + head * kHeadDim;
          std::vector<Seen> seen;
          for (int32_t key = sources.starts[s]; key < sources.starts[s + 1]; ++key)
            seen.push_back({encoder_.data(part(1)) + key * 3 * kWidth + head * kHeadDim,
                            encoder_.data(part(2)) + key * 3 * kWidth + head * kHeadDim});
          for (double sum : attend(q, seen, kScale)) results.push_back(sum);
        }
    return results;
  }

 private:
  static constexpr float kScale = 0.25f;
  static constexpr int64_t kBytes = int64_t{4} * kMaxTokens * 4 * kWidth;

  static PlanLimits limits(bool needs_whole_sequences) {
    return {kMaxTokens, kMaxSequences, kMaxSequences, kMaxSequences * kSequenceBlocks, kMaxContext, kVocab, 1,
            needs_whole_sequences};
  }
  static Matrix qkv() { return {0, 3 * kWidth, 3 * kWidth, Rows::tokens}; }
  static Matrix part(int64_t index) { return {4 * index * kWidth, 3 * kWidth, kWidth, Rows::tokens}; }
  static Matrix out() { return {int64_t{4} * kMaxTokens * 3 * kWidth, kWidth, kWidth, Rows::tokens}; }

  ThreadPool pool_;
  KvPool kv_;
  Weight table_;
  Plan encoder_, decoder_;
};

// Sources of one split and of several, targets token by token (cut by keys, where threads would idle) and in chunks.
void test_sources(const Kernels& kernels) {
  const Sequences sources({310, 1, 33, 60});
  for (const std::vector<int>& lengths : {std::vector<int>{1, 1, 1, 1}, std::vector<int>{5, 2, 60, 1}}) {
    const Sequences targets(lengths);
    std::vector<float> first;
    for (int threads : {1, 2, 8}) {
      Translator translator(kernels, threads);
      translator.encode(sources);
      const std::vector<float> results = translator.run(targets, sources);
      const std::string where = std::string(kernels.name) + " sources, threads " + std::to_string(threads);
      const std::vector<double> expected = translator.expect(targets, sources);
      expect_close(results, expected, 1e-5, where);
      if (first.empty()) first = results;
      expect_same(results, first, where);
      expect_refused([&] { translator.run(targets); }, where + ": a batch without sources runs");
    }
  }
}

// Chains of the calls [1, 4) and [5, 9) of 10, and where sequences have one, that of [0, 9) about them.
Chains chains_of(int32_t strip_rows, int32_t sequence_rows) {
  Chains chains{{{1, 4, strip_rows}, {5, 9, strip_rows}}, {}};
  if (sequence_rows > 0) chains.of_sequences.push_back({0, 9, sequence_rows});
  return chains;
}

// Every call in order, every row of a stage once, strips of whole register tiles, enough of them for each thread.
StageSchedule check_schedule(const std::vector<int>& lengths, const Chains& chains, int num_threads) {
  const Sequences sequences(lengths);
  const Batch batch = sequences.batch();
  StageSchedule schedule;
  schedule_stages(batch, chains, 10, num_threads, &schedule);
  const std::string where =
      "schedule for " + std::to_string(num_threads) + " threads of sequences" + sizes_of(lengths);
  int call = 0;
  for (const Stage& stage : schedule.stages) {
    expect(stage.first_call == call && stage.end_call > call, where + ": calls left out");
    call = stage.end_call;
    if (!stage.has_strips()) continue;
    expect(num_threads == 1 || stage.num_strips >= kLeastStripsPerThread * num_threads, where + ": few strips");
    std::vector<RowRange> strips;
    for (int i = 0; i < stage.num_strips; ++i) strips.push_back(schedule.strip(stage, i));
    std::sort(strips.begin(), strips.end(), [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; });
    int32_t row = 0;
    const auto& of = stage.has_whole_sequences ? chains.of_sequences : chains.of_rows;
    for (const RowRange& strip : strips) {
      expect(strip.begin == row && strip.end > row, where + ": rows left out or taken twice");
      expect(strip.size() <= of.front().strip_rows, where + ": a strip is too high");
      if (stage.has_whole_sequences)
        expect(std::count(sequences.starts.begin(), sequences.starts.end(), strip.begin) == 1, where + ": cut");
      else
        expect(strip.begin % kStripAlignment == 0, where + ": a strip begins within a register tile");
      row = strip.end;
    }
    expect(row == batch.num_tokens, where + ": rows left out at the end");
  }
  expect(call == 10, where + ": calls left out at the end");
  return schedule;
}

void test_schedules() {
  for (int threads : {1, 2, 3, 16})
    for (int32_t strip_rows : {24, 48, 96})
      for (int32_t sequence_rows : {0, 64, 128})
        for (const std::vector<int>& lengths : batches())
          check_schedule(lengths, chains_of(strip_rows, sequence_rows), threads);
  const std::vector<int> equal(16, 33);
  const auto num_stages = [&](const std::vector<int>& lengths, int32_t sequence_rows, int threads) {
    return check_schedule(lengths, chains_of(48, sequence_rows), threads).stages.size();
  };
  expect(num_stages(equal, 64, 2) == 2, "16 sequences are no strips of two threads");
  expect(num_stages(equal, 32, 2) == 5, "sequences that are too long are no strips of rows");
  expect(num_stages(equal, 0, 2) == 5, "528 rows are no strips of two threads");
  expect(num_stages({64}, 64, 2) == 10, "one sequence is in strips");
  expect(num_stages({32, 32}, 64, 2) == 10, "each of two threads has half of the rows, and cannot help the other");
  expect(num_stages(std::vector<int>(15, 8), 64, 2) == 10, "strips have few rows");
  expect(num_stages({64, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 64, 2) == 10, "a thread has most of the rows");
}

void test_all(const Kernels& kernels) {
  test_models(kernels, {WeightFormat::int8, ScaleFormat::bf16, WeightOffset::none, 0, kGroup}, {1, 2, 3});
  test_models(kernels, {WeightFormat::int4, ScaleFormat::bf16, WeightOffset::zero_point, kGroup, kGroup}, {3});
  test_mixtures(kernels, kFloatScheme, {1, 3});
  test_mixtures(kernels, {WeightFormat::int8, ScaleFormat::bf16, WeightOffset::none, 0, kGroup}, {1, 3});
  test_sources(kernels);
}

}  // namespace
}  // namespace fastserve::test

int main(int argc, char** argv) {
  using namespace fastserve;
  test::test_schedules();
  test::for_each_isa(argc, argv, test::test_all);
  return test::finish("plan");
}
