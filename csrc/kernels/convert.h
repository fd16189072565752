// From stored tensors to packed panels: decoding the stored formats and packing one row of weights.

static inline uint16_t half_bits_at(const uint8_t* p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return bits;
}

static inline float half_at(const uint8_t* p) { return half_to_f32(half_bits_at(p)); }

// Values of the nibbles of iq4_nl (kvalues_iq4nl of ggml-common.h).
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Element i of 32 that are a word of fifth bits, then nibbles.
static inline int five_bits(const uint8_t* p, int i) {
  const int nibble = i < 16 ? p[4 + i] & 15 : p[4 + i - 16] >> 4;
  return nibble | (p[i / 8] >> i % 8 & 1) << 4;
}

// The blocks of 256 elements; layouts of ggml-common.h, in the order of operations of dequantize_row_*.
static inline void decode_q2_k(const uint8_t* p, float* out) {
  const float d = half_at(p + 80), dmin = half_at(p + 82);
  for (int i = 0; i < 256; ++i) {
    const uint8_t scale = p[i / 16];
    const int q = p[16 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
    out[i] = d * (float)(scale & 15) * (float)q - dmin * (float)(scale >> 4);
  }
}

static inline void decode_q3_k(const uint8_t* p, float* out) {
  const float d = half_at(p + 108);
  const uint8_t* scales = p + 96;
  for (int i = 0; i < 256; ++i) {
    const int group = i / 16;
    const int scale = (group < 8 ? scales[group] & 15 : scales[group - 8] >> 4) |
                      (scales[8 + group % 4] >> group / 4 * 2 & 3) << 4;
    const int low = p[32 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
    const int high = p[i % 32] >> i / 32 & 1;  // set where 4 is not taken off
    out[i] = d * (float)(scale - 32) * (float)(low - 4 * (1 - high));
  }
}

// q4_k, and q5_k with its fifth bits at `fifth`.
static inline void decode_q45_k(const uint8_t* p, const uint8_t* fifth, const uint8_t* nibbles, float* out) {
  const float d = half_at(p), dmin = half_at(p + 2);
  const uint8_t* packed = p + 4;
  for (int group = 0; group < 8; ++group) {
    const int g = group % 4;
    const int scale = group < 4 ? packed[g] & 63 : (packed[8 + g] & 15) | packed[g] >> 6 << 4;
    const int minimum = group < 4 ? packed[4 + g] & 63 : packed[8 + g] >> 4 | packed[4 + g] >> 6 << 4;
    const float dl = d * (float)scale, ml = dmin * (float)minimum;
    for (int i = 0; i < 32; ++i) {
      int q = nibbles[group / 2 * 32 + i] >> group % 2 * 4 & 15;
      if (fifth) q |= (fifth[i] >> group & 1) << 4;
      out[group * 32 + i] = dl * (float)q - ml;
    }
  }
}

static inline void decode_q6_k(const uint8_t* p, float* out) {
  const float d = half_at(p + 208);
  for (int i = 0; i < 256; ++i) {
    const int low = p[i / 128 * 64 + i % 64] >> i / 64 % 2 * 4 & 15;
    const int high = p[128 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
    out[i] = d * (float)(int8_t)p[192 + i / 16] * (float)((low | high << 4) - 32);
  }
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
    case StoredFormat::q5_0:
      for (int64_t b = 0; b < count / 32; ++b, p += 22)
        for (int i = 0; i < 32; ++i) out[b * 32 + i] = (float)(five_bits(p + 2, i) - 16) * half_at(p);
      break;
    case StoredFormat::q5_1:
      for (int64_t b = 0; b < count / 32; ++b, p += 24)
        for (int i = 0; i < 32; ++i) out[b * 32 + i] = (float)five_bits(p + 4, i) * half_at(p) + half_at(p + 2);
      break;
    case StoredFormat::iq4_nl:
      for (int64_t b = 0; b < count / 32; ++b, p += 18)
        for (int i = 0; i < 16; ++i) {
          out[b * 32 + i] = half_at(p) * (float)kIq4Values[p[2 + i] & 15];
          out[b * 32 + 16 + i] = half_at(p) * (float)kIq4Values[p[2 + i] >> 4];
        }
      break;
    case StoredFormat::q2_k:
      for (int64_t b = 0; b < count / 256; ++b) decode_q2_k(p + b * 84, out + b * 256);
      break;
    case StoredFormat::q3_k:
      for (int64_t b = 0; b < count / 256; ++b) decode_q3_k(p + b * 110, out + b * 256);
      break;
    case StoredFormat::q4_k:
      for (int64_t b = 0; b < count / 256; ++b, p += 144) decode_q45_k(p, nullptr, p + 16, out + b * 256);
      break;
    case StoredFormat::q5_k:
      for (int64_t b = 0; b < count / 256; ++b, p += 176) decode_q45_k(p, p + 16, p + 48, out + b * 256);
      break;
    case StoredFormat::q6_k:
      for (int64_t b = 0; b < count / 256; ++b) decode_q6_k(p + b * 210, out + b * 256);
      break;
    case StoredFormat::groups: break;  // moved by pack_blocks
  }
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Columns of a row that are quantized at a time.
constexpr int32_t kPackedColumns = 64;
static_assert(kPackedColumns % kDepthAlignment == 0 && kSmallestGroup % kDepthAlignment == 0);

// Puts a multiple of 8 columns from `begin` on, which is one too: int8 as value + 128, int4 as nibbles.
static inline void put_columns(const PackedWeight& w, uint8_t* panel, int32_t column, int32_t begin, int32_t count,
                               const uint8_t* values) {
  for (int32_t i = 0; i < count; i += 8) {
    const int64_t at = (int64_t)(begin + i) * kPanel + column * 4;
    if (w.format == WeightFormat::int8) {
      memcpy(panel + at, values + i, 4);
      memcpy(panel + at + kPanel * 4, values + i + 4, 4);
    } else {
      uint8_t* out = panel + (int64_t)(begin + i) / 2 * kPanel + column * 4;
      for (int b = 0; b < 4; ++b) out[b] = (uint8_t)(values[i + b] | values[i + 4 + b] << 4);
    }
  }
}

static inline int32_t clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

// A group's scale, and the integer that is added to round(x / scale).
struct GroupScale {
  float scale;
  int32_t zero;
};

static inline GroupScale choose_scale(const PackedWeight& w, const float* x, int32_t count) {
  if (w.format == WeightFormat::int8) return {largest_magnitude(x, count) / 127.0f, 128};
  float low = 0.0f, high = 0.0f;
  for (int32_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  // Nibbles reach from -8 to 7: a scale with the sign that brings the largest magnitude to -8 uses them all.
  if (w.offset == WeightOffset::none) return {-low >= high ? low / -8.0f : high / -8.0f, 8};
  const float scale = high / 15.0f - low / 15.0f;
  const float zero = scale > kSmallestQuantized ? nearbyintf(-low / scale) : 0.0f;
  return {scale, clamp((int32_t)zero, 0, 15)};
}

// Rounds one group of a row. The rounded scale is the one that is used, so that its rounding costs nothing.
static inline void pack_group(const PackedWeight& w, const float* row, int32_t group, uint8_t* panel, int32_t column) {
  const int32_t begin = group * w.group_size;
  const int32_t count = w.depth - begin < w.group_size ? w.depth - begin : w.group_size;
  GroupScale chosen = choose_scale(w, row + begin, count);
  const uint16_t scale = to_bf16(chosen.scale + magnitude(row + begin, count).poison);
  ((uint16_t*)(panel + w.scales_offset))[group * kPanel + column] = scale;
  if (w.offset == WeightOffset::zero_point)
    ((uint16_t*)(panel + w.offsets_offset))[group * kPanel + column] = to_bf16((float)-chosen.zero);
  const float inverse = fabsf(chosen.scale) > kSmallestQuantized / 127.0f ? 1.0f / bf16_to_f32(scale) : 0.0f;
  const int32_t most = w.format == WeightFormat::int8 ? 255 : 15;
  for (int32_t at = 0; at < count; at += kPackedColumns) {
    const int32_t n = count - at < kPackedColumns ? count - at : kPackedColumns;
    int8_t rounded[kPackedColumns] = {};
    quantize_values(row + begin + at, n, inverse, rounded);
    uint8_t values[kPackedColumns];
    for (int32_t i = 0; i < kPackedColumns; ++i) values[i] = (uint8_t)clamp(rounded[i] + chosen.zero, 0, most);
    put_columns(w, panel, column, begin + at, n, values);
  }
}

static void pack_row(const PackedWeight& w, const float* row, uint8_t* panel, int32_t column) {
  switch (w.format) {
    case WeightFormat::f32:
      for (int32_t k = 0; k < w.depth; ++k) ((float*)panel)[(int64_t)k * kPanel + column] = row[k];
      break;
    case WeightFormat::f16:
      for (int32_t k = 0; k < w.depth; ++k) ((uint16_t*)panel)[(int64_t)k * kPanel + column] = to_f16(row[k]);
      break;
    case WeightFormat::bf16:
      for (int32_t k = 0; k < w.depth; ++k) ((uint16_t*)panel)[(int64_t)k * kPanel + column] = to_bf16(row[k]);
      break;
    case WeightFormat::int8:
    case WeightFormat::int4:
      for (int32_t group = 0; group < w.num_groups; ++group) pack_group(w, row, group, panel, column);
      break;
  }
}

static inline void pack_groups(const PackedWeight& w, const uint8_t* p, uint8_t* panel, int32_t column) {
  const auto put_numbers = [&](int64_t offset) {
    for (int32_t group = 0; group < w.num_groups; ++group, p += 2)
      ((uint16_t*)(panel + offset))[group * kPanel + column] = half_bits_at(p);
  };
  put_numbers(w.scales_offset);
  if (w.offset != WeightOffset::none) put_numbers(w.offsets_offset);
  put_columns(w, panel, column, 0, w.padded_depth, p);
}

// The groups of the weight are the stored blocks: their numbers are moved, not rounded.
static void pack_blocks(const PackedWeight& w, StoredFormat format, const uint8_t* p, uint8_t* panel, int32_t column) {
  if (format == StoredFormat::groups) return pack_groups(w, p, panel, column);
  const int32_t header = format == StoredFormat::q4_1 ? 4 : 2;
  for (int32_t group = 0; group < w.num_groups; ++group) {
    const int32_t at = group * kPanel + column;
    ((uint16_t*)(panel + w.scales_offset))[at] = half_bits_at(p);
    if (w.offset == WeightOffset::minimum) ((uint16_t*)(panel + w.offsets_offset))[at] = half_bits_at(p + 2);
    p += header;
    uint8_t values[32];
    if (format == StoredFormat::q8_0) {
      for (int i = 0; i < 32; ++i) values[i] = (uint8_t)(p[i] + 128);
      p += 32;
    } else if (format == StoredFormat::q5_0) {
      for (int i = 0; i < 32; ++i) values[i] = (uint8_t)(five_bits(p, i) - 16 + 128);
      p += 20;
    } else if (format == StoredFormat::iq4_nl) {
      for (int i = 0; i < 16; ++i) {
        values[i] = (uint8_t)(kIq4Values[p[i] & 15] + 128);
        values[16 + i] = (uint8_t)(kIq4Values[p[i] >> 4] + 128);
      }
      p += 16;
    } else {
      for (int i = 0; i < 16; ++i) values[i] = p[i] & 15, values[16 + i] = p[i] >> 4;
      p += 16;
    }
    put_columns(w, panel, column, group * 32, 32, values);
  }
}
