// Activations of the values p that a controller gives its heads.
#pragma once

#include "machine_math.h"

namespace seqmem::machine {
namespace {

// x = max(x, 0) + log(1 + e^-|x|)
template <int K, class C>
SEQMEM_INLINE void softplus(Vec<C> (&x)[K]) {
  Vec<C> e[K], u[K], logs[K];
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) e[i] = x[i] < C(0) ? x[i] : -x[i];
  exp_of_negative<K, C>(e);
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) u[i] = C(1) + e[i];
  log_of_positive<K, C>(u, logs);
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    const Vec<C> lost = e[i] - (u[i] - C(1));
    x[i] = (x[i] < C(0) ? Vec<C>{} : x[i]) + (logs[i] + lost / u[i]);
  }
}

// d softplus x / dx = 1 - e^-softplus x, from softplus x.
template <class C>
SEQMEM_INLINE Vec<C> softplus_slope(Vec<C> activated) {
  const Vec<C> argument[1] = {clamp<C>(-activated, ExpConstants<C>::limit)};
  ExpParts<C> e[1];
  exp_parts<1, C>(argument, e);
  return -(e[0].power * e[0].fraction + (e[0].power - C(1)));
}

// tanh and sigmoid of a row of p in its place are one function of all lanes,
//   y = e^(scale x),  out = (y - less) / (y + 1):
// (2, 1) makes tanh, (1, 0) sigmoid, and a scale of 0 leaves a lane alone.
template <class C>
class Squash {
  static constexpr int L = kLanes<C>;
  const int64_t P;
  C *scale, *less;  // [P_pad]

 public:
  explicit Squash(int64_t P) : P(P) {}

  void place(Carver& take) {
    scale = take.array<C>(padded<C>(P));
    less = take.array<C>(padded<C>(P));
  }

  // Which of P values are activated, n from the first on: none, until asked for.
  void clear() const {
    for (int64_t i = 0; i < padded<C>(P); ++i) scale[i] = less[i] = 0;
  }
  void tanh(int64_t first, int64_t n) const {
    for (int64_t i = first; i < first + n; ++i) scale[i] = 2, less[i] = 1;
  }
  void sigmoid(int64_t first, int64_t n) const {
    for (int64_t i = first; i < first + n; ++i) scale[i] = 1;
  }

  SEQMEM_INLINE void run(C* p) const {
    for_vectors(ceil_div(P, L), [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> x[K], argument[K];
      ExpParts<C> e[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        x[i] = load(p + (v + i) * L);
        argument[i] = clamp<C>(x[i] * load(scale + (v + i) * L), ExpConstants<C>::limit);
      }
      exp_parts<K, C>(argument, e);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        const Vec<C> one = load(less + (v + i) * L);
        // A gate that is shut is a true zero.
        const Vec<C> power = argument[i] > -ExpConstants<C>::limit ? e[i].power : Vec<C>{};
        const Vec<C> above = power * e[i].fraction + (power - one);
        const Vec<C> y = above / (above + (one + C(1)));
        store(p + (v + i) * L, load(scale + (v + i) * L) == C(0) ? x[i] : y);
      }
    });
  }

  // From gradients of a row's activated values to those of p, in place; padded as above.
  void back(const C* values, C* grad) const {
    for (int64_t i = 0; i < P; i += L) {
      const Vec<C> y = load_n(values + i, static_cast<int>(min<int64_t>(L, P - i)));
      const Vec<C> one = load(less + i), slope = one + y * ((C(1) - one) - y);
      const Vec<C> g = load(grad + i);
      store(grad + i, load(scale + i) == C(0) ? g : g * slope);
    }
  }
};

}  // namespace
}  // namespace seqmem::machine
