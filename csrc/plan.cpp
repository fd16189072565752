#include "plan.h"

#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "calls.h"

namespace fastserve {
namespace {

int64_t element_bytes(KvFormat format) { return format == KvFormat::f32 ? 4 : format == KvFormat::int8 ? 1 : 2; }

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_range(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(std::string(what) + " is " + std::to_string(value) + "; the limits are " + std::to_string(low) + " and " +
           std::to_string(high));
}

void check_equal(const char* what, int64_t value, int64_t expected) { check_range(what, value, expected, expected); }

// All calls of a plan for one step, then the sampling of its output rows.
class StepJob : public Job {
 public:
  StepJob(const std::vector<std::unique_ptr<Call>>& calls, const Step& step, const SampleBatch* sampling,
          const Matrix* logits, SampleResult* results, std::vector<SampleScratch>& sample_scratch, float* scratch,
          int64_t scratch_floats, std::vector<CallProfile>* profile)
      : calls_(calls),
        step_(step),
        sampling_(sampling),
        logits_(logits),
        results_(results),
        sample_scratch_(sample_scratch),
        scratch_(scratch),
        scratch_floats_(scratch_floats),
        profile_(profile) {
    if (profile_) stage_start_ = Clock::now();
  }

  int num_stages() const override { return static_cast<int>(calls_.size()) + (sampling_ ? 1 : 0); }
  int num_tiles(int stage) const override {
    return is_sampling(stage) ? sampling_->num_rows : calls_[static_cast<std::size_t>(stage)]->num_tiles(step_);
  }
  void run_tile(int stage, int tile, int thread) override {
    if (is_sampling(stage))
      sample_row(step_.row(*logits_, tile), logits_->width, sampling_->row(tile),
                 sample_scratch_[static_cast<std::size_t>(thread)], results_[tile]);
    else calls_[static_cast<std::size_t>(stage)]->run_tile(step_, tile, scratch_ + thread * scratch_floats_);
  }

  void stage_done(int stage) override {
    if (!profile_) return;
    const Clock::time_point now = Clock::now();
    CallProfile& p = (*profile_)[static_cast<std::size_t>(stage)];
    p.num_runs += 1;
    p.seconds += std::chrono::duration<double>(now - stage_start_).count();
    if (!is_sampling(stage)) {
      const Cost cost = calls_[static_cast<std::size_t>(stage)]->cost(step_);
      p.cost.bytes += cost.bytes;
      p.cost.operations += cost.operations;
    }
    stage_start_ = Clock::now();
  }

 private:
  using Clock = std::chrono::steady_clock;

  bool is_sampling(int stage) const { return stage == static_cast<int>(calls_.size()); }

  const std::vector<std::unique_ptr<Call>>& calls_;
  const Step& step_;
  const SampleBatch* sampling_;
  const Matrix* logits_;
  SampleResult* results_;
  std::vector<SampleScratch>& sample_scratch_;
  float* scratch_;
  int64_t scratch_floats_;
  std::vector<CallProfile>* profile_;
  Clock::time_point stage_start_;
};

}  // namespace

KvPool::KvPool(int32_t num_layers, int32_t num_blocks, int32_t num_kv_heads, int32_t head_dim, KvFormat format)
    : num_layers_(num_layers), num_blocks_(num_blocks) {
  check_range("head_dim", head_dim, 1, kMaxHeadDim);
  const auto padded_head_dim = static_cast<int32_t>(round_up(static_cast<std::size_t>(head_dim), 16));
  const int64_t scale_bytes = format == KvFormat::int8 ? static_cast<int64_t>(sizeof(float)) : 0;
  const int64_t head_bytes = kBlock * (padded_head_dim * element_bytes(format) + scale_bytes);
  layout_ = {format, num_kv_heads, head_dim, padded_head_dim, head_bytes, num_kv_heads * head_bytes};
  layer_bytes_ = layout_.block_bytes * num_blocks;
  memory_ = allocate<uint8_t>(static_cast<std::size_t>(num_bytes()));
}

void KvPool::read_block(int32_t block, uint8_t* out) const {
  check_block("block", block);
  const auto bytes = static_cast<std::size_t>(layout_.block_bytes);
  for (int32_t i = 0; i < num_parts(); ++i) std::memcpy(out + i * layout_.block_bytes, part(i, block), bytes);
}

void KvPool::write_block(int32_t block, const uint8_t* data) {
  check_block("block", block);
  const auto bytes = static_cast<std::size_t>(layout_.block_bytes);
  for (int32_t i = 0; i < num_parts(); ++i) std::memcpy(part(i, block), data + i * layout_.block_bytes, bytes);
}

void KvPool::copy_block(int32_t source, int32_t target) {
  check_block("source", source);
  check_block("target", target);
  if (source == target) return;
  const auto bytes = static_cast<std::size_t>(layout_.block_bytes);
  for (int32_t i = 0; i < num_parts(); ++i) std::memcpy(part(i, target), part(i, source), bytes);
}

void KvPool::check_block(const char* what, int32_t block) const { check_range(what, block, 0, num_blocks_ - 1); }

Plan::Plan(int64_t arena_bytes, const PlanLimits& limits, const Kernels& kernels, ThreadPool& pool)
    : limits_(limits),
      kernels_(kernels),
      pool_(pool),
      arena_bytes_(arena_bytes),
      arena_(allocate<uint8_t>(static_cast<std::size_t>(arena_bytes))),
      sample_scratch_(static_cast<std::size_t>(pool.num_threads())) {}

Plan::~Plan() = default;

bool Plan::holds(const Matrix& m, int64_t num_rows) const {
  if (m.offset_bytes < 0 || m.width < 0 || m.group_size < Matrix::kFloats) return false;
  const int64_t row_bytes = m.is_quantized() ? QuantizedLayout(m).row_bytes : 4 * static_cast<int64_t>(m.width);
  const int64_t stride_bytes = 4 * static_cast<int64_t>(m.stride);
  return stride_bytes >= row_bytes && m.offset_bytes + (num_rows - 1) * stride_bytes + row_bytes <= arena_bytes_;
}

// Every matrix of a call must lie within the arena at the plan's limits.
void Plan::check(const Matrix& m) const {
  const int64_t rows = m.rows == Rows::tokens    ? limits_.max_tokens
                       : m.rows == Rows::outputs ? limits_.max_outputs
                                                 : limits_.max_sequences;
  if (!holds(m, rows)) refuse("a matrix of the plan lies outside its arena");
}

void Plan::add_call(std::unique_ptr<Call> call) {
  const auto needed = static_cast<int64_t>(round_up(static_cast<std::size_t>(call->scratch_floats()), 16));
  if (needed > scratch_floats_) {
    scratch_floats_ = needed;
    scratch_ = allocate<float>(static_cast<std::size_t>(needed * pool_.num_threads()));
  }
  calls_.push_back(std::move(call));
}

void Plan::embedding(IdSource ids, const Weight& weight, Matrix out) {
  check(out);
  check_equal("columns of an embedding", out.width, weight.packed().depth);
  const int32_t num_ids = ids == IdSource::token_ids   ? limits_.vocab_size
                          : ids == IdSource::positions ? limits_.max_context
                                                       : limits_.num_token_types;
  check_range("ids of an embedding", num_ids, 1, weight.packed().rows);
  add_call(std::make_unique<EmbeddingCall>(ids, weight, out));
}

void Plan::linear(Matrix x, const Weight& weight, std::vector<float> bias, Matrix out) {
  check(x), check(out);
  const PackedWeight& w = weight.packed();
  if (is_integer(w.format))
    check_equal("bytes of a linear's quantized input", 4 * static_cast<int64_t>(x.stride),
                QuantizedLayout(w.depth, w.activation_group_size).row_bytes);
  else check_equal("columns of a linear's input", x.width, w.depth);
  check_equal("columns of a linear's result", out.width, w.rows);
  if (!bias.empty()) check_equal("biases of a linear", static_cast<int64_t>(bias.size()), w.rows);
  add_call(std::make_unique<LinearCall>(x, weight, std::move(bias), out));
}

void Plan::quantize_rows(Matrix x, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<QuantizeRowsCall>(x, out));
}

void Plan::rms_norm(Matrix x, std::vector<float> weight, float eps, Matrix out) {
  check(x), check(out);
  check_equal("weights of a norm", static_cast<int64_t>(weight.size()), x.width);
  add_call(std::make_unique<RmsNormCall>(x, std::move(weight), eps, out));
}

void Plan::layer_norm(Matrix x, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out) {
  check(x), check(out);
  check_equal("weights of a norm", static_cast<int64_t>(weight.size()), x.width);
  check_equal("biases of a norm", static_cast<int64_t>(bias.size()), x.width);
  add_call(std::make_unique<LayerNormCall>(x, std::move(weight), std::move(bias), eps, out));
}

void Plan::add(Matrix x, Matrix y, Matrix out) {
  check(x), check(y), check(out);
  add_call(std::make_unique<AddCall>(x, y, out));
}

void Plan::add_rms_norm(Matrix x, Matrix y, std::vector<float> weight, float eps, Matrix out_sum, Matrix out) {
  add_layer_norm(x, y, std::move(weight), {}, eps, out_sum, out);
}

void Plan::add_layer_norm(Matrix x, Matrix y, std::vector<float> weight, std::vector<float> bias, float eps,
                          Matrix out_sum, Matrix out) {
  check(x), check(y), check(out_sum), check(out);
  check_equal("weights of a norm", static_cast<int64_t>(weight.size()), x.width);
  if (!bias.empty()) check_equal("biases of a norm", static_cast<int64_t>(bias.size()), x.width);
  add_call(std::make_unique<AddNormCall>(x, y, std::move(weight), std::move(bias), eps, out_sum, out));
}

void Plan::check(const RopeTables& tables) const {
  const auto needed = static_cast<std::size_t>(limits_.max_context) * static_cast<std::size_t>(tables.dim / 2);
  if (tables.cosines->size() < needed || tables.sines->size() < needed)
    refuse("a rotary table is shorter than the context");
}

void Plan::rope(Matrix x, RopeTables tables, int32_t head_dim, Matrix out) {
  check(x), check(out), check(tables);
  check_range("dimensions that turn", tables.dim, 2, head_dim);
  check_equal("columns of turned heads", x.width % head_dim, 0);
  add_call(std::make_unique<RopeCall>(x, std::move(tables), head_dim, out));
}

void Plan::attention(Matrix q, Matrix k, Matrix v, const KvPool& pool, int32_t layer, float scale, bool causal,
                     Matrix out) {
  add_attention({q, k, v, pool, layer, {}, scale, causal}, out);
}

void Plan::rope_attention(Matrix q, Matrix k, Matrix v, RopeTables tables, const KvPool& pool, int32_t layer,
                          float scale, bool causal, Matrix out) {
  check(tables);
  check_range("dimensions that turn", tables.dim, 2, pool.layout().head_dim);
  add_attention({q, k, v, pool, layer, std::move(tables), scale, causal}, out);
}

void Plan::add_attention(const AttentionInputs& inputs, Matrix out) {
  check(inputs.q), check(inputs.k), check(inputs.v), check(out);
  check_range("layer", inputs.layer, 0, inputs.pool.num_layers() - 1);
  const KvLayout& kv = inputs.pool.layout();
  check_range("blocks of the pool", limits_.num_blocks, 1, inputs.pool.num_blocks());
  check_equal("columns of keys", inputs.k.width, static_cast<int64_t>(kv.num_kv_heads) * kv.head_dim);
  check_equal("columns of values", inputs.v.width, inputs.k.width);
  check_equal("columns of queries that make no whole groups", inputs.q.width % inputs.k.width, 0);
  const AttentionShape shape{inputs.num_heads(), kv.num_kv_heads};
  if (attention_shape_.num_heads > 0 && shape != attention_shape_) refuse("attention layers differ in their heads");
  attention_shape_ = shape;
  partial_floats_ = shape.num_heads * partial_floats(kv.padded_head_dim);
  add_call(std::make_unique<StoreKvCall>(inputs));
  add_call(std::make_unique<AttentionCall>(inputs, out));
  add_call(std::make_unique<MergeAttentionCall>(inputs, out));
}

void Plan::activation(ActivationKind kind, Matrix x, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<ActivationCall>(kind, x, out));
}

void Plan::gated_activation(ActivationKind kind, Matrix gate, Matrix up, Matrix out) {
  check(gate), check(up), check(out);
  add_call(std::make_unique<GatedActivationCall>(kind, gate, up, out));
}

void Plan::gather_rows(Matrix x, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<GatherRowsCall>(x, out));
}

void Plan::pool(PoolKind kind, Matrix x, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<PoolCall>(kind, x, out));
}

void Plan::l2_normalize(Matrix x, float eps, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<L2NormalizeCall>(x, eps, out));
}

void Plan::check(const Batch& b) const {
  check_range("tokens in the batch", b.num_tokens, 1, limits_.max_tokens);
  check_range("sequences in the batch", b.num_sequences, 1, limits_.max_sequences);
  check_range("output rows in the batch", b.num_outputs, 0, limits_.max_outputs);
  if (b.sequence_starts[0] != 0 || b.sequence_starts[b.num_sequences] != b.num_tokens)
    refuse("sequence_starts must run from 0 to the number of tokens");
  for (int32_t s = 0; s < b.num_sequences; ++s) {
    const int32_t begin = b.sequence_starts[s], end = b.sequence_starts[s + 1], length = b.context_lengths[s];
    check_range("tokens of a sequence", end - begin, 1, b.num_tokens - begin);
    check_range("context length", length, end - begin, limits_.max_context);
    if (limits_.needs_whole_sequences && length != end - begin)
      refuse("bidirectional attention needs all " + std::to_string(length) +
             " tokens of a sequence in one batch, not " + std::to_string(end - begin));
    const int32_t num_blocks = (length + kBlock - 1) / kBlock;
    check_range("blocks of a sequence", num_blocks, 1, b.block_table_width);
    for (int32_t i = 0; i < num_blocks; ++i)
      check_range("block", b.block_tables[static_cast<int64_t>(s) * b.block_table_width + i], 0,
                  limits_.num_blocks - 1);
    for (int32_t row = begin; row < end; ++row)
      if (b.positions[row] != length - (end - row))
        refuse("positions of a sequence must be consecutive and end at its context length");
  }
  for (int32_t row = 0; row < b.num_tokens; ++row) {
    check_range("token id", b.token_ids[row], 0, limits_.vocab_size - 1);
    if (b.token_types) check_range("token type", b.token_types[row], 0, limits_.num_token_types - 1);
  }
  for (int32_t i = 0; i < b.num_outputs; ++i) check_range("output row", b.output_rows[i], 0, b.num_tokens - 1);
}

void Plan::start_profile() {
  profile_.clear();
  for (const std::unique_ptr<Call>& call : calls_) profile_.push_back({call->name(), call->shape(), 0, 0, {}});
  profile_.push_back({"sample", "", 0, 0, {}});
  is_profiling_ = true;
}

void Plan::run(const Batch& batch, const SampleBatch* sampling, const Matrix* logits, SampleResult* results) {
  const std::unique_lock lock(run_mutex_, std::try_to_lock);
  if (!lock) throw std::logic_error("the plan is running a step in another thread");
  check(batch);
  if (sampling) {
    if (sampling->num_rows != batch.num_outputs) refuse("sampling must name every output row");
    check(*logits);
    if (logits->rows != Rows::outputs) refuse("logits must have output rows");
    check_sample_batch(*sampling, logits->width);
    for (SampleScratch& scratch : sample_scratch_) scratch.reserve(static_cast<std::size_t>(logits->width));
  }
  token_types_.assign(static_cast<std::size_t>(batch.num_tokens), 0);
  if (batch.token_types) token_types_.assign(batch.token_types, batch.token_types + batch.num_tokens);
  schedule_attention(batch, attention_shape_, pool_.num_threads(), &attention_);
  attention_partials_.resize(static_cast<std::size_t>(attention_.num_partials() * partial_floats_));
  const Step step{kernels_, arena_.get(), batch, token_types_, attention_, attention_partials_.data()};
  StepJob job(calls_, step, sampling, logits, results, sample_scratch_, scratch_.get(), scratch_floats_,
              is_profiling_ ? &profile_ : nullptr);
  pool_.run(job);
}

}  // namespace fastserve
