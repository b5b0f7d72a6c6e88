// The reverse of a pass over links (dnc_links.h), from the links before it: L_t is formed again in
// registers. With x1 and x2 the gradients of the directions forward = L_t q and backward = L_t^T q,
// but for factors that stand in c1 and c2:
//   dL_t += x1 c1^T + c2 x2^T, nothing on the diagonal
//   down = L_t^T x1,  along = L_t x2
//   dw[i] += sum_j dL_t (p[j] - L),  dw[j] -= sum_i dL_t L,  dp[j] += sum_i dL_t w[i]
//   dL = dL_t (1 - w[i] - w[j])
// in blocks of rows i that stay in the L1 cache:
//   by columns  dL_t; down, dw[j] and dp[j], in registers, as what x1 and c2 are multiplied with
//   by rows     along and dw[i], in registers, a few rows at once; dL
#pragma once

#include "dnc_links.h"

namespace seqmem::dnc {
namespace {

// [heads][stride] each, of read heads, but for link and dlink [N][stride] and w, p, dw, dp
// [stride].
template <class C>
struct LinkBack {
  const C *link, *w, *p, *x1, *x2, *c1, *c2;
  C *dlink, *down, *along, *dw, *dp;
};

// With `last`, dL_t is complete: on to dw and dp, and in the next to dL and dw.
template <int R, bool last, class C>
SEQMEM_INLINE void link_back_by_columns(int64_t begin, int64_t end, int64_t stride, int64_t v,
                                        const LinkBack<C>& a) {
  constexpr int L = kLanes<C>;
  Vec<C> x2[R], c1[R], down[R], dw{}, dp{};
  const Vec<C> w = load(a.w + v * L), p = load(a.p + v * L);
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) {
    x2[r] = load(a.x2 + r * stride + v * L);
    c1[r] = load(a.c1 + r * stride + v * L);
    down[r] = load(a.down + r * stride + v * L);
  }
  auto row = [&](int64_t i, auto diagonal) {
    const int64_t at = i * stride + v * L;
    const Vec<C> mine = splat(a.w[i]), before = load(a.link + at);
    Vec<C> now = before * (C(1) - mine - w) + mine * p, d = load(a.dlink + at);
    if constexpr (decltype(diagonal)::value) now[i % L] = 0;
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<C> x1 = splat(a.x1[r * stride + i]);
      d += x1 * c1[r] + splat(a.c2[r * stride + i]) * x2[r];
      down[r] += now * x1;
    }
    if constexpr (decltype(diagonal)::value) d[i % L] = 0;
    if constexpr (last) {
      dw += d * before;
      dp += d * mine;
    }
    store(a.dlink + at, d);
  };
  const int64_t first = min(end, max(begin, v * L)), beyond = min(end, max(begin, (v + 1) * L));
  for (int64_t i = begin; i < first; ++i) row(i, std::false_type{});
  for (int64_t i = first; i < beyond; ++i) row(i, std::true_type{});
  for (int64_t i = beyond; i < end; ++i) row(i, std::false_type{});
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) store(a.down + r * stride + v * L, down[r]);
  if constexpr (last) {
    store(a.dw + v * L, load(a.dw + v * L) - dw);
    store(a.dp + v * L, load(a.dp + v * L) + dp);
  }
}

template <int R, bool last, class C>
SEQMEM_INLINE void link_back_by_rows(int64_t begin, int64_t end, int64_t stride, int64_t vectors,
                                     const LinkBack<C>& a) {
  constexpr int L = kLanes<C>;
  for_link_rows<link_rows<C, R>()>(begin, end, [&](auto count, int64_t first) {
    constexpr int I = decltype(count)::value;
    Vec<C> sums[I][R], mine[I], rest[I], dmine[I];
    start_sums(sums);
    start_sums(dmine);
    SEQMEM_UNROLL
    for (int i = 0; i < I; ++i) {
      mine[i] = splat(a.w[first + i]);
      rest[i] = C(1) - mine[i];
    }
    for_link_columns<C>(first, vectors, [&](int64_t v, auto diagonal) {
      const Vec<C> w = load(a.w + v * L), p = load(a.p + v * L);
      Vec<C> now[I];
      SEQMEM_UNROLL
      for (int i = 0; i < I; ++i) {
        const int64_t at = (first + i) * stride + v * L;
        const Vec<C> before = load(a.link + at), keep = rest[i] - w;
        now[i] = before * keep + mine[i] * p;
        if constexpr (decltype(diagonal)::value) now[i][(first + i) % L] = 0;
        if constexpr (last) {
          const Vec<C> d = load(a.dlink + at);
          dmine[i] += d * (p - before);
          store(a.dlink + at, d * keep);
        }
      }
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<C> x2 = load(a.x2 + r * stride + v * L);
        SEQMEM_UNROLL
        for (int i = 0; i < I; ++i) sums[i][r] += now[i] * x2;
      }
    });
    put_link_sums<I, R, C>(sums, stride, first, a.along);
    for (int i = 0; i < I && last; ++i) a.dw[first + i] += lane_sum<C>(dmine[i]);
  });
}

template <int R, bool last, class C>
__attribute__((noinline)) void link_back_pass(int64_t N, int64_t stride, const LinkBack<C>& a) {
  const int64_t vectors = ceil_div(N, kLanes<C>);
  for (int64_t begin = 0; begin < N; begin += kLinkBlock) {
    const int64_t end = min(N, begin + kLinkBlock);
    for (int64_t v = 0; v < vectors; ++v) link_back_by_columns<R, last>(begin, end, stride, v, a);
    link_back_by_rows<R, last>(begin, end, stride, vectors, a);
  }
}

template <class C>
void link_back(int64_t N, int64_t stride, int64_t reads, LinkBack<C> a) {
  for (int64_t i = 0; i < reads * stride; ++i) a.down[i] = a.along[i] = 0;
  for (int64_t r = 0; r < reads; r += kMostReads) {
    for_count<kMostReads>(min<int64_t>(kMostReads, reads - r), [&](auto count) {
      constexpr int R = decltype(count)::value;
      if (r + kMostReads >= reads) {
        link_back_pass<R, true, C>(N, stride, a);
      } else {
        link_back_pass<R, false, C>(N, stride, a);
      }
    });
    const int64_t step = kMostReads * stride;
    a.x1 += step, a.x2 += step, a.c1 += step, a.c2 += step, a.down += step, a.along += step;
  }
}

}  // namespace
}  // namespace seqmem::dnc
