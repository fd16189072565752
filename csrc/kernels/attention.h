// Paged attention. Keys lie transposed within a block, so that scores of kBlock keys are computed without horizontal
// sums; rows that share a key head (queries of a group, neighbouring tokens) share its loads.
//
// Order of every output element: dimensions in order within a score; keys in order within a split of kSplit keys at
// absolute positions; splits, each with a softmax of its own, merged in order. Masked keys are left out, never added.

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

// Softmax over the keys of one split, not yet normalized: weights are exp(score - largest), `total` their sum,
// `values` the weighted sum of values.
template <int R>
struct Partial {
  float largest[R];
  float total[R];
  alignas(64) float values[R][kMaxHeadDim];
};

// Query rows, and vectors of values, whose sums a kernel holds in registers.
#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kQueryRows = 6, kValueVectors = 4;
#else
constexpr int kQueryRows = 2, kValueVectors = 4;
#endif
constexpr int kKeyVectors = kBlock / kLanes;

// What the rows of one tile share: their sequence's blocks and one key head.
template <class Kv>
struct Head {
  const typename Kv::type* keys;
  const typename Kv::type* values;
  const int32_t* block_table;
  int64_t block_elements;
  int32_t head_dim;
  int32_t padded_head_dim;

  const typename Kv::type* key_block(int32_t key) const { return keys + block_table[key / kBlock] * block_elements; }
  const typename Kv::type* value_row(int32_t key) const {
    return values + block_table[key / kBlock] * block_elements + (int64_t)(key % kBlock) * padded_head_dim;
  }
};

template <int R, class Kv>
static inline void scores_of_block(const float (*q)[kMaxHeadDim], int32_t head_dim, const typename Kv::type* keys,
                                   float* scores) {
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
    for (int v = 0; v < kKeyVectors; ++v) store(scores + r * kSplit + v * kLanes, acc[r][v]);
}

// Turns the first `count` scores of a split into weights, and what follows within the last vector into zeros.
static inline void softmax_weights(float* scores, int32_t count, float* largest_score, float* total) {
  const F32 lowest = set1(-INFINITY);
  const int32_t end = (count + kLanes - 1) / kLanes * kLanes;
  if (end > count) store(scores + end - kLanes, first(load(scores + end - kLanes), lowest, count - (end - kLanes)));
  F32 m = lowest;
  for (int32_t i = 0; i < end; i += kLanes) m = max(m, load(scores + i));
  *largest_score = largest(m);
  const F32 shift = set1(*largest_score);
  F32 sums = zero();
  for (int32_t i = 0; i < end; i += kLanes) {
    const F32 weight = exp(sub(load(scores + i), shift));
    store(scores + i, weight);
    sums = add(sums, weight);
  }
  *total = sum(sums);
}

// Adds weights[r][key] * value of keys [begin, end) of a split to the sums of R rows, key by key; `first_key` is the
// split's first.
template <int R, int kVectors, class Kv>
static inline void add_values_at(const Head<Kv>& head, const float* weights, int32_t first_key, int32_t begin,
                                 int32_t end, int32_t column, float (*sums)[kMaxHeadDim]) {
  F32 acc[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(sums[r] + column + v * kLanes);
  for (int32_t block = begin; block < end;) {
    const typename Kv::type* values = head.value_row(first_key + block) + column;
    const int32_t left = kBlock - (first_key + block) % kBlock, block_end = block + left < end ? block + left : end;
    for (; block < block_end; ++block, values += head.padded_head_dim) {
      F32 value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = Kv::load(values + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const F32 weight = set1(weights[r * kSplit + block]);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) store(sums[r] + column + v * kLanes, acc[r][v]);
}

template <int R, class Kv>
static inline void add_values(const Head<Kv>& head, const float* weights, int32_t first_key, int32_t begin, int32_t end,
                              float (*sums)[kMaxHeadDim]) {
  int32_t column = 0;
  for (; column + kValueVectors * kLanes <= head.padded_head_dim; column += kValueVectors * kLanes)
    add_values_at<R, kValueVectors, Kv>(head, weights, first_key, begin, end, column, sums);
  for (; column < head.padded_head_dim; column += kLanes)
    add_values_at<R, 1, Kv>(head, weights, first_key, begin, end, column, sums);
}

// One split of R rows; row r sees the first counts[r] of the split's keys, none where that is not positive.
template <int R, class Kv>
static inline void attend_split(const Head<Kv>& head, const float (*q)[kMaxHeadDim], int32_t first_key,
                                const int32_t* counts, Partial<R>& p) {
  int32_t longest = 0, shortest = kSplit;
  for (int r = 0; r < R; ++r) {
    longest = counts[r] > longest ? counts[r] : longest;
    shortest = counts[r] < shortest ? counts[r] : shortest;
  }
  alignas(64) float scores[R][kSplit];
  for (int32_t key = 0; key < longest; key += kBlock)
    scores_of_block<R, Kv>(q, head.head_dim, head.key_block(first_key + key), scores[0] + key);
  for (int r = 0; r < R; ++r) {
    for (int32_t d = 0; d < head.padded_head_dim; d += kLanes) store(p.values[r] + d, zero());
    if (counts[r] > 0) softmax_weights(scores[r], counts[r], &p.largest[r], &p.total[r]);
  }
  // Keys that all rows see, together; those that only some see, row by row: their values may be anything, and must
  // not even be multiplied by zero.
  if (shortest > 0) add_values<R, Kv>(head, scores[0], first_key, 0, shortest, p.values);
  const int32_t rest = shortest > 0 ? shortest : 0;
  for (int r = 0; r < R; ++r)
    if (counts[r] > rest) add_values<1, Kv>(head, scores[r], first_key, rest, counts[r], p.values + r);
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
  const int64_t head_offset = (int64_t)t.kv_head * a.padded_head_dim * kBlock;
  const Head<Kv> head = {(const typename Kv::type*)a.keys + head_offset,
                         (const typename Kv::type*)a.values + head_offset,
                         t.block_table,
                         a.block_elements,
                         a.head_dim,
                         a.padded_head_dim};
  float q[R][kMaxHeadDim];
  float* out[R];
  int32_t limits[R];  // keys that the row sees
  int32_t longest = 0;
  for (int r = 0; r < R; ++r) {
    const int32_t token = (begin + r) / group, query_head = t.kv_head * group + (begin + r) % group;
    const float* row = a.q + (t.first_row + token) * a.q_stride + (int64_t)query_head * a.head_dim;
    map(row, a.head_dim, q[r], [&](F32 x) { return mul(x, set1(a.scale)); });
    out[r] = a.out + (t.first_row + token) * a.out_stride + (int64_t)query_head * a.head_dim;
    limits[r] = a.causal ? t.first_position + token + 1 : t.context_length;
    longest = limits[r] > longest ? limits[r] : longest;
  }
  Partial<R> whole, part;
  for (int32_t split = 0; split < longest; split += kSplit) {
    int32_t counts[R];
    for (int r = 0; r < R; ++r) counts[r] = limits[r] - split < kSplit ? limits[r] - split : kSplit;
    attend_split<R, Kv>(head, q, split, counts, split == 0 ? whole : part);
    if (split > 0)
      for (int r = 0; r < R; ++r)
        if (counts[r] > 0) merge(whole, part, r, a.padded_head_dim);
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
