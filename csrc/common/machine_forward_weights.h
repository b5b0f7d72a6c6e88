// The weights of a machine forward: packed into panels [K][4 L] once a call, by all threads
// together, and multiplied by the operands of a step's rows. A panel holds 4 gates of L units, or
// 4 L outputs, and is read once for all the rows, from L1 or L2.
#pragma once

#include "machine_layout.h"

namespace seqmem::machine {
namespace {

template <class C, class Shape, class Arguments>
class ForwardWeights {
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;

  const Shape& s;
  const Arguments& a;
  const Layout<C, Shape>& layout;
  const int64_t head_panels = ceil_div(s.P, W), dense_panels = ceil_div(s.C, W);

  C *panels, *bias, *panels_head, *bias_head;

 public:
  ForwardWeights(const Shape& shape, const Arguments& arguments, const Layout<C, Shape>& layout_,
                 int64_t)
      : s(shape), a(arguments), layout(layout_) {}

  void place_shared(Carver& take) {
    panels = take.array<C>(panel_offset(s.layers));
    bias = take.array<C>(s.layers * bias_size());
    panels_head = take.array<C>(head_panels * s.C * W);
    bias_head = take.array<C>(head_panels * W);
  }
  void place_own(Carver&) {}

  void pack(int thread, int threads) {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(panel_count(), thread, threads);
      for (int64_t u = mine.begin; u < mine.end; ++u) s.lstm ? pack_gates(l, u) : pack_dense(l, u);
    }
    const C* given_bias = static_cast<const C*>(a.head_bias);
    const Share mine = share(head_panels, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      pack_panel(static_cast<const C*>(a.head_weight), s.C, s.P, i, panels_head);
      for (int64_t j = i * W; j < (i + 1) * W; ++j) bias_head[j] = j < s.P ? given_bias[j] : C(0);
    }
  }

  // The gates' pre-activations of an LSTM's layer: finish(constant R, first row, vector of units,
  // z[R][4]).
  template <class Finish>
  SEQMEM_INLINE void gates(int64_t l, int64_t n, const C* const* operand, const Finish& finish) {
    const int64_t K = layout.K(l);
    const C *panel = panels + panel_offset(l), *start = bias + l * bias_size();
    int64_t u = 0;
    if (n == 1) {
      for (; u + 2 <= layout.units; u += 2) {
        Vec<C> acc[1][2][4];
        SEQMEM_UNROLL
        for (int i = 0; i < 8; ++i) acc[0][i / 4][i % 4] = load(start + u * W + i * L);
        panels_multiply(K, operand, panel + u * K * W, K * W, W, acc);
        for (int i = 0; i < 2; ++i) {
          const Vec<C>(&sum)[4] = acc[0][i];
          const Vec<C> z[1][4] = {{sum[0], sum[1], sum[2], sum[3]}};
          finish(std::integral_constant<int, 1>{}, 0, u + i, z);
        }
      }
    }
    for (; u < layout.units; ++u) {
      for_row_blocks<C>(n, [&](auto block, int64_t first) {
        constexpr int R = decltype(block)::value;
        Vec<C> acc[R][4];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int g = 0; g < 4; ++g) acc[r][g] = load(start + u * W + g * L);
        tile_multiply<R, 4, C>(K, operand + first, 1, panel + u * K * W, L, W, acc);
        finish(block, first, u, acc);
      });
    }
  }

  // result[r] = bias + W operand[r], whole vectors: of a layer of tanh, and of the heads' values.
  void dense(int64_t l, int64_t n, const C* const* operand, C* const* result) {
    multiply<C>(n, operand, layout.K(l), panels + panel_offset(l), layout.units,
                bias + l * bias_size(), result);
  }
  void heads(int64_t n, const C* const* operand, C* const* result) {
    multiply<C>(n, operand, s.C, panels_head, ceil_div(s.P, L), bias_head, result);
  }

 private:
  int64_t bias_size() const { return max(layout.units, dense_panels) * W; }
  int64_t panel_count() const { return s.lstm ? layout.units : dense_panels; }
  int64_t panel_offset(int64_t l) const {
    return layout.layer(l, panel_count() * layout.K(0) * W,
                        s.layers > 1 ? panel_count() * layout.K(1) * W : 0);
  }
  const C* given(int64_t i) const { return static_cast<const C*>(a.controller[i]); }

  // One vector of units x 4 gates, so that a tile's accumulators hold i, f, g, o of the same units.
  void pack_gates(int64_t l, int64_t u) {
    C* panel = panels + panel_offset(l) + u * layout.K(l) * W;
    const int64_t lanes = min<int64_t>(L, s.C - u * L), below = layout.below(l);
    for (int g = 0; g < 4; ++g) {
      const int64_t from = g * s.C + u * L;
      const C* ih = given(layout.weight_ih(l)) + from * below;
      const C* hh = given(layout.weight_hh(l)) + from * s.C;
      pack_transposed(panel + layout.below_offset(l) * W + g * L, W, ih, below, lanes, below);
      pack_transposed(panel + layout.hidden_offset(l) * W + g * L, W, hh, s.C, lanes, s.C);
      const int n = static_cast<int>(lanes);
      store(bias + l * bias_size() + u * W + g * L,
            load_n(given(layout.bias(l)) + from, n) + load_n(given(layout.bias(l) + 1) + from, n));
    }
  }

  void pack_dense(int64_t l, int64_t u) {
    pack_panel(given(layout.weight_ih(l)), layout.K(l), s.C, u, panels + panel_offset(l));
    for (int64_t j = u * W; j < (u + 1) * W; ++j)
      bias[l * bias_size() + j] = j < s.C ? given(layout.bias(l))[j] : C(0);
  }
};

}  // namespace
}  // namespace seqmem::machine
