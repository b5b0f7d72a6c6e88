// As machine_backward_weights.h, with products in bf16 on tiles or dot products: gradients and
// operands are rounded to it, sums are in float32. A panel holds 64 of an operand's values.
#pragma once

#include "machine_backward_weights.h"
#include "machine_rows_bf16.h"

namespace seqmem::machine {
namespace {

template <class C, class Shape, class Arguments>
class BackwardWeightsInBf16 {
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Arguments& a;
  const Layout<C, Shape>& layout;
  const bool wide;
  const int64_t depth = ceil_div(layout.gates(), kDepth);

  // Shared by all threads.
  bf16* panels;
  Panels panels_head{nullptr, ceil_div(s.P, kDepth), wide};
  // This thread's own.
  RowsInBf16 rows;
  C* lines[2];

 public:
  BackwardWeightsInBf16(const Shape& shape, const Arguments& arguments,
                        const Layout<C, Shape>& layout_, int64_t most_rows)
      : s(shape),
        a(arguments),
        layout(layout_),
        wide(is_wide(most_rows)),
        rows(most_rows, max(layout.gates(), s.P)) {}

  void place_shared(Carver& take) {
    panels = take.array<bf16>(panel_offset(s.layers));
    panels_head.data = take.array<bf16>(panels_of_width(s.C) * panels_head.depth * 4 * kTile);
  }
  void place_own(Carver& take) {
    rows.place(take);
    const int64_t widest = max(s.C, max(layout.K(0), layout.K(1)));
    for (C*& line : lines) line = take.array<C>(panels_of_width(widest) * kPanel);
  }

  void pack(int thread, int threads) {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(depth, thread, threads);
      for (int64_t k = mine.begin; k < mine.end; ++k)
        pack_block(panels_of(l), k, layout.K(l), layout.gates(),
                   [&](int64_t j, C* line) { join_weights(s, a, layout, l, j, line); });
    }
    const Share mine = share(panels_head.depth, thread, threads);
    for (int64_t k = mine.begin; k < mine.end; ++k)
      pack_block(panels_head, k, s.C, s.P, [&](int64_t j, C* line) {
        copy(static_cast<const C*>(a.head_weight) + j * s.C, line, s.C);
      });
  }

  void heads(int64_t n, const C* const* dp, C* const* result) {
    rows.multiply_to(n, dp, s.P, panels_head, layout.units, nullptr, result);
  }
  void layer(int64_t l, int64_t n, const C* const* dz, C* const* result) {
    rows.multiply_to(n, dz, layout.gates(), panels_of(l), ceil_div(layout.K(l), L), nullptr,
                     result);
  }

 private:
  static int64_t panels_of_width(int64_t width) { return ceil_div(width, kPanel); }
  int64_t panel_offset(int64_t l) const {
    const auto size = [&](int64_t of) { return panels_of_width(layout.K(of)) * depth * 4 * kTile; };
    return layout.layer(l, size(0), size(1));
  }
  Panels panels_of(int64_t l) const { return {panels + panel_offset(l), depth, wide}; }

  // Block k of all panels: 32 outputs by pairs; fill(j, line) writes output j's weights.
  template <class Fill>
  void pack_block(const Panels& to, int64_t k, int64_t width, int64_t outputs, const Fill& fill) {
    const int64_t columns = panels_of_width(width) * kPanel;
    for (int i = 0; i < kBlock; ++i) {
      for (int odd = 0; odd < 2; ++odd) {
        zero(lines[odd], columns);
        const int64_t j = k * kDepth + 2 * i + odd;
        if (j < outputs) fill(j, lines[odd]);
      }
      for (int64_t c = 0; c < columns; c += L)
        store_pair(to, k * kBlock + i, c, load(lines[0] + c), load(lines[1] + c));
    }
  }
};

// Adds outer products in bf16: 32 outputs by a panel, 256 rows at a time, whose panels stay in L2.
template <class C>
class OuterProductsInBf16 {
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kRows = 256, kOutputs = 2 * kBlock;
  const int64_t most_panels;

  bf16 *left, *right;  // [32 outputs][256 rows], [panels][256 / 32]..
  float* staging;      // [32][64]

 public:
  explicit OuterProductsInBf16(int64_t most_values) : most_panels(ceil_div(most_values, kPanel)) {}

  void place(Carver& take) {
    left = take.array<bf16>(kOutputs * kRows);
    right = take.array<bf16>(most_panels * kRows * kPanel);
    staging = take.array<float>(kOutputs * kPanel);
  }

  // As OuterProducts::add.
  void add(int64_t n, const C* from, int64_t from_step, Share mine, const C* b, int64_t step,
           int64_t vectors, C* total) const {
    configure(kBlock);
    for (int64_t k = 0; k < n; k += kRows) {
      const int64_t rows = min(kRows, n - k);
      const Panels panels = {right, ceil_div(rows, kDepth), is_wide(kOutputs)};
      pair_operands(panels, rows, b + k * step, step, vectors);
      for (int64_t j = mine.begin; j < mine.end; j += kOutputs) {
        const int64_t outputs = min(kOutputs, mine.end - j);
        transpose_outputs(panels.depth, rows, from + k * from_step + j, from_step, outputs);
        tiles_fence();
        const RowGroup g = {0, outputs, {0, kBlock}, true};
        for (int64_t v = 0, p = 0; v < vectors; v += kPanel / L, ++p) {
          sum_products(g, {{panels, p, left, kRows, panels.depth}}, nullptr, 0, staging, kPanel,
                       kNothing);
          for (int64_t r = 0; r < outputs; ++r)
            for (int64_t i = 0; i < min<int64_t>(kPanel / L, vectors - v); ++i) {
              C* to = total + (j + r) * step + (v + i) * L;
              store(to, load(to) + load(staging + r * kPanel + i * L));
            }
        }
      }
    }
    tiles_release();
  }

 private:
  // Pairs of rows of the operands, whole panels; what lies beyond the vectors is zero.
  void pair_operands(const Panels& to, int64_t rows, const C* b, int64_t step,
                     int64_t vectors) const {
    for (int64_t i = 0; i < to.depth * kBlock; ++i)
      for (int64_t v = 0; v < ceil_div(vectors * L, kPanel) * kPanel / L; ++v) {
        const auto row = [&](int64_t r) {
          return r < rows && v < vectors ? rounded_to<bf16>(load(b + r * step + v * L))
                                         : Vec<float>{};
        };
        store_pair(to, i, v * L, row(2 * i), row(2 * i + 1));
      }
  }

  // left[output][row], rounded; zeros beyond rows and outputs.
  void transpose_outputs(int64_t blocks, int64_t rows, const C* from, int64_t step,
                         int64_t outputs) const {
    for (int64_t c = 0; c < kOutputs; c += kBlock)
      for (int64_t k = 0; k < blocks; ++k) {
        alignas(64) float square[kBlock][kBlock];
        for (int i = 0; i < kBlock; ++i)
          for (int l = 0; l < kBlock; l += L) {
            const auto row = [&](int64_t r) {
              const int lanes = static_cast<int>(outputs - c - l);
              return r < rows ? rounded_to<bf16>(load_n(from + r * step + c + l, lanes))
                              : Vec<float>{};
            };
            const int64_t r = k * kDepth + 2 * i;
            const UintVec pairs = pairs_of(row(r), row(r + 1));
            __builtin_memcpy(square[i] + l, &pairs, sizeof pairs);
          }
        transpose_tile(square, reinterpret_cast<float*>(left + c * kRows + k * kDepth), kRows / 2);
      }
  }
};

}  // namespace
}  // namespace seqmem::machine
