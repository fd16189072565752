// What bounds every kernel: loads from memory, dot products of bytes, multiply-adds of floats, each with nothing else
// in its loop. Results are returned only so that no compiler leaves the work out.

// Accumulators that hide the latency of their instruction, and still lie in registers.
#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kPeakSums = 16, kPeakFloatSums = 16;
#elif defined(FASTSERVE_ISA_AVXVNNI) || defined(FASTSERVE_ISA_NEONDOT)
constexpr int kPeakSums = 12, kPeakFloatSums = 12;
#else  // integer sums wait for additions alone, and what makes them takes twice the registers
constexpr int kPeakSums = 6, kPeakFloatSums = 12;
#endif
constexpr int kReadSums = 4;
constexpr int64_t kReadStep = kReadSums * kLanes;  // floats

static inline void prefetch(const float* p, bool is_temporal) {
#if defined(__GNUC__)
  if (is_temporal) __builtin_prefetch(p, 0, 3);
  else __builtin_prefetch(p, 0, 0);
#else
  (void)p, (void)is_temporal;
#endif
}

// Whole steps of each of kStreams equal parts of [begin, begin + count), side by side.
template <int kStreams, int64_t kAhead, bool kTemporal>
static float read_streams(const float* begin, int64_t count) {
  F32 sums[kReadSums];
  for (int i = 0; i < kReadSums; ++i) sums[i] = zero();
  const int64_t part = count / kStreams / kReadStep * kReadStep;
  for (int64_t at = 0; at < part; at += kReadStep)
    for (int stream = 0; stream < kStreams; ++stream) {
      const float* p = begin + stream * part + at;
      if (kAhead > 0)
        for (int64_t line = 0; line < kReadStep; line += 16) prefetch(p + kAhead + line, kTemporal);
      for (int i = 0; i < kReadSums; ++i) sums[i] = add(sums[i], load(p + i * kLanes));
    }
  F32 total = zero();
  for (int i = 0; i < kReadSums; ++i) total = add(total, sums[i]);
  return sum(total);
}

static float read_memory(ReadKind kind, const float* begin, int64_t count) {
  switch (kind) {
    case ReadKind::plain: return read_streams<1, 0, true>(begin, count);
    case ReadKind::interleaved: return read_streams<4, 0, true>(begin, count);
    case ReadKind::prefetched: return read_streams<1, 1024, true>(begin, count);
    case ReadKind::prefetched_interleaved: return read_streams<4, 256, true>(begin, count);
    case ReadKind::non_temporal: return read_streams<1, 1024, false>(begin, count);
  }
  return 0;
}

// `x`: 64 bytes. Returns the operations done: a multiplication and an addition for each byte.
static int64_t dot_products(int64_t iterations, const int8_t* x, float* out) {
  alignas(64) uint8_t bytes[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) bytes[i] = (uint8_t)(i + 1);
  const Weights4 weights = load_weights4(bytes);
  I32 sums[kPeakSums];
  for (int i = 0; i < kPeakSums; ++i) sums[i] = set1(i);
  for (int64_t n = 0; n < iterations; ++n) {
    const Bytes4 word = broadcast4(x + 4 * (n % 16));
    for (int i = 0; i < kPeakSums; ++i) sums[i] = dot4(sums[i], word, weights);
  }
  F32 total = zero();
  for (int i = 0; i < kPeakSums; ++i) total = add(total, to_f32(sums[i]));
  *out = sum(total);
  return iterations * kPeakSums * kLanes * 4 * 2;
}

// `x`: 16 floats of both signs, whose sum is 0. Returns the operations done.
static int64_t multiply_adds(int64_t iterations, const float* x, float* out) {
  const F32 factor = set1(0.5f);
  F32 sums[kPeakFloatSums];
  for (int i = 0; i < kPeakFloatSums; ++i) sums[i] = set1((float)i);
  for (int64_t n = 0; n < iterations; ++n) {
    const F32 value = set1(x[n % 16]);
    for (int i = 0; i < kPeakFloatSums; ++i) sums[i] = fma(value, factor, sums[i]);
  }
  F32 total = zero();
  for (int i = 0; i < kPeakFloatSums; ++i) total = add(total, sums[i]);
  *out = sum(total);
  return iterations * kPeakFloatSums * kLanes * 2;
}
