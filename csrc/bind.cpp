// The Python module fastserve._native: the only file of the runtime that knows Python.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "adapter.h"
#include "cores.h"
#include "dispatch.h"
#include "machine_limits.h"
#include "plan.h"
#include "sample.h"
#include "sparse_weight.h"
#include "threads.h"
#include "weight.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fastserve {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = Vector<int32_t>;
using Floats = Vector<float>;
using Bytes = Vector<uint8_t>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The thread pool and the kernels that everything of one executable shares.
struct Runtime {
  Runtime(int num_threads, const std::string& isa)
      : kernels(choose_kernels(isa)), pool(num_threads > 0 ? num_threads : count_cores().num_threads()) {}
  const Kernels& kernels;
  ThreadPool pool;
};

std::vector<float> to_vector(const Floats& a) { return {a.data(), a.data() + a.size()}; }

template <class T>
nb::ndarray<nb::numpy, T> new_array(std::initializer_list<std::size_t> shape) {
  std::size_t count = 1;
  for (std::size_t n : shape) count *= n;
  auto memory = std::make_unique<T[]>(count);
  T* data = memory.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

std::vector<const Weight*> to_weights(const nb::list& list) {
  std::vector<const Weight*> weights;
  for (nb::handle weight : list) weights.push_back(&nb::cast<const Weight&>(weight));
  return weights;
}

StoredMatrix to_stored_matrix(const std::tuple<std::string, Bytes, int32_t, int32_t>& source) {
  const auto& [format, data, rows, depth] = source;
  return {parse_stored_format(format), data.data(), static_cast<int64_t>(data.size()), rows, depth};
}

WeightScheme to_scheme(const std::string& format, int32_t group_size, int32_t activation_group_size,
                       const std::string& scale_format, const std::string& offset, const std::string& storage) {
  return {parse_weight_format(format), parse_scale_format(scale_format), parse_weight_offset(offset), group_size,
          activation_group_size,       parse_weight_storage(storage)};
}

void init_weight(Weight* self, Runtime& runtime,
                 const std::vector<std::tuple<std::string, Bytes, int32_t, int32_t>>& sources,
                 const std::string& format, int32_t group_size, int32_t activation_group_size,
                 const std::string& scale_format, const std::string& offset, const std::string& storage) {
  const WeightScheme scheme = to_scheme(format, group_size, activation_group_size, scale_format, offset, storage);
  std::vector<StoredMatrix> matrices;
  for (const auto& source : sources) matrices.push_back(to_stored_matrix(source));
  nb::gil_scoped_release release;
  new (self) Weight(matrices, scheme, runtime.kernels, runtime.pool);
}

Weight weight_from_panels(const Bytes& panels, int32_t rows, int32_t depth, const std::string& format,
                          int32_t group_size, int32_t activation_group_size, const std::string& scale_format,
                          const std::string& offset, const std::string& storage) {
  const WeightScheme scheme = to_scheme(format, group_size, activation_group_size, scale_format, offset, storage);
  return Weight(panels.data(), static_cast<int64_t>(panels.size()), rows, depth, scheme);
}

nb::ndarray<nb::numpy, float> decode(Runtime& runtime, const std::string& format, const Bytes& data, int64_t count) {
  const StoredFormat stored = parse_stored_format(format);
  if (stored == StoredFormat::groups || count < 0 || count % stored_block(stored) != 0 ||
      stored_bytes(stored, count) != static_cast<int64_t>(data.size()))
    throw std::invalid_argument(std::to_string(data.size()) + " bytes do not hold " + std::to_string(count) +
                                " elements of " + format);
  auto out = new_array<float>({static_cast<std::size_t>(count)});
  runtime.kernels.decode_row(stored, data.data(), count, out.data());
  return out;
}

// A fastserve.types.SamplingBatch, kept alive while it is read.
struct SamplingArrays {
  explicit SamplingArrays(nb::handle s)
      : temperature(get<Floats>(s, "temperature")),
        top_p(get<Floats>(s, "top_p")),
        min_p(get<Floats>(s, "min_p")),
        presence_penalty(get<Floats>(s, "presence_penalty")),
        frequency_penalty(get<Floats>(s, "frequency_penalty")),
        repetition_penalty(get<Floats>(s, "repetition_penalty")),
        bias_values(get<Floats>(s, "bias_values")),
        top_k(get<Ids>(s, "top_k")),
        num_logprobs(get<Ids>(s, "num_logprobs")),
        history_starts(get<Ids>(s, "history_starts")),
        history_prompt_lengths(get<Ids>(s, "history_prompt_lengths")),
        history_ids(get<Ids>(s, "history_ids")),
        bias_starts(get<Ids>(s, "bias_starts")),
        bias_ids(get<Ids>(s, "bias_ids")),
        mask_starts(get<Ids>(s, "mask_starts")),
        mask_words(get<Vector<uint32_t>>(s, "mask_words")),
        seeds(get<Vector<uint64_t>>(s, "seeds")),
        draws(get<Vector<uint64_t>>(s, "draws")) {
    const std::size_t rows = temperature.size();
    for (std::size_t size : {top_p.size(), min_p.size(), presence_penalty.size(), frequency_penalty.size(),
                             repetition_penalty.size(), top_k.size(), num_logprobs.size(), seeds.size(), draws.size(),
                             history_prompt_lengths.size(), history_starts.size() - 1, bias_starts.size() - 1,
                             mask_starts.size() - 1})
      if (size != rows) throw std::invalid_argument("sampling arrays differ in length");
    if (bias_ids.size() != bias_values.size()) throw std::invalid_argument("bias_ids and bias_values differ in length");
  }

  SampleBatch view() const {
    return {static_cast<int32_t>(temperature.size()),
            temperature.data(),
            top_k.data(),
            top_p.data(),
            min_p.data(),
            presence_penalty.data(),
            frequency_penalty.data(),
            repetition_penalty.data(),
            seeds.data(),
            draws.data(),
            num_logprobs.data(),
            history_starts.data(),
            history_prompt_lengths.data(),
            history_ids.data(),
            static_cast<int32_t>(history_ids.size()),
            bias_starts.data(),
            bias_ids.data(),
            bias_values.data(),
            static_cast<int32_t>(bias_ids.size()),
            mask_starts.data(),
            mask_words.data(),
            static_cast<int32_t>(mask_words.size())};
  }

  template <class Array>
  static Array get(nb::handle object, const char* name) {
    return nb::cast<Array>(object.attr(name));
  }

  Floats temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty, bias_values;
  Ids top_k, num_logprobs, history_starts, history_prompt_lengths, history_ids, bias_starts, bias_ids, mask_starts;
  Vector<uint32_t> mask_words;
  Vector<uint64_t> seeds, draws;
};

// (is_valid [R], token_ids [R], logprobs [R], top_token_ids [R, 20], top_logprobs [R, 20])
nb::tuple to_arrays(const std::vector<SampleResult>& results) {
  const std::size_t n = results.size(), width = kMaxTopLogprobs;
  auto ids = new_array<int32_t>({n}), top_ids = new_array<int32_t>({n, width});
  auto logprobs = new_array<float>({n}), top_logprobs = new_array<float>({n, width});
  auto is_valid = new_array<bool>({n});
  for (std::size_t i = 0; i < n; ++i) {
    is_valid.data()[i] = results[i].ok;
    ids.data()[i] = results[i].token_id;
    logprobs.data()[i] = results[i].logprob;
    std::copy_n(results[i].top_ids, width, top_ids.data() + i * width);
    std::copy_n(results[i].top_logprobs, width, top_logprobs.data() + i * width);
  }
  return nb::make_tuple(is_valid, ids, logprobs, top_ids, top_logprobs);
}

nb::object run(Plan& plan, nb::handle batch, const std::optional<Matrix>& logits) {
  const auto get = [&](const char* name) { return nb::cast<Ids>(batch.attr(name)); };
  const Ids token_ids = get("token_ids"), positions = get("positions"), starts = get("sequence_starts"),
            lengths = get("context_lengths"), output_rows = get("output_rows");
  const auto block_tables = nb::cast<Table<int32_t>>(batch.attr("block_tables"));
  const auto token_types = nb::cast<std::optional<Ids>>(batch.attr("token_types"));
  const auto adapter_slots = nb::cast<std::optional<Ids>>(batch.attr("adapter_slots"));
  const auto source_lengths = nb::cast<std::optional<Ids>>(batch.attr("source_lengths"));
  const auto source_tables = nb::cast<std::optional<Table<int32_t>>>(batch.attr("source_block_tables"));
  if (positions.size() != token_ids.size() || starts.size() != lengths.size() + 1 ||
      block_tables.shape(0) != lengths.size() || (token_types && token_types->size() != token_ids.size()) ||
      (adapter_slots && adapter_slots->size() != lengths.size()) ||
      source_lengths.has_value() != source_tables.has_value() ||
      (source_lengths && source_lengths->size() != lengths.size()) ||
      (source_tables && source_tables->shape(0) != lengths.size()))
    throw std::invalid_argument("the batch's arrays differ in length");
  const Batch b{static_cast<int32_t>(token_ids.size()),
                static_cast<int32_t>(lengths.size()),
                static_cast<int32_t>(output_rows.size()),
                static_cast<int32_t>(block_tables.shape(1)),
                token_ids.data(),
                positions.data(),
                token_types ? token_types->data() : nullptr,
                starts.data(),
                lengths.data(),
                block_tables.data(),
                output_rows.data(),
                adapter_slots ? adapter_slots->data() : nullptr,
                source_tables ? static_cast<int32_t>(source_tables->shape(1)) : 0,
                source_lengths ? source_lengths->data() : nullptr,
                source_tables ? source_tables->data() : nullptr};
  std::optional<SamplingArrays> arrays;
  if (nb::object sampling = batch.attr("sampling"); !sampling.is_none()) {
    if (!logits) throw std::invalid_argument("this plan has no logits to sample from");
    arrays.emplace(sampling);
  }
  if (!arrays) {
    nb::gil_scoped_release release;
    plan.run(b, nullptr, nullptr, nullptr);
    return nb::none();
  }
  std::vector<SampleResult> results(output_rows.size());
  const SampleBatch view = arrays->view();
  {
    nb::gil_scoped_release release;
    plan.run(b, &view, &*logits, results.data());
  }
  return to_arrays(results);
}

nb::tuple sample_rows(nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> logits, nb::handle sampling) {
  const SamplingArrays arrays(sampling);
  const SampleBatch view = arrays.view();
  if (static_cast<int32_t>(logits.shape(0)) != view.num_rows)
    throw std::invalid_argument("logits and sampling differ in rows");
  std::vector<SampleResult> results(logits.shape(0));
  sample(logits.data(), static_cast<int32_t>(logits.shape(1)), view, results.data());
  return to_arrays(results);
}

void check_size(const char* what, std::size_t size, int64_t expected) {
  if (static_cast<int64_t>(size) != expected)
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(size) + " bytes; a block has " +
                                std::to_string(expected));
}

// A float table that several calls of a plan share.
struct FloatTable {
  std::shared_ptr<const std::vector<float>> values;
};

// (first row, first rank, up) of every part.
void set_adapter(AdapterTable& table, int32_t slot, const Weight& down, const nb::list& parts) {
  std::vector<AdapterTable::Part> found;
  for (nb::handle part : parts) {
    const auto first_row = nb::cast<int32_t>(part[0]), first_rank = nb::cast<int32_t>(part[1]);
    const auto factors = nb::cast<std::optional<Floats>>(part[3]), shifts = nb::cast<std::optional<Floats>>(part[4]);
    found.push_back({first_row, first_rank, &nb::cast<const Weight&>(part[2]),
                     factors ? to_vector(*factors) : std::vector<float>{},
                     shifts ? to_vector(*shifts) : std::vector<float>{}});
  }
  table.set(slot, down, std::move(found));
}

void bind_plan(nb::module_& m) {
  nb::enum_<Rows>(m, "Rows")
      .value("TOKENS", Rows::tokens)
      .value("OUTPUTS", Rows::outputs)
      .value("SEQUENCES", Rows::sequences);
  nb::enum_<IdSource>(m, "IdSource")
      .value("token_ids", IdSource::token_ids)
      .value("positions", IdSource::positions)
      .value("token_types", IdSource::token_types);
  nb::enum_<PoolKind>(m, "PoolKind")
      .value("mean", PoolKind::mean)
      .value("first", PoolKind::first)
      .value("last", PoolKind::last);
  nb::class_<FloatTable>(m, "FloatTable")
      .def(
          "__init__",
          [](FloatTable* self, const Floats& values) {
            new (self) FloatTable{std::make_shared<const std::vector<float>>(to_vector(values))};
          },
          "values"_a);
  nb::class_<AttentionScores>(m, "AttentionScores")
      .def(
          "__init__",
          [](AttentionScores* self, float scale, std::optional<int32_t> keys_before, std::optional<int32_t> keys_after,
             std::optional<float> soft_cap, const FloatTable* bias, int32_t first_key) {
            new (self) AttentionScores{scale, keys_before.value_or(kAllKeys), keys_after.value_or(kAllKeys),
                                       soft_cap.value_or(0.0f), bias ? bias->values : nullptr, first_key};
          },
          "scale"_a, nb::kw_only(), "keys_before"_a.none(), "keys_after"_a.none(), "soft_cap"_a.none(),
          "bias"_a.none(), "first_key"_a = 0);
  nb::class_<Matrix>(m, "Matrix")
      .def(
          "__init__",
          [](Matrix* self, int64_t offset_bytes, int32_t stride, int32_t width, Rows rows,
             std::optional<int32_t> group_size, std::optional<int64_t> strip_offset_bytes,
             bool needs_whole_sequences) {
            new (self) Matrix{offset_bytes,
                              stride,
                              width,
                              rows,
                              group_size.value_or(Matrix::kFloats),
                              strip_offset_bytes.value_or(Matrix::kArenaOnly),
                              needs_whole_sequences};
          },
          "offset_bytes"_a, "stride"_a, "width"_a, "rows"_a, "group_size"_a = nb::none(),
          "strip_offset_bytes"_a = nb::none(), "needs_whole_sequences"_a = false);
  nb::class_<KvPool>(m, "KvPool")
      .def(
          "__init__",
          [](KvPool* self, int32_t num_layers, int32_t num_blocks, int32_t num_kv_heads, int32_t head_dim,
             const std::string& format) {
            new (self) KvPool(num_layers, num_blocks, num_kv_heads, head_dim, parse_kv_format(format));
          },
          "num_layers"_a, "num_blocks"_a, "num_kv_heads"_a, "head_dim"_a, "format"_a)
      .def_prop_ro("num_bytes", &KvPool::num_bytes)
      .def_prop_ro("block_bytes", &KvPool::block_bytes)
      .def(
          "read_block",
          [](const KvPool& pool, int32_t block, const MutableBytes& out) {
            check_size("out", out.size(), pool.block_bytes());
            nb::gil_scoped_release release;
            pool.read_block(block, out.data());
          },
          "block"_a, "out"_a.noconvert())  // what is written into a converted copy would be lost
      .def(
          "write_block",
          [](KvPool& pool, int32_t block, const Bytes& data) {
            check_size("data", data.size(), pool.block_bytes());
            nb::gil_scoped_release release;
            pool.write_block(block, data.data());
          },
          "block"_a, "data"_a)
      .def("copy_block", &KvPool::copy_block, nb::call_guard<nb::gil_scoped_release>(), "source"_a, "target"_a);
  nb::class_<AdapterTable>(m, "AdapterTable", "Borrows its matrices: whoever sets them keeps them.")
      .def(nb::init<int32_t, int32_t, int32_t, int32_t>(), "num_slots"_a, "rows"_a, "depth"_a, "max_ranks"_a)
      .def("set", &set_adapter, "slot"_a, "down"_a, "parts"_a)
      .def("clear", &AdapterTable::clear, "slot"_a);
  nb::class_<Plan>(m, "Plan")
      .def(
          "__init__",
          [](Plan* self, Runtime& runtime, int64_t arena_bytes, int32_t max_tokens, int32_t max_outputs,
             int32_t max_sequences, int32_t num_blocks, int32_t max_context, int32_t vocab_size,
             int32_t num_token_types, bool needs_whole_sequences) {
            const PlanLimits limits{max_tokens,  max_outputs, max_sequences,   num_blocks,
                                    max_context, vocab_size,  num_token_types, needs_whole_sequences};
            new (self) Plan(arena_bytes, limits, runtime.kernels, runtime.pool);
          },
          nb::keep_alive<1, 2>(), "runtime"_a, "arena_bytes"_a, nb::kw_only(), "max_tokens"_a, "max_outputs"_a,
          "max_sequences"_a, "num_blocks"_a, "max_context"_a, "vocab_size"_a, "num_token_types"_a,
          "needs_whole_sequences"_a)
      .def("embedding", &Plan::embedding, nb::keep_alive<1, 3>(), "ids"_a, "weight"_a, "out"_a, "offset"_a = 0,
           "scale"_a = 1.0f)
      .def(
          "linear",
          [](Plan& p, Matrix x, const Weight& weight, const std::optional<Floats>& bias, Matrix out) {
            p.linear(x, weight, bias ? to_vector(*bias) : std::vector<float>{}, out);
          },
          nb::keep_alive<1, 3>(), "x"_a, "weight"_a, "bias"_a.none(), "out"_a)
      .def("adapter_down", &Plan::adapter_down, nb::keep_alive<1, 3>(), "x"_a, "table"_a, "out"_a)
      .def("adapter_up", &Plan::adapter_up, nb::keep_alive<1, 3>(), "low"_a, "table"_a, "out"_a)
      .def(
          "linear_activation",
          [](Plan& p, const std::string& kind, Matrix x, const Weight& weight, const std::optional<Floats>& bias,
             Matrix out) {
            p.linear_activation(parse_activation(kind), x, weight, bias ? to_vector(*bias) : std::vector<float>{}, out);
          },
          nb::keep_alive<1, 4>(), "kind"_a, "x"_a, "weight"_a, "bias"_a.none(), "out"_a)
      .def(
          "linear_gated_activation",
          [](Plan& p, const std::string& kind, Matrix x, const Weight& weight, const std::optional<Floats>& bias,
             Matrix out) {
            p.linear_gated_activation(parse_activation(kind), x, weight,
                                      bias ? to_vector(*bias) : std::vector<float>{}, out);
          },
          nb::keep_alive<1, 4>(), "kind"_a, "x"_a, "weight"_a, "bias"_a.none(), "out"_a)
      .def("quantize_rows", &Plan::quantize_rows, "x"_a, "out"_a)
      .def(
          "rms_norm",
          [](Plan& p, Matrix x, const Floats& weight, float eps, Matrix out) {
            p.rms_norm(x, to_vector(weight), eps, out);
          },
          "x"_a, "weight"_a, "eps"_a, "out"_a)
      .def(
          "layer_norm",
          [](Plan& p, Matrix x, const Floats& weight, const Floats& bias, float eps, Matrix out) {
            p.layer_norm(x, to_vector(weight), to_vector(bias), eps, out);
          },
          "x"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a)
      .def("add", &Plan::add, "x"_a, "y"_a, "out"_a)
      .def(
          "add_rms_norm",
          [](Plan& p, Matrix x, Matrix y, const Floats& weight, float eps, Matrix out_sum, Matrix out) {
            p.add_rms_norm(x, y, to_vector(weight), eps, out_sum, out);
          },
          "x"_a, "y"_a, "weight"_a, "eps"_a, "out_sum"_a, "out"_a)
      .def(
          "add_layer_norm",
          [](Plan& p, Matrix x, Matrix y, const Floats& weight, const Floats& bias, float eps, Matrix out_sum,
             Matrix out) { p.add_layer_norm(x, y, to_vector(weight), to_vector(bias), eps, out_sum, out); },
          "x"_a, "y"_a, "weight"_a, "bias"_a, "eps"_a, "out_sum"_a, "out"_a)
      .def(
          "rope",
          [](Plan& p, Matrix x, const FloatTable& cosines, const FloatTable& sines, int32_t dim, int32_t head_dim,
             Matrix out) { p.rope(x, {cosines.values, sines.values, dim}, head_dim, out); },
          "x"_a, "cosines"_a, "sines"_a, "dim"_a, "head_dim"_a, "out"_a)
      .def("attention", &Plan::attention, nb::keep_alive<1, 5>(), "q"_a, "k"_a, "v"_a, "pool"_a, "layer"_a, "scores"_a,
           "out"_a)
      .def(
          "rope_attention",
          [](Plan& p, Matrix q, Matrix k, Matrix v, const FloatTable& cosines, const FloatTable& sines, int32_t dim,
             const KvPool& pool, int32_t layer, const AttentionScores& scores, Matrix out) {
            p.rope_attention(q, k, v, {cosines.values, sines.values, dim}, pool, layer, scores, out);
          },
          nb::keep_alive<1, 8>(), "q"_a, "k"_a, "v"_a, "cosines"_a, "sines"_a, "dim"_a, "pool"_a, "layer"_a,
          "scores"_a, "out"_a)
      .def("store_source", &Plan::store_source, nb::keep_alive<1, 4>(), "k"_a, "v"_a, "pool"_a, "layer"_a)
      .def("cross_attention", &Plan::cross_attention, nb::keep_alive<1, 3>(), "q"_a, "pool"_a, "layer"_a, "scale"_a,
           "out"_a)
      .def(
          "activation",
          [](Plan& p, const std::string& kind, Matrix x, Matrix out) { p.activation(parse_activation(kind), x, out); },
          "kind"_a, "x"_a, "out"_a)
      .def(
          "gated_activation",
          [](Plan& p, const std::string& kind, Matrix gate, Matrix up, Matrix out) {
            p.gated_activation(parse_activation(kind), gate, up, out);
          },
          "kind"_a, "gate"_a, "up"_a, "out"_a)
      .def(
          "mixture_of_experts",
          [](Plan& p, const std::string& kind, Matrix x, Matrix logits, const nb::list& gates, const nb::list& ups,
             const nb::list& downs, int32_t top_k, bool normalized, Matrix gathered, Matrix inner, Matrix results,
             Matrix out) {
            const Plan::Experts experts{to_weights(gates), to_weights(ups), to_weights(downs)};
            p.mixture_of_experts(parse_activation(kind), x, logits, experts, top_k, normalized, gathered, inner,
                                 results, out);
          },
          nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), "kind"_a, "x"_a, "logits"_a,
          "gates"_a, "ups"_a, "downs"_a, nb::kw_only(), "top_k"_a, "normalized"_a, "gathered"_a, "inner"_a,
          "results"_a, "out"_a)
      .def("soft_cap", &Plan::soft_cap, "x"_a, "cap"_a, "out"_a)
      .def("scale", &Plan::scale, "x"_a, "factor"_a, "out"_a)
      .def("gather_rows", &Plan::gather_rows, "x"_a, "out"_a)
      .def("pool", &Plan::pool, "kind"_a, "x"_a, "out"_a)
      .def("l2_normalize", &Plan::l2_normalize, "x"_a, "eps"_a, "out"_a)
      .def("start_chain", &Plan::start_chain, "strip_rows"_a, "strip_bytes"_a)
      .def("end_chain", &Plan::end_chain)
      .def("start_sequence_chain", &Plan::start_sequence_chain, "strip_rows"_a, "strip_bytes"_a)
      .def("end_sequence_chain", &Plan::end_sequence_chain)
      .def("run", &run, "batch"_a, "logits"_a.none(),
           "Run one step of a fastserve.types.Batch; (is_valid, token_ids, logprobs, top_token_ids, top_logprobs) "
           "where it asks "
           "for sampling, which uses the logits as scratch.")
      .def(
          "view",
          [](nb::handle self, const Matrix& m, std::size_t rows) {
            const Plan& plan = nb::cast<const Plan&>(self);
            if (m.stride != m.width || !plan.holds(m, static_cast<int64_t>(rows)))
              throw std::invalid_argument("only whole values within the arena can be viewed");
            return nb::ndarray<nb::numpy, const float>(plan.data(m), {rows, static_cast<std::size_t>(m.width)}, self);
          },
          "matrix"_a, "rows"_a)
      .def("start_profile", &Plan::start_profile)
      .def("stop_profile", &Plan::stop_profile)
      .def(
          "profile",
          [](const Plan& plan) {
            std::vector<std::tuple<std::string, std::string, int64_t, double, int64_t, int64_t>> rows;
            for (const CallProfile& p : plan.profile())
              rows.emplace_back(p.name, p.shape, p.num_runs, p.seconds, p.cost.bytes, p.cost.operations);
            return rows;
          },
          "(op, shape, runs, seconds, bytes, operations) of every call in order, then of the sampling.");
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Runtime>(m, "Runtime")
      .def(nb::init<int, const std::string&>(), "num_threads"_a = 0, "isa"_a = "")
      .def_prop_ro("num_threads", [](const Runtime& r) { return r.pool.num_threads(); })
      .def_prop_ro("isa", [](const Runtime& r) { return std::string(r.kernels.name); })
      .def("decode", &decode, "format"_a, "data"_a, "count"_a);
  nb::class_<Weight>(m, "Weight")
      .def("__init__", &init_weight, "runtime"_a, "sources"_a, "format"_a, nb::kw_only(), "group_size"_a = 0,
           "activation_group_size"_a = 0, "scale_format"_a = "bf16", "offset"_a = "none", "storage"_a = "dense")
      .def_static("from_panels", &weight_from_panels, nb::keep_alive<0, 1>(), "panels"_a, "rows"_a, "depth"_a,
                  "format"_a, nb::kw_only(), "group_size"_a = 0, "activation_group_size"_a = 0,
                  "scale_format"_a = "bf16", "offset"_a = "none", "storage"_a = "dense")
      .def_prop_ro("panels",
                   [](nb::handle self) {
                     const Weight& weight = nb::cast<const Weight&>(self);
                     return nb::ndarray<nb::numpy, const uint8_t>(weight.packed().panels,
                                                                  {static_cast<std::size_t>(weight.num_bytes())}, self);
                   })
      .def(
          "stored_as",
          [](const Weight& dense, Runtime& runtime, const std::string& storage) {
            nb::gil_scoped_release release;
            return Weight(dense, parse_weight_storage(storage), runtime.pool);
          },
          "runtime"_a, "storage"_a)
      .def(
          "share_of_zeros",
          [](const Weight& dense, Runtime& runtime) {
            if (dense.packed().storage != WeightStorage::dense)
              throw std::invalid_argument("only the zeros of dense weights are counted");
            nb::gil_scoped_release release;
            return share_of_zeros(dense.packed(), runtime.pool);
          },
          "runtime"_a)
      .def("can_be_stored_as",
           [](const Weight& weight, const std::string& storage) {
             return can_be_stored(weight.packed(), parse_weight_storage(storage));
           },
           "storage"_a)
      .def_prop_ro("storage", [](const Weight& weight) { return to_name(weight.packed().storage); })
      .def_prop_ro("num_bytes", &Weight::num_bytes);
  bind_plan(m);
  m.def("sample", &sample_rows, "logits"_a, "sampling"_a);
  m.def(
      "measure_read",
      [](Runtime& runtime, int64_t working_set_bytes, double seconds) {
        nb::gil_scoped_release release;
        return measure_read(runtime.kernels, runtime.pool, working_set_bytes, seconds);
      },
      "runtime"_a, "working_set_bytes"_a, "seconds"_a, "Bytes per second of every way to read (READ_KINDS).");
  m.def(
      "measure_dot_products",
      [](Runtime& runtime, double seconds) {
        nb::gil_scoped_release release;
        return measure_dot_products(runtime.kernels, runtime.pool, seconds);
      },
      "runtime"_a, "seconds"_a, "Operations per second on bytes.");
  m.def(
      "measure_multiply_adds",
      [](Runtime& runtime, double seconds) {
        nb::gil_scoped_release release;
        return measure_multiply_adds(runtime.kernels, runtime.pool, seconds);
      },
      "runtime"_a, "seconds"_a, "Operations per second on float32.");
  m.def("evict", [](const Bytes& data) { evict(data.data(), static_cast<int64_t>(data.size())); }, "data"_a);
  m.def("runnable_isas", &runnable_isas);
  nb::class_<Cores>(m, "Cores")
      .def_ro("num_cpus", &Cores::num_cpus)
      .def_ro("num_cores", &Cores::num_cores)
      .def_ro("num_nodes", &Cores::num_nodes)
      .def_ro("quota", &Cores::quota)
      .def_prop_ro("num_threads", &Cores::num_threads);
  m.def("count_cores", &count_cores, "root"_a = "", "cpus"_a = std::vector<int>());
  m.attr("READ_KINDS") = nb::make_tuple("plain", "interleaved", "prefetched", "prefetched_interleaved", "non_temporal");
  m.attr("BLOCK_SIZE") = kBlock;
  m.attr("PACKED_LAYOUT") = packed_layout();
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("BIAS_PADDING") = kBiasPadding;
}

}  // namespace fastserve
