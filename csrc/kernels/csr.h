// linear of CSR weights (kernel.h: PackedWeight): only weights other than zero are multiplied, each with the activation
// that its column names. The columns of a slice are those of a group of activations, whose products are summed exactly
// in integers, and the groups' sums are scaled and added in order: the bits are those of dense weights.

#if defined(FASTSERVE_ISA_AVX512VBMI2)

constexpr bool kMultipliesCsr = true;

// How many bytes ahead entries are asked for (kExpandAhead).
constexpr uintptr_t kCsrAhead = 1024;

// R rows against columns [begin, end) of a panel, which are whole slices; sums: [R][kPanel]; scales: of every slice from
// `begin` on, [kPanel], where they are groups'.
//
// A register holds the 64 activations of a slice, from which a permutation takes those that the columns name: of 16
// channels four entries each, as the dot product wants them. It multiplies unsigned by signed bytes, so activations are
// taken plus 128, and 128 * sum(weights), the same for all rows, is taken off the sums.
template <int R, bool has_group_scales>
static inline void linear_tile_csr(const LinearArgs& a, const uint8_t* panel, int32_t begin, int32_t end,
                                   const float (*scales)[kPanel], int32_t row, float* sums) {
  const PackedWeight& w = *a.weight;
  const int32_t width = w.activation_group_size;
  const int64_t stride = a.quantized.row_bytes;
  const int8_t* x = a.quantized.data + row * stride;
  const __m512i offset = _mm512_set1_epi8((char)128);
  const int32_t first = begin / width;
  const float* x_scales = (const float*)(x + a.quantized.scales_offset) + first;
  const CsrSlice* slices = (const CsrSlice*)panel + first;
  for (int32_t k = begin, g = 0; k < end; k += width, ++g) {
    const CsrSlice slice = slices[g];
    const uint64_t* masks = (const uint64_t*)(panel + slice.start);
    int num_masks = 0;
    for (int v = 0; v < kCsrVectors; ++v) num_masks += slice.num_steps[v];
    const uint8_t* entries = (const uint8_t*)(masks + num_masks);
    const int32_t left = end - k < width ? end - k : width;
    const __mmask64 columns = left == 64 ? ~0ull : (1ull << left) - 1;
    I32 xs[R];
    for (int r = 0; r < R; ++r)
      xs[r] = (I32)_mm512_xor_si512(_mm512_maskz_loadu_epi8(columns, x + r * stride + k), offset);
    for (int v = 0; v < kCsrVectors; ++v) {
      I32 acc[R], offsets = set1(0);
      for (int r = 0; r < R; ++r) acc[r] = set1(0);
      for (int step = 0; step < slice.num_steps[v]; ++step) {
        const uint64_t mask = *masks++;
        const int64_t count = count_ones(mask);
        const __m512i at = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(entries));
        const __m512i values = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(entries + count));
        prefetch_line((uintptr_t)entries + kCsrAhead);
        entries += 2 * count;
        offsets = dot4(offsets, values, offset);
        for (int r = 0; r < R; ++r) acc[r] = dot4(acc[r], values, _mm512_permutexvar_epi8(at, (__m512i)xs[r]));
      }
      for (int r = 0; r < R; ++r) {
        const F32 x_scale = set1(x_scales[r * (stride / 4) + g]);
        float* sum = sums + r * kPanel + v * kLanes;
        const F32 exact = to_f32((I32)_mm512_sub_epi32((__m512i)acc[r], (__m512i)offsets));
        if constexpr (has_group_scales)
          store(sum, fma(mul(exact, x_scale), load(scales[g] + v * kLanes), load(sum)));
        else store(sum, fma(exact, x_scale, load(sum)));
      }
    }
  }
}

#else

constexpr bool kMultipliesCsr = false;

#endif

// Columns [begin, end) of a panel, which are whole slices, as bytes of dense weights.
static inline void expand_csr(const PackedWeight& w, const uint8_t* panel, int32_t begin, int32_t end, uint8_t* out) {
  const int32_t width = w.activation_group_size;
  memset(out, kZeroByte, (size_t)(end - begin) * kPanel);
  for (int32_t k = begin; k < end; k += width, out += width * kPanel) {
    const CsrSlice& slice = ((const CsrSlice*)panel)[k / width];
    const uint64_t* masks = (const uint64_t*)(panel + slice.start);
    int num_masks = 0;
    for (int v = 0; v < kCsrVectors; ++v) num_masks += slice.num_steps[v];
    const uint8_t* entries = (const uint8_t*)(masks + num_masks);
    for (int v = 0; v < kCsrVectors; ++v)
      for (int step = 0; step < slice.num_steps[v]; ++step) {
        const uint64_t mask = *masks++;
        const int64_t count = count_ones(mask);
        uint64_t left = mask;
        for (int64_t i = 0; i < count; ++i, left &= left - 1) {
          const int row = v * (kPanel / kCsrVectors) + first_one(left) / 4;
          const int column = entries[i] & (width - 1);
          out[column / 4 * kPanel * 4 + row * 4 + column % 4] = (uint8_t)(entries[count + i] + kZeroByte);
        }
        entries += 2 * count;
      }
  }
}
