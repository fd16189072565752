// linear: out = x @ weight.T + bias over packed panels, and reading a row back (embedding).
//
// Every output element has one order of accumulation, whatever the number of rows in a call: float products are
// summed column by column within blocks of kDepthBlock, and the blocks' sums are added in order; integer sums are
// exact within a group, and the groups' scaled sums are added in order.

// Rows of x and vectors of channels whose sums a kernel holds in registers. Sums over blocks or groups lie on the
// stack: they are touched once in 64 columns or more.
#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(FASTSERVE_ISA_AVX2)
constexpr int kTileRows = 4, kTileVectors = 2;
#else
constexpr int kTileRows = 2, kTileVectors = 2;
#endif
static_assert(kPanel % (kTileVectors * kLanes) == 0, "a panel is a whole number of register tiles");

// Calls f<R>(row) for register tiles of R rows that cover [begin, end), R as large as can be.
template <int R, class Function>
static inline void each_row_tile(int32_t begin, int32_t end, Function f) {
  for (; begin + R <= end; begin += R) f.template operator()<R>(begin);
  if constexpr (R > 1)
    if (begin < end) each_row_tile<R - 1>(begin, end, f);
}

static inline void store_channels(const LinearArgs& a, int32_t row, int32_t channel, F32 sums) {
  const int32_t left = a.weight->rows - channel;
  if (left <= 0) return;
  const int n = left < kLanes ? left : kLanes;
  if (a.bias) sums = add(sums, load_up_to(a.bias + channel, n));
  store_up_to(a.out + row * a.out_stride + channel, sums, n);
}

static inline F32 load_weights(const float* p) { return load(p); }
static inline F32 load_weights(const uint16_t* p) { return load_bf16(p); }

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

template <int R, int V>
static inline void linear_tile_int8(const LinearArgs& a, int32_t row, int32_t panel, int32_t column) {
  const PackedWeight& w = *a.weight;
  const uint8_t* weights = w.panels + panel * w.panel_bytes + column * 4;
  const int64_t stride = a.quantized.row_bytes, word_stride = stride / 4;
  const int8_t* x = a.quantized.data + row * stride;
  const float* x_scales = (const float*)(x + a.quantized.scales_offset);
  const int32_t* corrections = (const int32_t*)(x + a.quantized.corrections_offset);
  alignas(64) float sums[R][V * kLanes] = {};
  for (int32_t g = 0; g < w.num_groups; ++g) {
    const int32_t begin = g * w.group_size;
    const int32_t end = begin + w.group_size < w.padded_depth ? begin + w.group_size : w.padded_depth;
    I32 acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = set1(corrections[r * word_stride + g]);
    for (int32_t k = begin; k < end; k += 4) {
      Weights4 bytes[V];
      for (int v = 0; v < V; ++v) bytes[v] = load_weights4(weights + (int64_t)k * kPanel + v * kLanes * 4);
      for (int r = 0; r < R; ++r) {
        const Bytes4 b = broadcast4(x + r * stride + k);
        for (int v = 0; v < V; ++v) acc[r][v] = dot4(acc[r][v], b, bytes[v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const F32 x_scale = set1(x_scales[r * word_stride + g]);
      for (int v = 0; v < V; ++v) {
        float* sum = sums[r] + v * kLanes;
        store(sum, fma(to_f32(acc[r][v]), x_scale, load(sum)));
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    const int32_t channel = panel * kPanel + column + v * kLanes;
    const F32 w_scale = load_bf16(w.scales + channel);
    for (int r = 0; r < R; ++r) store_channels(a, row + r, channel, mul(load(sums[r] + v * kLanes), w_scale));
  }
}

// All rows of a tile, a register tile of R rows at a time, against one panel.
template <class Tile>
static inline void linear_panel(int32_t row_begin, int32_t row_end, Tile tile) {
  each_row_tile<kTileRows>(row_begin, row_end, [&]<int R>(int32_t row) {
    for (int32_t column = 0; column < kPanel; column += kTileVectors * kLanes) tile.template operator()<R>(row, column);
  });
}

static void linear(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel_begin, int32_t panel_end) {
  for (int32_t panel = panel_begin; panel < panel_end; ++panel) switch (a.weight->format) {
      case WeightFormat::f32:
        linear_panel(row_begin, row_end, [&]<int R>(int32_t row, int32_t column) {
          linear_tile_float<R, kTileVectors, float>(a, row, panel, column);
        });
        break;
      case WeightFormat::bf16:
        linear_panel(row_begin, row_end, [&]<int R>(int32_t row, int32_t column) {
          linear_tile_float<R, kTileVectors, uint16_t>(a, row, panel, column);
        });
        break;
      case WeightFormat::int8:
        linear_panel(row_begin, row_end, [&]<int R>(int32_t row, int32_t column) {
          linear_tile_int8<R, kTileVectors>(a, row, panel, column);
        });
        break;
    }
}

static inline float bf16_to_f32(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static void embedding(const PackedWeight& w, int32_t row, float* out) {
  const uint8_t* panel = w.panels + (row / kPanel) * w.panel_bytes;
  const int32_t column = row % kPanel;
  switch (w.format) {
    case WeightFormat::f32:
      for (int32_t k = 0; k < w.depth; ++k) out[k] = ((const float*)panel)[(int64_t)k * kPanel + column];
      break;
    case WeightFormat::bf16:
      for (int32_t k = 0; k < w.depth; ++k)
        out[k] = bf16_to_f32(((const uint16_t*)panel)[(int64_t)k * kPanel + column]);
      break;
    case WeightFormat::int8: {
      const float scale = bf16_to_f32(w.scales[row]);
      for (int32_t k = 0; k < w.depth; ++k)
        out[k] = (float)(panel[(int64_t)(k / 4) * kPanel * 4 + column * 4 + k % 4] - 128) * scale;
      break;
    }
  }
}
