#include "weight.h"

#include <stdexcept>

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
    if (weight_.format == WeightFormat::int8) std::memset(out, 128, static_cast<std::size_t>(weight_.panel_bytes));
    for (int32_t row = panel * kPanel; row < weight_.rows && row < (panel + 1) * kPanel; ++row) {
      decode(row, values);
      kernels_.pack_row(weight_, values, out, row % kPanel, weight_.scales + row);
    }
  }

 private:
  void decode(int32_t row, float* out) const {
    for (const StoredMatrix& source : sources_) {
      if (row < source.rows) {
        const int64_t row_bytes = stored_bytes(source.format, source.depth);
        return kernels_.decode_row(source.format, source.data + row * row_bytes, source.depth, out);
      }
      row -= source.rows;
    }
  }

  const std::vector<StoredMatrix>& sources_;
  const PackedWeight& weight_;
  const Kernels& kernels_;
  std::vector<AlignedArray<float>> rows_;
};

void check(const StoredMatrix& source, int32_t depth) {
  if (source.depth != depth)
    throw std::invalid_argument("stacked weights differ in depth: " + std::to_string(source.depth) + " and " +
                                std::to_string(depth));
  if (depth % stored_block(source.format) != 0)
    throw std::invalid_argument("a depth of " + std::to_string(depth) + " is not a whole number of blocks");
  const int64_t expected = stored_bytes(source.format, static_cast<int64_t>(source.rows) * depth);
  if (source.num_bytes != expected)
    throw std::invalid_argument("a stored matrix has " + std::to_string(source.num_bytes) + " bytes; its shape needs " +
                                std::to_string(expected));
}

}  // namespace

StoredFormat parse_stored_format(const std::string& name) {
  static const Named<StoredFormat> table[] = {{"f32", StoredFormat::f32},   {"f16", StoredFormat::f16},
                                              {"bf16", StoredFormat::bf16}, {"q8_0", StoredFormat::q8_0},
                                              {"q4_0", StoredFormat::q4_0}, {"q4_1", StoredFormat::q4_1}};
  return parse("stored format", name, table);
}

WeightFormat parse_weight_format(const std::string& name) {
  static const Named<WeightFormat> table[] = {
      {"f32", WeightFormat::f32}, {"bf16", WeightFormat::bf16}, {"int8", WeightFormat::int8}};
  return parse("weight format", name, table);
}

KvFormat parse_kv_format(const std::string& name) {
  static const Named<KvFormat> table[] = {{"f32", KvFormat::f32}, {"f16", KvFormat::f16}};
  return parse("KV format", name, table);
}

ActivationKind parse_activation(const std::string& name) {
  static const Named<ActivationKind> table[] = {{"silu", ActivationKind::silu},
                                                {"gelu", ActivationKind::gelu},
                                                {"gelu_tanh", ActivationKind::gelu_tanh},
                                                {"relu", ActivationKind::relu},
                                                {"tanh", ActivationKind::tanh}};
  return parse("activation", name, table);
}

int32_t stored_block(StoredFormat format) {
  return format == StoredFormat::f32 || format == StoredFormat::f16 || format == StoredFormat::bf16 ? 1 : 32;
}

int64_t stored_bytes(StoredFormat format, int64_t count) {
  switch (format) {
    case StoredFormat::f32: return count * 4;
    case StoredFormat::f16:
    case StoredFormat::bf16: return count * 2;
    case StoredFormat::q8_0: return count / 32 * 34;
    case StoredFormat::q4_0: return count / 32 * 18;
    case StoredFormat::q4_1: return count / 32 * 20;
  }
  throw std::invalid_argument("unknown stored format");
}

Weight::Weight(const std::vector<StoredMatrix>& sources, WeightFormat format, int32_t group_size,
               const Kernels& kernels, ThreadPool& pool) {
  if (sources.empty()) throw std::invalid_argument("a weight needs at least one stored matrix");
  const int32_t depth = sources[0].depth;
  int64_t rows = 0;
  for (const StoredMatrix& source : sources) {
    check(source, depth);
    rows += source.rows;
  }
  packed_.format = format;
  packed_.rows = static_cast<int32_t>(rows);
  packed_.depth = depth;
  packed_.padded_depth = static_cast<int32_t>(round_up(static_cast<std::size_t>(depth), 4));
  packed_.group_size = group_size > 0 ? group_size : packed_.padded_depth;
  if (packed_.group_size % 4 != 0)
    throw std::invalid_argument("a group of " + std::to_string(group_size) + " columns is not a multiple of 4");
  packed_.num_groups = (packed_.padded_depth + packed_.group_size - 1) / packed_.group_size;

  const std::size_t num_panels = round_up(static_cast<std::size_t>(rows), kPanel) / kPanel;
  const int64_t element_bytes = format == WeightFormat::f32 ? 4 : format == WeightFormat::bf16 ? 2 : 1;
  packed_.panel_bytes = element_bytes * kPanel * (format == WeightFormat::int8 ? packed_.padded_depth : depth);
  panels_ = allocate<uint8_t>(num_panels * static_cast<std::size_t>(packed_.panel_bytes));
  num_bytes_ = static_cast<int64_t>(num_panels) * packed_.panel_bytes;
  if (format == WeightFormat::int8) {
    scales_ = allocate<uint16_t>(num_panels * kPanel);
    num_bytes_ += static_cast<int64_t>(num_panels * kPanel * sizeof(uint16_t));
  }
  packed_.panels = panels_.get();
  packed_.scales = scales_.get();

  PackJob job(sources, packed_, kernels, pool.num_threads());
  pool.run(job);
}

}  // namespace fastserve
