// Elementary functions on vectors, a few units in the last place from exact.

// Calls body(i, n) for every vector of a row: n lanes from column i, all of them but in the last call.
template <class Body>
static inline void each_vector(int32_t width, Body body) {
  int32_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}
static inline F32 load_up_to(const float* p, int n) { return n == kLanes ? load(p) : load_first(p, n); }
static inline void store_up_to(float* p, F32 a, int n) {
  if (n == kLanes) store(p, a);
  else store_first(p, a, n);
}

// `x` within the limits, where NaN stays: x86 takes the second operand of max and min if one is NaN.
static inline F32 clamp(F32 x, float low, float high) { return min(set1(high), max(set1(low), x)); }

// Cephes expf: 2^n * p(r), r = x - n ln 2 in two pieces. Inputs below -110 give exactly zero.
static inline F32 exp(F32 x) {
  x = clamp(x, -110.0f, 88.72f);
  F32 n = round(mul(x, set1(1.44269504088896341f)));
  F32 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_by_power(p, n);
}

static inline float exp(float x) {
  float lanes[kLanes];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

// x * p(x^2) / q(x^2), fitted to tanh(x) / x on [0, 9] by bench/fit_functions.py: relative error 2.1e-8 before
// rounding. By exp, values near zero would have the error of 1.
static inline F32 tanh(F32 x) {
  x = clamp(x, -9.0f, 9.0f);
  const F32 x2 = mul(x, x);
  F32 p = set1(1.335468599e-08f);
  p = fma(p, x2, set1(2.060910260e-05f));
  p = fma(p, x2, set1(3.495589467e-03f));
  p = fma(p, x2, set1(1.338102680e-01f));
  p = fma(p, x2, set1(9.999999795e-01f));
  F32 q = set1(7.776569102e-07f);
  q = fma(q, x2, set1(3.285636936e-04f));
  q = fma(q, x2, set1(2.587698740e-02f));
  q = fma(q, x2, set1(4.671434239e-01f));
  q = fma(q, x2, set1(1.000000000e+00f));
  return div(mul(x, p), q);
}

// x * p(x^2) / q(x^2), fitted to erf(x) / x on [0, 4] by bench/fit_functions.py: relative error 6.5e-8 before
// rounding.
static inline F32 erf(F32 x) {
  x = clamp(x, -4.0f, 4.0f);
  const F32 x2 = mul(x, x);
  F32 p = set1(1.911071073e-08f);
  p = fma(p, x2, set1(-1.942296828e-06f));
  p = fma(p, x2, set1(1.472854075e-04f));
  p = fma(p, x2, set1(3.990555853e-03f));
  p = fma(p, x2, set1(5.152485972e-02f));
  p = fma(p, x2, set1(2.071250958e-01f));
  p = fma(p, x2, set1(1.128379094e+00f));
  F32 q = set1(1.021106233e-03f);
  q = fma(q, x2, set1(1.495804908e-02f));
  q = fma(q, x2, set1(1.179706789e-01f));
  q = fma(q, x2, set1(5.168910853e-01f));
  q = fma(q, x2, set1(1.0f));
  return div(mul(x, p), q);
}

static inline F32 sigmoid(F32 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }
static inline F32 silu(F32 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }
static inline F32 gelu(F32 x) {
  return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
}
static inline F32 gelu_tanh(F32 x) {
  F32 inner = mul(set1(0.79788456080286536f), fma(mul(mul(x, x), x), set1(0.044715f), x));
  return mul(mul(x, set1(0.5f)), add(set1(1.0f), tanh(inner)));
}
static inline F32 relu(F32 x) { return max(zero(), x); }  // in this order NaN stays, as above
