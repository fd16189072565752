// Every kernel of every instruction set that this CPU runs against a plain scalar reference in double precision, over
// odd sizes and misaligned memory. Without Python, so that it runs under emulators and sanitizers.
//
//   test_kernels [ISA ...]: fails where a named instruction set does not run here.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"
#include "weight.h"

namespace fastserve::test {
namespace {

constexpr int kSizes[] = {1, 15, 16, 17, 257};
constexpr double kFloatTolerance = 4e-6;

std::string at(const Kernels& k, const char* what, std::initializer_list<int> sizes) {
  std::string text = k.name;
  (text += ' ') += what;
  for (int size : sizes) (text += ' ') += std::to_string(size);
  return text;
}

float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

double activate(ActivationKind kind, double x) {
  switch (kind) {
    case ActivationKind::silu: return x / (1 + std::exp(-x));
    case ActivationKind::gelu: return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case ActivationKind::gelu_tanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case ActivationKind::relu: return std::max(x, 0.0);
    case ActivationKind::tanh: return std::tanh(x);
    case ActivationKind::sigmoid: return 1 / (1 + std::exp(-x));
  }
  return 0;
}

void test_rows(const Kernels& k, int width) {
  Random random(1);
  const std::size_t n = static_cast<std::size_t>(width);
  OddArray<float> x(n), y(n), weight(n), bias(n), out(n);
  for (auto* a : {&x, &y, &weight, &bias}) random.fill(*a);
  std::vector<double> expected(n);
  const auto check = [&](const char* what) { expect_close(out, expected, kFloatTolerance, at(k, what, {width})); };

  double mean = 0, squares = 0, variance = 0;
  for (std::size_t i = 0; i < n; ++i) mean += x[i] / double(width), squares += double(x[i]) * x[i];
  for (std::size_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / double(width);

  k.add(x.data(), y.data(), width, out.data());
  for (std::size_t i = 0; i < n; ++i) expected[i] = double(x[i]) + y[i];
  check("add");
  k.rms_norm(x.data(), weight.data(), 1e-5f, width, out.data());
  for (std::size_t i = 0; i < n; ++i) expected[i] = x[i] / std::sqrt(squares / width + 1e-5) * weight[i];
  check("rms_norm");
  k.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, width, out.data());
  for (std::size_t i = 0; i < n; ++i) expected[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i];
  check("layer_norm");
  k.l2_normalize(x.data(), 1e-12f, width, out.data());
  for (std::size_t i = 0; i < n; ++i) expected[i] = x[i] / std::sqrt(squares);
  check("l2_normalize");
  k.scale(x.data(), -1.25f, width, out.data());
  for (std::size_t i = 0; i < n; ++i) expected[i] = -1.25 * x[i];
  check("scale");
  k.soft_cap(x.data(), 1.25f, width, out.data());
  for (std::size_t i = 0; i < n; ++i) expected[i] = 1.25 * std::tanh(x[i] / 1.25);
  check("soft_cap");
  for (const ActivationKind kind : {ActivationKind::silu, ActivationKind::gelu, ActivationKind::gelu_tanh,
                                    ActivationKind::relu, ActivationKind::tanh, ActivationKind::sigmoid}) {
    k.activation(kind, x.data(), width, out.data());
    for (std::size_t i = 0; i < n; ++i) expected[i] = activate(kind, x[i]);
    check("activation");
    k.gated_activation(kind, x.data(), y.data(), width, out.data());
    for (std::size_t i = 0; i < n; ++i) expected[i] = activate(kind, x[i]) * y[i];
    check("gated_activation");
  }
}

// What is computed of a NaN is one: where elements are computed apart, there alone; else everywhere.
void test_not_a_number(const Kernels& k, int width, int place) {
  Random random(7);
  const auto n = static_cast<std::size_t>(width), at_place = static_cast<std::size_t>(place);
  OddArray<float> x(n), broken(n), weight(n), out(n);
  for (auto* a : {&x, &broken, &weight}) random.fill(*a);
  broken[at_place] = std::numeric_limits<float>::quiet_NaN();
  const auto expect_nan = [&](const char* what, bool is_everywhere) {
    for (std::size_t i = 0; i < n; ++i)
      expect(std::isnan(out[i]) == (is_everywhere || i == at_place), at(k, what, {width, place, int(i)}) + ": NaN");
  };
  k.add(x.data(), broken.data(), width, out.data());
  expect_nan("add", false);
  k.rms_norm(broken.data(), weight.data(), 1e-5f, width, out.data());
  expect_nan("rms_norm", true);
  k.layer_norm(broken.data(), weight.data(), weight.data(), 1e-5f, width, out.data());
  expect_nan("layer_norm", true);
  k.l2_normalize(broken.data(), 1e-12f, width, out.data());
  expect_nan("l2_normalize", true);
  k.scale(broken.data(), 2.0f, width, out.data());
  expect_nan("scale", false);
  k.soft_cap(broken.data(), 2.0f, width, out.data());
  expect_nan("soft_cap", false);
  for (const ActivationKind kind : {ActivationKind::silu, ActivationKind::gelu, ActivationKind::gelu_tanh,
                                    ActivationKind::relu, ActivationKind::tanh, ActivationKind::sigmoid}) {
    k.activation(kind, broken.data(), width, out.data());
    expect_nan("activation", false);
    k.gated_activation(kind, broken.data(), x.data(), width, out.data());
    expect_nan("gated_activation", false);
    k.gated_activation(kind, x.data(), broken.data(), width, out.data());
    expect_nan("gated_activation", false);
  }
  const int num_groups = (width + 31) / 32;
  OddArray<int8_t> bytes(static_cast<std::size_t>(32 * num_groups));
  OddArray<float> scales(static_cast<std::size_t>(num_groups));
  OddArray<int32_t> corrections(static_cast<std::size_t>(num_groups));
  k.quantize_row(broken.data(), width, 32 * num_groups, 32, bytes.data(), scales.data(), corrections.data());
  for (std::size_t g = 0; g < scales.size(); ++g)
    expect(std::isnan(scales[g]) == (g == at_place / 32), at(k, "quantize_row", {width, place, int(g)}) + ": NaN");
}

// Turns one head by its position's cosines and sines [dim / 2].
template <class X>
void turn(const X* x, const float* cosines, const float* sines, int head_dim, int dim, double* out) {
  const int half = dim / 2;
  std::copy_n(x, head_dim, out);
  for (int i = 0; i < half; ++i) {
    out[i] = double(x[i]) * cosines[i] - double(x[half + i]) * sines[i];
    out[half + i] = double(x[half + i]) * cosines[i] + double(x[i]) * sines[i];
  }
}

void test_rope(const Kernels& k, int head_dim, int dim) {
  Random random(2);
  constexpr int kHeads = 3;
  const std::size_t n = static_cast<std::size_t>(kHeads * head_dim), half = static_cast<std::size_t>(dim / 2);
  OddArray<float> x(n), out(n), cosines(half), sines(half);
  for (auto* a : {&x, &cosines, &sines}) random.fill(*a);
  std::vector<double> expected(n);
  for (std::size_t h = 0; h < n; h += static_cast<std::size_t>(head_dim))
    turn(x.data() + h, cosines.data(), sines.data(), head_dim, dim, expected.data() + h);
  k.rope(x.data(), cosines.data(), sines.data(), dim, head_dim, kHeads, out.data());
  expect_close(out, expected, kFloatTolerance, at(k, "rope", {head_dim, dim}));
}

// Rows of x as the kernels quantize them, and what they stand for.
struct QuantizedX {
  AlignedArray<int8_t> bytes;
  QuantizedRows rows;
  std::vector<double> values;
};

QuantizedX quantize(const Kernels& k, const OddArray<float>& x, int num_rows, const PackedWeight& w) {
  const int64_t groups_bytes = 4 * w.num_activation_groups;
  const auto values_bytes = static_cast<int64_t>(round_up(static_cast<std::size_t>(w.padded_depth), 4));
  QuantizedRows rows{nullptr, values_bytes + 2 * groups_bytes, values_bytes, values_bytes + groups_bytes};
  const int group_size = w.activation_group_size;
  QuantizedX q;
  q.bytes = allocate<int8_t>(static_cast<std::size_t>(rows.row_bytes) * static_cast<std::size_t>(num_rows));
  rows.data = q.bytes.get();
  q.rows = rows;
  for (int r = 0; r < num_rows; ++r) {
    int8_t* row = q.bytes.get() + r * rows.row_bytes;
    auto* scales = reinterpret_cast<float*>(row + rows.scales_offset);
    auto* corrections = reinterpret_cast<int32_t*>(row + rows.corrections_offset);
    k.quantize_row(x.data() + r * w.depth, w.depth, w.padded_depth, group_size, row, scales, corrections);
    for (int begin = 0, g = 0; begin < w.depth; begin += group_size, ++g) {
      const int end = std::min(w.depth, begin + group_size);
      float largest = 0;
      for (int i = begin; i < end; ++i) largest = std::fmax(largest, std::fabs(x[std::size_t(r * w.depth + i)]));
      expect(scales[g] == largest / 127.0f, at(k, "quantize_row: scale", {w.depth, group_size, g}));
      for (int i = begin; i < end; ++i) {
        const float expected = std::nearbyintf(x[std::size_t(r * w.depth + i)] * (127.0f / largest));
        expect(row[i] == static_cast<int8_t>(expected), at(k, "quantize_row", {w.depth, group_size, i}));
        q.values.push_back(double(row[i]) * scales[g]);
      }
    }
    for (int i = w.depth; i < w.padded_depth; ++i) expect(row[i] == 0, at(k, "quantize_row: padding", {w.depth, i}));
  }
  return q;
}

float round_to_f16(float x) {
  const float step = std::ldexp(1.0f, std::max(std::ilogb(x), -14) - 10);
  return std::nearbyintf(x / step) * step;
}

// What an integer format keeps of one group of a row.
void round_group(const WeightScheme& scheme, double* values, int count) {
  float low = 0, high = 0;
  for (int i = 0; i < count; ++i) {
    low = std::fmin(low, static_cast<float>(values[i]));
    high = std::fmax(high, static_cast<float>(values[i]));
  }
  const bool is_int8 = scheme.format == WeightFormat::int8, is_symmetric = scheme.offset == WeightOffset::none;
  const float exact = is_int8        ? std::fmax(-low, high) / 127.0f
                      : is_symmetric ? (-low >= high ? low : high) / -8.0f
                                     : high / 15.0f - low / 15.0f;
  if (exact == 0) return;  // nothing but zeros
  const float scale = bf16_value(round_to_bf16(exact));
  const float zero = is_int8 ? 128 : is_symmetric ? 8 : std::nearbyintf(-low / exact);
  for (int i = 0; i < count; ++i) {
    const float rounded = std::nearbyintf(static_cast<float>(values[i]) * (1.0f / scale)) + zero;
    values[i] = double(std::clamp(rounded, 0.0f, is_int8 ? 255.0f : 15.0f) - zero) * scale;
  }
}

// What a scheme keeps of one row of weights.
std::vector<double> keep(const WeightScheme& scheme, const float* row, int depth) {
  std::vector<double> kept(row, row + depth);
  const int group_size = scheme.group_size > 0 ? scheme.group_size : depth;
  switch (scheme.format) {
    case WeightFormat::f32: break;
    case WeightFormat::f16:
      for (double& v : kept) v = round_to_f16(static_cast<float>(v));
      break;
    case WeightFormat::bf16:
      for (double& v : kept) v = bf16_value(round_to_bf16(static_cast<float>(v)));
      break;
    case WeightFormat::int8:
    case WeightFormat::int4:
      for (int i = 0; i < depth; i += group_size)
        round_group(scheme, &kept[size_t(i)], std::min(group_size, depth - i));
      break;
  }
  return kept;
}

// x @ weight.T + bias for a packed weight whose rows stand for `kept`, and its rows read back. Returns the product.
std::vector<float> test_packed(const Kernels& k, const Weight& packed, const std::vector<std::vector<double>>& kept,
                               int num_rows, const std::string& name) {
  Random random(3);
  const auto size = [](int n) { return static_cast<std::size_t>(n); };
  const PackedWeight& w = packed.packed();
  const int width = w.rows, depth = w.depth;
  for (int c = 0; c < width; ++c) {
    OddArray<float> row(size(depth));
    k.embedding(w, c, row.data());
    expect_close(row, kept[size(c)], 1e-6, name + ": packed and read back");
  }

  OddArray<float> x(size(num_rows * depth)), bias(size(width));
  random.fill(x);
  random.fill(bias);
  LinearArgs args{};
  args.weight = &w;
  args.bias = bias.data();
  std::vector<double> seen(x.data(), x.data() + x.size());
  QuantizedX quantized;
  if (is_integer(w.format)) {
    quantized = quantize(k, x, num_rows, w);
    args.quantized = quantized.rows;
    seen = quantized.values;
  } else {
    args.x = x.data();
    args.x_stride = depth;
  }
  std::vector<double> expected;
  for (int r = 0; r < num_rows; ++r)
    for (int c = 0; c < width; ++c) {
      double sum = bias[size(c)];
      for (int i = 0; i < depth; ++i) sum += seen[size(r * depth + i)] * kept[size(c)][size(i)];
      expected.push_back(sum);
    }
  OddArray<float> out(size(num_rows * width)), alone(size(num_rows * width));
  args.out = out.data();
  args.out_stride = width;
  const int num_panels = (width + kPanel - 1) / kPanel;
  k.linear(args, 0, num_rows, 0, num_panels);
  expect_close(out, expected, 1e-5, name + ": linear");
  args.out = alone.data();
  for (int panel = num_panels - 1; panel >= 0; --panel)
    for (int r = 0; r < num_rows; ++r) k.linear(args, r, r + 1, panel, panel + 1);
  expect(std::memcmp(out.data(), alone.data(), out.size() * sizeof(float)) == 0, name + ": a row alone differs");
  return {out.data(), out.data() + out.size()};
}

constexpr int kFewRows = 13;  // two register tiles and a rest on every instruction set
constexpr int kManyRows = kRowBlock + 35;

// Weights rounded from float32, of which so many in a hundred are zeros; however they are stored, the bits are the same.
void test_linear(const Kernels& k, ThreadPool& pool, const WeightScheme& scheme, int depth, int width,
                 int percent_zeros = 0, int num_rows = kFewRows) {
  Random random(6);
  OddArray<float> weights(static_cast<std::size_t>(width * depth));
  random.fill(weights);
  for (std::size_t i = 0; i < weights.size(); ++i)
    if (static_cast<int>(random.below(100)) < percent_zeros) weights[i] = 0;
  const StoredMatrix stored{StoredFormat::f32, reinterpret_cast<const uint8_t*>(weights.data()),
                            static_cast<int64_t>(weights.size() * sizeof(float)), width, depth};
  std::vector<std::vector<double>> kept;
  for (int c = 0; c < width; ++c) kept.push_back(keep(scheme, weights.data() + c * depth, depth));
  const bool can_be_sparse = is_integer(scheme.format) && scheme.offset == WeightOffset::none;
  std::vector<float> dense;
  for (WeightStorage storage : {WeightStorage::dense, WeightStorage::bitmask, WeightStorage::csr}) {
    if (storage != WeightStorage::dense && !can_be_sparse) continue;
    WeightScheme stored_so = scheme;
    stored_so.storage = storage;
    const std::string name = at(k, "weights", {int(scheme.format), int(storage), int(scheme.offset), scheme.group_size,
                                               depth, width, percent_zeros, num_rows});
    const std::vector<float> product = test_packed(k, Weight({stored}, stored_so, k, pool), kept, num_rows, name);
    if (storage == WeightStorage::dense) dense = product;
    expect(std::memcmp(product.data(), dense.data(), dense.size() * sizeof(float)) == 0, name + ": not as dense");
  }
}

// Random elements of a stored format at an odd address, without infinities or NaN, and what they stand for.
struct Stored {
  OddArray<uint8_t> bytes;
  std::vector<double> values;

  Stored(StoredFormat format, int count) : bytes(static_cast<std::size_t>(stored_bytes(format, count))) {
    Random random(4);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(random.below(256));
    const auto bits_at = [&](std::size_t i) { return static_cast<uint16_t>(bytes[i] | bytes[i + 1] << 8); };
    const auto tame = [&](std::size_t i) { bytes[i + 1] &= 0xbf; };
    const auto block = static_cast<std::size_t>(stored_block(format));
    const std::size_t block_bytes = static_cast<std::size_t>(stored_bytes(format, static_cast<int64_t>(block)));
    for (std::size_t p = 0; p < bytes.size(); p += block_bytes) switch (format) {
        case StoredFormat::f32: {
          const float value = random.normal();
          std::memcpy(bytes.data() + p, &value, 4);
          values.push_back(value);
          break;
        }
        case StoredFormat::f16: tame(p), values.push_back(f16_value(bits_at(p))); break;
        case StoredFormat::bf16: tame(p), values.push_back(bf16_value(bits_at(p))); break;
        case StoredFormat::q8_0:
          tame(p);
          for (std::size_t j = 0; j < 32; ++j)
            values.push_back(static_cast<int8_t>(bytes[p + 2 + j]) * f16_value(bits_at(p)));
          break;
        case StoredFormat::q4_0:
        case StoredFormat::q4_1: {
          const bool has_minimum = format == StoredFormat::q4_1;
          tame(p);
          if (has_minimum) tame(p + 2);
          const double scale = f16_value(bits_at(p)), offset = has_minimum ? f16_value(bits_at(p + 2)) : -8 * scale;
          for (std::size_t j = 0; j < 32; ++j)
            values.push_back((bytes[p + (has_minimum ? 4 : 2) + j % 16] >> (j < 16 ? 0 : 4) & 15) * scale + offset);
          break;
        }
        default: break;  // the tests in Python compare the others with the library of their format
      }
  }
};

// Weights as a file's blocks have them.
void test_stored_linear(const Kernels& k, ThreadPool& pool, StoredFormat format, const WeightScheme& scheme, int depth,
                        int width, int num_rows = kFewRows) {
  const Stored stored(format, depth * width);
  std::vector<std::vector<double>> kept;
  for (auto row = stored.values.begin(); row != stored.values.end(); row += depth) kept.emplace_back(row, row + depth);
  const StoredMatrix matrix{format, stored.bytes.data(), static_cast<int64_t>(stored.bytes.size()), width, depth};
  test_packed(k, Weight({matrix}, scheme, k, pool), kept, num_rows,
              at(k, "stored weights", {int(format), depth, width, num_rows}));
}

void test_decode(const Kernels& k, StoredFormat format, int count) {
  const Stored stored(format, count);
  OddArray<float> out(static_cast<std::size_t>(count));
  k.decode_row(format, stored.bytes.data(), count, out.data());
  expect_close(out, stored.values, 1e-6, at(k, "decode_row", {int(format), count}));
}

// One sequence of `context` tokens, of which the last `num_rows` attend, and the pool that its keys and values go to.
// Slots that hold no token are not numbers.
struct Attention {
  static constexpr int kKvHeads = 2;

  const Kernels& k;
  int head_dim, group, context, num_rows, rotary_dim, padded, heads, num_splits;
  KvLayout kv;
  AlignedArray<uint8_t> keys, values;
  AlignedArray<float> scratch;
  std::vector<int32_t> table;
  OddArray<float> k_rows, v_rows, q, cosines, sines, out;
  AttentionArgs args{};

  static std::size_t size(int64_t n) { return static_cast<std::size_t>(n); }

  Attention(const Kernels& kernels, KvFormat format, int head_dim, int group, int context, int rotary_dim,
            bool is_causal)
      : k(kernels),
        head_dim(head_dim),
        group(group),
        context(context),
        num_rows(std::min(context, 9)),
        rotary_dim(rotary_dim),
        padded((head_dim + 15) / 16 * 16),
        heads(kKvHeads * group),
        num_splits((context + kSplit - 1) / kSplit),
        k_rows(size(context * kKvHeads * head_dim)),
        v_rows(k_rows.size()),
        q(size(num_rows * heads * head_dim)),
        cosines(size(context * (rotary_dim / 2))),
        sines(cosines.size()),
        out(q.size()) {
    const int element_bytes = format == KvFormat::f32 ? 4 : format == KvFormat::int8 ? 1 : 2;
    const int head_bytes = kBlock * (padded * element_bytes + (format == KvFormat::int8 ? 4 : 0));
    const int num_blocks = (context + kBlock - 1) / kBlock + 1;
    kv = {format, kKvHeads, head_dim, padded, head_bytes, kKvHeads * head_bytes};
    keys = allocate<uint8_t>(size(num_blocks * kv.block_bytes));
    values = allocate<uint8_t>(size(num_blocks * kv.block_bytes));
    scratch = allocate<float>(size(attention_scratch_floats(padded)));
    for (int b = num_blocks - 1; b > 0; --b) table.push_back(b);
    Random random(5);
    for (auto* a : {&k_rows, &v_rows, &q}) random.fill(*a);
    for (std::size_t i = 0; i < cosines.size(); ++i) {
      const float angle = random.normal();
      cosines[i] = std::cos(angle), sines[i] = std::sin(angle);
    }
    args.kv = kv;
    args.keys = keys.get();
    args.values = values.get();
    args.q = q.data();
    args.k = k_rows.data();
    args.v = v_rows.data();
    args.q_stride = heads * head_dim;
    args.k_stride = args.v_stride = kKvHeads * head_dim;
    args.cosines = cosines.data();
    args.sines = sines.data();
    args.rotary_dim = rotary_dim;
    args.num_heads = heads;
    args.scale = 1 / std::sqrt(static_cast<float>(head_dim));
    args.keys_before = kAllKeys;
    args.keys_after = is_causal ? 0 : kAllKeys;
  }

  AttentionTask task(int first_position, int rows, bool stores) const {
    return {table.data(), 0, rows, first_position, context, 0, num_splits, stores, -1};
  }

  void run() {
    std::fill_n(keys.get(), (table.size() + 1) * size(kv.block_bytes), 0xff);
    std::fill_n(values.get(), (table.size() + 1) * size(kv.block_bytes), 0xff);
    for (int h = 0; h < kKvHeads; ++h) {
      k.store_kv(args, task(0, context, false), h, scratch.get());
      k.attention(args, task(context - num_rows, num_rows, false), h, scratch.get(),
                  out.data() + h * group * head_dim, args.q_stride, nullptr);
    }
  }

  // The same in two steps, the second of which stores its rows' keys and values as it attends.
  std::vector<float> run_storing() {
    const int before = context - num_rows;
    std::fill_n(keys.get(), (table.size() + 1) * size(kv.block_bytes), 0xff);
    std::fill_n(values.get(), (table.size() + 1) * size(kv.block_bytes), 0xff);
    std::vector<float> stored(q.size());
    AttentionArgs last = args;
    last.k += before * args.k_stride;
    last.v += before * args.v_stride;
    for (int h = 0; h < kKvHeads; ++h) {
      if (before > 0) k.store_kv(args, task(0, before, false), h, scratch.get());
      k.attention(last, task(before, num_rows, true), h, scratch.get(), stored.data() + h * group * head_dim,
                  args.q_stride, nullptr);
    }
    return stored;
  }

  // The last row, a split at a time and merged.
  std::vector<float> run_splits() {
    const int64_t stride = partial_floats(padded);
    OddArray<float> partials(size(num_splits * heads * stride));
    std::vector<float> merged(size(heads * head_dim));
    AttentionTask split = task(context - 1, 1, false);
    split.first_row = num_rows - 1;
    for (int h = 0; h < kKvHeads; ++h)
      for (int s = 0; s < num_splits; ++s) {
        split.first_split = s, split.end_split = s + 1;
        k.attention(args, split, h, scratch.get(), nullptr, 0, partials.data() + (s * heads + h * group) * stride);
      }
    for (int h = 0; h < heads; ++h)
      k.merge_attention(partials.data() + h * stride, heads * stride, num_splits, head_dim, padded,
                        merged.data() + h * head_dim);
    return merged;
  }

  // Rows of q or k from a position on, turned.
  std::vector<double> turned(const OddArray<float>& x, int first_position, int num_heads) const {
    std::vector<double> rows(x.size());
    for (int at = 0; at < static_cast<int>(x.size()); at += head_dim) {
      const int angles = (first_position + at / (num_heads * head_dim)) * (rotary_dim / 2);
      turn(x.data() + at, cosines.data() + angles, sines.data() + angles, head_dim, rotary_dim, rows.data() + at);
    }
    return rows;
  }

  std::vector<double> reference() const {
    const std::vector<double> queries = turned(q, context - num_rows, heads), all_keys = turned(k_rows, 0, kKvHeads);
    std::vector<double> expected(q.size());
    for (int r = 0; r < num_rows; ++r)
      for (int h = 0; h < heads; ++h) {
        const int position = context - num_rows + r, kv_column = h / group * head_dim;
        const int seen = std::max(args.first_key, position - args.keys_before);
        const int visible = position + 1 + std::min(args.keys_after, context - 1 - position);
        const double* query = queries.data() + (r * heads + h) * head_dim;
        std::vector<double> weights;
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        for (int t = seen; t < visible; ++t) {
          const double* key = all_keys.data() + t * kKvHeads * head_dim + kv_column;
          double score = 0;
          for (int d = 0; d < head_dim; ++d) score += query[d] * key[d];
          score *= args.scale;
          if (args.soft_cap > 0) score = args.soft_cap * std::tanh(score / args.soft_cap);
          if (args.bias) score += args.bias[h * args.bias_stride + args.bias_reach + t - position];
          weights.push_back(score);
          largest = std::max(largest, weights.back());
        }
        for (double& weight : weights) total += weight = std::exp(weight - largest);
        for (int t = seen; t < visible; ++t)
          for (int d = 0; d < head_dim; ++d)
            expected[size((r * heads + h) * head_dim + d)] +=
                weights[size(t - seen)] / total * v_rows[size(t * kKvHeads * head_dim + kv_column + d)];
      }
    return expected;
  }
};

// As the reference has it, and the same bits whatever way it is computed.
void check_attention(Attention& a, const std::string& where) {
  a.run();
  const KvFormat format = a.kv.format;
  const double tolerance = format == KvFormat::f32 ? 1e-5 : format == KvFormat::f16 ? 4e-3 : 3e-2;
  expect_close(a.out, a.reference(), tolerance, where);
  const std::vector<float> merged = a.run_splits(), stored = a.run_storing();
  expect(std::equal(stored.begin(), stored.end(), a.out.data()), where + ": of keys stored on the way differs");
  expect(std::equal(merged.begin(), merged.end(), a.out.data() + a.out.size() - merged.size()),
         where + ": merged splits differ");
}

void test_attention(const Kernels& k, KvFormat format, int head_dim, int group, int context, int rotary_dim,
                    bool is_causal) {
  Attention a(k, format, head_dim, group, context, rotary_dim, is_causal);
  const std::string where = at(k, "attention", {int(format), head_dim, group, context, rotary_dim, is_causal});
  check_attention(a, where);
}

// Rows see keys within a window alone, by capped scores with a bias of distances. The blocks before it may be anything.
void test_attention_in_window(const Kernels& k, KvFormat format, int head_dim, int group, int context, int before,
                              int after) {
  Attention a(k, format, head_dim, group, context, 0, after == 0);
  const int stride = 2 * context - 1 + kBiasPadding;
  OddArray<float> bias(Attention::size(a.heads * stride));
  Random(6).fill(bias);
  a.args.keys_before = before;
  a.args.keys_after = after;
  a.args.soft_cap = 0.7f;
  a.args.bias = bias.data();
  a.args.bias_stride = stride;
  a.args.bias_reach = context - 1;
  const std::string where = at(k, "attention in a window", {int(format), head_dim, group, context, before, after});
  check_attention(a, where);
  const int first_seen = std::max(0, context - a.num_rows - before);
  for (int block = 0; block < first_seen / kBlock; ++block) a.table[Attention::size(block)] = 1 << 24;  // nowhere
  OddArray<float> whole(a.out.size());
  std::copy_n(a.out.data(), a.out.size(), whole.data());
  for (int h = 0; h < Attention::kKvHeads; ++h)
    k.attention(a.args, a.task(context - a.num_rows, a.num_rows, false), h, a.scratch.get(),
                a.out.data() + h * group * head_dim, a.args.q_stride, nullptr);
  expect(std::equal(whole.data(), whole.data() + whole.size(), a.out.data()), where + ": reads other blocks");
}

// Nobody sees the slots before the first key, whatever is in them.
void test_attention_after_empty_slots(const Kernels& k, KvFormat format, int group, int context, int first_key,
                                      int before) {
  constexpr int kHeadDim = 18;
  Attention a(k, format, kHeadDim, group, context, kHeadDim, true);
  a.args.first_key = first_key;
  a.args.keys_before = before;
  const std::string where = at(k, "attention after empty slots", {int(format), group, context, first_key, before});
  const int row = Attention::kKvHeads * kHeadDim;
  std::fill_n(a.v_rows.data(), first_key * row, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(a.k_rows.data(), first_key * row, std::numeric_limits<float>::quiet_NaN());
  check_attention(a, where);
}

// A NaN among the keys or the values is seen by the rows that attend to it, in all of a key head's queries, and by no
// others.
void test_attention_of_nan(const Kernels& k, KvFormat format, bool is_in_keys) {
  constexpr int kContext = 40, kPlace = 35;
  Attention a(k, format, 18, 3, kContext, 18, true);
  a.run();
  const std::vector<float> whole(a.out.data(), a.out.data() + a.out.size());
  const int heads = a.heads, group = a.group, head_dim = a.head_dim;
  (is_in_keys ? a.k_rows : a.v_rows)[Attention::size(kPlace * Attention::kKvHeads * head_dim + 7)] =
      std::numeric_limits<float>::quiet_NaN();
  a.run();
  for (int r = 0; r < a.num_rows; ++r)
    for (int h = 0; h < heads; ++h) {
      const float* row = a.out.data() + (r * heads + h) * head_dim;
      const bool sees = kContext - a.num_rows + r >= kPlace && h < group;
      const bool has_nan = std::any_of(row, row + head_dim, [](float value) { return std::isnan(value); });
      const std::string where = at(k, "attention of NaN", {int(format), is_in_keys, r, h});
      expect(has_nan == sees, where + (sees ? ": is lost" : ": is seen"));
      if (!sees) expect(std::equal(row, row + head_dim, whole.data() + (r * heads + h) * head_dim), where);
    }
}

// What measures the machine's limits: that it reads, and computes, what it says.
void test_peak(const Kernels& k) {
  constexpr int kCount = 4096;  // whole steps of every kernel
  Random random(8);
  OddArray<float> floats(kCount);
  double total = 0;
  for (std::size_t i = 0; i < floats.size(); ++i) total += floats[i] = static_cast<float>(random.below(64));
  for (ReadKind kind : {ReadKind::plain, ReadKind::interleaved, ReadKind::prefetched,
                        ReadKind::prefetched_interleaved, ReadKind::non_temporal})
    expect(double(k.read_memory(kind, floats.data(), kCount)) == total, at(k, "read_memory", {int(kind)}));

  OddArray<int8_t> bytes(64);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<int8_t>(random.below(255) - 127);
  OddArray<float> x(16);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = i % 2 == 0 ? 0.25f : -0.25f;
  float none, some, twice;
  int64_t operations = k.dot_products(16, bytes.data(), &some);
  expect(operations > 0 && k.dot_products(32, bytes.data(), &twice) == 2 * operations, at(k, "dot_products", {}));
  expect(k.dot_products(0, bytes.data(), &none) == 0 && some != none && twice - none == 2 * (some - none),
         at(k, "dot_products: sums", {}));
  operations = k.multiply_adds(16, x.data(), &some);
  expect(operations > 0 && k.multiply_adds(32, x.data(), &twice) == 2 * operations, at(k, "multiply_adds", {}));
  expect(k.multiply_adds(0, x.data(), &none) == 0 && some == none && twice == none, at(k, "multiply_adds: sums", {}));
  k.multiply_adds(1, x.data(), &some);
  expect(some != none, at(k, "multiply_adds: one", {}));
}

void test_all(const Kernels& k, ThreadPool& pool) {
  for (int width : kSizes) {
    test_rows(k, width);
    for (int place : {0, width / 2, width - 1}) test_not_a_number(k, width, place);
  }
  for (int head_dim : {2, 18, 64, 80})
    for (int dim : {2, head_dim}) test_rope(k, head_dim, dim);
  constexpr ScaleFormat kBf16 = ScaleFormat::bf16, kF16 = ScaleFormat::f16;
  constexpr WeightOffset kNone = WeightOffset::none, kZero = WeightOffset::zero_point;
  for (int depth : kSizes)
    for (int width : {1, 15, 17, 64, 130}) {
      for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16})
        test_linear(k, pool, {format, kBf16, kNone, 0, 0}, depth, width);
      for (int group_size : {0, 32, 64, 128}) {
        const int activations = group_size == 32 ? 32 : 64;
        for (int percent_zeros : {0, 60, 95, 100}) {
          test_linear(k, pool, {WeightFormat::int8, kBf16, kNone, group_size, activations}, depth, width, percent_zeros);
          test_linear(k, pool, {WeightFormat::int4, kBf16, kNone, group_size, activations}, depth, width, percent_zeros);
        }
        test_linear(k, pool, {WeightFormat::int4, kBf16, kZero, group_size, activations}, depth, width);
      }
    }
  for (int depth : {32, 96, 288})
    for (int width : {1, 17, 130}) {
      test_stored_linear(k, pool, StoredFormat::q8_0, {WeightFormat::int8, kF16, kNone, 32, 32}, depth, width);
      test_stored_linear(k, pool, StoredFormat::q4_0, {WeightFormat::int4, kF16, kNone, 32, 32}, depth, width);
      test_stored_linear(k, pool, StoredFormat::q4_1, {WeightFormat::int4, kF16, WeightOffset::minimum, 32, 32}, depth,
                         width);
    }
  // More rows than a block: integers are unpacked, or expanded, once for many.
  for (int depth : {17, 257, 576}) {
    for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16})
      test_linear(k, pool, {format, kBf16, kNone, 0, 0}, depth, 70, 0, kManyRows);
    for (int group_size : {0, 32, 64, 128}) {
      const int activations = group_size == 32 ? 32 : 64;
      for (WeightFormat format : {WeightFormat::int8, WeightFormat::int4})
        test_linear(k, pool, {format, kBf16, kNone, group_size, activations}, depth, 70, 60, kManyRows);
      test_linear(k, pool, {WeightFormat::int4, kBf16, kZero, group_size, activations}, depth, 70, 0, kManyRows);
    }
  }
  test_stored_linear(k, pool, StoredFormat::q4_1, {WeightFormat::int4, kF16, WeightOffset::minimum, 32, 32}, 288, 70,
                     kManyRows);
  for (StoredFormat format : {StoredFormat::f32, StoredFormat::f16, StoredFormat::bf16})
    for (int count : kSizes) test_decode(k, format, count);
  for (StoredFormat format : {StoredFormat::q8_0, StoredFormat::q4_0, StoredFormat::q4_1})
    for (int count : {32, 96}) test_decode(k, format, count);
  for (int head_dim : {1, 18, 64})
    for (int group : {1, 3})
      for (int context : {1, 31, 33, 257, 600})
        for (bool is_causal : {true, false})
          for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
            for (int rotary_dim : head_dim > 2 ? std::vector{0, head_dim - 2} : std::vector{0})
              test_attention(k, format, head_dim, group, context, rotary_dim, is_causal);
  for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
    for (int group : {1, 3})
      for (int context : {1, 33, 257, 600})
        for (int before : {0, 3, 40, 256, 300, int(kAllKeys)})
          for (int after : {0, 3, int(kAllKeys)})
            test_attention_in_window(k, format, 18, group, context, before, after);
  for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
    for (bool is_in_keys : {true, false}) test_attention_of_nan(k, format, is_in_keys);
  for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
    for (int context : {40, 300})
      for (int first_key : {1, 12, 31})
        for (int before : {25, kAllKeys}) test_attention_after_empty_slots(k, format, 3, context, first_key, before);
  test_peak(k);
}

}  // namespace
}  // namespace fastserve::test

int main(int argc, char** argv) {
  using namespace fastserve;
  ThreadPool pool(1);
  test::for_each_isa(argc, argv, [&](const Kernels& kernels) { test::test_all(kernels, pool); });
  return test::finish("kernels");
}
