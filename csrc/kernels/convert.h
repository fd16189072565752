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

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void pack_row(const PackedWeight& w, const float* row, uint8_t* panel, int32_t column, float* scales,
                     int32_t* offsets, int64_t scales_stride, int8_t* scratch) {
  switch (w.format) {
    case WeightFormat::f32:
      for (int32_t k = 0; k < w.depth; ++k) ((float*)panel)[(int64_t)k * kPanel + column] = row[k];
      break;
    case WeightFormat::bf16:
      for (int32_t k = 0; k < w.depth; ++k) ((uint16_t*)panel)[(int64_t)k * kPanel + column] = to_bf16(row[k]);
      break;
    case WeightFormat::int8:
      // Weights use the signed range [-127, 127]; quantize_row offsets by 128, which is undone here.
      for (int32_t g = 0; g < w.num_groups; ++g) {
        const int32_t begin = g * w.group_size;
        const int32_t end = begin + w.group_size < w.padded_depth ? begin + w.group_size : w.padded_depth;
        const int32_t real_end = end < w.depth ? end : w.depth;
        quantize_row(row + begin, real_end - begin, end - begin, end - begin, (uint8_t*)scratch + begin,
                     scales + g * scales_stride + column);
        int32_t total = 0;
        for (int32_t k = begin; k < end; ++k) {
          scratch[k] = (int8_t)((uint8_t)scratch[k] - 128);
          total += scratch[k];
        }
        offsets[g * scales_stride + column] = 128 * total;
      }
      for (int32_t k = 0; k < w.padded_depth; k += 4)
        memcpy(panel + (int64_t)k * kPanel + column * 4, scratch + k, 4);
      break;
  }
}
