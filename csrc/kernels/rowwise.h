// Kernels that work on one row: norms, rotary embedding, activations, quantization of activations.

static void rms_norm(const float* x, const float* weight, float eps, int32_t width, float* out) {
  F32 squares = zero();
  each_vector(width, [&](int32_t i, int n) {
    F32 a = load_up_to(x + i, n);
    squares = fma(a, a, squares);
  });
  F32 scale = set1(1.0f / sqrtf(sum(squares) / (float)width + eps));
  each_vector(width, [&](int32_t i, int n) {
    store_up_to(out + i, mul(mul(load_up_to(x + i, n), scale), load_up_to(weight + i, n)), n);
  });
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps, int32_t width, float* out) {
  F32 total = zero();
  each_vector(width, [&](int32_t i, int n) { total = add(total, load_up_to(x + i, n)); });
  F32 mean = set1(sum(total) / (float)width);
  F32 squares = zero();
  each_vector(width, [&](int32_t i, int n) {
    F32 d = first(sub(load_up_to(x + i, n), mean), zero(), n);
    squares = fma(d, d, squares);
  });
  F32 scale = set1(1.0f / sqrtf(sum(squares) / (float)width + eps));
  each_vector(width, [&](int32_t i, int n) {
    F32 normed = mul(sub(load_up_to(x + i, n), mean), scale);
    store_up_to(out + i, fma(normed, load_up_to(weight + i, n), load_up_to(bias + i, n)), n);
  });
}

static void add(const float* x, const float* y, int32_t width, float* out) {
  each_vector(width,
              [&](int32_t i, int n) { store_up_to(out + i, add(load_up_to(x + i, n), load_up_to(y + i, n)), n); });
}

static void rope(const float* x, const float* cosines, const float* sines, int32_t dim, int32_t head_dim,
                 int32_t num_heads, float* out) {
  int32_t half = dim / 2;
  for (int32_t h = 0; h < num_heads; ++h, x += head_dim, out += head_dim) {
    each_vector(half, [&](int32_t i, int n) {
      F32 a = load_up_to(x + i, n), b = load_up_to(x + half + i, n);
      F32 c = load_up_to(cosines + i, n), s = load_up_to(sines + i, n);
      store_up_to(out + i, sub(mul(a, c), mul(b, s)), n);
      store_up_to(out + half + i, add(mul(b, c), mul(a, s)), n);
    });
    for (int32_t i = dim; i < head_dim; ++i) out[i] = x[i];
  }
}

template <class Function>
static inline void map(const float* x, int32_t width, float* out, Function f) {
  each_vector(width, [&](int32_t i, int n) { store_up_to(out + i, f(load_up_to(x + i, n)), n); });
}
static void activation(ActivationKind kind, const float* x, int32_t width, float* out) {
  switch (kind) {
    case ActivationKind::silu: return map(x, width, out, [](F32 a) { return silu(a); });
    case ActivationKind::gelu: return map(x, width, out, [](F32 a) { return gelu(a); });
    case ActivationKind::gelu_tanh: return map(x, width, out, [](F32 a) { return gelu_tanh(a); });
    case ActivationKind::relu: return map(x, width, out, [](F32 a) { return relu(a); });
    case ActivationKind::tanh: return map(x, width, out, [](F32 a) { return tanh(a); });
    case ActivationKind::sigmoid: return map(x, width, out, [](F32 a) { return sigmoid(a); });
  }
}

template <class Function>
static inline void gate(const float* g, const float* up, int32_t width, float* out, Function f) {
  each_vector(width,
              [&](int32_t i, int n) { store_up_to(out + i, mul(f(load_up_to(g + i, n)), load_up_to(up + i, n)), n); });
}
static void gated_activation(ActivationKind kind, const float* g, const float* up, int32_t width, float* out) {
  switch (kind) {
    case ActivationKind::silu: return gate(g, up, width, out, [](F32 a) { return silu(a); });
    case ActivationKind::gelu: return gate(g, up, width, out, [](F32 a) { return gelu(a); });
    case ActivationKind::gelu_tanh: return gate(g, up, width, out, [](F32 a) { return gelu_tanh(a); });
    case ActivationKind::relu: return gate(g, up, width, out, [](F32 a) { return relu(a); });
    case ActivationKind::tanh: return gate(g, up, width, out, [](F32 a) { return tanh(a); });
    case ActivationKind::sigmoid: return gate(g, up, width, out, [](F32 a) { return sigmoid(a); });
  }
}

static inline F32 soft_cap(F32 x, F32 cap, F32 inverse_cap) { return mul(cap, tanh(mul(x, inverse_cap))); }
static void soft_cap(const float* x, float cap, int32_t width, float* out) {
  const F32 c = set1(cap), inverse = set1(1.0f / cap);
  map(x, width, out, [&](F32 a) { return soft_cap(a, c, inverse); });
}

static void scale(const float* x, float factor, int32_t width, float* out) {
  const F32 f = set1(factor);
  map(x, width, out, [&](F32 a) { return mul(a, f); });
}

static void l2_normalize(const float* x, float eps, int32_t width, float* out) {
  F32 squares = zero();
  each_vector(width, [&](int32_t i, int n) {
    F32 a = load_up_to(x + i, n);
    squares = fma(a, a, squares);
  });
  float norm = sqrtf(sum(squares));
  F32 divisor = set1(norm < eps ? eps : norm);  // in this order, a norm that is NaN stays
  each_vector(width, [&](int32_t i, int n) { store_up_to(out + i, div(load_up_to(x + i, n), divisor), n); });
}

static inline float largest_magnitude(const float* x, int32_t count) {
  F32 m = zero();
  each_vector(count, [&](int32_t i, int n) { m = max(m, abs(load_up_to(x + i, n))); });
  return largest(m);
}

// The largest magnitude, and NaN if a value is NaN or infinite, else zero: the first alone would lose a NaN, and with it
// the news that a model or a request is broken.
struct Magnitude {
  float largest;
  float poison;
};
static inline Magnitude magnitude(const float* x, int32_t count) {
  F32 m = zero(), p = zero();
  each_vector(count, [&](int32_t i, int n) {
    const F32 a = load_up_to(x + i, n);
    m = max(m, abs(a));
    p = fma(a, zero(), p);
  });
  return {largest(m), sum(p)};
}

// Groups whose largest magnitude is below this are quantized to zeros: the inverse of their scale would overflow.
constexpr float kSmallestQuantized = 1e-30f;

// So many whole numbers below 128 have a sum that a float32 holds exactly.
constexpr int32_t kMostSummed = 1 << 16;

// `count` values, at most kMostSummed, each times `inverse_scale` and rounded; returns their sum, 0 if one is NaN.
static inline int32_t quantize_values(const float* x, int32_t count, float inverse_scale, int8_t* out) {
  const F32 inverse = set1(inverse_scale);
  F32 sums = zero();
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 q = round(mul(load(x + i), inverse));
    store_bytes(out + i, q);
    sums = add(sums, q);
  }
  if (i < count) {
    const F32 q = round(mul(load_first(x + i, count - i), inverse));
    int8_t rest[kLanes];
    store_bytes(rest, q);
    memcpy(out + i, rest, (size_t)(count - i));
    sums = add(sums, q);
  }
  const float total = sum(sums);
  return total == total ? (int32_t)total : 0;
}

static void quantize_row(const float* x, int32_t depth, int32_t padded_depth, int32_t group_size, int8_t* out,
                         float* scales, int32_t* corrections) {
  for (int32_t begin = 0, g = 0; begin < depth; begin += group_size, ++g) {
    const int32_t count = depth - begin < group_size ? depth - begin : group_size;
    const Magnitude found = magnitude(x + begin, count);
    const float inverse = found.largest > kSmallestQuantized ? 127.0f / found.largest : 0.0f;
    scales[g] = found.largest / 127.0f + found.poison;
    int32_t total = 0;
    for (int32_t i = 0; i < count; i += kMostSummed) {
      const int32_t some = count - i < kMostSummed ? count - i : kMostSummed;
      total += quantize_values(x + begin + i, some, inverse, out + begin + i);
    }
    corrections[g] = -128 * total;
  }
  for (int32_t i = depth; i < padded_depth; ++i) out[i] = 0;
}
