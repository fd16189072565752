// Paged attention. Keys lie transposed within a block, so that scores of kBlock keys are computed without horizontal
// sums; rows that share a key head (queries of a group, neighbouring tokens) share its loads.
//
// Order of every output element: dimensions in order within a score; keys in order within a split of kSplit keys at
// absolute positions, online softmax block by block; splits merged in order. Masked keys are left out, never added.

struct KeysF32 {
  using type = float;
  static inline F32 load(const type* p) { return FASTSERVE_ISA_NAMESPACE::load(p); }
  static inline void store(type* p, F32 a) { FASTSERVE_ISA_NAMESPACE::store(p, a); }
  static inline type from_f32(float x) { return x; }
};
struct KeysF16 {
  using type = uint16_t;
  static inline F32 load(const type* p) { return load_f16(p); }
  static inline void store(type* p, F32 a) { store_f16(p, a); }
  static inline type from_f32(float x) { return to_f16(x); }
};

template <class Kv>
static void store_kv_as(const float* k, const float* v, int32_t num_kv_heads, int32_t head_dim, int32_t padded_head_dim,
                        int32_t slot, void* key_block, void* value_block) {
  auto* keys = (typename Kv::type*)key_block;
  auto* values = (typename Kv::type*)value_block;
  for (int32_t h = 0; h < num_kv_heads; ++h) {
    typename Kv::type* head = keys + (int64_t)h * padded_head_dim * kBlock + slot;
    typename Kv::type* value = values + ((int64_t)h * kBlock + slot) * padded_head_dim;
    for (int32_t d = 0; d < head_dim; ++d) head[(int64_t)d * kBlock] = Kv::from_f32(k[h * head_dim + d]);
    for (int32_t d = 0; d < head_dim; ++d) value[d] = Kv::from_f32(v[h * head_dim + d]);
  }
}

static void store_kv(KvFormat format, const float* k, const float* v, int32_t num_kv_heads, int32_t head_dim,
                     int32_t padded_head_dim, int32_t slot, void* key_block, void* value_block) {
  auto* f = format == KvFormat::f32 ? store_kv_as<KeysF32> : store_kv_as<KeysF16>;
  f(k, v, num_kv_heads, head_dim, padded_head_dim, slot, key_block, value_block);
}

// Softmax over some keys, not yet normalized: weights are exp(score - largest), `total` their sum, `values` the
// weighted sum of values.
template <int R>
struct Partial {
  float largest[R];
  float total[R];
  alignas(64) float values[R][kMaxHeadDim];
};

#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kQueryRows = 6;
#else
constexpr int kQueryRows = 2;
#endif
constexpr int kKeyVectors = kBlock / kLanes;

template <int R, class Kv>
static inline void scores_of_block(const float (*q)[kMaxHeadDim], int32_t head_dim, const typename Kv::type* keys,
                                   float (*scores)[kBlock]) {
  F32 acc[R][kKeyVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kKeyVectors; ++v) acc[r][v] = zero();
  for (int32_t d = 0; d < head_dim; ++d) {
    F32 k[kKeyVectors];
    for (int v = 0; v < kKeyVectors; ++v) k[v] = Kv::load(keys + (int64_t)d * kBlock + v * kLanes);
    for (int r = 0; r < R; ++r) {
      F32 b = set1(q[r][d]);
      for (int v = 0; v < kKeyVectors; ++v) acc[r][v] = fma(b, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kKeyVectors; ++v) store(scores[r] + v * kLanes, acc[r][v]);
}

// Turns the first `count` scores into weights, and rescales what row r of the partial holds so far.
template <int R>
static inline void softmax_update(Partial<R>& p, int r, float* scores, int32_t count, int32_t padded_head_dim) {
  const F32 lowest = set1(-INFINITY);
  F32 block_largest = lowest;
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    int n = count - i < 0 ? 0 : count - i < kLanes ? count - i : kLanes;
    F32 s = n == kLanes ? load(scores + i) : first(load(scores + i), lowest, n);
    store(scores + i, s);
    block_largest = max(block_largest, s);
  }
  const float m = largest(block_largest);
  if (m > p.largest[r]) {
    const float shrink = exp(p.largest[r] - m);  // exp(-inf) = 0 the first time
    p.largest[r] = m;
    p.total[r] *= shrink;
    for (int32_t d = 0; d < padded_head_dim; d += kLanes)
      store(p.values[r] + d, mul(load(p.values[r] + d), set1(shrink)));
  }
  F32 total = zero();
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    F32 weight = exp(sub(load(scores + i), set1(p.largest[r])));
    store(scores + i, weight);
    total = add(total, weight);
  }
  p.total[r] += sum(total);
}

template <class Kv>
static inline void add_values(float* acc, const float* weights, int32_t count, const typename Kv::type* values,
                              int32_t padded_head_dim) {
  constexpr int kVectors = 4;
  int32_t d = 0;
  for (; d + kVectors * kLanes <= padded_head_dim; d += kVectors * kLanes) {
    F32 a[kVectors];
    for (int v = 0; v < kVectors; ++v) a[v] = load(acc + d + v * kLanes);
    for (int32_t key = 0; key < count; ++key) {
      F32 w = set1(weights[key]);
      for (int v = 0; v < kVectors; ++v)
        a[v] = fma(w, Kv::load(values + (int64_t)key * padded_head_dim + d + v * kLanes), a[v]);
    }
    for (int v = 0; v < kVectors; ++v) store(acc + d + v * kLanes, a[v]);
  }
  for (; d < padded_head_dim; d += kLanes) {
    F32 a = load(acc + d);
    for (int32_t key = 0; key < count; ++key)
      a = fma(set1(weights[key]), Kv::load(values + (int64_t)key * padded_head_dim + d), a);
    store(acc + d, a);
  }
}

template <int R>
static inline void merge(Partial<R>& whole, const Partial<R>& part, int r, int32_t padded_head_dim) {
  const float m = whole.largest[r] > part.largest[r] ? whole.largest[r] : part.largest[r];
  const float a = exp(whole.largest[r] - m), b = exp(part.largest[r] - m);
  whole.largest[r] = m;
  whole.total[r] = whole.total[r] * a + part.total[r] * b;
  for (int32_t d = 0; d < padded_head_dim; d += kLanes)
    store(whole.values[r] + d, add(mul(load(whole.values[r] + d), set1(a)), mul(load(part.values[r] + d), set1(b))));
}

// Query rows `begin` .. begin + R of the task, counted over tokens x heads of the group: row j is head
// j % group of token j / group.
template <int R, class Kv>
static void attention_rows(const AttentionArgs& a, const AttentionTask& t, int32_t begin) {
  const int32_t group = a.num_heads / a.num_kv_heads;
  float q[R][kMaxHeadDim];
  float* out[R];
  int32_t limit[R];  // keys that the row sees
  int32_t longest = 0;
  for (int r = 0; r < R; ++r) {
    const int32_t token = (begin + r) / group, head = t.kv_head * group + (begin + r) % group;
    const float* row = a.q + (t.first_row + token) * a.q_stride + (int64_t)head * a.head_dim;
    for (int32_t d = 0; d < a.head_dim; ++d) q[r][d] = row[d] * a.scale;
    out[r] = a.out + (t.first_row + token) * a.out_stride + (int64_t)head * a.head_dim;
    limit[r] = a.causal ? t.first_position + token + 1 : t.context_length;
    longest = limit[r] > longest ? limit[r] : longest;
  }
  const int64_t head_elements = (int64_t)a.padded_head_dim * kBlock;
  Partial<R> whole, part;
  for (int32_t split = 0; split < longest; split += kSplit) {
    Partial<R>& p = split == 0 ? whole : part;
    for (int r = 0; r < R; ++r) {
      p.largest[r] = -INFINITY;
      p.total[r] = 0.0f;
      for (int32_t d = 0; d < a.padded_head_dim; d += kLanes) store(p.values[r] + d, zero());
    }
    const int32_t split_end = split + kSplit < longest ? split + kSplit : longest;
    for (int32_t key = split; key < split_end; key += kBlock) {
      const int64_t at = t.block_table[key / kBlock] * a.block_elements + t.kv_head * head_elements;
      alignas(64) float scores[R][kBlock];
      scores_of_block<R, Kv>(q, a.head_dim, (const typename Kv::type*)a.keys + at, scores);
      for (int r = 0; r < R; ++r) {
        const int32_t count = limit[r] - key < kBlock ? limit[r] - key : kBlock;
        if (count <= 0) continue;
        softmax_update(p, r, scores[r], count, a.padded_head_dim);
        add_values<Kv>(p.values[r], scores[r], count, (const typename Kv::type*)a.values + at, a.padded_head_dim);
      }
    }
    if (split > 0)
      for (int r = 0; r < R; ++r)
        if (limit[r] > split) merge(whole, part, r, a.padded_head_dim);
  }
  for (int r = 0; r < R; ++r) {
    const F32 inverse = set1(1.0f / whole.total[r]);
    map(whole.values[r], a.head_dim, out[r], [&](F32 v) { return mul(v, inverse); });
  }
}

template <class Kv>
static void attention_as(const AttentionArgs& a, const AttentionTask& t) {
  const int32_t num_rows = t.num_rows * (a.num_heads / a.num_kv_heads);
  int32_t row = 0;
  for (; row + kQueryRows <= num_rows; row += kQueryRows) attention_rows<kQueryRows, Kv>(a, t, row);
  switch (num_rows - row) {
    case 5: attention_rows<5, Kv>(a, t, row); break;
    case 4: attention_rows<4, Kv>(a, t, row); break;
    case 3: attention_rows<3, Kv>(a, t, row); break;
    case 2: attention_rows<2, Kv>(a, t, row); break;
    case 1: attention_rows<1, Kv>(a, t, row); break;
    default: break;
  }
}

static void attention(KvFormat format, const AttentionArgs& a, const AttentionTask& t) {
  if (format == KvFormat::f32) attention_as<KeysF32>(a, t);
  else attention_as<KeysF16>(a, t);
}
