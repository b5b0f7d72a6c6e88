// The reverse of a pass over links (dnc_links.h) in one pass, from the links before it: L_t is
// formed again in registers. With x1 and x2 the gradients of the directions forward = L_t q and
// backward = L_t^T q, but for factors that stand in c1 and c2:
//   dL_t += x1 c1^T + c2 x2^T, nothing on the diagonal
//   down = L_t^T x1,  along = L_t x2
//   dw[i] += sum_j dL_t (p[j] - L),  dw[j] -= sum_i dL_t L,  dp[j] += sum_i dL_t w[i]
//   dL = dL_t (1 - w[i] - w[j])
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

// With `last`, dL_t is complete: on to dL, dw and dp.
template <int R, bool last, class C>
__attribute__((noinline)) void link_back_pass(int64_t N, int64_t stride, const LinkBack<C>& a) {
  constexpr int L = kLanes<C>;
  const int64_t vectors = ceil_div(N, L);
  for_link_rows<link_rows<C, R>()>(N, [&](auto count, int64_t first) {
    constexpr int I = decltype(count)::value;
    Vec<C> sums[I][R], x1[I][R], c2[I][R], mine[I], rest[I], dmine[I];
    start_sums(sums);
    start_sums(dmine);
    SEQMEM_UNROLL
    for (int i = 0; i < I; ++i) {
      mine[i] = splat(a.w[first + i]);
      rest[i] = C(1) - mine[i];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        x1[i][r] = splat(a.x1[r * stride + first + i]);
        c2[i][r] = splat(a.c2[r * stride + first + i]);
      }
    }
    for_link_columns<C>(first, vectors, [&](int64_t v, auto diagonal) {
      const Vec<C> w = load(a.w + v * L), p = load(a.p + v * L);
      Vec<C> now[I], d[I];
      SEQMEM_UNROLL
      for (int i = 0; i < I; ++i) {
        const int64_t at = (first + i) * stride + v * L;
        now[i] = load(a.link + at) * (rest[i] - w) + mine[i] * p;
        if constexpr (decltype(diagonal)::value) now[i][(first + i) % L] = 0;
        d[i] = load(a.dlink + at);
      }
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<C> x2 = load(a.x2 + r * stride + v * L), c1 = load(a.c1 + r * stride + v * L);
        Vec<C> down = load(a.down + r * stride + v * L);
        SEQMEM_UNROLL
        for (int i = 0; i < I; ++i) {
          d[i] += x1[i][r] * c1 + c2[i][r] * x2;
          down += now[i] * x1[i][r];
          sums[i][r] += now[i] * x2;
        }
        store(a.down + r * stride + v * L, down);
      }
      Vec<C> dw{}, dp{};
      SEQMEM_UNROLL
      for (int i = 0; i < I; ++i) {
        const int64_t at = (first + i) * stride + v * L;
        if constexpr (decltype(diagonal)::value) d[i][(first + i) % L] = 0;
        if constexpr (last) {
          const Vec<C> before = load(a.link + at);
          dmine[i] += d[i] * (p - before);
          dw += d[i] * before;
          dp += d[i] * mine[i];
          d[i] *= rest[i] - w;
        }
        store(a.dlink + at, d[i]);
      }
      if constexpr (last) {
        store(a.dw + v * L, load(a.dw + v * L) - dw);
        store(a.dp + v * L, load(a.dp + v * L) + dp);
      }
    });
    for (int i = 0; i < I; ++i) {
      if constexpr (last) a.dw[first + i] += total<C>(dmine[i]);
      if constexpr (R == 4) {
        C four[4];
        store_sums4<C>(four, sums[i]);
        for (int r = 0; r < R; ++r) a.along[r * stride + first + i] = four[r];
      } else {
        for (int r = 0; r < R; ++r) a.along[r * stride + first + i] = total<C>(sums[i][r]);
      }
    }
  });
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
