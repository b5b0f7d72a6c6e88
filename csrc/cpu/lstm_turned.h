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
    for (int64_t l = 0; l < lanes; ++l) {
      const C *ih[4], *hh[4];
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) {
        ih[g] = weight_ih + (g * gate + l) * I;
        hh[g] = weight_hh + (g * gate + l) * P;
      }
      const int64_t vectors = ceil_div(count, L);
      int64_t blocks = ceil_div(vectors, 3);
      for (int64_t v = 0; v < vectors; --blocks) {
        const int64_t here = ceil_div(vectors - v, blocks);
        switch (here) {
          case 1: unit<1>(ih, I, hh, P, bias + l, v, l); break;
          case 2: unit<2>(ih, I, hh, P, bias + l, v, l); break;
          case 3: unit<3>(ih, I, hh, P, bias + l, v, l); break;
        }
        v += here;
      }
    }
    for (int64_t i = 0; i < ceil_div(count, L) * 4; ++i) {
      Vec<C> square[L] = {};
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
        Vec<C> square[L] = {};
        const int n = static_cast<int>(min<int64_t>(L, K - k));
        for (int64_t r = 0; r < here; ++r) square[r] = load_n(rows[first + r] + k, n);
        transpose<C>(square);
        for (int i = 0; i < n; ++i) store(to + (k + i) * columns + first, square[i]);
      }
    }
  }

  template <int NV>
  SEQMEM_INLINE void unit(const C* const (&ih)[4], int64_t I, const C* const (&hh)[4], int64_t P,
                          const C* bias, int64_t v, int64_t l) {
    Vec<C> acc[4][NV];
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) SEQMEM_UNROLL
    for (int i = 0; i < NV; ++i) acc[g][i] = splat(bias[g * L]);
    tile_multiply<4, NV, C>(I, ih, 1, x + v * L, L, columns, acc);
    tile_multiply<4, NV, C>(P, hh, 1, h + v * L, L, columns, acc);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) SEQMEM_UNROLL
    for (int i = 0; i < NV; ++i) store(z + (((v + i) * 4 + g) * L + l) * L, acc[g][i]);
  }
};

}  // namespace
}  // namespace seqmem::lstm
