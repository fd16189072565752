#include "plan.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

#include "adapter_calls.h"
#include "attention_calls.h"
#include "expert_calls.h"
#include "linear_calls.h"
#include "refuse.h"
#include "rowwise_calls.h"

namespace fastserve {
namespace {

int64_t row_bytes(const Matrix& m) {
  return m.is_quantized() ? QuantizedLayout(m).row_bytes : 4 * static_cast<int64_t>(m.width);
}
// Bytes from a matrix's first to its last.
int64_t extent(const Matrix& m, int64_t num_rows) { return (num_rows - 1) * 4 * m.stride + row_bytes(m); }

}  // namespace

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
  return 4 * static_cast<int64_t>(m.stride) >= row_bytes(m) && m.offset_bytes + extent(m, num_rows) <= arena_bytes_;
}

// Every matrix of a call must lie within the arena at the plan's limits.
void Plan::check(const Matrix& m) const {
  const int64_t rows = m.rows == Rows::tokens    ? limits_.max_tokens
                       : m.rows == Rows::outputs ? limits_.max_outputs
                                                 : limits_.max_sequences;
  if (!holds(m, rows)) refuse("a matrix of the plan lies outside its arena");
  if (m.is_in_strips()) check_in_strip(m);
}

void Plan::check_in_strip(const Matrix& m) const {
  if (!is_in_sequence_chain_ && (!is_in_chain_ || m.needs_whole_sequences))
    refuse("a matrix of strips is used outside of a chain");
  const int32_t strip_rows = std::max(is_in_chain_ ? chains_.of_rows.back().strip_rows : 0,
                                      is_in_sequence_chain_ ? chains_.of_sequences.back().strip_rows : 0);
  if (m.rows != Rows::tokens || m.strip_offset_bytes < 0 ||
      m.strip_offset_bytes + extent(m, strip_rows) > strip_bytes_)
    refuse("a matrix of the plan lies outside its strip");
}

void Plan::add_call(std::unique_ptr<Call> call) {
  if (is_in_chain_ || is_in_sequence_chain_) {
    const auto* in_strips = dynamic_cast<const StripCall*>(call.get());
    if (!in_strips || in_strips->rows() != Rows::tokens || (is_in_chain_ && in_strips->needs_whole_sequences()))
      refuse(std::string(call->name()) + " cannot be part of such a chain");
  }
  const auto needed = static_cast<int64_t>(round_up(static_cast<std::size_t>(call->scratch_floats()), 16));
  if (needed > scratch_floats_) {
    scratch_floats_ = needed;
    scratch_ = allocate<float>(static_cast<std::size_t>(needed * pool_.num_threads()));
  }
  calls_.push_back(std::move(call));
}

void Plan::start_chain(int32_t strip_rows, int64_t strip_bytes) {
  if (is_in_chain_) refuse("a chain is begun within a chain");
  check_equal("rows of a strip beyond whole register tiles", strip_rows % kStripAlignment, 0);
  reserve_strips(strip_rows, strip_bytes);
  const int first_call = static_cast<int>(calls_.size());
  chains_.of_rows.push_back({first_call, first_call, strip_rows});
  is_in_chain_ = true;
}

void Plan::end_chain() {
  if (!is_in_chain_) refuse("no chain was begun that could be ended");
  is_in_chain_ = false;
  chains_.of_rows.back().end_call = static_cast<int>(calls_.size());
}

void Plan::start_sequence_chain(int32_t strip_rows, int64_t strip_bytes) {
  if (is_in_chain_ || is_in_sequence_chain_) refuse("a chain of sequences is begun within a chain");
  if (!limits_.needs_whole_sequences) refuse("sequences that come in parts have no chains");
  reserve_strips(strip_rows, strip_bytes);
  const int first_call = static_cast<int>(calls_.size());
  chains_.of_sequences.push_back({first_call, first_call, strip_rows});
  is_in_sequence_chain_ = true;
}

void Plan::end_sequence_chain() {
  if (is_in_chain_ || !is_in_sequence_chain_) refuse("no chain of sequences was begun that could be ended");
  is_in_sequence_chain_ = false;
  chains_.of_sequences.back().end_call = static_cast<int>(calls_.size());
}

void Plan::reserve_strips(int32_t strip_rows, int64_t strip_bytes) {
  check_range("rows of a strip", strip_rows, 1, INT16_MAX);
  check_range("bytes of a strip", strip_bytes, 0, INT32_MAX);
  const auto needed = static_cast<int64_t>(round_up(static_cast<std::size_t>(strip_bytes), 64));
  if (needed <= strip_bytes_) return;
  strip_bytes_ = needed;
  strips_ = allocate<uint8_t>(static_cast<std::size_t>(strip_bytes_ * pool_.num_threads()));
}

void Plan::embedding(IdSource ids, const Weight& weight, Matrix out, int32_t offset, float scale) {
  check(out);
  check_equal("columns of an embedding", out.width, weight.packed().depth);
  const int32_t num_ids = ids == IdSource::token_ids   ? limits_.vocab_size
                          : ids == IdSource::positions ? limits_.max_context
                                                       : limits_.num_token_types;
  check_range("offset of an embedding", offset, -num_ids, weight.packed().rows - 1);
  check_range("ids of an embedding", num_ids, 1, weight.packed().rows - offset);
  add_call(std::make_unique<EmbeddingCall>(ids, weight, offset, scale, out));
}

void Plan::check_linear(const Matrix& x, const Weight& weight, const std::vector<float>& bias, int32_t columns) const {
  check(x);
  const PackedWeight& w = weight.packed();
  if (is_integer(w.format))
    check_equal("bytes of a linear's quantized input", 4 * static_cast<int64_t>(x.stride),
                QuantizedLayout(w.depth, w.activation_group_size).row_bytes);
  else check_equal("columns of a linear's input", x.width, w.depth);
  check_equal("columns of a linear's result", columns, w.rows);
  if (!bias.empty()) check_equal("biases of a linear", static_cast<int64_t>(bias.size()), w.rows);
}

void Plan::linear(Matrix x, const Weight& weight, std::vector<float> bias, Matrix out) {
  check_linear(x, weight, bias, out.width), check(out);
  if (out.is_quantized()) refuse("a linear without an activation writes floats");
  add_call(std::make_unique<LinearCall>(x, weight, std::move(bias), out));
}

void Plan::adapter_down(Matrix x, const AdapterTable& table, Matrix out) {
  check(x), check(out);
  check_equal("columns of an adapter's input", x.width, table.depth());
  check_adapters(table, out);
  add_call(std::make_unique<AdapterDownCall>(table, x, out));
}

void Plan::adapter_up(Matrix low, const AdapterTable& table, Matrix out) {
  check(low), check(out);
  check_equal("columns of an adapted linear's result", out.width, table.rows());
  check_adapters(table, low);
  add_call(std::make_unique<AdapterUpCall>(table, low, out));
}

void Plan::check_adapters(const AdapterTable& table, const Matrix& low) {
  check_range("ranks of adapters", table.max_ranks(), 1, low.width);
  if (num_adapter_slots_ != 0) check_equal("adapter slots", table.num_slots(), num_adapter_slots_);
  num_adapter_slots_ = table.num_slots();
}

void Plan::linear_activation(ActivationKind kind, Matrix x, const Weight& weight, std::vector<float> bias,
                             Matrix out) {
  check_linear(x, weight, bias, out.width);
  check_whole_panels(out);
  add_call(std::make_unique<LinearActivationCall>(kind, false, x, weight, std::move(bias), out));
}

void Plan::linear_gated_activation(ActivationKind kind, Matrix x, const Weight& weight, std::vector<float> bias,
                                   Matrix out) {
  check_linear(x, weight, bias, 2 * out.width);
  check_whole_panels(out);
  check_equal("columns of a gate beyond whole panels", out.width % kPanel, 0);
  add_call(std::make_unique<LinearActivationCall>(kind, true, x, weight, std::move(bias), out));
}

void Plan::check_whole_panels(const Matrix& out) const {
  check(out);
  if (out.group_size <= 0 || kPanel % out.group_size != 0)
    refuse("groups of a quantized activation must make whole panels");
}

void Plan::quantize_rows(Matrix x, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<QuantizeRowsCall>(x, out));
}

void Plan::rms_norm(Matrix x, std::vector<float> weight, float eps, Matrix out) {
  check(x), check(out);
  check_range("weights of a norm", static_cast<int64_t>(weight.size()), 1, x.width);
  check_equal("columns of a norm that make no whole groups", x.width % static_cast<int64_t>(weight.size()), 0);
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

void Plan::attention(Matrix q, Matrix k, Matrix v, const KvPool& pool, int32_t layer, AttentionScores scores,
                     Matrix out) {
  add_attention({q, k, v, pool, layer, {}, std::move(scores), limits_.max_context}, out);
}

void Plan::rope_attention(Matrix q, Matrix k, Matrix v, RopeTables tables, const KvPool& pool, int32_t layer,
                          AttentionScores scores, Matrix out) {
  check(tables);
  check_range("dimensions that turn", tables.dim, 2, pool.layout().head_dim);
  add_attention({q, k, v, pool, layer, std::move(tables), std::move(scores), limits_.max_context}, out);
}

void Plan::store_source(Matrix k, Matrix v, const KvPool& pool, int32_t layer) {
  if (is_in_chain_ || is_in_sequence_chain_) refuse("store_source cannot be part of a chain");
  if (!limits_.needs_whole_sequences) refuse("sources that come in parts cannot be stored");
  const AttentionInputs inputs{k, k, v, pool, layer, {}, {1.0f}, limits_.max_context};
  check_keys(inputs);
  add_call(std::make_unique<StoreSourceCall>(inputs));
}

void Plan::cross_attention(Matrix q, const KvPool& pool, int32_t layer, float scale, Matrix out) {
  if (is_in_chain_ || is_in_sequence_chain_) refuse("cross_attention cannot be part of a chain");
  const Matrix nothing{0, 0, 0, Rows::tokens};
  AttentionScores scores{scale};
  scores.keys_after = kAllKeys;
  reads_sources_ = true;
  add_attention({q, nothing, nothing, pool, layer, {}, std::move(scores), limits_.max_context, true}, out);
}

void Plan::check_pool(const KvPool& pool, int32_t layer) const {
  check_range("layer", layer, 0, pool.num_layers() - 1);
  check_range("blocks of the pool", limits_.num_blocks, 1, pool.num_blocks());
}

void Plan::check_keys(const AttentionInputs& inputs) const {
  check(inputs.k), check(inputs.v);
  check_pool(inputs.pool, inputs.layer);
  const KvLayout& kv = inputs.pool.layout();
  check_equal("columns of keys", inputs.k.width, static_cast<int64_t>(kv.num_kv_heads) * kv.head_dim);
  check_equal("columns of values", inputs.v.width, inputs.k.width);
}

void Plan::add_attention(const AttentionInputs& inputs, Matrix out) {
  check(inputs.q), check(out);
  const KvLayout& kv = inputs.pool.layout();
  if (inputs.reads_source) check_pool(inputs.pool, inputs.layer);
  else check_keys(inputs);
  check_equal("columns of queries that make no whole groups",
              inputs.q.width % (static_cast<int64_t>(kv.num_kv_heads) * kv.head_dim), 0);
  check_range("keys that a row sees before it", inputs.scores.keys_before, 0, kAllKeys);
  check_range("keys that a row sees after it", inputs.scores.keys_after, 0, kAllKeys);
  check_range("first key that is seen", inputs.scores.first_key, 0, limits_.max_context - 1);
  first_key_ = std::max(first_key_, inputs.scores.first_key);
  if (inputs.scores.bias)
    check_equal("floats of a relative bias", static_cast<int64_t>(inputs.scores.bias->size()),
                static_cast<int64_t>(inputs.num_heads()) * AttentionScores::bias_stride(limits_.max_context));
  const AttentionShape shape{inputs.num_heads(), kv.num_kv_heads};
  if (attention_shape_.num_heads > 0 && shape != attention_shape_) refuse("attention layers differ in their heads");
  attention_shape_ = shape;
  partial_floats_ = shape.num_heads * partial_floats(kv.padded_head_dim);
  if (!inputs.reads_source) add_call(std::make_unique<StoreKvCall>(inputs));
  add_call(std::make_unique<AttentionCall>(inputs, out));
  add_call(std::make_unique<MergeAttentionCall>(inputs, out));
}

void Plan::activation(ActivationKind kind, Matrix x, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<ActivationCall>(kind, x, out));
}

void Plan::gated_activation(ActivationKind kind, Matrix gate, Matrix up, Matrix out) {
  check(gate), check(up), check(out);
  if (gate.width != 1) check_equal("columns of a gate", gate.width, out.width);
  add_call(std::make_unique<GatedActivationCall>(kind, gate, up, out));
}

// A matrix with `top_k` rows for each row of a value.
void Plan::check_expert_rows(const Matrix& places, int32_t top_k, const char* what, int32_t width) const {
  check_equal(what, places.width, width);
  const int64_t rows = places.rows == Rows::tokens ? limits_.max_tokens : limits_.max_outputs;
  if (places.rows == Rows::sequences || places.is_in_strips() || !holds(places, rows * top_k))
    refuse("rows of experts lie outside the plan's arena");
}

void Plan::check_experts(const std::vector<const Weight*>& weights, std::size_t count, const Matrix& x,
                         int32_t rows) const {
  check_equal("weights of experts", static_cast<int64_t>(weights.size()), static_cast<int64_t>(count));
  for (const Weight* weight : weights) {
    const PackedWeight& w = weight->packed();
    check_equal("rows of an expert's weight", w.rows, rows);
    check_equal("columns of an expert's weight", w.depth, x.width);
    check_equal("whether rows of experts are quantized", x.is_quantized(), is_integer(w.format));
    if (x.is_quantized())
      check_equal("bytes of an expert's quantized row", QuantizedLayout(x).row_bytes,
                  QuantizedLayout(w.depth, w.activation_group_size).row_bytes);
  }
}

void Plan::mixture_of_experts(ActivationKind kind, Matrix x, Matrix logits, const Experts& experts, int32_t top_k,
                              bool normalized, Matrix gathered, Matrix inner, Matrix results, Matrix out) {
  check(x), check(logits), check(out);
  check_equal("columns of a mixture's result", out.width, x.width);
  check_range("experts of a row", top_k, 1, logits.width);
  check_expert_rows(gathered, top_k, "columns of gathered rows", x.width);
  check_expert_rows(inner, top_k, "columns within experts", inner.width);
  check_expert_rows(results, top_k, "columns of experts' results", out.width);
  const auto count = static_cast<std::size_t>(logits.width);
  check_experts(experts.gates, count, gathered, inner.width);
  check_experts(experts.ups, count, gathered, inner.width);
  check_experts(experts.downs, count, inner, out.width);
  if (inner.is_quantized()) check_whole_panels(inner);
  const MixtureInputs inputs{out.rows, logits.width, top_k, std::make_shared<Routing>()};
  add_call(std::make_unique<RouteExpertsCall>(inputs, normalized, logits));
  add_call(std::make_unique<GatherExpertRowsCall>(inputs, x, gathered));
  add_call(std::make_unique<ExpertGatedActivationCall>(inputs, kind, gathered, experts.gates, experts.ups, inner));
  add_call(std::make_unique<ExpertLinearCall>(inputs, inner, experts.downs, results));
  add_call(std::make_unique<CombineExpertsCall>(inputs, results, out));
}

void Plan::soft_cap(Matrix x, float cap, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<SoftCapCall>(x, cap, out));
}

void Plan::scale(Matrix x, float factor, Matrix out) {
  check(x), check(out);
  add_call(std::make_unique<ScaleCall>(x, factor, out));
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
    check_range("context length", length, end - begin + first_key_, limits_.max_context);
    if (b.adapter_slots) check_range("adapter slot", b.adapter_slots[s], -1, num_adapter_slots_ - 1);
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
  if (reads_sources_) check_sources(b);
  else if (b.source_lengths) refuse("the batch has sources, which this plan does not read");
}

void Plan::check_sources(const Batch& b) const {
  if (!b.source_lengths) refuse("the batch has no sources, which this plan reads");
  for (int32_t s = 0; s < b.num_sequences; ++s) {
    check_range("length of a source", b.source_lengths[s], 1, limits_.max_context);
    const int32_t num_blocks = (b.source_lengths[s] + kBlock - 1) / kBlock;
    check_range("blocks of a source", num_blocks, 1, b.source_table_width);
    for (int32_t i = 0; i < num_blocks; ++i)
      check_range("block of a source", b.source_block_tables[static_cast<int64_t>(s) * b.source_table_width + i], 0,
                  limits_.num_blocks - 1);
  }
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
  if (reads_sources_) schedule_source_attention(batch, attention_shape_, pool_.num_threads(), &source_attention_);
  const int32_t num_partials = std::max(attention_.num_partials(), source_attention_.num_partials());
  attention_partials_.resize(static_cast<std::size_t>(num_partials * partial_floats_));
  schedule_stages(batch, chains_, static_cast<int>(calls_.size()), pool_.num_threads(), &stages_);
  find_adapter_runs(batch, &adapter_runs_);
  const Step step{kernels_,          arena_.get(),      batch, token_types_, attention_, source_attention_,
                  attention_partials_.data(), &adapter_runs_};
  const ThreadMemory memory{scratch_.get(), scratch_floats_, strips_.get(), strip_bytes_, pool_.num_threads()};
  StepJob job(calls_, stages_, step, {sampling, logits, sample_scratch_, results}, memory,
              is_profiling_ ? &profile_ : nullptr);
  pool_.run(job);
}

}  // namespace fastserve
