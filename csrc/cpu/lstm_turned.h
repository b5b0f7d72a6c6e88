// One step of a batch over weights as they lie: x and h are turned instead, rows side by side in
// the lanes, so that four gates of a unit meet many rows at the full rate of a register tile. A
// step or two do not repay packing the weights, and sums along the weights' rows end in shuffles.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"

namespace seqmem::lstm {
namespace {

template <class C>
class Turned {
  static constexpr int L = kLanes<C>;
  int64_t columns = 0;  // rows rounded up to vectors
  C *x, *h;             // [I][columns], [P][columns]
  C* z;                 // [columns / L][gate][row][unit], of one vector of units

 public:
  void place(Carver& take, int64_t rows, int64_t I, int64_t P) {
    columns = ceil_div(rows, L) * L;
    x = take.array<C>(I * columns);
    h = take.array<C>(P * columns);
    z = take.array<C>(4 * L * columns);
  }

  void turn(const C* const* x_row, int64_t I, const C* const* h_row, int64_t P, int64_t count) {
    turn(x, x_row, I, count);
    turn(h, h_row, P, count);
  }

  // The pre-activations of `lanes` units, whose first gate's weights and biases are given; the
  // next gate's weights lie `gate` rows further on.
  void multiply(const C* weight_ih, int64_t I, const C* weight_hh, int64_t P, const C* bias,
                int64_t gate, int64_t lanes, int64_t count) {
    const C *ih[4 * L], *hh[4 * L];
    for (int64_t i = 0; i < 4 * lanes; ++i) {
      ih[i] = weight_ih + (i % 4 * gate + i / 4) * I;
      hh[i] = weight_hh + (i % 4 * gate + i / 4) * P;
    }
    const int64_t vectors = ceil_div(count, L);
    int64_t blocks = ceil_div(vectors, 3);
    for (int64_t v = 0; v < vectors; --blocks) {
      const int64_t here = ceil_div(vectors - v, blocks);
      switch (here) {
        case 1: gates<1>(ih, I, hh, P, bias, v, 4 * lanes); break;
        case 2: gates<2>(ih, I, hh, P, bias, v, 4 * lanes); break;
        case 3: gates<3>(ih, I, hh, P, bias, v, 4 * lanes); break;
      }
      v += here;
    }
    for (int64_t i = 0; i < ceil_div(count, L) * 4; ++i) {
      Vec<C> square[L];
      start_sums(square);
      for (int64_t l = 0; l < lanes; ++l) square[l] = load(z + (i * L + l) * L);
      transpose<C>(square);
      for (int l = 0; l < L; ++l) store(z + (i * L + l) * L, square[l]);
    }
  }

  // A gate of the units multiplied last, for one row.
  SEQMEM_INLINE Vec<C> at(int64_t row, int g) const {
    return load(z + ((row / L * 4 + g) * L + row % L) * L);
  }

 private:
  void turn(C* to, const C* const* rows, int64_t K, int64_t count) {
    for (int64_t first = 0; first < count; first += L) {
      const int64_t here = min<int64_t>(L, count - first);
      for (int64_t k = 0; k < K; k += L) {
        Vec<C> square[L];
        start_sums(square);
        const int n = static_cast<int>(min<int64_t>(L, K - k));
        for (int64_t r = 0; r < here; ++r) square[r] = load_n(rows[first + r] + k, n);
        transpose<C>(square);
        for (int i = 0; i < n; ++i) store(to + (k + i) * columns + first, square[i]);
      }
    }
  }

  // NV vectors of rows by n gates, whose weights lie at ih and hh: all four of a unit, unit by
  // unit.
  template <int NV>
  void gates(const C* const* ih, int64_t I, const C* const* hh, int64_t P, const C* bias, int64_t v,
             int64_t n) {
    constexpr int most = NV == 3 && SEQMEM_VEC_BYTES < 64 ? 4 : 6;  // what the registers hold
    for_row_blocks<C, most>(n, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      Vec<C> acc[R][NV];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int i = 0; i < NV; ++i) acc[r][i] = splat(bias[(start + r) % 4 * L + (start + r) / 4]);
      tile_multiply<R, NV, C>(I, ih + start, 1, x + v * L, L, columns, acc);
      tile_multiply<R, NV, C>(P, hh + start, 1, h + v * L, L, columns, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int i = 0; i < NV; ++i)
        store(z + (((v + i) * 4 + (start + r) % 4) * L + (start + r) / 4) * L, acc[r][i]);
    });
  }
};

}  // namespace
}  // namespace seqmem::lstm
