// Expanding the values of bitmask weights (kernel.h: WeightStorage) to the bytes of dense ones, 64 at a time.

// The byte that stands for a weight of zero.
constexpr uint8_t kZeroByte = 128;
// What is added to a nibble of a weight without an offset.
constexpr uint8_t kNibbleToByte = kZeroByte - 8;

static inline int64_t count_ones(uint64_t mask) {
#if defined(__GNUC__)
  return __builtin_popcountll(mask);
#else
  mask -= mask >> 1 & 0x5555555555555555;
  mask = (mask & 0x3333333333333333) + (mask >> 2 & 0x3333333333333333);
  return (int64_t)(((mask + (mask >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
#endif
}

// The place of the lowest bit that is set, of a mask that has one.
static inline int first_one(uint64_t mask) {
#if defined(__GNUC__)
  return __builtin_ctzll(mask);
#else
  return (int)count_ones((mask & (0 - mask)) - 1);
#endif
}

#if defined(FASTSERVE_ISA_AVX512VBMI2)

constexpr bool kExpandsInRegisters = true;

static inline __m512i expand(uint64_t mask, __m512i values, int zero = kZeroByte) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8((char)zero), mask, values);
}

// Halves of bytes, as bytes of weights.
static inline __m512i low_halves(__m512i both) {
  return _mm512_add_epi8(_mm512_and_si512(both, _mm512_set1_epi8(15)), _mm512_set1_epi8((char)kNibbleToByte));
}
static inline __m512i high_halves(__m512i both) { return low_halves(_mm512_srli_epi16(both, 4)); }

// 64 bytes: where a bit of the mask is set, the next of the values, else the zero byte. Reads 64 values.
static inline void expand_bytes(uint64_t mask, const uint8_t* values, uint8_t* out) {
  _mm512_store_si512(out, expand(mask, _mm512_loadu_si512(values)));
}

// As above, of values in the low and the high halves of bytes.
static inline void expand_nibbles(uint64_t low_mask, uint64_t high_mask, const uint8_t* values, uint8_t* low_out,
                                  uint8_t* high_out) {
  const __m512i both = _mm512_loadu_si512(values);
  _mm512_store_si512(low_out, expand(low_mask, low_halves(both)));
  _mm512_store_si512(high_out, expand(high_mask, high_halves(both)));
}

#else

constexpr bool kExpandsInRegisters = false;
constexpr int kSparseTileRows = 1;

// For eight bits of a mask, which of the next values goes to each of eight bytes; kNowhere: none.
constexpr uint8_t kNowhere = 0x80;
struct ExpandTable {
  uint8_t places[256][8];
};
static constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int i = 0, next = 0; i < 8; ++i) table.places[bits][i] = bits >> i & 1 ? (uint8_t)next++ : kNowhere;
  return table;
}
static constexpr ExpandTable kExpandTable = make_expand_table();

// Shuffles give zero where a place is kNowhere, so that values pass through them less the zero byte.
static inline void expand_8(int bits, const uint8_t* values, uint8_t* out) {
  const uint8_t* places = kExpandTable.places[bits];
#if defined(FASTSERVE_ISA_AVX2) || defined(FASTSERVE_ISA_AVX512VNNI)
  const __m128i zero_byte = _mm_set1_epi8((char)kZeroByte);
  const __m128i less = _mm_xor_si128(_mm_loadl_epi64((const __m128i*)values), zero_byte);
  const __m128i spread = _mm_shuffle_epi8(less, _mm_loadl_epi64((const __m128i*)places));
  _mm_storel_epi64((__m128i*)out, _mm_xor_si128(spread, zero_byte));
#elif defined(FASTSERVE_ISA_NEONDOT)
  const uint8x8_t zero_byte = vdup_n_u8(kZeroByte);
  vst1_u8(out, veor_u8(vtbl1_u8(veor_u8(vld1_u8(values), zero_byte), vld1_u8(places)), zero_byte));
#else
  for (int i = 0; i < 8; ++i) out[i] = places[i] == kNowhere ? kZeroByte : values[places[i]];
#endif
}

static inline void expand_bytes(uint64_t mask, const uint8_t* values, uint8_t* out) {
  for (int i = 0; i < 64; i += 8) {
    const int bits = (int)(mask >> i & 255);
    expand_8(bits, values, out + i);
    values += count_ones((uint64_t)bits);
  }
}

static inline void expand_nibbles(uint64_t low_mask, uint64_t high_mask, const uint8_t* values, uint8_t* low_out,
                                  uint8_t* high_out) {
  uint8_t low[64 + 8] = {}, high[64 + 8] = {};  // expand_8 reads eight from the last value on
  for (int i = 0; i < 64; ++i) {
    low[i] = (uint8_t)((values[i] & 15) + kNibbleToByte);
    high[i] = (uint8_t)((values[i] >> 4) + kNibbleToByte);
  }
  expand_bytes(low_mask, low, low_out);
  expand_bytes(high_mask, high, high_out);
}

#endif

// Bytes that the values of a pair of int4 columns take.
static inline int64_t paired_bytes(uint64_t low_mask, uint64_t high_mask) {
  const int64_t low = count_ones(low_mask), high = count_ones(high_mask);
  return low > high ? low : high;
}

// The masks of the block of columns whose values come after those before `end`.
static inline const uint64_t* next_masks(const uint8_t* end) { return (const uint64_t*)(((uintptr_t)end + 7) & ~(uintptr_t)7); }

// The values of a block that begins with these masks, at column k.
static inline const uint8_t* block_values(const uint64_t* masks, int32_t k, int32_t padded_depth) {
  return (const uint8_t*)(masks + (padded_depth - k < kBitmaskBlock ? padded_depth - k : kBitmaskBlock));
}

// Columns [begin, end) of a panel, which are whole blocks, as bytes; `values` ends those before. Returns where theirs end.
static inline const uint8_t* expand_columns(const PackedWeight& w, int32_t begin, int32_t end, const uint8_t* values,
                                            uint8_t* out) {
  for (int32_t block = begin; block < end; block += kBitmaskBlock) {
    const uint64_t* masks = next_masks(values);
    values = block_values(masks, block, w.padded_depth);
    const int32_t count = end - block < kBitmaskBlock ? end - block : kBitmaskBlock;
    if (w.format == WeightFormat::int8) {
      for (int32_t k = 0; k < count; ++k, out += kPanel) {
        expand_bytes(masks[k], values, out);
        values += count_ones(masks[k]);
      }
    } else {
      for (int32_t first = 0; first < count; first += 8, out += 8 * kPanel)
        for (int32_t i = 0; i < 4; ++i) {
          const uint64_t low = masks[first + i], high = masks[first + i + 4];
          expand_nibbles(low, high, values, out + i * kPanel, out + (i + 4) * kPanel);
          values += paired_bytes(low, high);
        }
    }
  }
  return values;
}

// Four columns of a panel at a time, from the memory in which they lie as bytes.
struct StoredWeights {
  const uint8_t* bytes;
  static int32_t start(int32_t correction) { return kKeepsWeightOffset ? correction : 0; }
  template <int V>
  void next(int32_t, Weights4 (&w)[V]) {
    for (int v = 0; v < V; ++v) w[v] = load_weights4(bytes + v * kLanes * 4);
    bytes += kPanel * 4;
  }
};

#if defined(FASTSERVE_ISA_AVX512VBMI2)

// How many bytes ahead values are asked for.
constexpr int64_t kExpandAhead = 1536;
constexpr uintptr_t kExpandStreamAhead = 4096;

// Asks for two pairs of lines, about what four columns of a panel, or their masks, take.
static inline void ask_ahead(uintptr_t address) {
  prefetch_line(address + kExpandStreamAhead);
  prefetch_line(address + kExpandStreamAhead + 128);
}

// 64 bytes in a register: an instruction that expands from memory is a fifth slower (Zen 5).
static inline __m512i load_apart(const uint8_t* values) {
  __m512i loaded = _mm512_loadu_si512(values);
#if defined(__GNUC__)
  asm("" : "+v"(loaded));
#endif
  return loaded;
}

// Four columns of a panel at a time, expanded in registers, or of V vectors of its channels from `first` on: the others
// are passed over. As fast as it gets, but paid for by every tile of rows.
template <WeightFormat format, int first = 0>
struct ExpandedWeights {
  // Nibbles are used with the offset that they are stored with.
  static constexpr int kOffset = format == WeightFormat::int8 ? kZeroByte : kZeroByte - kNibbleToByte;
  int32_t padded_depth;
  const uint8_t* values;
  const uint64_t* masks = nullptr;
  __m512i pairs[4] = {};

  ExpandedWeights(const PackedWeight& w, const uint8_t* values) : padded_depth(w.padded_depth), values(values) {}
  // A correction is -128 * sum(q).
  static int32_t start(int32_t correction) { return correction / (kZeroByte / kOffset); }

  template <int V>
  void next(int32_t k, Weights4 (&w)[V]) {
    const bool is_asking = first == 0 && (format == WeightFormat::int8 || (k & 4) == 0);
    if ((k & (kBitmaskBlock - 1)) == 0) {
      masks = next_masks(values);
      values = block_values(masks, k, padded_depth);
      if (V == 4 && is_asking) ask_ahead((uintptr_t)masks);
    }
    // More rows than a full tile has keep the processor from looking far ahead. With fewer, memory is waited for, and
    // not every processor foresees this stream by itself.
    if (V == 4 && is_asking) ask_ahead((uintptr_t)values);
    if (V < 4 && is_asking) {
      _mm_prefetch((const char*)values + kExpandAhead, _MM_HINT_T0);
      _mm_prefetch((const char*)values + kExpandAhead + 64, _MM_HINT_T0);
    }
    const __m512i halves = _mm512_set1_epi8(15);
    for (int v = 0; v < 4; ++v) {
      const bool is_wanted = v >= first && v < first + V;
      const uint64_t mask = masks[v];
      if constexpr (format == WeightFormat::int8) {
        if (is_wanted) w[v - first] = expand(mask, load_apart(values), kOffset);
        values += count_ones(mask);
      } else if ((k & 4) == 0) {
        if (is_wanted) {
          pairs[v] = _mm512_loadu_si512(values);
          w[v - first] = expand(mask, _mm512_and_si512(pairs[v], halves), kOffset);
        }
        values += paired_bytes(mask, masks[v + 4]);
      } else if (is_wanted) {
        w[v - first] = expand(mask, _mm512_and_si512(_mm512_srli_epi16(pairs[v], 4), halves), kOffset);
      }
    }
    masks += 4;
  }
};

// Rows that share what is expanded: of a bitmask half of the channels at a time where they are more than kTileRows, of CSR
// a fourth.
constexpr int kSparseTileRows = 12;

#endif
