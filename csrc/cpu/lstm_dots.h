// The gates of a few rows over unpacked weights, as sums along the weights' rows: nothing is
// prepared, but each sum ends in shuffles.
//
//   for each gate, for each four units (or eight, where a single row needs more sums in flight):
//     [rows][units] vectors of sums over all products, then four sums at once across their lanes
#pragma once

#include "../common/gemm.h"
#include "lstm_common.h"

namespace seqmem::lstm {
namespace {

// Rows [K] times a weight [4H, K].
template <class S>
struct RowsTimes {
  using C = compute_t<S>;

  const C* const* rows;
  const void* weight;
  int64_t K;

  // Adds R rows from `start` on times N units' rows, the last unit's again beyond it.
  template <int R, int N>
  SEQMEM_INLINE void add(int64_t start, int64_t g, int64_t unit, int64_t H,
                         Vec<C> (&sums)[R][N]) const {
    const S* units[N];
    SEQMEM_UNROLL
    for (int i = 0; i < N; ++i)
      units[i] = static_cast<const S*>(weight) + (g * H + min<int64_t>(unit + i, H - 1)) * K;
    tile_dot<R, N, C, S>(K, rows + start, units, sums);
  }
};

// gates[row][gate] of vector u, the sum of the products of R rows from `start` on; what stands in
// the lanes beyond the last unit is of no use.
template <int R, class S, class C = compute_t<S>, class... Products>
SEQMEM_INLINE void dot_gates(int64_t u, int64_t H, int64_t start, Vec<C> (&gates)[R][4],
                             const Products&... products) {
  constexpr int L = kLanes<C>, N = R == 1 && L >= 8 ? 8 : 4, width = (L + 3) / 4 * 4;
  C out[R][4][width];
  Vec<C> nothing[1];
  start_sums(nothing);
  for (C* p = out[0][0]; p < out[0][0] + R * 4 * width; p += L) store(p, nothing[0]);
  const int64_t lanes = min<int64_t>(L, H - u * L);
  for (int g = 0; g < 4; ++g) {
    for (int64_t l = 0; l < lanes; l += N) {
      Vec<C> sums[R][N];
      start_sums(sums);
      (products.template add<R, N>(start, g, u * L + l, H, sums), ...);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int i = 0; i < N; i += 4) {
        const Vec<C> four[4] = {sums[r][i], sums[r][i + 1], sums[r][i + 2], sums[r][i + 3]};
        store_sums4<C>(out[r][g] + l + i, four);
      }
    }
  }
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int g = 0; g < 4; ++g) gates[r][g] = load(out[r][g]);
}

}  // namespace
}  // namespace seqmem::lstm
