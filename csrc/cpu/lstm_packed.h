// The gates of many rows over packed weights: for many steps, or a step of many rows.
//
//   pack        panels of each weight, one vector of units by kGates gates wide,
//               [units][4 / kGates][K][kGates][lanes]; they are read from L2 or beyond
//   project     z = bias + W_ih x for all rows of a chunk of steps
//   add_hidden  z += W_hh h for the rows of one step
//
// z [units][rows of the chunk][4][lanes], so that the four gates of a vector of units are found
// together. The product depends on the number of rows:
//
//   many       tiles of six rows by a panel: what asks least of L2; all rows pass over one panel,
//              which is in L1 after the first of them
//   up to 3    all panels of a vector of units at once: the few sums of one panel would wait for
//   (AVX-512   each other
//   up to 6)
//   1          the panels of two vectors of units at once, for the same reason (two_units)
#pragma once

#include "../common/gemm.h"
#include "lstm_common.h"

namespace seqmem::lstm {
namespace {

constexpr int kRows = 6, kGates = SEQMEM_VEC_BYTES == 64 ? 4 : 2;

// A weight [4H, K] in panels.
template <class S>
class PackedWeight {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;             // all gates of a vector of units
  static constexpr int V = kGates * L;        // a panel's width
  static constexpr int kPanels = 4 / kGates;  // of a vector of units

  const int64_t H, K;
  C* panels;  // shared by all threads

 public:
  PackedWeight(int64_t H, int64_t K) : H(H), K(K) {}

  void place(Carver& take, int64_t units) { panels = take.array<C>(units * K * W); }

  // panels[gate / kGates][k][gate % kGates][lane] = weight[gate * H + u * L + lane][k], zero beyond
  // the last unit.
  void pack(int64_t u, const S* weight) {
    for (int g = 0; g < 4; ++g)
      pack_transposed(panels + u * K * W + g / kGates * K * V + g % kGates * L, V,
                      weight + (g * H + u * L) * K, K, min<int64_t>(L, H - u * L), K);
  }

  // to[n][4][lanes]: the gates of a vector of units of n rows, start(gate, to) plus row times
  // panel.
  template <class Start>
  SEQMEM_INLINE void multiply(int64_t u, int64_t n, const C* const* row, C* to,
                              const Start& start_of) const {
    const C* panel = panels + u * K * W;
    if (n <= kTileRows<C>) return multiply_few(panel, n, row, to, start_of);
    for (int g = 0; g < 4; g += kGates, panel += K * V) {
      for_row_blocks<C, kRows>(n, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        C* here = to + start * W + g * L;
        Vec<C> acc[R][kGates];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int v = 0; v < kGates; ++v) acc[r][v] = start_of(g + v, here + r * W + v * L);
        tile_multiply<R, kGates, C>(K, row + start, 1, panel, L, V, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int v = 0; v < kGates; ++v) store(here + r * W + v * L, acc[r][v]);
      });
    }
  }

  // The gates of units u and u + 1 for a single row, added to those in z[2][4][lanes].
  SEQMEM_INLINE void two_units(int64_t u, const C* const* row, const C* z, int64_t z_step,
                               Vec<C> (&gates)[2][1][4]) const {
    Vec<C> acc[1][2 * kPanels][kGates];
    SEQMEM_UNROLL
    for (int p = 0; p < 2 * kPanels; ++p) SEQMEM_UNROLL
    for (int v = 0; v < kGates; ++v)
      acc[0][p][v] = load(z + p / kPanels * z_step + (p % kPanels * kGates + v) * L);
    panels_multiply(K, row, panels + u * K * W, K * V, V, acc);
    SEQMEM_UNROLL
    for (int i = 0; i < 2; ++i) SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) gates[i][0][g] = acc[0][i * kPanels + g / kGates][g % kGates];
  }

 private:
  template <class Start>
  SEQMEM_INLINE void multiply_few(const C* panel, int64_t n, const C* const* row, C* to,
                                  const Start& start_of) const {
    for_row_blocks<C>(n, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      C* here = to + start * W;
      Vec<C> acc[R][kPanels][kGates];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g)
        acc[r][g / kGates][g % kGates] = start_of(g, here + r * W + g * L);
      panels_multiply(K, row + start, panel, K * V, V, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) store(here + r * W + g * L, acc[r][g / kGates][g % kGates]);
    });
  }
};

template <class S>
class PackedGates {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;  // all gates of a vector of units

  PackedWeight<S> of_input, of_hidden;
  C* z;  // this thread's own
  int64_t first_unit = 0, rows = 0;

 public:
  explicit PackedGates(const Shape& s) : of_input(s.H, s.I), of_hidden(s.H, s.P) {}

  void place_panels(Carver& take, int64_t units) {
    of_input.place(take, units);
    of_hidden.place(take, units);
  }
  // For so many vectors of units from first_unit on, and so many rows of a chunk.
  void place_gates(Carver& take, int64_t first, int64_t units, int64_t rows_of_chunk) {
    first_unit = first, rows = rows_of_chunk;
    z = take.array<C>(rows * units * W);
  }

  void pack(int64_t u, const S* weight_ih, const S* weight_hh) {
    of_input.pack(u, weight_ih);
    of_hidden.pack(u, weight_hh);
  }

  // z of the first n rows. bias: of these units, [4][lanes].
  void project(int64_t u, int64_t n, const C* const* x_row, const C* bias) {
    of_input.multiply(u, n, x_row, gates(u, 0),
                      [&](int g, const C*) { return load(bias + g * L); });
  }

  // To z of n rows from `first` on.
  void add_hidden(int64_t u, int64_t first, int64_t n, const C* const* h_row) {
    of_hidden.multiply(u, n, h_row, gates(u, first),
                       [](int, const C* so_far) { return load(so_far); });
  }

  SEQMEM_INLINE C* gates(int64_t u, int64_t row) const {
    return z + ((u - first_unit) * rows + row) * W;
  }

  // The gates of units u and u + 1 for a single row, h's share added.
  SEQMEM_INLINE void two_units(int64_t u, int64_t row, const C* const* h_row,
                               Vec<C> (&pre)[2][1][4]) const {
    of_hidden.two_units(u, h_row, gates(u, row), rows * W, pre);
  }
};

}  // namespace
}  // namespace seqmem::lstm
