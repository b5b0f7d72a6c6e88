// One step of a batch over unpacked weights, for calls of a step or two, which do not repay packing
// them. x and h are transposed instead, rows side by side in the lanes, so that the four gates of a
// unit meet many rows at the full rate of a register tile; sums along the weights' rows would end
// in shuffles.
//
//   load      x [I][columns], h [P][columns]: a step's rows transposed, kept for all units
//   multiply  z = bias + W_ih x + W_hh h for a vector of units, [columns / L][gate][unit][row],
//             then transposed to [columns / L][gate][row][unit], all in L1
//   gate      a gate of these units for one row
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"

namespace seqmem::lstm {
namespace {

template <class C>
class TransposedRows {
  static constexpr int L = kLanes<C>;
  int64_t columns = 0;  // rows, padded
  C *x, *h, *z;

 public:
  void place(Carver& take, int64_t rows, int64_t I, int64_t P) {
    columns = padded<C>(rows);
    x = take.array<C>(I * columns);
    h = take.array<C>(P * columns);
    z = take.array<C>(4 * L * columns);
  }

  void load_rows(const C* const* x_row, int64_t I, const C* const* h_row, int64_t P,
                 int64_t count) {
    transpose_rows(x, x_row, I, count);
    transpose_rows(h, h_row, P, count);
  }

  // The pre-activations of `lanes` units, whose first gate's weights and biases are given; the
  // weights of the next gate are `gate` rows further on.
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
      for_count<3>(here, [&](auto constant) {
        multiply_block<decltype(constant)::value>(ih, I, hh, P, bias, v, 4 * lanes);
      });
      v += here;
    }
    for (int64_t i = 0; i < vectors * 4; ++i) {
      C* block = z + i * L * L;
      transpose_block<C>(
          static_cast<int>(lanes), L, [&](int l) { return load(block + l * L); },
          [&](int l, Vec<C> v) { store(block + l * L, v); });
    }
  }

  // A gate of the units multiplied last, for one row.
  SEQMEM_INLINE Vec<C> gate(int64_t row, int g) const {
    return load(z + ((row / L * 4 + g) * L + row % L) * L);
  }

 private:
  void transpose_rows(C* to, const C* const* rows, int64_t K, int64_t count) {
    for (int64_t first = 0; first < count; first += L) {
      const int here = static_cast<int>(min<int64_t>(L, count - first));
      for (int64_t k = 0; k < K; k += L) {
        const int n = static_cast<int>(min<int64_t>(L, K - k));
        transpose_block<C>(
            here, n, [&](int r) { return load_n(rows[first + r] + k, n); },
            [&](int i, Vec<C> v) { store(to + (k + i) * columns + first, v); });
      }
    }
  }

  // NV vectors of rows by n gates, whose weights are at ih and hh: all four of a unit, unit by
  // unit.
  template <int NV>
  void multiply_block(const C* const* ih, int64_t I, const C* const* hh, int64_t P, const C* bias,
                      int64_t v, int64_t n) {
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
