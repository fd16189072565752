// linear: out = x @ weight.T + bias over packed panels, and reading a row back (embedding).
//
// Every output element has one order of accumulation, whatever the number of rows in a call: float products are
// summed column by column within blocks of kDepthBlock, and the blocks' sums are added in order; integer sums are
// exact within a group, and the groups' scaled sums are added in order. Partial sums live in a tile
// [rows][kPanel] on the stack.

// Rows and vectors of channels whose sums a kernel holds in registers.
#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kRegisterRows = 6, kRegisterVectors = 4;
#elif defined(FASTSERVE_ISA_AVX2)
constexpr int kRegisterRows = 4, kRegisterVectors = 2;
#else
constexpr int kRegisterRows = 2, kRegisterVectors = 2;
#endif
constexpr int kRegisterColumns = kRegisterVectors * kLanes;
static_assert(kPanel % kRegisterColumns == 0, "a panel is a whole number of register tiles");

static inline F32 load_weights(const float* p) { return load(p); }
static inline F32 load_weights(const uint16_t* p) { return load_bf16(p); }

template <int R, class Weight>
static inline void linear_rows_float(const LinearArgs& a, int32_t row, const Weight* panel, float (*tile)[kPanel]) {
  const int32_t depth = a.weight->depth;
  const float* x = a.x + row * a.x_stride;
  for (int column = 0; column < kPanel; column += kRegisterColumns) {
    for (int32_t block = 0; block < depth; block += kDepthBlock) {
      const int32_t end = block + kDepthBlock < depth ? block + kDepthBlock : depth;
      F32 acc[R][kRegisterVectors];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kRegisterVectors; ++v) acc[r][v] = zero();
      for (int32_t k = block; k < end; ++k) {
        const Weight* w = panel + (int64_t)k * kPanel + column;
        F32 weights[kRegisterVectors];
        for (int v = 0; v < kRegisterVectors; ++v) weights[v] = load_weights(w + v * kLanes);
        for (int r = 0; r < R; ++r) {
          F32 b = set1(x[r * a.x_stride + k]);
          for (int v = 0; v < kRegisterVectors; ++v) acc[r][v] = fma(b, weights[v], acc[r][v]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kRegisterVectors; ++v) {
          float* t = tile[r] + column + v * kLanes;
          store(t, block == 0 ? acc[r][v] : add(load(t), acc[r][v]));
        }
    }
  }
}

template <int R>
static inline void linear_rows_int8(const LinearArgs& a, int32_t row, const uint8_t* panel, const uint16_t* scales,
                                    int64_t scales_stride, float (*tile)[kPanel]) {
  const PackedWeight& w = *a.weight;
  const int8_t* x = a.quantized.data + row * a.quantized.row_bytes;
  const int64_t x_stride = a.quantized.row_bytes;
  for (int column = 0; column < kPanel; column += kRegisterColumns) {
    for (int32_t g = 0; g < w.num_groups; ++g) {
      const int32_t begin = g * w.group_size;
      const int32_t end = begin + w.group_size < w.padded_depth ? begin + w.group_size : w.padded_depth;
      float x_scale[R];
      I32 acc[R][kRegisterVectors];
      for (int r = 0; r < R; ++r) {
        int32_t correction;
        memcpy(&correction, x + r * x_stride + a.quantized.corrections_offset + g * 4, 4);
        memcpy(&x_scale[r], x + r * x_stride + a.quantized.scales_offset + g * 4, 4);
        for (int v = 0; v < kRegisterVectors; ++v) acc[r][v] = set1(correction);
      }
      for (int32_t k = begin; k < end; k += 4) {
        const uint8_t* p = panel + (int64_t)k * kPanel + column * 4;
        Weights4 weights[kRegisterVectors];
        for (int v = 0; v < kRegisterVectors; ++v) weights[v] = load_weights4(p + v * kLanes * 4);
        for (int r = 0; r < R; ++r) {
          Bytes4 b = broadcast4(x + r * x_stride + k);
          for (int v = 0; v < kRegisterVectors; ++v) acc[r][v] = dot4(acc[r][v], b, weights[v]);
        }
      }
      for (int v = 0; v < kRegisterVectors; ++v) {
        const int c = column + v * kLanes;
        const F32 w_scale = load_bf16(scales + g * scales_stride + c);
        for (int r = 0; r < R; ++r) {
          const F32 scale = mul(w_scale, set1(x_scale[r])), sum = to_f32(acc[r][v]);
          store(tile[r] + c, g == 0 ? mul(sum, scale) : fma(sum, scale, load(tile[r] + c)));
        }
      }
    }
  }
}

template <int R>
static inline void linear_rows(const LinearArgs& a, int32_t row, int32_t panel) {
  const PackedWeight& w = *a.weight;
  const uint8_t* weights = w.panels + panel * w.panel_bytes;
  const int32_t column = panel * kPanel;
  alignas(64) float tile[R][kPanel];
  switch (w.format) {
    case WeightFormat::f32: linear_rows_float<R>(a, row, (const float*)weights, tile); break;
    case WeightFormat::bf16: linear_rows_float<R>(a, row, (const uint16_t*)weights, tile); break;
    case WeightFormat::int8: {
      const int64_t padded_rows = (w.rows + kPanel - 1) / kPanel * kPanel;
      linear_rows_int8<R>(a, row, weights, w.scales + column, padded_rows, tile);
      break;
    }
  }
  const int32_t width = w.rows - column < kPanel ? w.rows - column : kPanel;
  for (int r = 0; r < R; ++r) {
    float* out = a.out + (row + r) * a.out_stride + column;
    if (a.bias) add(tile[r], a.bias + column, width, out);
    else memcpy(out, tile[r], (size_t)width * sizeof(float));
  }
}

static void linear(const LinearArgs& a, int32_t row_begin, int32_t row_end, int32_t panel_begin, int32_t panel_end) {
  for (int32_t panel = panel_begin; panel < panel_end; ++panel) {
    int32_t row = row_begin;
    for (; row + kRegisterRows <= row_end; row += kRegisterRows) linear_rows<kRegisterRows>(a, row, panel);
    switch (row_end - row) {
      case 5: linear_rows<5>(a, row, panel); break;
      case 4: linear_rows<4>(a, row, panel); break;
      case 3: linear_rows<3>(a, row, panel); break;
      case 2: linear_rows<2>(a, row, panel); break;
      case 1: linear_rows<1>(a, row, panel); break;
      default: break;
    }
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
      const int64_t padded_rows = (w.rows + kPanel - 1) / kPanel * kPanel;
      for (int32_t k = 0; k < w.depth; ++k) {
        const int32_t value = panel[(int64_t)(k / 4) * kPanel * 4 + column * 4 + k % 4] - 128;
        out[k] = (float)value * bf16_to_f32(w.scales[(k / w.group_size) * padded_rows + row]);
      }
      break;
    }
  }
}
