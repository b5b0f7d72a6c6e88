// A call of one step, which takes little longer than the memory takes to come and go. Whole rows
// are read in one pass, all that is asked of them at once:
//   r = S^T (decay k),  p = S^T (decay q);  u = beta (v - r),  o = p + (q . k) u
// and S' = decay S + k u' is written from the last row to the first, of which the L1 cache still
// has some.
#pragma once

#include "delta_memory_steps.h"

namespace seqmem::delta_memory {
namespace {

template <class S>
class OneStep {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>;
  // Of a slice: rows of neighbouring cache lines come fastest, and each vector has two sums.
  static constexpr int kVectors = SEQMEM_VEC_BYTES == 64 ? 8 : 4;

  const Shape& s;
  const Forward& a;
  Steps<S>& steps;
  C *keys, *queries;  // [Kp]: k and q after the decay

 public:
  // `spare`: 2 rows of steps.Kp.
  OneStep(const Shape& shape, const Forward& arguments, Steps<S>& of, C* spare)
      : s(shape), a(arguments), steps(of), keys(spare), queries(spare + of.Kp) {}

  // Of what every decoder does: rows of whole vectors, a memory to go on from and none to keep.
  static bool suits(const Shape& s, const Forward& a) {
    return s.T == 1 && s.V % L == 0 && a.state != nullptr && a.states == nullptr &&
           s.lengths == nullptr && s.reset == nullptr;
  }

  void run(int thread, int threads) {
    const int64_t vectors = s.V / L, slices = ceil_div(vectors, kVectors);
    const Share mine = share(s.B * s.H * slices, thread, threads);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const int64_t head = u / slices, first = u % slices * kVectors;
      const C meets = read(head);
      for_count<kVectors>(min<int64_t>(kVectors, vectors - first), [&](auto count) {
        constexpr int NV = decltype(count)::value;
        switch (s.decay) {
          case Decay::None: take<NV, Decay::None>(head, first * L, meets); break;
          case Decay::Head: take<NV, Decay::Head>(head, first * L, meets); break;
          case Decay::Feature: take<NV, Decay::Feature>(head, first * L, meets); break;
        }
      });
    }
  }

 private:
  // q . k
  C read(int64_t head) {
    steps.read(a, head / s.H, head % s.H, {0, 1, false});
    Vec<C> sums = {};
    for (int64_t c = 0; c < steps.Kp; c += L) {
      const Vec<C> q = load(steps.q + c), k = load(steps.k + c);
      Vec<C> decay = splat(C(1));
      if (s.decay == Decay::Head) decay = splat(steps.decay_head[0]);
      if (s.decay == Decay::Feature) decay = load(steps.decay + c);
      sums += q * k;
      store(keys + c, decay * k);
      store(queries + c, decay * q);
    }
    return lane_sum<C>(sums);
  }

  template <int NV, Decay decay>
  __attribute__((noinline)) void take(int64_t head, int64_t column, C meets) const {
    const int64_t K = s.K, V = s.V, matrix = head * K * V + column;
    const C* from = static_cast<const C*>(a.state) + matrix;
    C* to = static_cast<C*>(a.final_state) + matrix;
    const C *read_k = keys, *read_q = queries, *k = steps.k, *decays = steps.decay;
    const C of_head = steps.decay_head[0];
    Vec<C> u[NV], o[NV];
    start_sums(u);
    start_sums(o);
    for (int64_t i = 0; i < K; ++i) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<C> x = load(from + i * V + v * L);
      u[v] += read_k[i] * x;
      o[v] += read_q[i] * x;
    }
    const S* given = Steps<S>::row(a.v, head / s.H, 0, head % s.H) + column;
    S* output = static_cast<S*>(a.output) + head * V + column;
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      u[v] = steps.beta[0] * (load(given + v * L) - u[v]);
      store(output + v * L, o[v] + meets * u[v]);
    }
    for (int64_t i = K - 1; i >= 0; --i) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      Vec<C> x = load(from + i * V + v * L);
      if constexpr (decay == Decay::Head) x *= of_head;
      if constexpr (decay == Decay::Feature) x *= decays[i];
      store(to + i * V + v * L, x + k[i] * u[v]);
    }
  }
};

}  // namespace
}  // namespace seqmem::delta_memory
