// What both directions of the delta memory read: a run of at most kChunk steps of one head, none of
// which but the first starts anew.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"
#include "delta_memory_kernel.h"

namespace seqmem::delta_memory {
namespace {

SEQMEM_INLINE float root(float x) { return __builtin_sqrtf(x); }
SEQMEM_INLINE double root(double x) { return __builtin_sqrt(x); }

// e^x for x <= 0, which is what a logarithm of a decay is: 0 of -inf; NaN stays NaN.
template <class C>
SEQMEM_INLINE Vec<C> decay_of(Vec<C> x) {
  Vec<C> one[1] = {x};
  exp_of_negative<1, C>(one);
  return one[0];
}

// A run of one batch row.
struct Run {
  int64_t begin, steps;
  bool anew;  // the memory is empty before the first step
};

SEQMEM_INLINE int64_t steps_of(const Shape& s, int64_t b) {
  return s.lengths == nullptr ? s.T : s.lengths[b];
}

// The run that begins at step t, before `end`; never across a multiple of kChunk.
SEQMEM_INLINE Run run_from(const Shape& s, int64_t b, int64_t t, int64_t end) {
  const bool* reset = s.reset == nullptr ? nullptr : s.reset + b * s.T;
  const int64_t last = min(end, (t / kChunk + 1) * kChunk);
  int64_t stop = t + 1;
  while (stop < last && !(reset != nullptr && reset[stop])) ++stop;
  return {t, stop - t, reset != nullptr && reset[t]};
}

// Rows of neighbouring heads lie side by side: their units of work, of `elements` of memory each,
// go through the steps together, as many as the L2 cache keeps beside the rest.
template <class C>
SEQMEM_INLINE int64_t together(int64_t elements) {
  constexpr int64_t kBytes = 256 << 10;
  return max<int64_t>(kBytes / (max<int64_t>(elements, 1) * static_cast<int64_t>(sizeof(C))), 1);
}

template <class S>
class Steps {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>;
  static constexpr C kNormFloor = C(1e-6);

 public:
  const Shape& s;
  const int64_t Kp;  // K in whole vectors
  // [kChunk, Kp]: q times the scale and k, normalised if asked for; zeros beyond K
  C *q, *k;
  C* decay;            // [kChunk, Kp] of features
  C* decay_head;       // [kChunk + lanes] of heads
  C *norm_q, *norm_k;  // [kChunk]: the inverse norms, 1 where not normalised
  C* beta;             // [kChunk]

  explicit Steps(const Shape& shape) : s(shape), Kp(padded<C>(shape.K)) {}

  void place(Carver& take) {
    q = take.array<C>(kChunk * Kp);
    k = take.array<C>(kChunk * Kp);
    decay = take.array<C>(s.decay == Decay::Feature ? kChunk * Kp : 0);
    decay_head = take.array<C>(kChunk + L);
    norm_q = take.array<C>(kChunk);
    norm_k = take.array<C>(kChunk);
    beta = take.array<C>(kChunk);
  }

  template <class Arguments>
  void read(const Arguments& a, int64_t b, int64_t h, const Run& run) {
    const int64_t key_head = h / (s.H / s.Hk);
    for (int64_t i = 0; i < run.steps; ++i) {
      const int64_t t = run.begin + i;
      if (key_head + 1 < s.Hk) {
        ask_for(row(a.q, b, t, key_head + 1), s.K);
        ask_for(row(a.k, b, t, key_head + 1), s.K);
      }
      if (h + 1 < s.H) ask_for(row(a.v, b, t, h + 1), s.V);
      norm_q[i] = read_row(q + i * Kp, row(a.q, b, t, key_head), C(s.scale));
      norm_k[i] = read_row(k + i * Kp, row(a.k, b, t, key_head), C(1));
      const int64_t at = (b * s.T + t) * s.H + h;
      beta[i] = static_cast<const C*>(a.beta)[at];
      if (s.decay == Decay::Head) decay_head[i] = static_cast<const C*>(a.decay)[at];
      if (s.decay == Decay::Feature) {
        const C* from = static_cast<const C*>(a.decay) + at * s.K;
        for (int64_t c = 0; c < s.K; c += L)
          store(decay + i * Kp + c, decay_of<C>(load_n(from + c, static_cast<int>(s.K - c))));
      }
    }
    if (s.decay == Decay::Head) {
      for (int64_t i = 0; i < run.steps; i += L)
        store(decay_head + i, decay_of<C>(load_n(decay_head + i, static_cast<int>(run.steps - i))));
    }
  }

  // The rows of the next head, which lie beside these: the hardware asks for neighbours in time.
  static void ask_for(const S* from, int64_t width) {
    for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(S)))
      __builtin_prefetch(from + c);
  }

  static const S* row(const Rows& rows, int64_t b, int64_t t, int64_t h) {
    return static_cast<const S*>(rows.data) + b * rows.batch + t * rows.time + h * rows.head;
  }

 private:
  C read_row(C* to, const S* from, C factor) const {
    C inverse = 1;
    if (s.l2norm) {
      Vec<C> squares = {};
      for (int64_t c = 0; c < s.K; c += L) {
        const Vec<C> x = load_n(from + c, static_cast<int>(s.K - c));
        squares += x * x;
      }
      inverse = 1 / root(lane_sum<C>(squares) + kNormFloor);
    }
    factor *= inverse;
    for (int64_t c = 0; c < s.K; c += L)
      store(to + c, factor * load_n(from + c, static_cast<int>(s.K - c)));
    return inverse;
  }
};

}  // namespace
}  // namespace seqmem::delta_memory
