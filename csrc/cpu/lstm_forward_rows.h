// Rows as the LSTM's forward kernels read and write them: inputs, and the state from step to step.
#pragma once

#include "lstm_common.h"

namespace seqmem::lstm {
namespace {

// bias[4][lanes] = bias_ih + bias_hh of a vector of units, zero beyond the last unit.
template <class S, class C = compute_t<S>>
SEQMEM_INLINE void add_biases(C* bias, int64_t u, int64_t H, const Forward& a) {
  constexpr int L = kLanes<C>;
  SEQMEM_UNROLL
  for (int g = 0; g < 4; ++g) {
    const int64_t i = g * H + u * L;
    const int n = static_cast<int>(H - u * L);
    Vec<C> b{};
    if (a.bias_ih != nullptr) b += load_n(static_cast<const S*>(a.bias_ih) + i, n);
    if (a.bias_hh != nullptr) b += load_n(static_cast<const S*>(a.bias_hh) + i, n);
    store(bias + g * L, b);
  }
}

// Pointers to a chunk's input rows, to copies of them where they are stored in 16 bits.
template <class S>
class InputRows {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr bool copies = !std::is_same_v<S, C>;

  const Shape& s;
  const Forward& a;
  C* copy;
  const C** row;

 public:
  InputRows(const Shape& s, const Forward& a) : s(s), a(a) {}

  void place(Carver& take, int64_t rows) {
    copy = take.array<C>(copies ? rows * s.I : 0);
    row = take.array<const C*>(rows);
  }

  const C* const* from(int64_t n) const { return row + n; }

  // Puts the rows active at time t at position n; returns how many.
  int64_t gather(const Walk& walk, int64_t t, int64_t n) {
    const int64_t count = walk.active(t);
    for (int64_t j = 0; j < count; ++j) {
      const S* x = static_cast<const S*>(a.input) + walk.index(t, walk.row(j)) * s.I;
      if constexpr (copies) {
        C* to = copy + (n + j) * s.I;
        for (int64_t i = 0; i < s.I; i += L) {
          const int lanes = static_cast<int>(s.I - i);
          store_n(to + i, load_n(x + i, lanes), lanes);
        }
        row[n + j] = to;
      } else {
        row[n + j] = x;
      }
    }
    return count;
  }
};

// h and c of all rows, and those that enter the step at hand.
template <class S>
class StateRows {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Forward& a;
  const Walk& walk;
  C *h[2], *c, *zeros;  // [B, P_pad] (of this step and the next), [B, H_pad]; shared
  const C **h_row, **c_row;
  int64_t* row_index;
  int64_t parity = 0;

 public:
  const int64_t H_pad, P_pad;  // H and P rounded up to vectors

  StateRows(const Shape& s, const Forward& a, const Walk& walk)
      : s(s), a(a), walk(walk), H_pad(padded<C>(s.H)), P_pad(padded<C>(s.P)) {}

  void place(Carver& take) {
    h[0] = take.array<C>(s.B * P_pad);
    h[1] = take.array<C>(s.B * P_pad);
    c = take.array<C>(s.B * H_pad);
    zeros = take.array<C>(max(P_pad, H_pad));
  }
  void place_rows(Carver& take, int64_t rows) {
    h_row = take.array<const C*>(rows);
    c_row = take.array<const C*>(rows);
    row_index = take.array<int64_t>(rows);
  }

  // One thread's share, from hx and cx.
  void start(int thread, int threads) {
    if (thread == 0)
      for (int64_t i = 0; i < max(P_pad, H_pad); ++i) zeros[i] = 0;
    for (int64_t r = thread; r < s.B; r += threads) {
      for (int i = 0; i < 2; ++i)
        load_row_or_zero(h[i] + r * P_pad, optional_row<S>(a.hx, s.order[r], s.P), s.P);
      load_row_or_zero(c + r * H_pad, optional_row<S>(a.cx, s.order[r], s.H), s.H);
      if (r >= s.active[0]) {  // an empty sequence hands its state on
        store_row(static_cast<S*>(a.hy) + s.order[r] * s.P, h[0] + r * P_pad, s.P);
        store_row(static_cast<S*>(a.cy) + s.order[r] * s.H, c + r * H_pad, s.H);
      }
    }
  }

  // The state that enters time t, of `count` rows.
  void enter(int64_t step, int64_t t, int64_t count) {
    parity = step & 1;
    for (int64_t j = 0; j < count; ++j) {
      const bool cut = is_cut(s, t, walk.row(j));
      row_index[j] = walk.index(t, walk.row(j));
      h_row[j] = cut ? zeros : h[parity] + walk.row(j) * P_pad;
      c_row[j] = cut ? zeros : c + walk.row(j) * H_pad;
    }
  }
  SEQMEM_INLINE const C* const* hidden() const { return h_row; }
  SEQMEM_INLINE const C* cell(int64_t j) const { return c_row[j]; }
  SEQMEM_INLINE int64_t index(int64_t j) const { return row_index[j]; }

  // Vector u of row j's new c.
  SEQMEM_INLINE void set_cell(int64_t t, int64_t j, int64_t u, Vec<C> cell) {
    const int64_t r = walk.row(j);
    const int n = static_cast<int>(min<int64_t>(L, s.H - u * L));
    store(c + r * H_pad + u * L, cell);
    if (a.cells != nullptr) store_n(static_cast<S*>(a.cells) + row_index[j] * s.H + u * L, cell, n);
    if (a.cy != nullptr && is_last(s, t, r))
      store_n(static_cast<S*>(a.cy) + s.order[r] * s.H + u * L, cell, n);
  }

  // Vector b of row j's new h goes to the output and, rounded as there, to the next step.
  SEQMEM_INLINE void set_hidden(int64_t t, int64_t j, int64_t b, Vec<C> hidden) {
    const int64_t r = walk.row(j);
    const int n = static_cast<int>(min<int64_t>(L, s.P - b * L));
    store(h[1 - parity] + r * P_pad + b * L, rounded_to<S>(hidden));
    store_n(static_cast<S*>(a.output) + row_index[j] * s.P + b * L, hidden, n);
    if (a.hy != nullptr && is_last(s, t, r))
      store_n(static_cast<S*>(a.hy) + s.order[r] * s.P + b * L, hidden, n);
  }

  // Row j's gates of vector u, for the backward.
  SEQMEM_INLINE void save_gates(int64_t j, int64_t u, Vec<C> i, Vec<C> f, Vec<C> g, Vec<C> o) {
    if (a.gates == nullptr) return;
    const int n = static_cast<int>(min<int64_t>(L, s.H - u * L));
    S* gates = static_cast<S*>(a.gates) + row_index[j] * 4 * s.H + u * L;
    store_n(gates, i, n);
    store_n(gates + s.H, f, n);
    store_n(gates + 2 * s.H, g, n);
    store_n(gates + 3 * s.H, o, n);
  }
};

}  // namespace
}  // namespace seqmem::lstm
