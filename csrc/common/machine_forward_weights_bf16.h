// As machine_forward_weights.h, with products in bf16 on tiles or dot products: weights, which come
// from bf16, as they are, operands rounded to it, sums in float32. A panel holds 4 gates of 16
// units, or 64 outputs.
#pragma once

#include "machine_rows_bf16.h"

namespace seqmem::machine {
namespace {

template <class C, class Shape, class Arguments>
class ForwardWeightsInBf16 {
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Arguments& a;
  const Layout<C, Shape>& layout;
  const bool wide;
  const int64_t unit_blocks = ceil_div(s.C, kBlock), head_panels = ceil_div(s.P, kPanel);
  const int64_t panel_count = s.lstm ? unit_blocks : ceil_div(s.C, kPanel);

  // Shared by all threads.
  bf16* panels;
  C *bias, *bias_head;  // [layers][panels][64], [panels][64]
  Panels panels_head{nullptr, ceil_div(s.C, kDepth), wide};
  // This thread's own.
  RowsInBf16 rows;

 public:
  ForwardWeightsInBf16(const Shape& shape, const Arguments& arguments,
                       const Layout<C, Shape>& layout_, int64_t most_rows)
      : s(shape),
        a(arguments),
        layout(layout_),
        wide(is_wide(most_rows)),
        rows(most_rows, max(layout.K(0), max(layout.K(1), s.C))) {}

  void place_shared(Carver& take) {
    panels = take.array<bf16>(panel_offset(s.layers));
    bias = take.array<C>(s.layers * panel_count * kPanel);
    panels_head.data = take.array<bf16>(head_panels * panels_head.depth * 4 * kTile);
    bias_head = take.array<C>(head_panels * kPanel);
  }
  void place_own(Carver& take) { rows.place(take); }

  void pack(int thread, int threads) {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(panel_count, thread, threads);
      for (int64_t p = mine.begin; p < mine.end; ++p)
        for (int block = 0; block < 4; ++block) pack_controller(l, p, block);
    }
    const Share mine = share(head_panels, thread, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p)
      for (int block = 0; block < 4; ++block) {
        const int64_t first = p * kPanel + block * kBlock;
        rows.pack_columns(panels_head, p, block, [&](int i, bf16* to) {
          line(to, panels_head.depth, {{given(a.head_weight), s.C, 0}}, first + i, s.P);
        });
        for (int64_t j = first; j < first + kBlock; ++j)
          bias_head[j] = j < s.P ? given(a.head_bias)[j] : C(0);
      }
  }

  // finish(constant R, first row, vector of units, z[R][4])
  template <class Finish>
  SEQMEM_INLINE void gates(int64_t l, int64_t n, const C* const* operand, const Finish& finish) {
    rows.multiply(n, operand, layout.K(l), panels_of(l), panel_count, bias_of(l),
                  [&](int64_t u, int64_t begin, int64_t count, const C* sums) {
                    for (int part = 0; part < kBlock && u * kBlock + part < s.C; part += L)
                      for_row_blocks<C>(count, [&](auto block, int64_t first) {
                        constexpr int R = decltype(block)::value;
                        Vec<C> z[R][4];
                        SEQMEM_UNROLL
                        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
                        for (int g = 0; g < 4; ++g)
                          z[r][g] = load(sums + (first + r) * kPanel + g * kBlock + part);
                        finish(block, begin + first, (u * kBlock + part) / L, z);
                      });
                  });
  }

  void dense(int64_t l, int64_t n, const C* const* operand, C* const* result) {
    rows.multiply_to(n, operand, layout.K(l), panels_of(l), layout.units, bias_of(l), result);
  }
  void heads(int64_t n, const C* const* operand, C* const* result) {
    rows.multiply_to(n, operand, s.C, panels_head, ceil_div(s.P, L), bias_head, result);
  }

 private:
  // One of the two weights of an operand: [outputs][width], at `offset` of the operand.
  struct Part {
    const C* weight;
    int64_t width, offset;
  };

  static const C* given(const void* p) { return static_cast<const C*>(p); }
  int64_t panel_offset(int64_t l) const {
    const auto size = [&](int64_t of) { return panel_count * depth(of) * 4 * kTile; };
    return layout.layer(l, size(0), size(1));
  }
  int64_t depth(int64_t l) const { return ceil_div(layout.K(l), kDepth); }
  Panels panels_of(int64_t l) const { return {panels + panel_offset(l), depth(l), wide}; }
  C* bias_of(int64_t l) const { return bias + l * panel_count * kPanel; }

  // An output's weights, rounded; zeros from `outputs` on.
  template <int n>
  static void line(bf16* to, int64_t depth, const Part (&parts)[n], int64_t output,
                   int64_t outputs) {
    __builtin_memset(static_cast<void*>(to), 0, depth * kDepth * sizeof(bf16));
    if (output >= outputs) return;
    for (const Part& part : parts)
      for (int64_t i = 0; i < part.width; i += L) {
        const int lanes = static_cast<int>(part.width - i);
        store_n(to + part.offset + i, load_n(part.weight + output * part.width + i, lanes), lanes);
      }
  }

  // A block of 16 columns: a gate of 16 units, or 16 outputs of a layer of tanh.
  void pack_controller(int64_t l, int64_t p, int block) {
    const Part below = {given(a.controller[layout.weight_ih(l)]), layout.below(l),
                        layout.below_offset(l)};
    C* start = bias_of(l) + p * kPanel + block * kBlock;
    if (s.lstm) {
      const Part hidden = {given(a.controller[layout.weight_hh(l)]), s.C, layout.hidden_offset(l)};
      const C *ih = given(a.controller[layout.bias(l)]),
              *hh = given(a.controller[layout.bias(l) + 1]);
      const int64_t first = block * s.C + p * kBlock, end = (block + 1) * s.C;
      rows.pack_columns(panels_of(l), p, block, [&](int i, bf16* to) {
        line(to, depth(l), {below, hidden}, first + i, end);
      });
      for (int i = 0; i < kBlock; ++i)
        start[i] = first + i < end ? ih[first + i] + hh[first + i] : C(0);
    } else {
      const C* given_bias = given(a.controller[layout.bias(l)]);
      const int64_t first = p * kPanel + block * kBlock;
      rows.pack_columns(panels_of(l), p, block,
                        [&](int i, bf16* to) { line(to, depth(l), {below}, first + i, s.C); });
      for (int i = 0; i < kBlock; ++i) start[i] = first + i < s.C ? given_bias[first + i] : C(0);
    }
  }
};

}  // namespace
}  // namespace seqmem::machine
