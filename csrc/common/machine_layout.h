// What the forward and backward of a machine share: the layout of buffers, and products.
//
// A machine is a controller with a memory of slots, over a whole sequence; an op's Shape has T, B,
// I, layers, C, M, reads (vectors that the controller is fed), P (values of its heads), lstm,
// lengths, reset, and record(), the values saved of a step: per layer of an LSTM the gates i, f, g,
// o and the cell [5C]; the outputs of all layers but the last [layers - 1, C]; head values [P].
#pragma once

#include "gemm.h"
#include "kernel_util.h"
#include "machine.h"

namespace seqmem::machine {
namespace {

// Widths and offsets that follow from a shape.
//
// A layer's operand is [x | reads | h] for the first and [h | output of the layer below] for the
// others, h only for an LSTM. A part that is written by whole vectors may overwrite the beginning
// of the next part, which is written later, or the padding at the end.
template <class C, class Shape>
class Layout {
 public:
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;  // a panel's width

  const Shape& s;
  const int64_t R, C_pad, P_pad;  // values read; padded widths of C and P
  const int64_t units;            // vectors of units

  explicit Layout(const Shape& s)
      : s(s),
        R(s.reads * s.M),
        C_pad(padded_width(s.C)),
        P_pad(padded_width(s.P)),
        units(ceil_div(s.C, L)) {}

  // Padded by at least a vector, and no multiple of 64, whose rows would share cache sets.
  static int64_t padded_width(int64_t n) { return slot_stride(n + L); }

  int64_t below(int64_t l) const { return l == 0 ? s.I + R : s.C; }
  int64_t recurrent() const { return s.lstm ? s.C : 0; }
  int64_t K(int64_t l) const { return below(l) + recurrent(); }
  int64_t below_offset(int64_t l) const { return l == 0 ? 0 : recurrent(); }
  int64_t hidden_offset(int64_t l) const { return l == 0 ? below(0) : 0; }
  int64_t operand(int64_t l) const { return padded_width(K(l)); }  // its stride
  int64_t gates() const { return (s.lstm ? 4 : 1) * s.C; }
  int64_t gates_stride() const { return padded_width(gates()); }

  // Positions within a record of `saved`.
  int64_t record_gates(int64_t l) const { return l * 5 * s.C; }
  int64_t record_output(int64_t l) const { return (s.lstm ? s.layers * 5 * s.C : 0) + l * s.C; }
  int64_t record_p() const { return record_output(s.layers - 1); }

  // Positions among the controller's tensors.
  int64_t weight_ih(int64_t l) const { return l * (s.lstm ? 4 : 2); }
  int64_t weight_hh(int64_t l) const { return l * 4 + 1; }
  int64_t bias(int64_t l) const { return s.lstm ? l * 4 + 2 : l * 2 + 1; }

  // Where layer l begins in an array of first-layer and further-layer parts.
  int64_t layer(int64_t l, int64_t first, int64_t other) const {
    return l == 0 ? 0 : first + (l - 1) * other;
  }

  bool active(int64_t t, int64_t b) const { return s.lengths == nullptr || t < s.lengths[b]; }
  bool reset(int64_t t, int64_t b) const { return s.reset != nullptr && s.reset[t * s.B + b]; }
};

// panels[p][k][4 vectors] of a weight [width, K]: its rows become lanes.
template <class C>
void pack_panel(const C* weight, int64_t K, int64_t width, int64_t p, C* panels) {
  constexpr int L = kLanes<C>, W = 4 * L;
  for (int64_t v = 0; v < 4; ++v) {
    const int64_t row = p * W + v * L;
    if (row < width)
      pack_transposed(panels + p * K * W + v * L, W, weight + row * K, K,
                      min<int64_t>(L, width - row), K);
  }
}

// Rows of a tile of NV vectors: more of them the fewer the vectors, for as many sums in flight.
template <class C, int NV>
inline constexpr int kTileRowsBy = kTileRows<C> * 4 / NV < 8 ? kTileRows<C> * 4 / NV : 8;

// Calls f(first, count) for pieces of a product's depth, so short that a panel's piece stays in the
// L1 cache while several blocks of rows use it.
template <class F>
SEQMEM_INLINE void for_depths(int64_t K, int64_t rows, F&& f) {
  constexpr int64_t kDeep = 160, kPiece = 128;
  const int64_t pieces = rows <= 4 || K <= kDeep ? 1 : ceil_div(K, kPiece);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = K * i / pieces;
    f(first, K * (i + 1) / pieces - first);
  }
}

// out[r] = start + a[r] panels, whole vectors; `start` [4 vectors a panel], or null for zero.
template <class C>
void multiply(int64_t n, const C* const* a, int64_t K, const C* panels, int64_t vectors,
              const C* start, C* const* out) {
  constexpr int L = kLanes<C>, W = 4 * L;
  auto begin = [&](int64_t v) { return start == nullptr ? Vec<C>{} : load(start + v * L); };
  int64_t done = 0;
  if (n == 1) {
    for (; done + 8 <= vectors; done += 8) {
      Vec<C> acc[1][2][4];
      SEQMEM_UNROLL
      for (int i = 0; i < 8; ++i) acc[0][i / 4][i % 4] = begin(done + i);
      panels_multiply(K, a, panels + done * L * K, K * W, W, acc);
      SEQMEM_UNROLL
      for (int i = 0; i < 8; ++i) store(out[0] + (done + i) * L, acc[0][i / 4][i % 4]);
    }
  }
  for_panels(done, vectors, [&](auto columns, int64_t v) {
    constexpr int NV = decltype(columns)::value;
    for_depths(K, n, [&](int64_t k, int64_t depth) {
      for_row_blocks<C, kTileRowsBy<C, NV>>(n, [&](auto block, int64_t r0) {
        constexpr int R = decltype(block)::value;
        const C* row[R];
        Vec<C> acc[R][NV];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          row[r] = a[r0 + r] + k;
          SEQMEM_UNROLL
          for (int i = 0; i < NV; ++i)
            acc[r][i] = k == 0 ? begin(v + i) : load(out[r0 + r] + (v + i) * L);
        }
        tile_multiply<R, NV, C>(depth, row, 1, panels + v * L * K + k * W, L, W, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int i = 0; i < NV; ++i) store(out[r0 + r] + (v + i) * L, acc[r][i]);
      });
    });
  });
}

template <class C>
SEQMEM_INLINE void copy(const C* from, C* to, int64_t n) {
  if (n > 0) __builtin_memcpy(to, from, n * sizeof(C));
}
template <class C>
SEQMEM_INLINE void zero(C* to, int64_t n) {
  if (n > 0) __builtin_memset(to, 0, n * sizeof(C));
}

// How many of n rows go through time at once: few, so that what they carry stays in the L2 cache,
// but more where the weights are too large for it, so that each pass over the weights serves many
// rows. The groups are of nearly the same size, in whole tiles.
template <class C, class Shape>
int64_t rows_at_once(const Shape& s, int64_t n) {
  constexpr int64_t kCache = 400 << 10;
  const Layout<C, Shape> layout(s);
  int64_t weights = s.P * s.C;
  for (int64_t l = 0; l < s.layers; ++l) weights += layout.gates() * layout.K(l);
  constexpr int64_t tile = kTileRows<C>;
  const int64_t most = max<int64_t>(3, ceil_div(weights * sizeof(C), kCache));  // tiles
  const int64_t groups = max<int64_t>(1, ceil_div(n, most * tile));
  return max<int64_t>(1, min(n, ceil_div(ceil_div(n, groups), tile) * tile));
}

}  // namespace
}  // namespace seqmem::machine
