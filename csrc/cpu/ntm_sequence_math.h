// Logarithm, guarded exponential and the activations of a head's parameters.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"

namespace seqmem::ntm_sequence {
namespace {

// Calls f(constant K, first vector) for 0..n-1, some vectors at once as long as they last: the
// polynomials of one vector alone would wait for themselves, those of many do not fit registers.
template <class F>
SEQMEM_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t v = 0;
  constexpr int K = SEQMEM_VEC_BYTES == 64 ? 4 : 2;
  for (; v + K <= n; v += K) f(std::integral_constant<int, K>{}, v);
  for (; v < n; ++v) f(std::integral_constant<int, 1>{}, v);
}

// e^x for x <= 0, and a true zero where it would be denormal: those are slow to compute with.
template <int K, class C>
SEQMEM_INLINE void exp_of_negative(Vec<C> (&x)[K]) {
  Vec<C> clamped[K];
  ExpParts<C> e[K];
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) clamped[i] = clamp<C>(x[i], ExpConstants<C>::limit);
  exp_parts<K, C>(clamped, e);
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const Vec<C> value = e[i].power + e[i].power * e[i].fraction;
    x[i] = x[i] < -ExpConstants<C>::limit ? Vec<C>{} : value;
  }
}

template <class C>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  static constexpr float smallest = 0x1p-126f;
  static constexpr int terms = 4;
};
template <>
struct LogConstants<double> {
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double smallest = 0x1p-1022;
  static constexpr int terms = 10;
};

// log x for x > 0, anything finite for x <= 0; NaN and infinity stay. With x = 2^n m and m near 1,
// log m = 2 atanh s = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1).
template <int K, class C>
SEQMEM_INLINE void log_of_positive(const Vec<C> (&x)[K], Vec<C> (&out)[K]) {
  using E = ExpConstants<C>;
  using G = LogConstants<C>;
  constexpr C up = C(int64_t(1) << (E::mantissa + 1));
  Vec<C> s[K], z[K], p[K], n[K];
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const IntVec<C> tiny = x[i] < G::smallest;
    const Vec<C> scaled = tiny ? x[i] * up : x[i];
    const IntVec<C> bits = (IntVec<C>)scaled;
    const IntVec<C> exponent = (bits - G::sqrt_half) >> E::mantissa;
    const Vec<C> m = (Vec<C>)(bits - (exponent << E::mantissa));
    n[i] = __builtin_convertvector(exponent + (tiny & -(E::mantissa + 1)), Vec<C>);
    s[i] = (m - C(1)) / (m + C(1));
    z[i] = s[i] * s[i];
    p[i] = splat(C(2) / C(2 * G::terms + 1));
  }
  SEQMEM_UNROLL
  for (int k = G::terms - 1; k >= 1; --k) {
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i) p[i] = p[i] * z[i] + C(2) / C(2 * k + 1);
  }
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const Vec<C> log_m = s[i] * C(2) + (s[i] * z[i] * p[i] + n[i] * E::ln2_lo);
    const Vec<C> value = n[i] * E::ln2_hi + log_m;
    out[i] = x[i] - x[i] == C(0) ? value : x[i];
  }
}

template <class C>
SEQMEM_INLINE C log_of_one(C x) {
  const Vec<C> in[1] = {splat(x)};
  Vec<C> out[1];
  log_of_positive<1, C>(in, out);
  return out[0][0];
}

template <class C>
SEQMEM_INLINE C largest(Vec<C> v) {
  C lanes[kLanes<C>];
  store(lanes, v);
  C most = lanes[0];
  for (int i = 1; i < kLanes<C>; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

SEQMEM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
SEQMEM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A vector's lanes stay in a register only if the loop over them vanishes.
template <class C>
SEQMEM_INLINE Vec<C> square_root(Vec<C> x) {
  Vec<C> y{};
  SEQMEM_UNROLL
  for (int i = 0; i < kLanes<C>; ++i) y[i] = square_root(x[i]);
  return y;
}

// out = tanh(x) or sigmoid(x), n values; both arrays have room up to a whole vector.
template <bool is_tanh, class C>
SEQMEM_INLINE void squash_row(const C* x, C* out, int64_t n) {
  constexpr int L = kLanes<C>;
  for_vectors(ceil_div(n, L), [&](auto count, int64_t v) {
    constexpr int K = decltype(count)::value;
    Vec<C> argument[K];
    ExpParts<C> e[K];
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i) {
      const Vec<C> from = load(x + (v + i) * L);
      argument[i] = is_tanh ? tanh_argument<C>(from) : sigmoid_argument<C>(from);
    }
    exp_parts<K, C>(argument, e);
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i)
      store(out + (v + i) * L, is_tanh ? tanh_of<C>(e[i]) : sigmoid_of<C>(e[i]));
  });
}

// What one head does in one step.
template <class C>
struct Head {
  C *key, *erase, *add;  // [M], with room for whole vectors
  C* shift;              // [taps]
  C beta, gate, gamma;
  C beta_slope, gamma_slope;  // their derivatives by what they were computed from
  C key_norm;
};

// Where a head's values lie in p: key M, beta, gate, shift, gamma, and erase M, add M.
struct HeadLayout {
  int64_t beta, gate, shift, gamma, erase, add;
  SEQMEM_INLINE HeadLayout(int64_t M, int64_t taps)
      : beta(M),
        gate(M + 1),
        shift(M + 2),
        gamma(M + 2 + taps),
        erase(M + 3 + taps),
        add(2 * M + 3 + taps) {}
  SEQMEM_INLINE int64_t size(bool writes, int64_t M) const { return writes ? add + M : erase; }
};

// p has room for a whole vector beyond its end.
template <class C>
SEQMEM_INLINE void activate_head(const C* p, int64_t M, int64_t taps, bool writes, bool squash,
                                 Head<C>& head) {
  constexpr int L = kLanes<C>;
  const HeadLayout at(M, taps);
  auto vector = [&](const C* from, C* to) {
    if (squash) {
      squash_row<true, C>(from, to, M);
    } else {
      for (int64_t i = 0; i < M; i += L) store(to + i, load(from + i));
    }
  };
  vector(p, head.key);
  if (writes) {
    squash_row<false, C>(p + at.erase, head.erase, M);
    vector(p + at.add, head.add);
  }
  Vec<C> squares{};
  for (int64_t m = 0; m < M; m += L) {
    const Vec<C> k = load_n(head.key + m, static_cast<int>(M - m));
    squares += k * k;
  }
  head.key_norm = square_root(sum<C>(squares));

  // Lanes 0, 1, 2: beta, gate, gamma. softplus x = max(x, 0) + log(1 + e^-|x|).
  C lanes[L < 4 ? 4 : L] = {p[at.beta], p[at.gate], p[at.gamma]};
  constexpr int K = L < 4 ? 4 / L : 1;
  Vec<C> x[K], e[K], u[K], logs[K];
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    x[i] = load(lanes + i * L);
    e[i] = x[i] < C(0) ? x[i] : -x[i];
  }
  exp_of_negative<K, C>(e);
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) u[i] = C(1) + e[i];
  log_of_positive<K, C>(u, logs);
  C soft[K * L], sigmoid[K * L];
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const Vec<C> lost = e[i] - (u[i] - C(1));
    store(soft + i * L, (x[i] < C(0) ? Vec<C>{} : x[i]) + (logs[i] + lost / u[i]));
    store(sigmoid + i * L, (x[i] < C(0) ? e[i] : splat(C(1))) / u[i]);
  }
  head.beta = soft[0], head.gate = sigmoid[1], head.gamma = C(1) + soft[2];
  head.beta_slope = sigmoid[0], head.gamma_slope = sigmoid[2];

  const C* raw = p + at.shift;
  C most = raw[0];
  for (int64_t j = 1; j < taps; ++j) most = raw[j] > most ? raw[j] : most;
  C total = 0;
  for (int64_t j = 0; j < taps; j += L) {
    Vec<C> y[1] = {load(raw + j) - most};
    // Beyond the taps lies another value, of any sign.
    y[0] = y[0] > C(0) ? Vec<C>{} : y[0];
    exp_of_negative<1, C>(y);
    C values[L];
    store(values, y[0]);
    for (int64_t i = 0; i < L && j + i < taps; ++i) total += head.shift[j + i] = values[i];
  }
  for (int64_t j = 0; j < taps; ++j) head.shift[j] /= total;
}

}  // namespace
}  // namespace seqmem::ntm_sequence
