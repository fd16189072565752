#include "weight.h"

#include <stdexcept>

#include "sparse_weight.h"

namespace fastserve {
namespace {

template <class Enum>
struct Named {
  const char* name;
  Enum value;
};

template <class Enum, std::size_t N>
Enum parse(const char* what, const std::string& name, const Named<Enum> (&table)[N]) {
  for (const Named<Enum>& entry : table)
    if (name == entry.name) return entry.value;
  throw std::invalid_argument("unknown " + std::string(what) + " '" + name + "'");
}

// float16 scales are those of the file: numbers are moved, not rounded.
bool keeps_blocks(const PackedWeight& w) { return is_integer(w.format) && w.scale_format == ScaleFormat::f16; }

int64_t row_bytes(const StoredMatrix& source, const PackedWeight& w) {
  if (source.format != StoredFormat::groups) return stored_bytes(source.format, source.depth);
  return w.num_groups * (w.offset == WeightOffset::none ? 2 : 4) + static_cast<int64_t>(w.padded_depth);
}

// Packs one panel a tile.
class PackJob : public Job {
 public:
  PackJob(const std::vector<StoredMatrix>& sources, const PackedWeight& weight, const Kernels& kernels, int num_threads)
      : sources_(sources), weight_(weight), kernels_(kernels) {
    for (int thread = 0; thread < num_threads; ++thread)
      rows_.emplace_back(allocate<float>(static_cast<std::size_t>(weight.depth)));
  }
  int num_stages() const override { return 1; }
  int num_tiles(int) const override { return (weight_.rows + kPanel - 1) / kPanel; }
  void run_tile(int, int panel, int thread) override {
    uint8_t* out = weight_.panels + panel * weight_.panel_bytes;
    float* values = rows_[static_cast<std::size_t>(thread)].get();
    for (int32_t row = panel * kPanel; row < weight_.rows && row < (panel + 1) * kPanel; ++row) pack(row, values, out);
  }

 private:
  void pack(int32_t row, float* values, uint8_t* out) const {
    int32_t at = row;
    for (const StoredMatrix& source : sources_) {
      if (at >= source.rows) {
        at -= source.rows;
        continue;
      }
      const uint8_t* stored = source.data + at * row_bytes(source, weight_);
      if (keeps_blocks(weight_) || source.format == StoredFormat::groups) return kernels_.pack_blocks(weight_, source.format, stored, out, row % kPanel);
      kernels_.decode_row(source.format, stored, source.depth, values);
      return kernels_.pack_row(weight_, values, out, row % kPanel);
    }
  }

  const std::vector<StoredMatrix>& sources_;
  const PackedWeight& weight_;
  const Kernels& kernels_;
  std::vector<AlignedArray<float>> rows_;
};

void check(const StoredMatrix& source, int32_t depth, const PackedWeight& weight) {
  if (source.depth != depth)
    throw std::invalid_argument("stacked weights differ in depth: " + std::to_string(source.depth) + " and " +
                                std::to_string(depth));
  if (depth % stored_block(source.format) != 0)
    throw std::invalid_argument("a depth of " + std::to_string(depth) + " is not a whole number of blocks");
  if (source.format == StoredFormat::groups && !is_integer(weight.format))
    throw std::invalid_argument("groups of whole numbers are packed into integer weights");
  const int64_t expected = source.rows * row_bytes(source, weight);
  if (source.num_bytes != expected)
    throw std::invalid_argument("a stored matrix has " + std::to_string(source.num_bytes) + " bytes; its shape needs " +
                                std::to_string(expected));
  if (!keeps_blocks(weight) || source.format == StoredFormat::groups) return;
  const StoredFormat f = source.format;
  const bool is_kept = weight.group_size == 32 && weight.offset != WeightOffset::zero_point &&
                       (weight.format == WeightFormat::int8
                           ? f == StoredFormat::q8_0 || f == StoredFormat::q5_0 || f == StoredFormat::iq4_nl
                           : f == (weight.offset == WeightOffset::minimum ? StoredFormat::q4_1 : StoredFormat::q4_0));
  if (!is_kept) throw std::invalid_argument("a stored matrix has no blocks of the kind to keep");
}

// 0, or a size that divides both a chunk of columns and, of weights, into groups of activations.
void check(const WeightScheme& s) {
  const auto is_group = [](int32_t size) { return size == 0 || (size >= 32 && 256 % size == 0); };
  const bool is_divided =
      s.group_size == 0 || (s.activation_group_size > 0 && s.group_size % s.activation_group_size == 0);
  if (!is_group(s.group_size) || !is_group(s.activation_group_size) || !is_divided)
    throw std::invalid_argument("groups of " + std::to_string(s.group_size) + " columns, of activations " +
                                std::to_string(s.activation_group_size) + ", are not supported");
  if (s.format == WeightFormat::int4 && s.activation_group_size == 0)
    throw std::invalid_argument("int4 weights need groups of activations");
  if (s.format == WeightFormat::int8 && s.offset != WeightOffset::none)
    throw std::invalid_argument("int8 weights have no offsets");
  if (s.scale_format == ScaleFormat::bf16 && s.offset == WeightOffset::minimum)
    throw std::invalid_argument("minimums are those of stored blocks, with float16 scales");
}

constexpr Named<WeightStorage> kStorages[] = {
    {"dense", WeightStorage::dense}, {"bitmask", WeightStorage::bitmask}, {"csr", WeightStorage::csr}};

void check_storage(const PackedWeight& w, WeightStorage storage) {
  if (!can_be_stored(w, storage))
    throw std::invalid_argument(std::string(to_name(storage)) +
                                " weights are integers without offsets that meet activations in groups of " +
                                (storage == WeightStorage::csr ? "32 or 64" : "up to 256") + " columns");
}

}  // namespace

StoredFormat parse_stored_format(const std::string& name) {
  static const Named<StoredFormat> table[] = {{"f32", StoredFormat::f32},   {"f16", StoredFormat::f16},
                                              {"bf16", StoredFormat::bf16}, {"q8_0", StoredFormat::q8_0},
                                              {"q4_0", StoredFormat::q4_0}, {"q4_1", StoredFormat::q4_1},
                                              {"q5_0", StoredFormat::q5_0}, {"q5_1", StoredFormat::q5_1},
                                              {"q2_k", StoredFormat::q2_k}, {"q3_k", StoredFormat::q3_k},
                                              {"q4_k", StoredFormat::q4_k}, {"q5_k", StoredFormat::q5_k},
                                              {"q6_k", StoredFormat::q6_k}, {"iq4_nl", StoredFormat::iq4_nl},
                                              {"groups", StoredFormat::groups}};
  return parse("stored format", name, table);
}

WeightFormat parse_weight_format(const std::string& name) {
  static const Named<WeightFormat> table[] = {{"f32", WeightFormat::f32},
                                              {"f16", WeightFormat::f16},
                                              {"bf16", WeightFormat::bf16},
                                              {"int8", WeightFormat::int8},
                                              {"int4", WeightFormat::int4}};
  return parse("weight format", name, table);
}

ScaleFormat parse_scale_format(const std::string& name) {
  static const Named<ScaleFormat> table[] = {{"bf16", ScaleFormat::bf16}, {"f16", ScaleFormat::f16}};
  return parse("format of scales", name, table);
}

WeightStorage parse_weight_storage(const std::string& name) {
  return parse("storage", name, kStorages);
}

const char* to_name(WeightStorage storage) {
  for (const auto& entry : kStorages)
    if (entry.value == storage) return entry.name;
  throw std::invalid_argument("unknown storage");
}

WeightOffset parse_weight_offset(const std::string& name) {
  static const Named<WeightOffset> table[] = {
      {"none", WeightOffset::none}, {"zero_point", WeightOffset::zero_point}, {"minimum", WeightOffset::minimum}};
  return parse("offset", name, table);
}

KvFormat parse_kv_format(const std::string& name) {
  static const Named<KvFormat> table[] = {
      {"f32", KvFormat::f32}, {"f16", KvFormat::f16}, {"bf16", KvFormat::bf16}, {"int8", KvFormat::int8}};
  return parse("KV format", name, table);
}

ActivationKind parse_activation(const std::string& name) {
  static const Named<ActivationKind> table[] = {{"silu", ActivationKind::silu},
                                                {"gelu", ActivationKind::gelu},
                                                {"gelu_tanh", ActivationKind::gelu_tanh},
                                                {"relu", ActivationKind::relu},
                                                {"tanh", ActivationKind::tanh},
                                                {"sigmoid", ActivationKind::sigmoid}};
  return parse("activation", name, table);
}

namespace {

struct Block {
  int32_t elements;
  int32_t bytes;
};

Block block_of(StoredFormat format) {
  switch (format) {
    case StoredFormat::f32: return {1, 4};
    case StoredFormat::f16:
    case StoredFormat::bf16: return {1, 2};
    case StoredFormat::q8_0: return {32, 34};
    case StoredFormat::q4_0:
    case StoredFormat::iq4_nl: return {32, 18};
    case StoredFormat::q4_1: return {32, 20};
    case StoredFormat::q5_0: return {32, 22};
    case StoredFormat::q5_1: return {32, 24};
    case StoredFormat::q2_k: return {256, 84};
    case StoredFormat::q3_k: return {256, 110};
    case StoredFormat::q4_k: return {256, 144};
    case StoredFormat::q5_k: return {256, 176};
    case StoredFormat::q6_k: return {256, 210};
    case StoredFormat::groups: return {1, 0};  // their bytes depend on the weight
  }
  throw std::invalid_argument("unknown stored format");
}

}  // namespace

int32_t stored_block(StoredFormat format) { return block_of(format).elements; }

int64_t stored_bytes(StoredFormat format, int64_t count) {
  const Block block = block_of(format);
  return count / block.elements * block.bytes;
}

const char* packed_layout() { return FASTSERVE_PACKED_LAYOUT; }

Weight::Weight(const std::vector<StoredMatrix>& sources, const WeightScheme& scheme, const Kernels& kernels,
               ThreadPool& pool) {
  if (sources.empty()) throw std::invalid_argument("a weight needs at least one stored matrix");
  int64_t rows = 0;
  for (const StoredMatrix& source : sources) rows += source.rows;
  describe(rows, sources[0].depth, scheme);
  for (const StoredMatrix& source : sources) check(source, packed_.depth, packed_);
  panels_ = allocate<uint8_t>(static_cast<std::size_t>(num_bytes_));
  packed_.panels = panels_.get();
  PackJob job(sources, packed_, kernels, pool.num_threads());
  pool.run(job);
  if (scheme.storage != WeightStorage::dense) store_sparse(PackedWeight(packed_), scheme.storage, pool);
}

Weight::Weight(const Weight& dense, WeightStorage storage, ThreadPool& pool) {
  if (dense.packed_.storage != WeightStorage::dense || storage == WeightStorage::dense)
    throw std::invalid_argument("only dense weights are stored in another way");
  check_storage(dense.packed_, storage);
  store_sparse(dense.packed_, storage, pool);
}

void Weight::store_sparse(const PackedWeight& dense, WeightStorage storage, ThreadPool& pool) {
  packed_ = describe_sparse(dense, storage);
  Panels panels = make_sparse(dense, packed_, pool);
  panels_ = std::move(panels.data);
  packed_.panels = panels_.get();
  num_bytes_ = panels.num_bytes;
}

Weight::Weight(const uint8_t* panels, int64_t num_bytes, int32_t rows, int32_t depth, const WeightScheme& scheme) {
  describe(rows, depth, scheme);
  if (reinterpret_cast<std::uintptr_t>(panels) % kAlignment != 0)
    throw std::invalid_argument("packed weights are not aligned to " + std::to_string(kAlignment) + " bytes");
  if (scheme.storage != WeightStorage::dense) {
    packed_ = describe_sparse(packed_, scheme.storage);
    num_bytes_ = sparse_bytes(packed_, panels, num_bytes);
    if (num_bytes_ == 0) throw std::invalid_argument("packed weights are no whole " + std::string(to_name(scheme.storage)));
  }
  if (num_bytes != num_bytes_)
    throw std::invalid_argument("packed weights have " + std::to_string(num_bytes) + " bytes; their shape needs " +
                                std::to_string(num_bytes_));
  packed_.panels = const_cast<uint8_t*>(panels);  // nothing writes them once they are packed
}

// Everything but the panels, as dense weights have it.
void Weight::describe(int64_t rows, int32_t depth, const WeightScheme& scheme) {
  check(scheme);
  PackedWeight& w = packed_;
  w.format = scheme.format;
  w.storage = WeightStorage::dense;
  w.scale_format = scheme.scale_format;
  w.offset = scheme.offset;
  w.depth = depth;
  w.rows = static_cast<int32_t>(rows);
  w.padded_depth = static_cast<int32_t>(round_up(static_cast<std::size_t>(w.depth), kDepthAlignment));
  const auto count = [&](int32_t group_size) { return (w.padded_depth + group_size - 1) / group_size; };
  w.group_size = scheme.group_size > 0 ? scheme.group_size : w.padded_depth;
  w.num_groups = count(w.group_size);
  w.activation_group_size = scheme.activation_group_size > 0 ? scheme.activation_group_size : w.padded_depth;
  w.num_activation_groups = count(w.activation_group_size);

  const int64_t bits = w.format == WeightFormat::f32    ? 32
                       : w.format == WeightFormat::int8 ? 8
                       : w.format == WeightFormat::int4 ? 4
                                                        : 16;
  const int64_t group_bytes = is_integer(w.format) ? w.num_groups * kPanel * static_cast<int64_t>(sizeof(uint16_t)) : 0;
  w.scales_offset = (is_integer(w.format) ? w.padded_depth : w.depth) * bits / 8 * kPanel;
  w.offsets_offset = w.scales_offset + group_bytes;
  w.panel_bytes = w.offsets_offset + (w.offset == WeightOffset::none ? 0 : group_bytes);
  const std::size_t num_panels = round_up(static_cast<std::size_t>(rows), kPanel) / kPanel;
  num_bytes_ = static_cast<int64_t>(num_panels) * w.panel_bytes;
  check_storage(w, scheme.storage);
}

}  // namespace fastserve
