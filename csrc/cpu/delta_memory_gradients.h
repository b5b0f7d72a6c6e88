// What the products of a run (delta_memory_backward_kernel.cpp) give of q, k and the decays, with
// the letters of delta_memory_chunk.h: dE, dF, dA and dM of n steps, and E_n sum_v S dS, come in;
//   dq_i = E_i d(E q)_i + sum_j dA_ij D_ij k_j
//   dk_i = E_i d(E k)_i + F_i d(F k)_i + sum_j dA_ji D_ji q_j + dM_ji D_ji k_j + dM_ij D_ij k_j
//   dg_m = sum of what decays over step m: E_i for i >= m, F_i for i < m, D_ij for j < m <= i
// Value heads that share a key head, and slices, leave parts, which are summed at the end; the
// norms of q and k are undone last.
#pragma once

#include "delta_memory_chunk.h"

namespace seqmem::delta_memory {
namespace {

template <class C>
void fill(C* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

template <class S>
class KeyGradients {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>, N = kChunk;

  const Shape& s;
  const Backward& a;
  Chunk<S>& chunk;
  const int64_t Kp;
  const bool by_feature;
  C *grad_q, *grad_k;  // [N, Kp]

 public:
  C* scores;    // [2 N, N]: dA, then dM
  C* of_early;  // [2 n, Kp]: d(E q), then d(E k)
  C* of_late;   // [N, Kp]: d(F k)
  C* whole;     // [Kp]: E_n sum_v S dS, by feature; else one

  KeyGradients(const Shape& shape, const Backward& arguments, Chunk<S>& of)
      : s(shape), a(arguments), chunk(of), Kp(of.Kp), by_feature(shape.decay == Decay::Feature) {}

  void place(Carver& take) {
    scores = take.array<C>(2 * N * N);
    of_early = take.array<C>(2 * N * Kp);
    of_late = take.array<C>(N * Kp);
    whole = take.array<C>(Kp);
    grad_q = take.array<C>(N * Kp);
    grad_k = take.array<C>(N * Kp);
  }

  // All of a run.
  void leave(int64_t b, int64_t h, int64_t slice, const Run& run) {
    if (by_feature) {
      finish_by_feature(b, h, slice, run);
    } else {
      finish_by_head(b, h, slice, run);
    }
    for (int64_t i = 0; i < run.steps; ++i) leave_step(b, h, slice, run.begin + i, i);
  }

  // The sum of what value heads and slices give a row of q and k.
  void add_parts(int64_t row) {
    const int64_t h = row % s.Hk, t = row / s.Hk % s.T, b = row / s.Hk / s.T, group = s.H / s.Hk;
    fill(grad_q, Kp);
    fill(grad_k, Kp);
    if (t < steps_of(s, b)) {
      for (int64_t part = 0; part < group * s.slices; ++part) {
        const int64_t place = ((b * s.H + h * group) * s.slices + part) * s.T + t;
        add_row(grad_q, static_cast<const C*>(a.parts_q) + place * s.K);
        add_row(grad_k, static_cast<const C*>(a.parts_k) + place * s.K);
      }
      chunk.steps.read(a, b, h * group, {t, 1, false});
    }
    leave_row(b, t, h, 0, 0);
  }

 private:
  C& dA(int64_t i, int64_t j) const { return scores[i * N + j]; }
  C& dM(int64_t i, int64_t j) const { return scores[(N + i) * N + j]; }

  C dot_row(const C* x, const C* y) const {
    Vec<C> sums = {};
    for (int64_t c = 0; c < Kp; c += L) sums += load(x + c) * load(y + c);
    return lane_sum<C>(sums);
  }

  // grad_q, grad_k and the decays' gradients, one for each step.
  void finish_by_head(int64_t b, int64_t h, int64_t slice, const Run& run) {
    const int64_t n = run.steps;
    C of_decay[N] = {};
    for (int64_t i = 0; i < n; ++i) {
      const C *early_q = of_early + i * Kp, *early_k = of_early + (n + i) * Kp;
      const C* late = of_late + i * Kp;
      for (int64_t c = 0; c < Kp; c += L) {
        store(grad_q + i * Kp + c, chunk.from[i] * load(early_q + c));
        store(grad_k + i * Kp + c,
              chunk.from[i] * load(early_k + c) + chunk.to[i] * load(late + c));
      }
    }
    if (a.grad_decay != nullptr) {
      for (int64_t i = 0; i < n; ++i) {
        const C early = dot_row(of_early + i * Kp, chunk.early + i * Kp) +
                        dot_row(of_early + (n + i) * Kp, chunk.writes() + i * Kp);
        const C late = dot_row(of_late + i * Kp, chunk.late + i * Kp);
        of_decay[i] += whole[0];
        for (int64_t m = 0; m <= i; ++m) of_decay[m] += early;
        for (int64_t m = i + 1; m < n; ++m) of_decay[m] += late;
        C between = 0;
        for (int64_t m = n - 1; m > i; --m) {
          between += dA(m, i) * chunk.A(m, i) + dM(m, i) * chunk.M(m, i);
          of_decay[m] += between;
        }
      }
      C* to = static_cast<C*>(a.grad_decay) + slice * s.B * s.T * s.H;
      for (int64_t i = 0; i < n; ++i) to[(b * s.T + run.begin + i) * s.H + h] = of_decay[i];
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const C decay = chunk.between[i * N + j];
        dA(i, j) = j > i ? C(0) : dA(i, j) * decay;
        dM(i, j) = j >= i ? C(0) : dM(i, j) * decay;
      }
    const C *q = chunk.steps.q, *k = chunk.steps.k, *of_M = scores + N * N;
    matrix_multiply<false>(n, n, Kp, scores, N, k, Kp, grad_q, true);
    matrix_multiply<true>(n, n, Kp, scores, N, q, Kp, grad_k, true);
    matrix_multiply<false>(n, n, Kp, of_M, N, k, Kp, grad_k, true);
    matrix_multiply<true>(n, n, Kp, of_M, N, k, Kp, grad_k, true);
  }

  // The same where each feature decays by itself.
  void finish_by_feature(int64_t b, int64_t h, int64_t slice, const Run& run) {
    const int64_t n = run.steps;
    for (int64_t c = 0; c < Kp; c += L) {
      auto row = [&](const C* matrix, int64_t i) { return load(matrix + i * Kp + c); };
      Vec<C> dq[N], dk[N], of_decay[N], late = load(whole + c), early = {};
      for (int64_t i = 0; i < n; ++i) {
        dq[i] = row(chunk.from, i) * row(of_early, i);
        dk[i] = row(chunk.from, i) * row(of_early, n + i) + row(chunk.to, i) * row(of_late, i);
        of_decay[i] = late;
        late += row(of_late, i) * row(chunk.late, i);
      }
      for (int64_t i = n - 1; i >= 0; --i) {
        early += row(of_early, i) * row(chunk.early, i);
        early += row(of_early, n + i) * row(chunk.writes(), i);
        of_decay[i] += early;
      }
      for (int64_t j = 0; j < n; ++j) {
        Vec<C> decay = splat(C(1)), through[N];
        const Vec<C> key = row(chunk.steps.k, j);
        dq[j] += dA(j, j) * key;
        dk[j] += dA(j, j) * row(chunk.steps.q, j);
        for (int64_t i = j + 1; i < n; ++i) {
          decay *= row(chunk.steps.decay, i);
          const Vec<C> there = decay * key;
          dq[i] += dA(i, j) * there;
          dk[i] += dM(i, j) * there;
          const Vec<C> back =
              decay * (dA(i, j) * row(chunk.steps.q, i) + dM(i, j) * row(chunk.steps.k, i));
          dk[j] += back;
          through[i] = back * key;
        }
        Vec<C> total = {};
        for (int64_t i = n - 1; i > j; --i) {
          total += through[i];
          of_decay[i] += total;
        }
      }
      C* to = static_cast<C*>(a.grad_decay) + slice * s.B * s.T * s.H * s.K + c;
      for (int64_t i = 0; i < n; ++i) {
        store(grad_q + i * Kp + c, dq[i]);
        store(grad_k + i * Kp + c, dk[i]);
        store_n(to + ((b * s.T + run.begin + i) * s.H + h) * s.K, of_decay[i],
                static_cast<int>(s.K - c));
      }
    }
  }

  // Of row i of the run: where it belongs, or among the parts of its head.
  void leave_step(int64_t b, int64_t h, int64_t slice, int64_t t, int64_t i) {
    if (a.parts_q != nullptr) {
      const int64_t part = ((b * s.H + h) * s.slices + slice) * s.T + t;
      store_row<C>(static_cast<C*>(a.parts_q) + part * s.K, grad_q + i * Kp, s.K);
      store_row<C>(static_cast<C*>(a.parts_k) + part * s.K, grad_k + i * Kp, s.K);
    } else {
      leave_row(b, t, h, i, i);
    }
  }

  // Row i of grad_q and grad_k, that of q and k number `given`.
  void leave_row(int64_t b, int64_t t, int64_t h, int64_t i, int64_t row) {
    const C scale = C(s.scale), inverse = scale == 0 ? C(0) : 1 / scale;
    const int64_t to = ((b * s.T + t) * s.Hk + h) * s.K;
    const Steps<S>& steps = chunk.steps;
    leave_unnormalized(static_cast<S*>(a.grad_q) + to, grad_q + i * Kp, steps.q + row * Kp,
                       scale * steps.norm_q[row], inverse);
    leave_unnormalized(static_cast<S*>(a.grad_k) + to, grad_k + i * Kp, steps.k + row * Kp,
                       steps.norm_k[row], C(1));
  }

  // `to` = factor * the part of `grad` that is orthogonal to `unit` times `rescale`.
  void leave_unnormalized(S* to, const C* grad, const C* unit, C factor, C rescale) const {
    const C along = s.l2norm ? dot_row(grad, unit) * rescale * rescale : C(0);
    for (int64_t c = 0; c < s.K; c += L) {
      Vec<C> x = load(grad + c);
      if (s.l2norm) x -= along * load(unit + c);
      store_n(to + c, factor * x, static_cast<int>(s.K - c));
    }
  }

  void add_row(C* to, const C* from) const {
    for (int64_t c = 0; c < s.K; c += L)
      store(to + c, load(to + c) + load_n(from + c, static_cast<int>(s.K - c)));
  }
};

}  // namespace
}  // namespace seqmem::delta_memory
