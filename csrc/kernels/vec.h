// The vector types of one instruction set: F32 and I32 of `kLanes` lanes, and the few operations the kernels need.
// Included once per instruction set, inside that set's own namespace (see isa.cpp).
//
// Every floating-point operation is explicit: the build forbids contraction, so that two instances of a kernel
// template can never round differently.

// Whether dot4 multiplies weights with the offset of 128 that they are stored with (kernel.h): the x86 instructions
// want unsigned weights, NEON's wants signed ones.
#if defined(FASTSERVE_ISA_NEONDOT)
constexpr bool kKeepsWeightOffset = false;
#else
constexpr bool kKeepsWeightOffset = true;
#endif

#if defined(_MSC_VER)
#define FASTSERVE_NOINLINE __declspec(noinline)
#else
#define FASTSERVE_NOINLINE __attribute__((noinline))
#endif

// Asks for a line of memory to come to the second-level cache; any address will do.
static inline void prefetch_line(uintptr_t address) {
#if defined(__GNUC__)
  __builtin_prefetch((const void*)address, 0, 2);
#else
  (void)address;
#endif
}

#if defined(FASTSERVE_ISA_AVX512VNNI)

constexpr int kLanes = 16;
using F32 = __m512;
#if defined(_MSC_VER)
using I32 = __m512i;
#else
// Not __m512i, whose elements are 64 bits wide: GCC keeps arrays that the intrinsics must cast in memory.
#if defined(__GNUC__)
typedef int I32 __attribute__((vector_size(64)));
#else
using I32 = __m512i;
#endif
#endif

static inline F32 zero() { return _mm512_setzero_ps(); }
static inline F32 set1(float x) { return _mm512_set1_ps(x); }
static inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
static inline F32 load_first(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline void store_first(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
static inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
static inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
static inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
static inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
// a * b + c
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n for integral n
static inline F32 scale_by_power(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
// Lanes below n of a, of b beyond.
static inline F32 first(F32 a, F32 b, int n) { return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), b, a); }
static inline float sum(F32 a) { return _mm512_reduce_add_ps(a); }
static inline float largest(F32 a) { return _mm512_reduce_max_ps(a); }
static inline F32 load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline F32 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline F32 load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store_f16(uint16_t* p, F32 a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline uint16_t to_f16(float x) {
  return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT));
}

static inline I32 set1(int32_t x) { return (I32)_mm512_set1_epi32(x); }
static inline F32 to_f32(I32 a) { return _mm512_cvtepi32_ps((__m512i)a); }
// Four signed bytes of an activation, in every lane.
using Bytes4 = __m512i;
static inline Bytes4 broadcast4(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
// Four unsigned bytes a lane.
using Weights4 = __m512i;
static inline Weights4 load_weights4(const uint8_t* p) { return _mm512_loadu_si512(p); }
// Eight nibbles a lane, and what dot4 takes of them: the low halves of four bytes, then the high ones.
using Nibbles4 = __m512i;
static inline Nibbles4 load_nibbles4(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Weights4 low_nibbles4(Nibbles4 n) { return _mm512_and_si512(n, _mm512_set1_epi8(15)); }
static inline Weights4 high_nibbles4(Nibbles4 n) { return low_nibbles4(_mm512_srli_epi16(n, 4)); }
// The n bytes at p, parted into their low halves and their high ones, each plus `add`: 2 n bytes.
template <int n>
static inline void unpack_nibbles(const uint8_t* p, uint8_t add, uint8_t* out) {
  static_assert(n % 64 == 0);
  const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8((char)add);
  for (int i = 0; i < n; i += 64) {
    const __m512i both = _mm512_loadu_si512(p + i);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    _mm512_store_si512(out + i, _mm512_add_epi8(_mm512_and_si512(both, mask), offset));
    _mm512_store_si512(out + n + i, _mm512_add_epi8(high, offset));
  }
}
// acc + sum over a lane's four bytes of x * w, exact.
static inline I32 dot4(I32 acc, Bytes4 x, Weights4 w) { return (I32)_mm512_dpbusd_epi32((__m512i)acc, w, x); }
// round(x) as bytes, for |x| < 127.5.
static inline void store_bytes(int8_t* p, F32 a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

#elif defined(FASTSERVE_ISA_AVX2)

constexpr int kLanes = 8;
using F32 = __m256;
#if defined(_MSC_VER)
using I32 = __m256i;
#else
#if defined(__GNUC__)
typedef int I32 __attribute__((vector_size(32)));  // as above
#else
using I32 = __m256i;
#endif
#endif

static inline __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline F32 zero() { return _mm256_setzero_ps(); }
static inline F32 set1(float x) { return _mm256_set1_ps(x); }
static inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a); }
static inline F32 load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_mask(n)); }
static inline void store_first(float* p, F32 a, int n) { _mm256_maskstore_ps(p, first_mask(n), a); }
static inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
static inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
static inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
static inline F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
static inline F32 round(F32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two factors, so that results below the smallest normal number underflow gradually to zero.
static inline F32 scale_by_power(F32 a, F32 n) {
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
static inline F32 first(F32 a, F32 b, int n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_mask(n))); }
static inline float sum(F32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float largest(F32 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline F32 load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F32 load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline F32 load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store_f16(uint16_t* p, F32 a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline uint16_t to_f16(float x) {
  return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT));
}

static inline I32 set1(int32_t x) { return (I32)_mm256_set1_epi32(x); }
static inline F32 to_f32(I32 a) { return _mm256_cvtepi32_ps((__m256i)a); }
template <int n>
static inline void unpack_nibbles(const uint8_t* p, uint8_t add, uint8_t* out) {
  static_assert(n % 32 == 0);
  const __m256i mask = _mm256_set1_epi8(15), offset = _mm256_set1_epi8((char)add);
  for (int i = 0; i < n; i += 32) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(p + i));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    _mm256_store_si256((__m256i*)(out + i), _mm256_add_epi8(_mm256_and_si256(both, mask), offset));
    _mm256_store_si256((__m256i*)(out + n + i), _mm256_add_epi8(high, offset));
  }
}
#if defined(FASTSERVE_ISA_AVXVNNI)
using Bytes4 = __m256i;
static inline Bytes4 broadcast4(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
using Weights4 = __m256i;
static inline Weights4 load_weights4(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
using Nibbles4 = __m256i;
static inline Nibbles4 load_nibbles4(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline Weights4 low_nibbles4(Nibbles4 n) { return _mm256_and_si256(n, _mm256_set1_epi8(15)); }
static inline Weights4 high_nibbles4(Nibbles4 n) { return low_nibbles4(_mm256_srli_epi16(n, 4)); }
static inline I32 dot4(I32 acc, Bytes4 x, Weights4 w) { return (I32)_mm256_dpbusd_avx_epi32((__m256i)acc, w, x); }
#else
// vpmaddubsw would saturate its 16-bit sums (255 * 127 * 2 > 32767), so bytes are widened to 16 bits first, even and
// odd ones apart, and multiplied by vpmaddwd, whose 32-bit sums are exact.
struct Bytes4 {
  __m256i even, odd;
};
static inline Bytes4 broadcast4(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  __m256i x = _mm256_set1_epi32(word);
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
struct Weights4 {
  __m256i even, odd;
};
static inline Weights4 load_weights4(const uint8_t* p) {
  __m256i w = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(w, 8)};
}
using Nibbles4 = __m256i;
static inline Nibbles4 load_nibbles4(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline Weights4 low_nibbles4(Nibbles4 n) {
  const __m256i mask = _mm256_set1_epi16(15);
  return {_mm256_and_si256(n, mask), _mm256_and_si256(_mm256_srli_epi16(n, 8), mask)};
}
static inline Weights4 high_nibbles4(Nibbles4 n) { return low_nibbles4(_mm256_srli_epi16(n, 4)); }
static inline I32 dot4(I32 acc, Bytes4 x, Weights4 w) {
  __m256i products = _mm256_add_epi32(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd));
  return (I32)_mm256_add_epi32((__m256i)acc, products);
}
#endif
static inline void store_bytes(int8_t* p, F32 a) {
  __m256i q = _mm256_cvtps_epi32(a);
  __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(half, half));
}

#elif defined(FASTSERVE_ISA_NEONDOT)

constexpr int kLanes = 4;
using F32 = float32x4_t;
using I32 = int32x4_t;

static inline uint32x4_t first_mask(int n) {
  const int32_t lanes[kLanes] = {0, 1, 2, 3};
  return vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n));
}
static inline F32 zero() { return vdupq_n_f32(0); }
static inline F32 set1(float x) { return vdupq_n_f32(x); }
static inline F32 load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, F32 a) { vst1q_f32(p, a); }
static inline F32 load_first(const float* p, int n) {
  float lanes[kLanes] = {};
  memcpy(lanes, p, (size_t)n * 4);
  return vld1q_f32(lanes);
}
static inline void store_first(float* p, F32 a, int n) {
  float lanes[kLanes];
  vst1q_f32(lanes, a);
  memcpy(p, lanes, (size_t)n * 4);
}
static inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
static inline F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
static inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
static inline F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
static inline F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
static inline F32 min(F32 a, F32 b) { return vminq_f32(a, b); }
static inline F32 abs(F32 a) { return vabsq_f32(a); }
static inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
static inline F32 round(F32 a) { return vrndnq_f32(a); }
static inline F32 power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
// In two factors, as for AVX2.
static inline F32 scale_by_power(F32 a, F32 n) {
  int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return vmulq_f32(vmulq_f32(a, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}
static inline F32 first(F32 a, F32 b, int n) { return vbslq_f32(first_mask(n), a, b); }
static inline float sum(F32 a) { return vaddvq_f32(a); }
static inline float largest(F32 a) { return vmaxvq_f32(a); }
static inline F32 load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline F32 load_i8(const int8_t* p) {
  int8x8_t bytes = {};
  memcpy(&bytes, p, kLanes);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
static inline F32 load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void store_f16(uint16_t* p, F32 a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
static inline uint16_t to_f16(float x) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(set1(x))), 0); }

static inline I32 set1(int32_t x) { return vdupq_n_s32(x); }
static inline F32 to_f32(I32 a) { return vcvtq_f32_s32(a); }
using Bytes4 = int8x16_t;
static inline Bytes4 broadcast4(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}
using Weights4 = int8x16_t;
static inline Weights4 load_weights4(const uint8_t* p) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
}
using Nibbles4 = uint8x16_t;
static inline Nibbles4 load_nibbles4(const uint8_t* p) { return vld1q_u8(p); }
static inline Weights4 low_nibbles4(Nibbles4 n) { return vreinterpretq_s8_u8(vandq_u8(n, vdupq_n_u8(15))); }
static inline Weights4 high_nibbles4(Nibbles4 n) { return vreinterpretq_s8_u8(vshrq_n_u8(n, 4)); }
template <int n>
static inline void unpack_nibbles(const uint8_t* p, uint8_t add, uint8_t* out) {
  static_assert(n % 16 == 0);
  const uint8x16_t mask = vdupq_n_u8(15), offset = vdupq_n_u8(add);
  for (int i = 0; i < n; i += 16) {
    const uint8x16_t both = vld1q_u8(p + i);
    vst1q_u8(out + i, vaddq_u8(vandq_u8(both, mask), offset));
    vst1q_u8(out + n + i, vaddq_u8(vshrq_n_u8(both, 4), offset));
  }
}
static inline I32 dot4(I32 acc, Bytes4 x, Weights4 w) { return vdotq_s32(acc, x, w); }
static inline void store_bytes(int8_t* p, F32 a) {
  int16x4_t halves = vqmovn_s32(vcvtnq_s32_f32(a));
  int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
  memcpy(p, &bytes, kLanes);
}

#else  // portable: plain loops, which compilers turn into whatever vectors the baseline has

constexpr int kLanes = 8;
struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};

#define FASTSERVE_EACH(expression)                        \
  F32 r;                                                  \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expression); \
  return r

static inline float bits_to_f32(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t f32_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline F32 zero() { return {}; }
static inline F32 set1(float x) { FASTSERVE_EACH(x); }
static inline F32 load(const float* p) {
  F32 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
static inline void store(float* p, F32 a) { memcpy(p, a.v, sizeof a.v); }
static inline F32 load_first(const float* p, int n) { FASTSERVE_EACH(i < n ? p[i] : 0.0f); }
static inline void store_first(float* p, F32 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
static inline F32 add(F32 a, F32 b) { FASTSERVE_EACH(a.v[i] + b.v[i]); }
static inline F32 sub(F32 a, F32 b) { FASTSERVE_EACH(a.v[i] - b.v[i]); }
static inline F32 mul(F32 a, F32 b) { FASTSERVE_EACH(a.v[i] * b.v[i]); }
static inline F32 div(F32 a, F32 b) { FASTSERVE_EACH(a.v[i] / b.v[i]); }
static inline F32 max(F32 a, F32 b) { FASTSERVE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F32 min(F32 a, F32 b) { FASTSERVE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F32 abs(F32 a) { FASTSERVE_EACH(fabsf(a.v[i])); }
// Rounded twice: a fused multiply-add without the instruction is a slow library call.
static inline F32 fma(F32 a, F32 b, F32 c) { FASTSERVE_EACH(a.v[i] * b.v[i] + c.v[i]); }
static inline F32 round(F32 a) { FASTSERVE_EACH(nearbyintf(a.v[i])); }
static inline float power_of_two(int32_t n) { return bits_to_f32((uint32_t)(n + 127) << 23); }
static inline F32 scale_by_power(F32 a, F32 n) {
  F32 r;
  for (int i = 0; i < kLanes; ++i) {
    int32_t whole = n.v[i] == n.v[i] ? (int32_t)n.v[i] : 0, half = whole >> 1;  // a NaN is no whole number
    r.v[i] = a.v[i] * power_of_two(half) * power_of_two(whole - half);
  }
  return r;
}
static inline F32 first(F32 a, F32 b, int n) { FASTSERVE_EACH(i < n ? a.v[i] : b.v[i]); }
static inline float sum(F32 a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
static inline float largest(F32 a) {
  float m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
static inline float f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_to_f32(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A multiplication by 2^112 rebiases the exponent and normalizes subnormals.
  return bits_to_f32(sign | f32_to_bits(bits_to_f32(rest << 13) * bits_to_f32(0x77800000)));
}
static inline uint16_t to_f16(float x) {
  uint32_t bits = f32_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: adding 0.5 aligns the mantissa and rounds to nearest even
    return (uint16_t)(sign | (f32_to_bits(bits_to_f32(rest) + 0.5f) - 0x3f000000));
  }
  uint32_t odd = rest >> 13 & 1;
  return (uint16_t)(sign | ((rest - 0x38000000 + 0xfff + odd) >> 13));
}
static inline F32 load_bf16(const uint16_t* p) { FASTSERVE_EACH(bits_to_f32((uint32_t)p[i] << 16)); }
static inline F32 load_i8(const int8_t* p) { FASTSERVE_EACH((float)p[i]); }
static inline F32 load_f16(const uint16_t* p) { FASTSERVE_EACH(f16_to_f32(p[i])); }
static inline void store_f16(uint16_t* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(a.v[i]);
}

static inline I32 set1(int32_t x) {
  I32 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = x;
  return r;
}
static inline F32 to_f32(I32 a) { FASTSERVE_EACH((float)a.v[i]); }
struct Bytes4 {
  int32_t v[4];
};
static inline Bytes4 broadcast4(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
struct Weights4 {
  const uint8_t* p;
  int shift;
  int mask;
};
static inline Weights4 load_weights4(const uint8_t* p) { return {p, 0, 255}; }
using Nibbles4 = const uint8_t*;
static inline Nibbles4 load_nibbles4(const uint8_t* p) { return p; }
static inline Weights4 low_nibbles4(Nibbles4 p) { return {p, 0, 15}; }
static inline Weights4 high_nibbles4(Nibbles4 p) { return {p, 4, 15}; }
template <int n>
static inline void unpack_nibbles(const uint8_t* p, uint8_t add, uint8_t* out) {
  for (int i = 0; i < n; ++i) {
    out[i] = (uint8_t)((p[i] & 15) + add);
    out[n + i] = (uint8_t)((p[i] >> 4) + add);
  }
}
static inline I32 dot4(I32 acc, Bytes4 x, Weights4 w) {
  for (int i = 0; i < kLanes; ++i) {
    const uint8_t* p = w.p + 4 * i;
    for (int j = 0; j < 4; ++j) acc.v[i] += x.v[j] * (p[j] >> w.shift & w.mask);
  }
  return acc;
}
static inline void store_bytes(int8_t* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = fabsf(a.v[i]) < 127.5f ? (int8_t)(int32_t)nearbyintf(a.v[i]) : 0;  // NaN is 0
}

#undef FASTSERVE_EACH
#endif
