// linear: out = x @ weight.T + bias over packed panels, and reading a row back (embedding).
//
// Every output element has one order of accumulation, whatever the number of rows in a call: float products are
// summed column by column within blocks of kDepthBlock, and the blocks' sums are added in order; integer sums are
// exact within a group of columns, and the groups' scaled sums are added in order.

// Rows of x and vectors of channels whose sums a kernel holds in registers. Sums over blocks or groups are touched once
// in 64 columns or more. Of integers, fewer rows leave registers to most of these too, and stores of 512 bits are dear.
#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kTileRows = 6, kIntegerTileRows = 4, kTileVectors = 4;
#elif defined(FASTSERVE_ISA_NEONDOT)
constexpr int kTileRows = 6, kIntegerTileRows = 6, kTileVectors = 4;
#elif defined(FASTSERVE_ISA_AVXVNNI)
constexpr int kTileRows = 6, kIntegerTileRows = 6, kTileVectors = 2;
#elif defined(FASTSERVE_ISA_AVX2)
constexpr int kTileRows = 4, kIntegerTileRows = 4, kTileVectors = 2;
#else
constexpr int kTileRows = 2, kIntegerTileRows = 2, kTileVectors = 2;
#endif
static_assert(kPanel % (kTileVectors * kLanes) == 0, "a panel is a whole number of register tiles");

// Calls f<rows>().
template <int R, class Function>
static inline void with_height(int32_t rows, Function f) {
  if (rows == R) return f.template operator()<R>();
  if constexpr (R > 1) with_height<R - 1>(rows, f);
}

// Calls f<R>(row) for register tiles of R rows that cover [begin, end): as few as can be, of about equal height.
template <int kMostRows = kTileRows, class Function>
static inline void each_row_tile(int32_t begin, int32_t end, Function f) {
  for (int32_t tiles = (end - begin + kMostRows - 1) / kMostRows; tiles > 0; --tiles) {
    const int32_t rows = (end - begin + tiles - 1) / tiles;
    with_height<kMostRows>(rows, [&]<int R>() { f.template operator()<R>(begin); });
    begin += rows;
  }
}

static inline void store_channels(const LinearArgs& a, int32_t row, int32_t channel, F32 sums) {
  const int32_t left = a.weight->rows - channel;
  if (left <= 0) return;
  const int n = left < kLanes ? left : kLanes;
  if (a.bias) sums = add(sums, load_up_to(a.bias + channel, n));
  store_up_to(a.out + row * a.out_stride + (channel - a.first_channel), sums, n);
}

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
static inline F32 load_weights(const float* p) { return load(p); }
static inline F32 load_weights(const Bf16* p) { return load_bf16(&p->bits); }
static inline F32 load_weights(const F16* p) { return load_f16(&p->bits); }

// R rows by V vectors of channels from `column` of a panel.
template <int R, int V, class Weight>
static inline void linear_tile_float(const LinearArgs& a, int32_t row, int32_t panel, int32_t column) {
  const int32_t depth = a.weight->depth;
  const Weight* weights = (const Weight*)(a.weight->panels + panel * a.weight->panel_bytes) + column;
  const float* x = a.x + row * a.x_stride;
  alignas(64) float sums[R][V * kLanes] = {};
  for (int32_t block = 0; block < depth; block += kDepthBlock) {
    const int32_t end = block + kDepthBlock < depth ? block + kDepthBlock : depth;
    F32 acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = zero();
    for (int32_t k = block; k < end; ++k) {
      F32 w[V];
      for (int v = 0; v < V; ++v) w[v] = load_weights(weights + (int64_t)k * kPanel + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const F32 b = set1(x[r * a.x_stride + k]);
        for (int v = 0; v < V; ++v) acc[r][v] = fma(b, w[v], acc[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        float* sum = sums[r] + v * kLanes;
        store(sum, add(load(sum), acc[r][v]));
      }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store_channels(a, row + r, panel * kPanel + column + v * kLanes, load(sums[r] + v * kLanes));
}

// Columns of integer weights that all rows of a block are multiplied with before the next columns: few enough for their
// bytes to stay in the first-level cache, enough to hold whole groups of activations.
constexpr int32_t kChunk = kMaxExpandedColumns;
constexpr int32_t kSmallestGroup = 32;

// Many rows do not wait for memory: meanwhile the next panel comes. Up to so many ask for a line with every step of
// their loop, because a burst would hold up their own loads; more of them for a piece with every tile.
constexpr int32_t kMostAskingRows = 64;

static inline F32 load_scales(ScaleFormat format, const uint16_t* p) {
  return format == ScaleFormat::bf16 ? load_bf16(p) : load_f16(p);
}

static inline const uint8_t* panel_at(const PackedWeight& w, int32_t panel) {
  return w.panels + (w.storage == WeightStorage::dense ? panel * w.panel_bytes : ((const int64_t*)w.panels)[panel]);
}

static inline bool has_row_scales(const PackedWeight& w) { return w.num_groups == 1; }

// scale * offset or offset of a group: see WeightOffset.
static inline F32 load_offsets(const PackedWeight& w, const uint16_t* p, F32 scales) {
  const F32 offsets = load_scales(w.scale_format, p);
  return w.offset == WeightOffset::zero_point ? mul(scales, offsets) : offsets;
}

// Some columns of a panel as register tiles read them: bytes of value + 128, scales and offsets widened. Where a scale
// spans a whole row, it waits for the row's end.
struct Chunk {
  int32_t begin, end;  // columns; whole groups of activations
  const uint8_t* bytes;
  const uint8_t* next_values;  // bitmask: where those of the last column end
  alignas(64) uint8_t unpacked[kChunk * kPanel];
  alignas(64) float scales[kChunk / kSmallestGroup][kPanel];  // of every group of activations
  alignas(64) float offsets[kChunk / kSmallestGroup][kPanel];

  // Of a group of activations of these columns, channels from `at` on.
  F32 load_scale(int32_t g, int at) const { return load(scales[g] + at); }
  F32 load_offset(int32_t g, int at) const { return load(offsets[g] + at); }
};

// The same of columns whose scales and offsets are read as they are stored.
struct StoredColumns {
  int32_t begin, end;
  const PackedWeight& weight;
  const uint8_t* panel;

  F32 load_scale(int32_t g, int at) const {
    return load_scales(weight.scale_format, (const uint16_t*)(panel + weight.scales_offset) + first_of_group(g) + at);
  }
  F32 load_offset(int32_t g, int at) const {
    const uint16_t* offsets = (const uint16_t*)(panel + weight.offsets_offset) + first_of_group(g) + at;
    return load_offsets(weight, offsets, load_scale(g, at));
  }
  int32_t first_of_group(int32_t g) const {
    return (begin + g * weight.activation_group_size) / weight.group_size * kPanel;
  }
};

static inline void widen_group(const PackedWeight& w, const uint8_t* panel, int32_t group, float* scales,
                               float* offsets) {
  const uint16_t* stored_scales = (const uint16_t*)(panel + w.scales_offset) + group * kPanel;
  const uint16_t* stored_offsets = (const uint16_t*)(panel + w.offsets_offset) + group * kPanel;
  for (int c = 0; c < kPanel; c += kLanes) {
    const F32 scale = load_scales(w.scale_format, stored_scales + c);
    store(scales + c, scale);
    if (w.offset != WeightOffset::none) store(offsets + c, load_offsets(w, stored_offsets + c, scale));
  }
}

// Bytes of a panel's values over a number of columns.
static inline int64_t value_bytes(const PackedWeight& w, int64_t columns) {
  return columns * kPanel / (w.format == WeightFormat::int4 ? 2 : 1);
}

// Asks for `bytes` bytes at p + ahead, which may lie beyond what there is.
static inline void prefetch(const uint8_t* p, int64_t ahead, int64_t bytes) {
  for (int64_t at = ahead; at < ahead + bytes; at += 64) prefetch_line((uintptr_t)p + (uintptr_t)at);
}

// Unpacking waits for memory in bursts, between which nobody asks for more: so it asks for what comes so much later.
constexpr int64_t kUnpackAhead = 2048;

static inline void prepare_chunk(const PackedWeight& w, const uint8_t* panel, int32_t begin, int32_t end,
                                 bool is_expanded_later, Chunk& c) {
  c.begin = begin;
  c.end = end;
  if (is_expanded_later) {
    c.bytes = nullptr;
  } else if (w.storage == WeightStorage::bitmask) {
    c.bytes = c.unpacked;
    c.next_values = expand_columns(w, begin, end, c.next_values, c.unpacked);
  } else if (w.storage == WeightStorage::csr) {
    c.bytes = c.unpacked;
    expand_csr(w, panel, begin, end, c.unpacked);
  } else if (w.format == WeightFormat::int8) {
    c.bytes = panel + (int64_t)begin * kPanel;
  } else {
    c.bytes = c.unpacked;
    // Nibbles without an offset stand for value + 8.
    const uint8_t add = w.offset == WeightOffset::none ? 120 : 128;
    for (int32_t k = begin; k < end; k += 8) {
      const uint8_t* packed = panel + value_bytes(w, k);
      prefetch(packed, kUnpackAhead, kPanel * 4);
      unpack_nibbles<kPanel * 4>(packed, add, c.unpacked + (k - begin) * kPanel);
    }
  }
  if (has_row_scales(w) && w.offset == WeightOffset::none) return;
  for (int32_t k = begin, g = 0; k < end; k += w.activation_group_size, ++g)
    widen_group(w, panel, k / w.group_size, c.scales[g], c.offsets[g]);
}

// How far ahead of itself a tile of few rows asks for memory: what the processor asks for by itself ends with every
// page. Every second line is enough, and all of them are too many for tiles of several rows. Nibbles gain nothing.
constexpr int64_t kStreamAhead = 4096, kStreamStep = 128;

// As they are stored; asks for what comes.
struct StreamedWeights {
  StoredWeights stored;
  static int32_t start(int32_t correction) { return StoredWeights::start(correction); }
  template <int V>
  void next(int32_t k, Weights4 (&w)[V]) {
    for (int64_t at = 0; at < V * kLanes * 4; at += kStreamStep)
      prefetch_line((uintptr_t)stored.bytes + (uintptr_t)(kStreamAhead + at));
    stored.next(k, w);
  }
};

// Four columns of a panel of nibbles at a time, parted in registers: two of them share the bytes that are loaded.
// Nibbles stand for value + 8, or with an offset for the value.
template <bool has_bias>
struct NibbleWeights {
  const uint8_t* packed;
  Nibbles4 pairs[kTileVectors];
  // A correction is -128 * sum(q).
  static int32_t start(int32_t correction) { return has_bias ? correction / 16 : 0; }
  template <int V>
  void next(int32_t k, Weights4 (&w)[V]) {
    if ((k & 4) == 0) {
      for (int v = 0; v < V; ++v) {
        pairs[v] = load_nibbles4(packed + v * kLanes * 4);
        w[v] = low_nibbles4(pairs[v]);
      }
      packed += kPanel * 4;
    } else {
      for (int v = 0; v < V; ++v) w[v] = high_nibbles4(pairs[v]);
    }
  }
};

// As they are stored; asks for memory meanwhile, `step` bytes on with every four columns.
struct AskingWeights {
  StoredWeights stored;
  uintptr_t line;
  uintptr_t step;
  static int32_t start(int32_t correction) { return StoredWeights::start(correction); }
  template <int V>
  void next(int32_t k, Weights4 (&w)[V]) {
    stored.next(k, w);
    prefetch_line(line);
    line += step;
  }
};

// How the groups' sums become the row's.
enum class Scaling { row, group, group_and_offset };

// Where the sums of a tile of rows by kPanel channels come from and go: `column` counts channels.
struct KeptSums {
  float* sums;  // [R][kPanel]
  F32 start(int r, int column) const { return load(sums + r * kPanel + column); }
  void finish(int r, int column, F32 total) const { store(sums + r * kPanel + column, total); }
};

// A tile that goes down the whole depth starts from nothing, and its sums are the result.
struct Results {
  const LinearArgs& args;
  int32_t row;
  int32_t channel;         // of the panel's first
  const uint16_t* scales;  // of whole rows of weights
  F32 start(int, int) const { return zero(); }
  void finish(int r, int column, F32 total) const {
    store_channels(args, row + r, channel + column, mul(total, load_scales(args.weight->scale_format, scales + column)));
  }
};

// R rows by V vectors of channels from `column` of a panel.
template <int R, int V, Scaling scaling, class Columns, class Source, class Sums>
static inline void linear_tile_int(const LinearArgs& a, const Columns& c, int32_t row, int32_t column, Source& source,
                                   const Sums& sums) {
  const int32_t group_size = a.weight->activation_group_size;
  const int64_t stride = a.quantized.row_bytes, word_stride = stride / 4;
  const int8_t* x = a.quantized.data + row * stride;
  const float* x_scales = (const float*)(x + a.quantized.scales_offset) + c.begin / group_size;
  const int32_t* corrections = (const int32_t*)(x + a.quantized.corrections_offset) + c.begin / group_size;
  Source weights = source;
  F32 totals[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) totals[r][v] = sums.start(r, column + v * kLanes);
  for (int32_t begin = c.begin, g = 0; begin < c.end; begin += group_size, ++g) {
    const int32_t end = begin + group_size < c.end ? begin + group_size : c.end;
    I32 acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = set1(weights.start(corrections[r * word_stride + g]));
    for (int32_t k = begin; k < end; k += 4) {
      Weights4 w[V];
      weights.next(k, w);
      for (int r = 0; r < R; ++r) {
        const Bytes4 b = broadcast4(x + r * stride + k);
        for (int v = 0; v < V; ++v) acc[r][v] = dot4(acc[r][v], b, w[v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const float x_scale = x_scales[r * word_stride + g];
      // x_scale * sum(q): what an offset is multiplied with.
      const float x_sum = x_scale * (float)(corrections[r * word_stride + g] / -128);
      for (int v = 0; v < V; ++v) {
        const int at = column + v * kLanes;
        F32 total = totals[r][v];
        if constexpr (scaling == Scaling::row) total = fma(to_f32(acc[r][v]), set1(x_scale), total);
        else total = fma(mul(to_f32(acc[r][v]), set1(x_scale)), c.load_scale(g, at), total);
        if constexpr (scaling == Scaling::group_and_offset) total = fma(c.load_offset(g, at), set1(x_sum), total);
        totals[r][v] = total;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums.finish(r, column + v * kLanes, totals[r][v]);
  source = weights;
}

// The same out of line, but for few rows that take a chunk at a time, which are faster without the call: compilers that
// have all of a panel's tiles in one function put sums on the stack.
template <int R, int V, Scaling scaling, class Columns, class Source, class Sums>
FASTSERVE_NOINLINE static void linear_tile_apart(const LinearArgs& a, const Columns& c, int32_t row, int32_t column,
                                                   Source source, Sums sums) {
  linear_tile_int<R, V, scaling>(a, c, row, column, source, sums);
}

// R rows against columns of a panel of dense weights that no other rows read.
template <int R, Scaling scaling>
static inline void linear_tile_streamed(const LinearArgs& a, int32_t row, const StoredColumns& c,
                                        float (*sums)[kPanel]) {
  const PackedWeight& w = *a.weight;
  for (int32_t column = 0; column < kPanel; column += kTileVectors * kLanes) {
    const uint8_t* values = c.panel + value_bytes(w, c.begin) + column * 4;
    const KeptSums kept{sums[0]};
    if (w.format == WeightFormat::int8)
      linear_tile_apart<R, kTileVectors, scaling>(a, c, row, column, StreamedWeights{StoredWeights{values}}, kept);
    else
      linear_tile_apart<R, kTileVectors, scaling>(
          a, c, row, column, NibbleWeights<scaling != Scaling::group_and_offset>{values, {}}, kept);
  }
}

#if defined(FASTSERVE_ISA_AVX512VBMI2)
static_assert(kTileVectors * kLanes == kPanel, "a tile takes the values of a column in turn");

// R rows against a chunk of a bitmask panel, expanded on the way.
template <int R, Scaling scaling, WeightFormat format>
static inline void linear_tile_bitmask(const LinearArgs& a, int32_t row, Chunk& c, float* sums) {
  ExpandedWeights<format> weights(*a.weight, c.next_values);
  if constexpr (R <= kTileRows) {
    linear_tile_int<R, kTileVectors, scaling>(a, c, row, 0, weights, KeptSums{sums});
  } else {
    linear_tile_int<R, kTileVectors / 2, scaling>(a, c, row, 0, weights, KeptSums{sums});
    ExpandedWeights<format, kTileVectors / 2> others(*a.weight, c.next_values);
    linear_tile_int<R, kTileVectors / 2, scaling>(a, c, row, kPanel / 2, others, KeptSums{sums});
  }
  c.next_values = weights.values;
}

// R rows against a chunk of a sparse panel.
template <int R, Scaling scaling>
static inline void linear_tile_sparse(const LinearArgs& a, const uint8_t* panel, int32_t row, Chunk& c, float* sums) {
  const PackedWeight& w = *a.weight;
  if (w.storage == WeightStorage::csr)
    linear_tile_csr<R, scaling == Scaling::group>(a, panel, c.begin, c.end, c.scales, row, sums);
  else if (w.format == WeightFormat::int8)
    linear_tile_bitmask<R, scaling, WeightFormat::int8>(a, row, c, sums);
  else linear_tile_bitmask<R, scaling, WeightFormat::int4>(a, row, c, sums);
}
#endif

// Rows of one block against one panel of dense int8 weights with a scale for each row of theirs, which are multiplied
// as they are stored: every tile goes down the whole depth, so that its sums stay in registers. Many rows ask for the
// next panel; few wait for memory with their first tile, and find the panel in the cache with their second.
static inline void linear_panel_stored(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel) {
  const PackedWeight& w = *a.weight;
  const uint8_t* data = panel_at(w, panel);
  const int64_t size = w.panel_bytes;
  const int32_t num_rows = row_end - row_begin;
  const bool is_few = num_rows <= 2 * kIntegerTileRows;
  Chunk chunk;
  chunk.begin = 0;
  chunk.end = w.padded_depth;
  each_row_tile<kIntegerTileRows>(row_begin, row_end, [&]<int R>(int32_t row) {
    // Where the next panel is asked for: the piece that falls to this tile.
    const auto ahead = (uintptr_t)(data + size + size * (row - row_begin) / num_rows);
    const auto step = (uintptr_t)(size * 4 * R / num_rows / w.padded_depth);
    const Results results{a, row, panel * kPanel, (const uint16_t*)(data + w.scales_offset)};
    for (int32_t column = 0; column < kPanel; column += kTileVectors * kLanes) {
      const StoredWeights stored{data + column * 4};
      const auto multiply = [&](auto source) {
        linear_tile_apart<R, kTileVectors, Scaling::row>(a, chunk, row, column, source, results);
      };
      if (!is_few) multiply(AskingWeights{stored, ahead, step});
      else if (row == row_begin) multiply(StreamedWeights{stored});
      else multiply(stored);
    }
  });
}

// Rows of one block against one panel of integer weights.
template <Scaling scaling>
static inline void linear_panel_int(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel) {
  const PackedWeight& w = *a.weight;
  const uint8_t* data = panel_at(w, panel);
  const int64_t size = panel_at(w, panel + 1) - data;
  const int32_t group = w.activation_group_size;
  const int32_t num_rows = row_end - row_begin;
  // One tile of rows takes dense weights as they are stored; more of them share what is unpacked once. Few rows take
  // short chunks, so that products overlap with the loads of the next chunk.
  const bool is_few = num_rows <= 2 * kIntegerTileRows;
  const bool is_dense = w.storage == WeightStorage::dense;
  const bool is_streamed = num_rows <= kIntegerTileRows && is_dense;
  // One tile of rows takes a bitmask's weights as they come; more of them share what is expanded once.
  const bool is_expanded_later =
      (kExpandsInRegisters && w.storage == WeightStorage::bitmask && num_rows <= kSparseTileRows) ||
      (kMultipliesCsr && w.storage == WeightStorage::csr);
  if (!is_streamed && is_dense && w.format == WeightFormat::int8 && scaling == Scaling::row)
    return linear_panel_stored(a, row_begin, row_end, panel);
  const bool is_unpacked_for_few = is_few && !is_streamed && !is_expanded_later;
  const int32_t most = is_unpacked_for_few ? group : kChunk;
  // Tiles of all channels of a panel go down its whole depth; others come back for the rest while a piece is near.
  const bool is_whole = is_streamed && kTileVectors * kLanes == kPanel;
  const int32_t columns = is_whole ? w.padded_depth : group < most ? most / group * group : group;
  alignas(64) float sums[kRowBlock][kPanel];
  memset(sums, 0, (size_t)num_rows * sizeof sums[0]);
  Chunk chunk;
  chunk.next_values = data + w.panel_bytes;
  const int64_t column_bytes = size / w.padded_depth;
  for (int32_t begin = 0; begin < w.padded_depth; begin += columns) {
    const int32_t end = begin + columns < w.padded_depth ? begin + columns : w.padded_depth;
    if (is_streamed) {
      with_height<kIntegerTileRows>(num_rows, [&]<int R>() {
        linear_tile_streamed<R, scaling>(a, row_begin, StoredColumns{begin, end, w, data}, sums);
      });
      continue;
    }
    prepare_chunk(w, data, begin, end, is_expanded_later, chunk);
#if defined(FASTSERVE_ISA_AVX512VBMI2)
    if constexpr (scaling != Scaling::group_and_offset) {
      if (is_expanded_later) {
        each_row_tile<kSparseTileRows>(row_begin, row_end, [&]<int R>(int32_t row) {
          linear_tile_sparse<R, scaling>(a, data, row, chunk, sums[row - row_begin]);
        });
        continue;
      }
    }
#endif
    each_row_tile<kIntegerTileRows>(row_begin, row_end, [&]<int R>(int32_t row) {
      // Where the next panel is asked for, from the piece that falls to this tile on.
      const uint8_t* ahead = data + column_bytes * begin + column_bytes * (end - begin) * (row - row_begin) / num_rows;
      if (num_rows > kMostAskingRows) prefetch(ahead, size, column_bytes * (end - begin) * R / num_rows);
      for (int32_t column = 0; column < kPanel; column += kTileVectors * kLanes) {
        const KeptSums tile_sums{sums[row - row_begin]};
        StoredWeights stored{chunk.bytes + column * 4};
        if (is_few) {
          linear_tile_int<R, kTileVectors, scaling>(a, chunk, row, column, stored, tile_sums);
        } else if (num_rows > kMostAskingRows) {
          linear_tile_apart<R, kTileVectors, scaling>(a, chunk, row, column, stored, tile_sums);
        } else {
          const auto step = (uintptr_t)(column_bytes * 4 * R / num_rows);
          linear_tile_apart<R, kTileVectors, scaling>(
              a, chunk, row, column, AskingWeights{stored, (uintptr_t)ahead + (uintptr_t)size, step}, tile_sums);
        }
      }
    });
  }
  for (int32_t row = row_begin; row < row_end; ++row)
    for (int32_t c = 0; c < kPanel; c += kLanes) {
      F32 total = load(sums[row - row_begin] + c);
      if constexpr (scaling == Scaling::row)
        total = mul(total, load_scales(w.scale_format, (const uint16_t*)(data + w.scales_offset) + c));
      store_channels(a, row, panel * kPanel + c, total);
    }
}

template <class Weight>
static inline void linear_panel_float(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel) {
  each_row_tile(row_begin, row_end, [&]<int R>(int32_t row) {
    for (int32_t column = 0; column < kPanel; column += kTileVectors * kLanes)
      linear_tile_float<R, kTileVectors, Weight>(a, row, panel, column);
  });
}

static inline void linear_panel(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel) {
  switch (a.weight->format) {
    case WeightFormat::f32: return linear_panel_float<float>(a, row_begin, row_end, panel);
    case WeightFormat::f16: return linear_panel_float<F16>(a, row_begin, row_end, panel);
    case WeightFormat::bf16: return linear_panel_float<Bf16>(a, row_begin, row_end, panel);
    case WeightFormat::int8:
    case WeightFormat::int4:
      if (a.weight->offset != WeightOffset::none)
        return linear_panel_int<Scaling::group_and_offset>(a, row_begin, row_end, panel);
      if (has_row_scales(*a.weight)) return linear_panel_int<Scaling::row>(a, row_begin, row_end, panel);
      return linear_panel_int<Scaling::group>(a, row_begin, row_end, panel);
  }
}

static void linear(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel_begin, int32_t panel_end) {
  for (int32_t panel = panel_begin; panel < panel_end; ++panel)
    for (int32_t row = row_begin; row < row_end; row += kRowBlock)
      linear_panel(a, row, row + kRowBlock < row_end ? row + kRowBlock : row_end, panel);
}

static inline float bf16_to_f32(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline float half_to_f32(uint16_t x) {
  uint16_t halves[kLanes] = {x};
  float lanes[kLanes];
  store(lanes, load_f16(halves));
  return lanes[0];
}

static inline float scale_to_f32(ScaleFormat format, uint16_t x) {
  return format == ScaleFormat::bf16 ? bf16_to_f32(x) : half_to_f32(x);
}

// The values of a row of integer weights, to be scaled.
static inline void read_values(const PackedWeight& w, const uint8_t* panel, int32_t column, float* out) {
  if (w.storage != WeightStorage::dense) {
    alignas(64) uint8_t bytes[kChunk * kPanel];
    const uint8_t* values = panel + w.panel_bytes;
    for (int32_t begin = 0; begin < w.depth; begin += kChunk) {
      const int32_t end = begin + kChunk < w.padded_depth ? begin + kChunk : w.padded_depth;
      if (w.storage == WeightStorage::csr) expand_csr(w, panel, begin, end, bytes);
      else values = expand_columns(w, begin, end, values, bytes);
      for (int32_t k = begin; k < end && k < w.depth; ++k)
        out[k] = (float)(bytes[(k - begin) / 4 * kPanel * 4 + column * 4 + k % 4] - 128);
    }
  } else if (w.format == WeightFormat::int8) {
    for (int32_t k = 0; k < w.depth; ++k)
      out[k] = (float)(panel[(int64_t)(k / 4) * kPanel * 4 + column * 4 + k % 4] - 128);
  } else {
    const int32_t zero = w.offset == WeightOffset::none ? 8 : 0;
    for (int32_t k = 0; k < w.depth; ++k) {
      const uint8_t both = panel[(int64_t)(k / 8) * kPanel * 4 + column * 4 + k % 4];
      out[k] = (float)((both >> (k % 8 / 4 * 4) & 15) - zero);
    }
  }
}

static void embedding(const PackedWeight& w, int32_t row, float* out) {
  const uint8_t* panel = panel_at(w, row / kPanel);
  const int32_t column = row % kPanel;
  switch (w.format) {
    case WeightFormat::f32:
      for (int32_t k = 0; k < w.depth; ++k) out[k] = ((const float*)panel)[(int64_t)k * kPanel + column];
      break;
    case WeightFormat::f16:
      for (int32_t k = 0; k < w.depth; ++k)
        out[k] = half_to_f32(((const uint16_t*)panel)[(int64_t)k * kPanel + column]);
      break;
    case WeightFormat::bf16:
      for (int32_t k = 0; k < w.depth; ++k)
        out[k] = bf16_to_f32(((const uint16_t*)panel)[(int64_t)k * kPanel + column]);
      break;
    case WeightFormat::int8:
    case WeightFormat::int4:
      read_values(w, panel, column, out);
      for (int32_t begin = 0, g = 0; begin < w.depth; begin += w.group_size, ++g) {
        const int32_t end = begin + w.group_size < w.depth ? begin + w.group_size : w.depth, at = g * kPanel + column;
        const float scale = scale_to_f32(w.scale_format, ((const uint16_t*)(panel + w.scales_offset))[at]);
        float offset = 0.0f;
        if (w.offset != WeightOffset::none)
          offset = scale_to_f32(w.scale_format, ((const uint16_t*)(panel + w.offsets_offset))[at]);
        if (w.offset == WeightOffset::zero_point) offset = scale * offset;
        for (int32_t k = begin; k < end; ++k) out[k] = out[k] * scale + offset;
      }
      break;
  }
}
