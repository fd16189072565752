// The kernel table: plain structs and function pointers that every instruction set fills in.
// No STL here or in any header that a per-ISA file includes: the linker may keep one ISA's copy of an inline
// function for all of them.
#pragma once

#include <stdint.h>

namespace fastserve {

// Output channels a panel of packed weights holds.
constexpr int kPanel = 64;
// Tokens one KV block holds.
constexpr int kBlock = 32;
// Keys one attention split spans. Splits lie at absolute positions: partial softmax results are merged in order, so
// that neither threads, nor batch, nor chunking can change a result.
constexpr int kSplit = 256;
// Columns of x that one float32 partial sum spans; as above, for the K dimension of float linears.
constexpr int kDepthBlock = 256;
constexpr int kMaxHeadDim = 256;
// Rows that a linear multiplies with a panel at a time: enough for a panel to be read from memory few times, few
// enough for their sums to stay in the cache. A multiple of every register tile's height.
constexpr int kRowBlock = 96;
// Integer weights and the activations they meet are padded to a whole number of so many columns.
constexpr int kDepthAlignment = 8;
// Of keys before or after a position: all that there are.
constexpr int32_t kAllKeys = INT32_MAX;
// Floats that kernels may read beyond the distances of a relative bias.
constexpr int kBiasPadding = 16;
// Bytes that kernels may read beyond the values of a sparse weight.
constexpr int64_t kExpandSlack = 64;
// Columns of a bitmask weight that kernels expand at a time, and so the most that share a scale of activations.
constexpr int kMaxExpandedColumns = 256;
// Columns whose masks lie together in a bitmask weight, before their values: memory is read as one stream.
constexpr int kBitmaskBlock = 32;
// Most columns of a slice of a CSR weight: as many bytes of activations as one register holds to choose from.
constexpr int kMaxCsrSlice = 64;
// Parts of a panel that have masks of their own in a CSR weight.
constexpr int kCsrVectors = 4;

enum class WeightFormat : int32_t { f32, f16, bf16, int8, int4 };
constexpr bool is_integer(WeightFormat format) { return format == WeightFormat::int8 || format == WeightFormat::int4; }

// How the values of integer weights lie in memory: all of them; those that are not zero, behind a bitmask; or these row
// by row with their columns. Results have the same bits.
enum class WeightStorage : int32_t { dense, bitmask, csr };
enum class ScaleFormat : int32_t { bf16, f16 };
// What is added to scale * value: nothing, scale * offset for a whole offset, or an offset.
enum class WeightOffset : int32_t { none, zero_point, minimum };
enum class KvFormat : int32_t { f32, f16, bf16, int8 };
// `groups` are rows that are whole numbers already, in the groups of the weight that they are packed into: 16-bit scales
// [num_groups], as many 16-bit offsets where the weight has them, and a byte for each column [padded_depth], as a panel
// has it (int8: value + 128; int4: the nibble).
enum class StoredFormat : int32_t {
  f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, groups
};
// Ways to read memory, of which the fastest is the limit: one stream or four, with or without prefetching.
enum class ReadKind : int32_t { plain, interleaved, prefetched, prefetched_interleaved, non_temporal };
enum class ActivationKind : int32_t { silu, gelu, gelu_tanh, relu, tanh, sigmoid };

// A slice of a panel of a CSR weight (see PackedWeight).
struct CsrSlice {
  uint32_t start;  // of its masks, bytes from the panel's
  uint8_t num_steps[kCsrVectors];
};

// A matrix of weights [rows, depth], prepacked in panels of kPanel rows. A panel holds values, then 16-bit scales
// [num_groups][kPanel], then as many 16-bit offsets where there are any. Values are
//   f32, f16, bf16: [depth][kPanel]
//   int8:           [padded_depth / 4][kPanel][4] of value + 128 as uint8 (the dot instruction wants unsigned x signed)
//   int4:           [padded_depth / 8][kPanel][4] of value (without an offset: value + 8), of columns k .. k + 3 in the
//                   low halves of bytes and of columns k + 4 .. k + 7 in the high ones
// A weight is scale * value + offset (see WeightOffset). Rows are padded to whole panels with scales of zero.
//
// Bitmask weights are int8 or int4 without an offset. Let the bytes of a panel be those of int8 above (of nibbles:
// value + 128 too), 64 to a column of the panel's size: a panel holds scales, then blocks of kBitmaskBlock columns (the
// last may have fewer), at multiples of 8 bytes. A block holds a mask of 64 bits for each column, of which bit i says
// whether byte i of the 64 is a weight other than zero, and then the values that the masks say are there:
// of int8 column by column; of int4 as nibbles, those of column k in the low halves of bytes whose high ones are those
// of column k + 4 (k % 8 < 4), as many bytes as the longer of the two needs.
//
// CSR weights (compressed sparse rows) are int8 or int4 without an offset, whose activations share a scale over 32 or 64
// columns, which are a slice. A panel holds [num_activation_groups] CsrSlice; then scales; then slices, at multiples of
// 8 bytes. A slice lists, row by row, the weights other than zero. Its rows take four entries a step: there are uint64
// masks, for each kCsrVectors-th of the rows one a step, of which bit i says whether its row i / 4 has an entry i % 4 in
// this step; then for every mask the entries that are there, first their columns within the slice, then their values:
// a byte each, int4 too.
//
// Panels of sparse weights differ in length: `panels` begins with their starts and the last one's end, int64 [number of
// panels + 1] bytes from `panels`, multiples of 64, and ends kExpandSlack bytes after the last.
struct PackedWeight {
  WeightFormat format;
  WeightStorage storage;
  ScaleFormat scale_format;
  WeightOffset offset;
  int32_t rows;
  int32_t depth;
  int32_t padded_depth;           // int8, int4: depth rounded up to kDepthAlignment
  int32_t group_size;             // columns of a row that share a scale; the last group may be shorter
  int32_t num_groups;             // of a row of weights
  int32_t activation_group_size;  // columns of a row of x that share a scale; divides group_size, or is it
  int32_t num_activation_groups;
  int64_t panel_bytes;     // sparse: of all but the values
  int64_t scales_offset;   // bytes from a panel's start
  int64_t offsets_offset;  // bytes from a panel's start
  uint8_t* panels;         // 64-byte aligned
};

// Activations quantized per row and group: q = round(x / scale), x_scale = largest |x| / 127. Kernels multiply them
// with value + 128, and sum(q * value) = sum(q * (value + 128)) - 128 * sum(q): a row's correction is that last term.
struct QuantizedRows {
  const int8_t* data;  // row r at data + r * row_bytes: [padded_depth] values
  int64_t row_bytes;
  int64_t scales_offset;       // bytes from a row's start to its scales, float [num_groups]
  int64_t corrections_offset;  // ... to its corrections, int32 [num_groups]
};

struct LinearArgs {
  const PackedWeight* weight;
  const float* x;  // f32, f16, bf16 weights: [rows, depth]
  int64_t x_stride;
  QuantizedRows quantized;  // int8, int4 weights
  const float* bias;        // [weight->rows] or null
  float* out;               // [rows, channels from first_channel on]
  int64_t out_stride;
  int32_t first_channel;
};

// How the blocks of one layer's keys lie, and those of its values: [block][kv_head] of kBlock tokens, keys transposed
// as [padded_head_dim][kBlock], values as [kBlock][padded_head_dim]; in int8 then a float scale for each token.
struct KvLayout {
  KvFormat format;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t padded_head_dim;  // a multiple of 16
  int64_t head_bytes;       // from one key head of a block to the next
  int64_t block_bytes;      // from one block to the next
};

struct AttentionArgs {
  KvLayout kv;
  uint8_t* keys;    // this layer's pool
  uint8_t* values;  // this layer's pool
  const float* q;   // [tokens, num_heads * head_dim]
  int64_t q_stride;
  const float* k;  // [tokens, num_kv_heads * head_dim]
  int64_t k_stride;
  const float* v;  // [tokens, num_kv_heads * head_dim]
  int64_t v_stride;
  const float* cosines;  // [positions, rotary_dim / 2]: q and k are turned when they are read
  const float* sines;
  int32_t rotary_dim;  // 0: q and k are as they should be
  int32_t num_heads;
  float scale;
  // Keys before and after its own position that a row sees; none after are causal attention.
  int32_t keys_before;
  int32_t keys_after;
  float soft_cap;     // 0: none; else scores become soft_cap * tanh(score / soft_cap)
  const float* bias;  // null: none; else [num_heads][bias_stride], added to scores by key position - query position
  int64_t bias_stride;
  int32_t bias_reach;  // column of distance 0
  int32_t first_key;   // of all that are seen: slots before it are empty
};

// Rows first_row .. first_row + num_rows of one sequence against the splits [first_split, end_split) of its keys.
struct AttentionTask {
  const int32_t* block_table;
  int32_t first_row;  // in the flat batch
  int32_t num_rows;
  int32_t first_position;  // of first_row within its sequence
  int32_t context_length;
  int32_t first_split;
  int32_t end_split;
  bool stores;            // the rows' keys and values are still to be stored
  int32_t partial_index;  // where the result is one of several to be merged, counted over sequences and splits; or -1
};

// Query rows (tokens x heads of a group) that go through the keys together, and blocks widened to floats for them.
constexpr int kAttentionRows = 48;
constexpr int kConvertedBlocks = 2;
// A partial result of a row: the largest score, the sum of weights, and from kPartialHeader on the weighted values.
constexpr int kPartialHeader = 16;
static constexpr int64_t partial_floats(int64_t padded_head_dim) { return kPartialHeader + padded_head_dim; }
// Scratch memory of store_kv and attention.
static constexpr int64_t attention_scratch_floats(int64_t padded_head_dim) {
  return kAttentionRows * (padded_head_dim + kSplit + 2 * partial_floats(padded_head_dim)) +
         kConvertedBlocks * kBlock * padded_head_dim;
}

struct Kernels {
  const char* name;
  // out[0 .. depth) = row `row` of the weight, dequantized.
  void (*embedding)(const PackedWeight&, int32_t row, float* out);
  // Rows [row_begin, row_end) x panels [panel_begin, panel_end) of out = x @ weight.T + bias.
  void (*linear)(const LinearArgs&, int32_t row_begin, int32_t row_end, int32_t panel_begin, int32_t panel_end);
  void (*quantize_row)(const float* x, int32_t depth, int32_t padded_depth, int32_t group_size, int8_t* out,
                       float* scales, int32_t* corrections);
  void (*rms_norm)(const float* x, const float* weight, float eps, int32_t width, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int32_t width, float* out);
  void (*add)(const float* x, const float* y, int32_t width, float* out);
  // Every head of one row: cosines and sines are [dim / 2] of the row's position.
  void (*rope)(const float* x, const float* cosines, const float* sines, int32_t dim, int32_t head_dim,
               int32_t num_heads, float* out);
  // Keys and values of the task's rows into their blocks.
  void (*store_kv)(const AttentionArgs&, const AttentionTask&, int32_t kv_head, float* scratch);
  // The query heads of one key head: row r to out + r * out_stride, or, where `partials` is not null, partial results
  // of rows x heads one after the other.
  void (*attention)(const AttentionArgs&, const AttentionTask&, int32_t kv_head, float* scratch, float* out,
                    int64_t out_stride, float* partials);
  // One head of one row from its partial results, `stride` floats apart, which are overwritten.
  void (*merge_attention)(float* partials, int64_t stride, int32_t num_splits, int32_t head_dim,
                          int32_t padded_head_dim, float* out);
  void (*activation)(ActivationKind, const float* x, int32_t width, float* out);
  void (*gated_activation)(ActivationKind, const float* gate, const float* up, int32_t width, float* out);
  void (*soft_cap)(const float* x, float cap, int32_t width, float* out);
  void (*scale)(const float* x, float factor, int32_t width, float* out);
  void (*l2_normalize)(const float* x, float eps, int32_t width, float* out);
  // `count` elements of a stored row to float32; count is a multiple of the format's block.
  void (*decode_row)(StoredFormat, const uint8_t* stored, int64_t count, float* out);
  // One row into column `column` of a panel of the weight, which is zeros so far: rounded from float32, or (int8,
  // int4) as the blocks of a stored row have it, whose format must fit the weight's.
  void (*pack_row)(const PackedWeight&, const float* row, uint8_t* panel, int32_t column);
  void (*pack_blocks)(const PackedWeight&, StoredFormat, const uint8_t* stored, uint8_t* panel, int32_t column);
  // The machine's limits (peak.h): a sum of `count` floats, and so many rounds of nothing but arithmetic.
  float (*read_memory)(ReadKind, const float* begin, int64_t count);
  int64_t (*dot_products)(int64_t iterations, const int8_t* x, float* out);
  int64_t (*multiply_adds)(int64_t iterations, const float* x, float* out);
};

const Kernels* portable_kernels();
#if defined(FASTSERVE_X86)
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* avx512vbmi2_kernels();
#endif
#if defined(FASTSERVE_AVXVNNI)
const Kernels* avxvnni_kernels();
#endif
#if defined(FASTSERVE_NEONDOT)
const Kernels* neondot_kernels();
#endif

}  // namespace fastserve
