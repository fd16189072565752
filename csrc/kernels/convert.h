// From stored tensors to packed panels: decoding the stored formats and packing one row of weights.

static inline float half_at(const uint8_t* p) {
  uint16_t h[kLanes] = {};
  float lanes[kLanes];
  memcpy(h, p, 2);
  store(lanes, load_f16(h));
  return lanes[0];
}

static void decode_row(StoredFormat format, const uint8_t* p, int64_t count, float* out) {
  switch (format) {
    case StoredFormat::f32: memcpy(out, p, (size_t)count * 4); break;
    case StoredFormat::f16:
      for (int64_t i = 0; i < count; i += kLanes) {
        int n = count - i < kLanes ? (int)(count - i) : kLanes;
        uint16_t h[kLanes] = {};
        memcpy(h, p + 2 * i, (size_t)n * 2);
        float lanes[kLanes];
        store(lanes, load_f16(h));
        memcpy(out + i, lanes, (size_t)n * 4);
      }
      break;
    case StoredFormat::bf16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t h;
        memcpy(&h, p + 2 * i, 2);
        out[i] = bf16_to_f32(h);
      }
      break;
    case StoredFormat::q8_0:
      for (int64_t b = 0; b < count / 32; ++b, p += 34) {
        const float d = half_at(p);
        for (int i = 0; i < 32; ++i) out[b * 32 + i] = (float)(int8_t)p[2 + i] * d;
      }
      break;
    case StoredFormat::q4_0:
      for (int64_t b = 0; b < count / 32; ++b, p += 18) {
        const float d = half_at(p);
        for (int i = 0; i < 16; ++i) {
          out[b * 32 + i] = (float)((p[2 + i] & 15) - 8) * d;
          out[b * 32 + 16 + i] = (float)((p[2 + i] >> 4) - 8) * d;
        }
      }
      break;
    case StoredFormat::q4_1:
      for (int64_t b = 0; b < count / 32; ++b, p += 20) {
        const float d = half_at(p), m = half_at(p + 2);
        for (int i = 0; i < 16; ++i) {
          out[b * 32 + i] = (float)(p[4 + i] & 15) * d + m;
          out[b * 32 + 16 + i] = (float)(p[4 + i] >> 4) * d + m;
        }
      }
      break;
  }
}

// Columns of a row that are quantized at a time; a multiple of 4.
constexpr int32_t kPackedColumns = 64;

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void pack_row(const PackedWeight& w, const float* row, uint8_t* panel, int32_t column, uint16_t* scale) {
  switch (w.format) {
    case WeightFormat::f32:
      for (int32_t k = 0; k < w.depth; ++k) ((float*)panel)[(int64_t)k * kPanel + column] = row[k];
      break;
    case WeightFormat::bf16:
      for (int32_t k = 0; k < w.depth; ++k) ((uint16_t*)panel)[(int64_t)k * kPanel + column] = to_bf16(row[k]);
      break;
    case WeightFormat::int8: {
      // The rounded scale is the one that is used, so that its rounding costs nothing. Being at most 2^-8 too small,
      // it cannot push a value beyond 127.5.
      const float largest_value = largest_magnitude(row, w.depth);
      *scale = to_bf16(largest_value / 127.0f);
      const float inverse = largest_value > kSmallestQuantized ? 1.0f / bf16_to_f32(*scale) : 0.0f;
      for (int32_t begin = 0; begin < w.depth; begin += kPackedColumns) {
        const int32_t n = w.depth - begin < kPackedColumns ? w.depth - begin : kPackedColumns;
        int8_t values[kPackedColumns] = {};
        quantize_values(row + begin, n, inverse, values);
        for (int32_t i = 0; i < n; i += 4) {
          uint8_t* out = panel + (int64_t)(begin + i) * kPanel + column * 4;
          for (int b = 0; b < 4; ++b) out[b] = (uint8_t)(values[i + b] + 128);
        }
      }
      break;
    }
  }
}
