// The weights of a machine backward, packed into panels [outputs][4 L inputs] once a call, by all
// threads together, so that dx = dz W runs over panels; and the sums of outer products that are the
// weights' gradients.
#pragma once

#include "machine_layout.h"

namespace seqmem::machine {
namespace {

// line[0..] = the weights that an operand's values meet at gate j of layer l: those of what is
// below and of the hidden state.
template <class C, class Shape, class Arguments>
SEQMEM_INLINE void join_weights(const Shape& s, const Arguments& a, const Layout<C, Shape>& layout,
                                int64_t l, int64_t j, C* line) {
  const auto from = [&](int64_t i) { return static_cast<const C*>(a.controller[i]); };
  copy(from(layout.weight_ih(l)) + j * layout.below(l), line + layout.below_offset(l),
       layout.below(l));
  if (s.lstm) copy(from(layout.weight_hh(l)) + j * s.C, line + layout.hidden_offset(l), s.C);
}

template <class C, class Shape, class Arguments>
class BackwardWeights {
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;

  const Shape& s;
  const Arguments& a;
  const Layout<C, Shape>& layout;

  C *panels, *panels_head;  // shared by all threads
  C* line;                  // this thread's own

 public:
  BackwardWeights(const Shape& shape, const Arguments& arguments, const Layout<C, Shape>& layout_,
                  int64_t)
      : s(shape), a(arguments), layout(layout_) {}

  void place_shared(Carver& take) {
    panels = take.array<C>(panel_offset(s.layers));
    panels_head = take.array<C>(ceil_div(s.C, W) * W * s.P);
  }
  void place_own(Carver& take) {
    line = take.array<C>(max(layout.C_pad, max(layout.operand(0), layout.operand(1))));
  }

  void pack(int thread, int threads) {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(layout.gates(), thread, threads);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        zero(line, layout.operand(l));
        join_weights(s, a, layout, l, j, line);
        pack_line(panels + panel_offset(l), layout.gates(), j, layout.K(l));
      }
    }
    const Share mine = share(s.P, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      zero(line, layout.C_pad);
      copy(static_cast<const C*>(a.head_weight) + j * s.C, line, s.C);
      pack_line(panels_head, s.P, j, s.C);
    }
  }

  // result[r] = gradients of outputs, dp[r] head_weight, or of a layer's operand, dz[r] W.
  void heads(int64_t n, const C* const* dp, C* const* result) {
    multiply<C>(n, dp, s.P, panels_head, layout.units, nullptr, result);
  }
  void layer(int64_t l, int64_t n, const C* const* dz, C* const* result) {
    multiply<C>(n, dz, layout.gates(), panels + panel_offset(l), ceil_div(layout.K(l), L), nullptr,
                result);
  }

 private:
  int64_t panel_size(int64_t l) const { return ceil_div(layout.K(l), W) * W * layout.gates(); }
  int64_t panel_offset(int64_t l) const { return layout.layer(l, panel_size(0), panel_size(1)); }

  // panels[p][j][4 vectors] = line
  void pack_line(C* to, int64_t depth, int64_t j, int64_t width) {
    for (int64_t p = 0; p * W < width; ++p)
      for (int64_t i = 0; i < W && p * W + i < width; i += L)
        store(to + (p * depth + j) * W + i, load(line + p * W + i));
  }
};

// Adds outer products, 128 rows at a time, so that a panel of operands stays in L1.
template <class C>
class OuterProducts {
  static constexpr int64_t kDepth = 128;

 public:
  explicit OuterProducts(int64_t) {}
  void place(Carver&) {}

  // total[j][.] += sum over n rows of from[.][j] b[.], for the outputs j of `mine`; rows of total
  // are as wide as those of b.
  void add(int64_t n, const C* from, int64_t from_step, Share mine, const C* b, int64_t step,
           int64_t vectors, C* total) const {
    constexpr int L = kLanes<C>;
    for (int64_t k = 0; k < n; k += kDepth) {
      const int64_t depth = min(kDepth, n - k);
      // Panels are the outer loop: one of b stays in the L1 cache for all rows of total.
      for_panels(0, vectors, [&](auto columns, int64_t v) {
        constexpr int NV = decltype(columns)::value;
        for_row_blocks<C, kTileRowsBy<C, NV>>(
            mine.end - mine.begin, [&](auto block, int64_t start) {
              constexpr int R = decltype(block)::value;
              const C* column[R];
              SEQMEM_UNROLL
              for (int r = 0; r < R; ++r) column[r] = from + k * from_step + mine.begin + start + r;
              tile_multiply_into<R, NV, C>(true, depth, column, from_step, b + k * step + v * L, L,
                                           step, total + (mine.begin + start) * step + v * L, step);
            });
      });
    }
  }
};

}  // namespace
}  // namespace seqmem::machine
