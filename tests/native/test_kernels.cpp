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
  for (const ActivationKind kind : {ActivationKind::silu, ActivationKind::gelu, ActivationKind::gelu_tanh,
                                    ActivationKind::relu, ActivationKind::tanh}) {
    k.activation(kind, x.data(), width, out.data());
    for (std::size_t i = 0; i < n; ++i) expected[i] = activate(kind, x[i]);
    check("activation");
    k.gated_activation(kind, x.data(), y.data(), width, out.data());
    for (std::size_t i = 0; i < n; ++i) expected[i] = activate(kind, x[i]) * y[i];
    check("gated_activation");
  }
}

void test_rope(const Kernels& k, int head_dim, int dim) {
  Random random(2);
  constexpr int kHeads = 3;
  const std::size_t n = static_cast<std::size_t>(kHeads * head_dim), half = static_cast<std::size_t>(dim / 2);
  OddArray<float> x(n), out(n), cosines(half), sines(half);
  for (auto* a : {&x, &cosines, &sines}) random.fill(*a);
  std::vector<double> expected(n);
  for (std::size_t h = 0; h < n; h += static_cast<std::size_t>(head_dim)) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(head_dim); ++i) expected[h + i] = x[h + i];
    for (std::size_t i = 0; i < half; ++i) {
      const double a = x[h + i], b = x[h + half + i];
      expected[h + i] = a * cosines[i] - b * sines[i];
      expected[h + half + i] = b * cosines[i] + a * sines[i];
    }
  }
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
                               const std::string& name) {
  Random random(3);
  constexpr int kRows = 13;  // two register tiles and a rest on every instruction set
  const auto size = [](int n) { return static_cast<std::size_t>(n); };
  const PackedWeight& w = packed.packed();
  const int width = w.rows, depth = w.depth;
  for (int c = 0; c < width; ++c) {
    OddArray<float> row(size(depth));
    k.embedding(w, c, row.data());
    expect_close(row, kept[size(c)], 1e-6, name + ": packed and read back");
  }

  OddArray<float> x(size(kRows * depth)), bias(size(width));
  random.fill(x);
  random.fill(bias);
  LinearArgs args{};
  args.weight = &w;
  args.bias = bias.data();
  std::vector<double> seen(x.data(), x.data() + x.size());
  QuantizedX quantized;
  if (is_integer(w.format)) {
    quantized = quantize(k, x, kRows, w);
    args.quantized = quantized.rows;
    seen = quantized.values;
  } else {
    args.x = x.data();
    args.x_stride = depth;
  }
  std::vector<double> expected;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < width; ++c) {
      double sum = bias[size(c)];
      for (int i = 0; i < depth; ++i) sum += seen[size(r * depth + i)] * kept[size(c)][size(i)];
      expected.push_back(sum);
    }
  OddArray<float> out(size(kRows * width)), alone(size(kRows * width));
  args.out = out.data();
  args.out_stride = width;
  const int num_panels = (width + kPanel - 1) / kPanel;
  k.linear(args, 0, kRows, 0, num_panels);
  expect_close(out, expected, 1e-5, name + ": linear");
  args.out = alone.data();
  for (int panel = num_panels - 1; panel >= 0; --panel)
    for (int r = 0; r < kRows; ++r) k.linear(args, r, r + 1, panel, panel + 1);
  expect(std::memcmp(out.data(), alone.data(), out.size() * sizeof(float)) == 0, name + ": a row alone differs");
  return {out.data(), out.data() + out.size()};
}

// Weights rounded from float32, of which so many in a hundred are zeros; however they are stored, the bits are the same.
void test_linear(const Kernels& k, ThreadPool& pool, const WeightScheme& scheme, int depth, int width,
                 int percent_zeros = 0) {
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
                                               depth, width, percent_zeros});
    const std::vector<float> product = test_packed(k, Weight({stored}, stored_so, k, pool), kept, name);
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
        }
      }
  }
};

// Weights as a file's blocks have them.
void test_stored_linear(const Kernels& k, ThreadPool& pool, StoredFormat format, const WeightScheme& scheme, int depth,
                        int width) {
  const Stored stored(format, depth * width);
  std::vector<std::vector<double>> kept;
  for (auto row = stored.values.begin(); row != stored.values.end(); row += depth) kept.emplace_back(row, row + depth);
  const StoredMatrix matrix{format, stored.bytes.data(), static_cast<int64_t>(stored.bytes.size()), width, depth};
  test_packed(k, Weight({matrix}, scheme, k, pool), kept, at(k, "stored weights", {int(format), depth, width}));
}

void test_decode(const Kernels& k, StoredFormat format, int count) {
  const Stored stored(format, count);
  OddArray<float> out(static_cast<std::size_t>(count));
  k.decode_row(format, stored.bytes.data(), count, out.data());
  expect_close(out, stored.values, 1e-6, at(k, "decode_row", {int(format), count}));
}

// One sequence of `context` tokens whose last rows attend. Slots that hold no token are not numbers.
void test_attention(const Kernels& k, KvFormat format, int head_dim, int group, int context, bool is_causal) {
  Random random(5);
  constexpr int kKvHeads = 2;
  const auto size = [](int64_t n) { return static_cast<std::size_t>(n); };
  const int padded = (head_dim + 15) / 16 * 16, heads = kKvHeads * group;
  const int num_rows = std::min(context, 9), num_blocks = (context + kBlock - 1) / kBlock + 1;
  const int element_bytes = format == KvFormat::f32 ? 4 : format == KvFormat::int8 ? 1 : 2;
  const int head_bytes = kBlock * (padded * element_bytes + (format == KvFormat::int8 ? 4 : 0));
  const KvLayout kv{format, kKvHeads, head_dim, padded, head_bytes, kKvHeads * head_bytes};
  AlignedArray<uint8_t> keys = allocate<uint8_t>(size(num_blocks * kv.block_bytes));
  AlignedArray<uint8_t> values = allocate<uint8_t>(size(num_blocks * kv.block_bytes));
  std::fill_n(keys.get(), num_blocks * kv.block_bytes, 0xff);
  std::fill_n(values.get(), num_blocks * kv.block_bytes, 0xff);
  std::vector<int32_t> table;
  for (int b = num_blocks - 1; b > 0; --b) table.push_back(b);

  OddArray<float> k_rows(size(context * kKvHeads * head_dim)), v_rows(k_rows.size());
  OddArray<float> q(size(num_rows * heads * head_dim)), out(q.size());
  for (auto* a : {&k_rows, &v_rows, &q}) random.fill(*a);
  AlignedArray<float> scratch = allocate<float>(size(attention_scratch_floats(padded)));
  AttentionArgs args{};
  args.kv = kv;
  args.keys = keys.get();
  args.values = values.get();
  args.q = q.data();
  args.k = k_rows.data();
  args.v = v_rows.data();
  args.q_stride = heads * head_dim;
  args.k_stride = args.v_stride = kKvHeads * head_dim;
  args.num_heads = heads;
  args.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  args.causal = is_causal;
  const int num_splits = (context + kSplit - 1) / kSplit;
  const AttentionTask all{table.data(), 0, context, 0, context, 0, num_splits, true, -1};
  const AttentionTask last{table.data(), 0, num_rows, context - num_rows, context, 0, num_splits, false, -1};
  for (int h = 0; h < kKvHeads; ++h) {
    k.store_kv(args, all, h, scratch.get());
    k.attention(args, last, h, scratch.get(), out.data() + h * group * head_dim, args.q_stride, nullptr);
  }
  const std::string where = at(k, "attention", {int(format), head_dim, group, context, is_causal});

  // The last row again, a split at a time and merged: the same bits.
  const int64_t stride = partial_floats(padded);
  OddArray<float> partials(size(num_splits * heads * stride)), merged(size(heads * head_dim));
  AttentionTask split = last;
  split.first_row = num_rows - 1, split.num_rows = 1, split.first_position = context - 1;
  for (int h = 0; h < kKvHeads; ++h)
    for (int s = 0; s < num_splits; ++s) {
      split.first_split = s, split.end_split = s + 1;
      k.attention(args, split, h, scratch.get(), nullptr, 0, partials.data() + (s * heads + h * group) * stride);
    }
  for (int h = 0; h < heads; ++h)
    k.merge_attention(partials.data() + h * stride, heads * stride, num_splits, head_dim, padded,
                      merged.data() + h * head_dim);
  const float* whole = out.data() + (num_rows - 1) * heads * head_dim;
  expect(std::equal(whole, whole + heads * head_dim, merged.data()), where + ": merged splits differ");

  std::vector<double> expected(q.size());
  for (int r = 0; r < num_rows; ++r)
    for (int h = 0; h < heads; ++h) {
      const int visible = is_causal ? context - num_rows + r + 1 : context, kv = h / group * head_dim;
      std::vector<double> weights;
      double largest = -std::numeric_limits<double>::infinity(), total = 0;
      for (int t = 0; t < visible; ++t) {
        double score = 0;
        for (int d = 0; d < head_dim; ++d)
          score += double(q[size((r * heads + h) * head_dim + d)]) * k_rows[size(t * kKvHeads * head_dim + kv + d)];
        weights.push_back(score * args.scale);
        largest = std::max(largest, weights.back());
      }
      for (double& weight : weights) total += weight = std::exp(weight - largest);
      for (int t = 0; t < visible; ++t)
        for (int d = 0; d < head_dim; ++d)
          expected[size((r * heads + h) * head_dim + d)] +=
              weights[size(t)] / total * v_rows[size(t * kKvHeads * head_dim + kv + d)];
    }
  const double tolerance = format == KvFormat::f32 ? 1e-5 : format == KvFormat::f16 ? 4e-3 : 3e-2;
  expect_close(out, expected, tolerance, where);
}

void test_all(const Kernels& k, ThreadPool& pool) {
  for (int width : kSizes) test_rows(k, width);
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
  for (StoredFormat format : {StoredFormat::f32, StoredFormat::f16, StoredFormat::bf16})
    for (int count : kSizes) test_decode(k, format, count);
  for (StoredFormat format : {StoredFormat::q8_0, StoredFormat::q4_0, StoredFormat::q4_1})
    for (int count : {32, 96}) test_decode(k, format, count);
  for (int head_dim : {1, 18, 64})
    for (int group : {1, 3})
      for (int context : {1, 31, 33, 257, 600})
        for (bool is_causal : {true, false})
          for (KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::bf16, KvFormat::int8})
            test_attention(k, format, head_dim, group, context, is_causal);
}

}  // namespace
}  // namespace fastserve::test

int main(int argc, char** argv) {
  using namespace fastserve;
  ThreadPool pool(1);
  const std::vector<std::string> isas = argc > 1 ? std::vector<std::string>(argv + 1, argv + argc) : runnable_isas();
  for (const std::string& isa : isas) {
    test::test_all(choose_kernels(isa), pool);
    std::printf("%s: %d failures\n", isa.c_str(), test::num_failures);
  }
  return test::finish("kernels");
}
