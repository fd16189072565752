// Paged attention. Keys lie transposed within a block, so that scores of kBlock keys are computed without horizontal
// sums; rows that share a key head (queries of a group, neighbouring tokens) share its loads.
//
// Order of every output element: dimensions in order within a score; keys in order within a split of kSplit keys at
// absolute positions; splits, each with a softmax of its own, merged in order. Masked keys are left out, never added.
// How rows and keys are cut into tasks, tiles and chunks changes no sum.

struct KvF32 {
  using type = float;
  static constexpr bool kIsScaled = false;
  static inline F32 load(const type* p) { return FASTSERVE_ISA_NAMESPACE::load(p); }
  static inline void store(type* p, F32 a) { FASTSERVE_ISA_NAMESPACE::store(p, a); }
};
struct KvF16 {
  using type = uint16_t;
  static constexpr bool kIsScaled = false;
  static inline F32 load(const type* p) { return load_f16(p); }
  static inline void store(type* p, F32 a) { store_f16(p, a); }
};
struct KvBf16 {
  using type = uint16_t;
  static constexpr bool kIsScaled = false;
  static inline F32 load(const type* p) { return load_bf16(p); }
  static inline void store(type* p, F32 a) {
    float lanes[kLanes];
    FASTSERVE_ISA_NAMESPACE::store(lanes, a);
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(lanes[i]);
  }
};
// Each token's keys, and its values, of one head share a scale: largest magnitude / 127.
struct KvInt8 {
  using type = int8_t;
  static constexpr bool kIsScaled = true;
  static inline F32 load(const type* p) { return load_i8(p); }
  static inline void store(type* p, F32 a) { store_bytes(p, a); }
};

// Calls f<Kv>() for the type of a format.
template <class Function>
static inline void with_kv_type(KvFormat format, Function f) {
  switch (format) {
    case KvFormat::f32: return f.template operator()<KvF32>();
    case KvFormat::f16: return f.template operator()<KvF16>();
    case KvFormat::bf16: return f.template operator()<KvBf16>();
    case KvFormat::int8: return f.template operator()<KvInt8>();
  }
}

// --- Storing ---

// Turns one head of q or k by its position, or copies it where the model has no rotary embedding.
static inline void turn(const AttentionArgs& a, const float* x, int32_t position, float* out) {
  const int64_t at = (int64_t)position * (a.rotary_dim / 2);
  if (a.rotary_dim > 0) rope(x, a.cosines + at, a.sines + at, a.rotary_dim, a.kv.head_dim, 1, out);
  else memcpy(out, x, (size_t)a.kv.head_dim * sizeof(float));
}

// One token's keys or values of a head in the pool's format; returns their scale.
template <class Kv>
static inline float encode(const float* x, int32_t width, typename Kv::type* out) {
  if constexpr (Kv::kIsScaled) {
    const Magnitude found = magnitude(x, width);
    const F32 inverse = set1(found.largest > kSmallestQuantized ? 127.0f / found.largest : 0.0f);
    for (int32_t d = 0; d < width; d += kLanes) Kv::store(out + d, mul(load(x + d), inverse));
    return found.largest / 127.0f + found.poison;
  }
  for (int32_t d = 0; d < width; d += kLanes) Kv::store(out + d, load(x + d));
  return 1.0f;
}

template <class Kv>
static void store_kv_as(const AttentionArgs& a, const AttentionTask& t, int32_t kv_head, float* scratch) {
  using Element = typename Kv::type;
  const int32_t head_dim = a.kv.head_dim, width = a.kv.padded_head_dim;
  float* row = scratch;                        // [width]
  Element* encoded = (Element*)(row + width);  // keys of the tokens of one block: [kBlock][width]
  for (int32_t d = head_dim; d < width; ++d) row[d] = 0.0f;
  for (int32_t begin = 0; begin < t.num_rows;) {
    const int32_t position = t.first_position + begin, slot = position % kBlock;
    const int32_t count = kBlock - slot < t.num_rows - begin ? kBlock - slot : t.num_rows - begin;
    const int64_t at = t.block_table[position / kBlock] * a.kv.block_bytes + kv_head * a.kv.head_bytes;
    Element* keys = (Element*)(a.keys + at);
    Element* values = (Element*)(a.values + at);
    float* key_scales = (float*)(keys + kBlock * width) + slot;
    float* value_scales = (float*)(values + kBlock * width) + slot;
    for (int32_t i = 0; i < count; ++i) {
      const int64_t from = t.first_row + begin + i;
      turn(a, a.k + from * a.k_stride + kv_head * head_dim, position + i, row);
      const float key_scale = encode<Kv>(row, width, encoded + i * width);
      memcpy(row, a.v + from * a.v_stride + kv_head * head_dim, (size_t)head_dim * sizeof(float));
      const float value_scale = encode<Kv>(row, width, values + (slot + i) * width);
      if constexpr (Kv::kIsScaled) key_scales[i] = key_scale, value_scales[i] = value_scale;
    }
    for (int32_t d = 0; d < width; ++d)
      for (int32_t i = 0; i < count; ++i) keys[d * kBlock + slot + i] = encoded[i * width + d];
    begin += count;
  }
}

static void store_kv(const AttentionArgs& a, const AttentionTask& t, int32_t kv_head, float* scratch) {
  with_kv_type(a.kv.format, [&]<class Kv>() { store_kv_as<Kv>(a, t, kv_head, scratch); });
}

// --- One split ---

// Query rows, and vectors of keys or values, whose sums a kernel holds in registers.
#if defined(FASTSERVE_ISA_AVX512VNNI)
constexpr int kQueryRows = 6, kKeyBlocks = 2, kValueVectors = 4;
#else
constexpr int kQueryRows = 2, kKeyBlocks = 1, kValueVectors = 4;
#endif
constexpr int kKeyVectors = kBlock / kLanes;
constexpr int kSplitBlocks = kSplit / kBlock;
// Keys of a chunk, which rows beyond one register tile go through together while it is in the nearest cache, widened
// to floats once for all of them.
constexpr int kKeyChunkBlocks = kConvertedBlocks, kKeyChunk = kKeyChunkBlocks * kBlock;
static_assert(kKeyChunkBlocks % kKeyBlocks == 0 && kSplit % kKeyChunk == 0,
              "a chunk is a whole number of register tiles");

// The blocks of one split for one key head, from `first_key` on.
template <class Kv>
struct SplitBlocks {
  using Element = typename Kv::type;
  const Element* blocks[kSplitBlocks];
  int64_t scales_at;  // elements from a block to its tokens' scales

  // Those of keys [begin, end) of the split, from a block's first on.
  SplitBlocks(const KvLayout& kv, const uint8_t* pool, const AttentionTask& t, int32_t kv_head, int32_t first_key,
              int32_t begin, int32_t end)
      : scales_at((int64_t)kBlock * kv.padded_head_dim) {
    for (int32_t key = begin; key < end; key += kBlock)
      blocks[key / kBlock] =
          (const Element*)(pool + t.block_table[(first_key + key) / kBlock] * kv.block_bytes + kv_head * kv.head_bytes);
  }
  // Multiplies x by the scales of the split's tokens [begin, end), from a vector's first on, where the format has any.
  void scale(float* x, int32_t begin, int32_t end) const {
    if constexpr (Kv::kIsScaled)
      for (int32_t key = begin; key < end; key += kLanes) {
        const float* scales = (const float*)(blocks[key / kBlock] + scales_at) + key % kBlock;
        store(x + key, mul(load(x + key), load(scales)));
      }
  }
};

// The query rows of one pass over the keys. `queries` and the rows' partial results are `stride` floats apart.
struct QueryRows {
  int32_t num_rows;
  int32_t width;          // padded_head_dim
  const float* queries;   // [num_rows][width], scaled
  // Keys [begins[r], ends[r]) of the split are seen by row r; no keys where there are none between.
  const int32_t* begins;        // null: zeros
  const int32_t* ends;
  const float* const* biases;   // null: none; else of each row, what is added to its score of key 0 of the sequence on
  float* scores;                // [num_rows][kSplit]
  float* converted;             // [kKeyChunk * width]

  int32_t begin_of(int32_t row) const { return begins ? begins[row] : 0; }
  bool sees_any(int32_t row) const { return ends[row] > begin_of(row); }
};

// The largest score of no keys: finite, so that differences of two are zero.
constexpr float kNoScore = -3e38f;

// A partial result: softmax over some keys, not normalized. Weights are exp(score - largest).
static inline float& largest_score(float* partial) { return partial[0]; }
static inline float& total_weight(float* partial) { return partial[1]; }
static inline float* weighted_values(float* partial) { return partial + kPartialHeader; }

static inline int32_t most(const int32_t* x, int32_t n) {
  int32_t m = x[0];
  for (int32_t i = 1; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
static inline int32_t least(const int32_t* x, int32_t n) {
  int32_t m = x[0];
  for (int32_t i = 1; i < n; ++i) m = x[i] < m ? x[i] : m;
  return m;
}
static inline int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }

// Scores of R rows against B blocks.
template <int R, int B, class Kv>
static inline void scores_of_blocks(const float* q, int32_t width, int32_t head_dim,
                                    const typename Kv::type* const* blocks, float* scores) {
  F32 acc[R][B * kKeyVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < B * kKeyVectors; ++v) acc[r][v] = zero();
  for (int32_t d = 0; d < head_dim; ++d) {
    F32 k[B * kKeyVectors];
    for (int v = 0; v < B * kKeyVectors; ++v)
      k[v] = Kv::load(blocks[v / kKeyVectors] + d * kBlock + v % kKeyVectors * kLanes);
    for (int r = 0; r < R; ++r) {
      const F32 b = set1(q[r * width + d]);
      for (int v = 0; v < B * kKeyVectors; ++v) acc[r][v] = fma(b, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < B * kKeyVectors; ++v) store(scores + r * kSplit + v * kLanes, acc[r][v]);
}

// Scores of all rows against the keys [begin, begin + kKeyChunk) of the split that some row sees.
template <class Kv>
static void scores_of_chunk(const QueryRows& rows, int32_t head_dim, const typename Kv::type* const* blocks,
                            int32_t begin) {
  each_row_tile<kQueryRows>(0, rows.num_rows, [&]<int R>(int32_t row) {
    const int32_t end = lesser(most(rows.ends + row, R), begin + kKeyChunk);
    const float* q = rows.queries + row * rows.width;
    float* scores = rows.scores + row * kSplit;
    int32_t key = begin, block = 0;
    for (; key + (kKeyBlocks - 1) * kBlock < end; key += kKeyBlocks * kBlock, block += kKeyBlocks)
      scores_of_blocks<R, kKeyBlocks, Kv>(q, rows.width, head_dim, blocks + block, scores + key);
    for (; key < end; key += kBlock, ++block)
      scores_of_blocks<R, 1, Kv>(q, rows.width, head_dim, blocks + block, scores + key);
  });
}

static inline int32_t vector_before(int32_t key) { return key / kLanes * kLanes; }

// A row's scores of keys [begin, end) of a split: capped, where there is a cap, then with the bias of its distances.
FASTSERVE_NOINLINE static void shape_scores(float* scores, int32_t begin, int32_t end, float cap, const float* bias) {
  const F32 c = set1(cap), inverse = set1(1.0f / cap);
  for (int32_t i = vector_before(begin); i < end; i += kLanes) {
    F32 score = load(scores + i);
    if (cap > 0) score = soft_cap(score, c, inverse);
    if (bias) score = add(score, load(bias + i));
    store(scores + i, score);
  }
}

// Turns scores [begin, end) of a split into weights, and what else is within the first and the last vector into zeros.
static inline void softmax_weights(float* scores, int32_t begin, int32_t count, float* partial) {
  const F32 lowest = set1(-INFINITY);
  const int32_t from = vector_before(begin), end = (count + kLanes - 1) / kLanes * kLanes;
  if (begin > from) store(scores + from, first(lowest, load(scores + from), begin - from));
  if (end > count) store(scores + end - kLanes, first(load(scores + end - kLanes), lowest, count - (end - kLanes)));
  F32 m = lowest;
  for (int32_t i = from; i < end; i += kLanes) m = max(m, load(scores + i));
  largest_score(partial) = largest(m);
  const F32 shift = set1(largest_score(partial));
  F32 sums = zero();
  for (int32_t i = from; i < end; i += kLanes) {
    const F32 weight = exp(sub(load(scores + i), shift));
    store(scores + i, weight);
    sums = add(sums, weight);
  }
  total_weight(partial) = sum(sums);
}

// Adds weights[r][key] * value of keys [begin, end) of a chunk to the sums of R rows, key by key.
template <int R, int V, class Kv>
static inline void add_values_at(const typename Kv::type* const* blocks, int32_t width, const float* weights,
                                 int32_t begin, int32_t end, int32_t column, float* sums, int64_t stride) {
  F32 acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * stride + column + v * kLanes);
  for (int32_t key = begin; key < end;) {
    const typename Kv::type* values = blocks[key / kBlock] + key % kBlock * width + column;
    const int32_t block_end = lesser(end, (key / kBlock + 1) * kBlock);
    for (; key < block_end; ++key, values += width) {
      F32 value[V];
      for (int v = 0; v < V; ++v) value[v] = Kv::load(values + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const F32 weight = set1(weights[r * kSplit + key]);
        for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + r * stride + column + v * kLanes, acc[r][v]);
}

template <int R, class Kv>
static inline void add_values(const typename Kv::type* const* blocks, int32_t width, const float* weights,
                              int32_t begin, int32_t end, float* sums, int64_t stride) {
  int32_t column = 0;
  for (; column + kValueVectors * kLanes <= width; column += kValueVectors * kLanes)
    add_values_at<R, kValueVectors, Kv>(blocks, width, weights, begin, end, column, sums, stride);
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    add_values_at<R, 2, Kv>(blocks, width, weights, begin, end, column, sums, stride);
  for (; column < width; column += kLanes)
    add_values_at<R, 1, Kv>(blocks, width, weights, begin, end, column, sums, stride);
}

// The rows of a register tile that see from `rows.begins` on, keys [begin, begin + num_keys) of the split.
template <int R, class Kv>
FASTSERVE_NOINLINE static void add_values_within(const QueryRows& rows, int32_t row,
                                                 const typename Kv::type* const* blocks, int32_t begin,
                                                 int32_t num_keys, float* sums, int64_t stride) {
  const float* weights = rows.scores + row * kSplit + begin;
  const auto add_to_row = [&](int r, int32_t from, int32_t to) {
    if (to > from) add_values<1, Kv>(blocks, rows.width, weights + r * kSplit, from, to, sums + r * stride, stride);
  };
  int32_t first = greater(0, most(rows.begins + row, R) - begin);  // all see [first, common)
  int32_t common = greater(0, lesser(least(rows.ends + row, R) - begin, num_keys));
  if (first >= common) first = common = 0;
  for (int r = 0; r < R; ++r) add_to_row(r, greater(0, rows.begins[row + r] - begin), first);
  if (common > first) add_values<R, Kv>(blocks, rows.width, weights, first, common, sums, stride);
  for (int r = 0; r < R; ++r)
    add_to_row(r, greater(common, rows.begins[row + r] - begin), lesser(rows.ends[row + r] - begin, num_keys));
}

// All rows, keys [begin, begin + num_keys) of the split. Keys that all rows of a register tile see go together; those
// that only some see, row by row: their values may be anything, and must not even be multiplied by zero.
template <class Kv>
static void add_values_of_chunk(const QueryRows& rows, const typename Kv::type* const* blocks, int32_t begin,
                                int32_t num_keys, float* partials, int64_t stride) {
  each_row_tile<kQueryRows>(0, rows.num_rows, [&]<int R>(int32_t row) {
    const float* weights = rows.scores + row * kSplit + begin;
    float* sums = weighted_values(partials + row * stride);
    if (rows.begins) return add_values_within<R, Kv>(rows, row, blocks, begin, num_keys, sums, stride);
    const int32_t common = greater(0, lesser(least(rows.ends + row, R) - begin, num_keys));
    if (common > 0) add_values<R, Kv>(blocks, rows.width, weights, 0, common, sums, stride);
    for (int r = 0; r < R; ++r) {
      const int32_t end = lesser(rows.ends[row + r] - begin, num_keys);
      if (end > common)
        add_values<1, Kv>(blocks, rows.width, weights + r * kSplit, common, end, sums + r * stride, stride);
    }
  });
}

template <class Kv>
static inline void convert_blocks(const typename Kv::type* const* blocks, int32_t num_keys, int32_t width, float* out,
                                  const float** converted) {
  for (int32_t b = 0; b * kBlock < num_keys; ++b) {
    converted[b] = out + b * kBlock * width;
    for (int32_t i = 0; i < kBlock * width; i += kLanes) store(out + b * kBlock * width + i, Kv::load(blocks[b] + i));
  }
}

static inline void see_nothing(float* partial, int32_t width) {
  largest_score(partial) = kNoScore;
  total_weight(partial) = 0.0f;
  for (int32_t d = 0; d < width; d += kLanes) store(weighted_values(partial) + d, zero());
}

// Partial results of all rows over one split, that some row sees.
template <class Kv>
static void attend_split(const AttentionArgs& a, const AttentionTask& t, int32_t kv_head, const QueryRows& rows,
                         int32_t first_key, float* partials, int64_t stride) {
  const int32_t begin = rows.begins ? least(rows.begins, rows.num_rows) / kBlock * kBlock : 0;
  const int32_t end = most(rows.ends, rows.num_rows);
  const bool is_shared = rows.num_rows > kQueryRows, shapes_scores = a.soft_cap > 0 || rows.biases;
  const bool converts = is_shared && sizeof(typename Kv::type) < sizeof(float);
  const float* converted[kKeyChunkBlocks];
  const SplitBlocks<Kv> keys(a.kv, a.keys, t, kv_head, first_key, begin, end);
  for (int32_t key = begin; key < end; key += kKeyChunk) {
    const typename Kv::type* const* blocks = keys.blocks + key / kBlock;
    if (converts) {
      convert_blocks<Kv>(blocks, lesser(kKeyChunk, end - key), rows.width, rows.converted, converted);
      scores_of_chunk<KvF32>(rows, a.kv.head_dim, converted, key);
    } else {
      scores_of_chunk<Kv>(rows, a.kv.head_dim, blocks, key);
    }
  }
  const SplitBlocks<Kv> values(a.kv, a.values, t, kv_head, first_key, begin, end);
  for (int32_t r = 0; r < rows.num_rows; ++r) {
    float* partial = partials + r * stride;
    float* scores = rows.scores + r * kSplit;
    see_nothing(partial, rows.width);
    if (!rows.sees_any(r)) continue;
    const int32_t from = vector_before(rows.begin_of(r)), to = rows.ends[r];
    keys.scale(scores, from, to);
    if (shapes_scores) shape_scores(scores, from, to, a.soft_cap, rows.biases ? rows.biases[r] + first_key : nullptr);
    softmax_weights(scores, rows.begin_of(r), to, partial);
    values.scale(scores, from, to);
  }
  const int32_t chunk = is_shared ? kKeyChunk : kSplit;
  for (int32_t key = begin; key < end; key += chunk) {
    const typename Kv::type* const* blocks = values.blocks + key / kBlock;
    const int32_t count = lesser(chunk, end - key);
    if (converts) {
      convert_blocks<Kv>(blocks, count, rows.width, rows.converted, converted);
      add_values_of_chunk<KvF32>(rows, converted, key, count, partials, stride);
    } else {
      add_values_of_chunk<Kv>(rows, blocks, key, count, partials, stride);
    }
  }
}

// --- All splits ---

static inline void merge(float* whole, float* part, int32_t width) {
  const float m = largest_score(whole) > largest_score(part) ? largest_score(whole) : largest_score(part);
  const float a = exp(largest_score(whole) - m), b = exp(largest_score(part) - m);
  largest_score(whole) = m;
  total_weight(whole) = total_weight(whole) * a + total_weight(part) * b;
  float *to = weighted_values(whole), *from = weighted_values(part);
  for (int32_t d = 0; d < width; d += kLanes)
    store(to + d, add(mul(load(to + d), set1(a)), mul(load(from + d), set1(b))));
}

static inline void normalize(float* partial, int32_t head_dim, float* out) {
  const F32 inverse = set1(1.0f / total_weight(partial));
  map(weighted_values(partial), head_dim, out, [&](F32 v) { return mul(v, inverse); });
}

// Query rows `begin` .. begin + num_rows of the task, at most kAttentionRows, counted over tokens x heads of the
// group: row j is head j % group of token j / group.
template <class Kv>
static void attention_rows(const AttentionArgs& a, const AttentionTask& t, int32_t kv_head, int32_t begin,
                           int32_t num_rows, float* scratch, float* out, int64_t out_stride, float* partials) {
  const int32_t group = a.num_heads / a.kv.num_kv_heads, width = a.kv.padded_head_dim;
  const int64_t stride = partial_floats(width);
  float* queries = scratch;
  float* scores = queries + kAttentionRows * width;
  float* converted = scores + kAttentionRows * kSplit;
  float* part = converted + kKeyChunk * width;
  float* whole = partials ? partials + begin * stride : part + kAttentionRows * stride;
  // Keys that a row sees, of all and of a split.
  int32_t firsts[kAttentionRows], limits[kAttentionRows], begins[kAttentionRows], ends[kAttentionRows];
  const float* biases[kAttentionRows];
  for (int32_t r = 0; r < num_rows; ++r) {
    const int32_t token = (begin + r) / group, query_head = kv_head * group + (begin + r) % group;
    const int32_t position = t.first_position + token;
    float* query = queries + r * width;
    turn(a, a.q + (t.first_row + token) * a.q_stride + (int64_t)query_head * a.kv.head_dim, position, query);
    map(query, a.kv.head_dim, query, [&](F32 x) { return mul(x, set1(a.scale)); });
    firsts[r] = greater(a.first_key, position - a.keys_before);
    limits[r] = lesser(a.keys_after, t.context_length - 1 - position) + position + 1;
    if (a.bias) biases[r] = a.bias + query_head * a.bias_stride + a.bias_reach - position;
  }
  const bool is_within = most(firsts, num_rows) > 0;  // a window, or empty slots
  const QueryRows rows = {num_rows, width,  queries,  is_within ? begins : nullptr,
                          ends,     a.bias ? biases : nullptr, scores,   converted};
  const int32_t end_key = lesser(most(limits, num_rows), t.end_split * kSplit);
  const int32_t first_split = is_within ? greater(t.first_split, least(firsts, num_rows) / kSplit) : t.first_split;
  if (first_split * kSplit >= end_key)
    for (int32_t r = 0; r < num_rows; ++r) see_nothing(whole + r * stride, width);
  for (int32_t split = first_split; split * kSplit < end_key; ++split) {
    for (int32_t r = 0; r < num_rows; ++r) {
      begins[r] = greater(0, firsts[r] - split * kSplit);
      ends[r] = lesser(limits[r] - split * kSplit, kSplit);
    }
    const bool is_first = split == first_split;
    attend_split<Kv>(a, t, kv_head, rows, split * kSplit, is_first ? whole : part, stride);
    if (is_first) continue;
    for (int32_t r = 0; r < num_rows; ++r)
      if (rows.sees_any(r)) merge(whole + r * stride, part + r * stride, width);
  }
  if (partials) return;
  for (int32_t r = 0; r < num_rows; ++r)
    normalize(whole + r * stride, a.kv.head_dim,
              out + (begin + r) / group * out_stride + (begin + r) % group * a.kv.head_dim);
}

static void attention(const AttentionArgs& a, const AttentionTask& t, int32_t kv_head, float* scratch, float* out,
                      int64_t out_stride, float* partials) {
  const int32_t num_rows = t.num_rows * (a.num_heads / a.kv.num_kv_heads);
  with_kv_type(a.kv.format, [&]<class Kv>() {
    if (t.stores) store_kv_as<Kv>(a, t, kv_head, scratch);
    for (int32_t row = 0; row < num_rows; row += kAttentionRows)
      attention_rows<Kv>(a, t, kv_head, row, lesser(num_rows - row, kAttentionRows), scratch, out, out_stride,
                         partials);
  });
}

static void merge_attention(float* partials, int64_t stride, int32_t num_splits, int32_t head_dim,
                            int32_t padded_head_dim, float* out) {
  for (int32_t split = 1; split < num_splits; ++split) merge(partials, partials + split * stride, padded_head_dim);
  normalize(partials, head_dim, out);
}
