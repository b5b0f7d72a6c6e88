// Functions of rows, and the activations of a head's parameters.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"
#include "ntm_math.h"

namespace seqmem::ntm_sequence {
namespace {

// Calls f(constant K, first vector) for 0..n-1, some vectors at once as long as they last: the
// polynomials of one vector alone would wait for themselves, those of many do not fit registers
// beside what the passes here hold (so two, where ntm::for_vectors takes four).
template <class F>
SEQMEM_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t v = 0;
  constexpr int K = SEQMEM_VEC_BYTES == 64 ? 4 : 2;
  for (; v + K <= n; v += K) f(std::integral_constant<int, K>{}, v);
  for (; v < n; ++v) f(std::integral_constant<int, 1>{}, v);
}

using ntm::exp_of_negative;
using ntm::largest;
using ntm::log_of_positive;
using ntm::square_root;

template <class C>
SEQMEM_INLINE C log_of_one(C x) {
  const Vec<C> in[1] = {splat(x)};
  Vec<C> out[1];
  log_of_positive<1, C>(in, out);
  return out[0][0];
}

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
