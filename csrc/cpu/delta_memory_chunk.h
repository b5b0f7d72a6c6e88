// A run of n steps of the delta memory as matrix products. With D_ij the decay from after step j to
// step i, a product of factors that are at most 1 (so that nothing overflows and 0 stays 0),
//   E_i = D from the beginning to step i,  F_j = D from step j to the end,  all by feature or not,
//   M_ij = (k_i . D_ij k_j) for j < i,  A_ij = (q_i . D_ij k_j) for j <= i,
//   (I + M diag(beta)) x = v - (E k) S,  u = beta x,  o = (E q) S + A u,  S' = E_n S + (F k)^T u.
#pragma once

#include "delta_memory_steps.h"

namespace seqmem::delta_memory {
namespace {

// out = start + a^T b, of `width` columns, whole vectors; a [count, ..] with rows a_stride apart.
// start(i, c, sums) sets `sums`, vectors of row i from column c on.
template <class C, class Start>
SEQMEM_INLINE void add_products(int64_t rows, int64_t count, int64_t width, const C* a,
                                int64_t a_stride, const C* b, C* out, Start&& start) {
  constexpr int64_t L = kLanes<C>;
  for_panels(0, width / L, [&](auto columns, int64_t v) {
    constexpr int NV = decltype(columns)::value;
    for_row_blocks<C>(rows, [&](auto block, int64_t first) {
      constexpr int R = decltype(block)::value;
      const C* from[R];
      Vec<C> sums[R][NV];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        from[r] = a + first + r;
        start(first + r, v * L, sums[r]);
      }
      tile_multiply<R, NV, C>(count, from, a_stride, b + v * L, L, width, sums);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int w = 0; w < NV; ++w) store(out + (first + r) * width + (v + w) * L, sums[r][w]);
    });
  });
}

template <class S>
class Chunk {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>, N = kChunk;

  const Shape& s;
  const int64_t Vp;  // the width of the arrays of values
  const bool by_feature;

 public:
  Steps<S> steps;
  const int64_t Kp;
  int64_t n = 0;  // steps of the run
  C *from, *to;   // E and F: [N, Kp] by feature, else [N]
  C* between;     // D [N, N], zero above the diagonal; not by feature
  C* early;       // [2 n, Kp]: E q, then E k
  C* late;        // [N, Kp]: F k
  C* scores;      // [2 N, N]: A, then M from row N on; zero above (and M on) the diagonal
  C *x, *u;       // [N, Vp]
  C* columns;     // [max(Kp, 2 Vp), N]: steps side by side

  Chunk(const Shape& shape, int64_t values)
      : s(shape),
        Vp(values),
        by_feature(shape.decay == Decay::Feature),
        steps(shape),
        Kp(steps.Kp) {}

  void place(Carver& take) {
    steps.place(take);
    from = take.array<C>(by_feature ? N * Kp : N);
    to = take.array<C>(by_feature ? N * Kp : N);
    between = take.array<C>(by_feature ? 0 : N * N);
    early = take.array<C>(2 * N * Kp);
    late = take.array<C>(N * Kp);
    scores = take.array<C>(2 * N * N);
    x = take.array<C>(N * Vp);
    u = take.array<C>(N * Vp);
    columns = take.array<C>(max(Kp, 2 * Vp) * N);
  }

  C* writes() const { return early + n * Kp; }  // E k
  C& A(int64_t i, int64_t j) const { return scores[i * N + j]; }
  C& M(int64_t i, int64_t j) const { return scores[(N + i) * N + j]; }
  // The decay of feature `c`, or of the vector of features from c on, over the whole run.
  C whole(int64_t c) const { return by_feature ? from[(n - 1) * Kp + c] : from[n - 1]; }

  // What stands above, but for A and M; `kept` is x, whose rows of `width` columns are V apart.
  template <class Arguments>
  void read(const Arguments& a, int64_t b, int64_t h, const Run& run, const C* kept,
            int64_t width) {
    n = run.steps;
    steps.read(a, b, h, run);
    if (by_feature) {
      decays_by_feature();
    } else {
      decays();
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t w = 0; w < Vp; w += L) {
        const int count = static_cast<int>(max<int64_t>(width - w, 0));
        const Vec<C> rest = load_n(kept + i * s.V + w, count);
        store(x + i * Vp + w, rest);
        store(u + i * Vp + w, steps.beta[i] * rest);
      }
  }

  // A and M.
  void find_scores() {
    if (by_feature) {
      scores_by_feature();
    } else {
      scores_of_heads();
    }
  }

  // columns = the transpose of x [n, width], zeros beyond the n steps: with few steps a product
  // with it is faster than sums over the lanes of rows.
  void lay_columns(const C* x, int64_t stride, int64_t width) const {
    lay_columns(x, stride, width, n, N);
  }
  // [width, side] of x [count, width].
  void lay_columns(const C* x, int64_t stride, int64_t width, int64_t count, int64_t side) const {
    for (int64_t i = 0; i < side; i += L)
      pack_transposed(columns + i, side, x + i * stride, stride, max<int64_t>(min(L, count - i), 0),
                      width);
  }

  // next = S', of the run that was read.
  void advance(const C* memory, C* next) const {
    add_products(s.K, n, Vp, late, Kp, u, next, [&](int64_t i, int64_t c, auto& sums) {
      const C decay = whole(i);
      const C* row = memory + i * Vp + c;
      for (auto& sum : sums) {
        sum = decay * load(row);
        row += L;
      }
    });
  }

 private:
  void decays() {
    C* one = steps.decay_head;
    if (s.decay == Decay::None)
      for (int64_t i = 0; i < n; ++i) one[i] = 1;
    for (int64_t i = 0; i < N * N; ++i) between[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      from[i] = (i > 0 ? from[i - 1] : C(1)) * one[i];
      for (int64_t j = 0; j < i; ++j) between[i * N + j] = between[(i - 1) * N + j] * one[i];
      between[i * N + i] = 1;
    }
    for (int64_t i = n - 1; i >= 0; --i) to[i] = i + 1 < n ? to[i + 1] * one[i + 1] : C(1);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < Kp; c += L) {
        const Vec<C> key = load(steps.k + i * Kp + c);
        store(early + i * Kp + c, from[i] * load(steps.q + i * Kp + c));
        store(writes() + i * Kp + c, from[i] * key);
        store(late + i * Kp + c, to[i] * key);
      }
  }

  void decays_by_feature() {
    for (int64_t c = 0; c < Kp; c += L) {
      Vec<C> product = splat(C(1));
      for (int64_t i = 0; i < n; ++i) {
        product *= load(steps.decay + i * Kp + c);
        store(from + i * Kp + c, product);
        store(early + i * Kp + c, product * load(steps.q + i * Kp + c));
        store(writes() + i * Kp + c, product * load(steps.k + i * Kp + c));
      }
      product = splat(C(1));
      for (int64_t i = n - 1; i >= 0; --i) {
        store(to + i * Kp + c, product);
        store(late + i * Kp + c, product * load(steps.k + i * Kp + c));
        product *= load(steps.decay + i * Kp + c);
      }
    }
  }

  void scores_of_heads() {
    lay_columns(steps.k, Kp, s.K);
    matrix_multiply<false>(n, s.K, N, steps.q, Kp, columns, N, scores, false);
    matrix_multiply<false>(n, s.K, N, steps.k, Kp, columns, N, scores + N * N, false);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const C decay = between[i * N + j];
        A(i, j) = j > i ? C(0) : A(i, j) * decay;
        M(i, j) = j >= i ? C(0) : M(i, j) * decay;
      }
  }

  void scores_by_feature() {
    for (int64_t i = 0; i < 2 * N * N; ++i) scores[i] = 0;
    for (int64_t j = 0; j < n; ++j) {
      Vec<C> of_q[N] = {}, of_k[N] = {};
      for (int64_t c = 0; c < Kp; c += L) {
        Vec<C> key = load(steps.k + j * Kp + c);
        for (int64_t i = j; i < n; ++i) {
          if (i > j) key *= load(steps.decay + i * Kp + c);
          of_q[i] += key * load(steps.q + i * Kp + c);
          of_k[i] += key * load(steps.k + i * Kp + c);
        }
      }
      for (int64_t i = j; i < n; ++i) {
        A(i, j) = lane_sum<C>(of_q[i]);
        if (i > j) M(i, j) = lane_sum<C>(of_k[i]);
      }
    }
  }
};

}  // namespace
}  // namespace seqmem::delta_memory
