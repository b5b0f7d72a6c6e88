// A single step backwards in bf16, whose weights meet few rows once, and whose every product with
// dz is as deep as there are rows:
//
//   dz W         weights are packed a few blocks of dz's columns by a few panels at a time, right
//                before their product: they stay in L2 and are not written to memory. Panels are
//                shared out
//   dz^T [x, h]  gives the rows of the weights' gradients as they are stored: dz is transposed
//                beforehand, no sum is. Units are shared out
#pragma once

#include "lstm_bf16.h"

namespace seqmem::lstm {
namespace {

// As block `to` of panels: 32 rows of a weight [4 H, N], those that block k of dz's columns meets,
// by pairs, from column `first` on. Each pair of rows is read to its end while the next pair is
// prefetched into L2.
template <class S>
void pack_gate_rows(const Panels& panels, int64_t to, const S* weight, int64_t H, int64_t k,
                    int64_t N, int64_t first, int64_t count) {
  for (int i = 0; i < kBlock; ++i) {
    const int64_t gate = k % 2 * 2 + i / 8, unit = k / 2 * kBlock + i % 8 * 2;
    const S* row = weight + (gate * H + unit) * N + first;
    for (int64_t v = 0; v < count * 4; ++v) {
      __builtin_prefetch(row + 2 * N + v * kBlock, 0, 2);
      __builtin_prefetch(row + 3 * N + v * kBlock, 0, 2);
      store_pairs(panels.tile(v / 4, to, v % 4) + i * kDepth, unit < H ? row + v * kBlock : nullptr,
                  unit + 1 < H ? row + N + v * kBlock : nullptr, N - first - v * kBlock);
    }
  }
}

// to[16 pairs][16 columns][2] of the rows from `from` on: at(row) is where one begins, null if it
// is zero; `columns` of its 16 columns exist.
template <class At>
SEQMEM_INLINE void pair_tile(void* to, int64_t from, int64_t columns, const At& at) {
  for (int i = 0; i < kBlock; ++i)
    store_pairs(static_cast<float*>(to) + i * kBlock, at(from + 2 * i), at(from + 2 * i + 1),
                columns);
}

// to[column * stride + row] = 16 columns of `count` rows, whole blocks of 32, given as to
// pair_tile.
template <class S, class At>
void transpose_rows(S* to, int64_t stride, int64_t count, int64_t columns, const At& at) {
  for (int64_t from = 0; from < count; from += kDepth) {
    alignas(64) float square[kBlock][kBlock];
    pair_tile(square, from, columns, at);
    transpose_tile(square, reinterpret_cast<float*>(to + from), stride / 2);
  }
}

template <class S>
class SingleStep {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kPanels = 8, kBlocks = 8;  // of a weight at once: 256 KB

  const Shape& s;
  const int thread, threads;
  const int64_t units = ceil_div(s.H, kBlock), gate_blocks = 2 * units;
  const int64_t dz_stride = gate_blocks * kDepth;
  const int64_t depth = ceil_div(s.B, kDepth), rows = depth * kDepth;
  const bool wide = is_wide(s.B);
  // Panels of x, those of h behind them
  const int64_t panels_x = ceil_div(s.I, kPanel), panels_h = ceil_div(s.H, kPanel);

  // Shared by all threads.
  S* left;  // dz^T [its columns][rows]
  Panels right{nullptr, depth, is_wide(2 * kBlock)};
  // This thread's own.
  S* packed;
  float* sums;  // [rows][kPanels * 64]

 public:
  SingleStep(const Shape& shape, int thread_, int threads_)
      : s(shape), thread(thread_), threads(threads_) {}

  // of_weights: whether lay_out() and weight_gradients() will be called.
  void place_shared(Carver& take, bool of_weights) {
    left = take.array<S>(of_weights ? dz_stride * rows : 0);
    right.data = take.array<S>(of_weights ? (panels_x + panels_h) * depth * 4 * kTile : 0);
  }
  void place_own(Carver& take) {
    packed = take.array<S>(kPanels * kBlocks * 4 * kTile);
    sums = take.array<float>(rows * kPanels * kPanel);
  }

  // dz W of the first n rows, for this thread's share of the panels of W [4 H, N]: leave(row,
  // columns, sums) takes up to 512 sums.
  template <class Leave>
  void multiply(const S* dz, int64_t n, const void* weight, int64_t N, const Leave& leave) {
    const Share some = share(ceil_div(N, kPanel), thread, threads);
    for (int64_t v = some.begin; v < some.end; v += kPanels) {
      const int64_t count = min(kPanels, some.end - v), stride = count * kPanel;
      for (int64_t k = 0; k < gate_blocks; k += kBlocks) {
        const Panels panels = {packed, min(kBlocks, gate_blocks - k), wide};
        for (int64_t i = 0; i < panels.depth; ++i)
          pack_gate_rows(panels, i, static_cast<const S*>(weight), s.H, k + i, N, v * kPanel,
                         count);
        tiles_fence();
        for (int64_t p = 0; p < count; ++p)
          for (int64_t first = 0; first < n;) {
            const RowGroup g = row_group(first, whole_blocks(n), wide);
            float* to = sums + g.block[0] * stride + p * kPanel;
            sum_products(g, {{panels, p, dz + k * kDepth, dz_stride, panels.depth}},
                         k == 0 ? nullptr : to, stride, to, stride, kNothing);
            first += g.count;
          }
      }
      for (int64_t r = 0; r < n; ++r)
        leave(r, Share{v * kPanel, v * kPanel + stride}, sums + r * stride);
    }
  }

  // This thread's share of both operands of the weights' gradients; a null row is zero.
  void lay_out(const S* dz, int64_t n, const S* const* x_row, const S* const* h_row) {
    const Share columns = share(2 * gate_blocks, thread, threads);
    for (int64_t b = columns.begin; b < columns.end; ++b)
      transpose_rows(left + b * kBlock * rows, rows, rows, kBlock,
                     [&](int64_t r) { return r < n ? dz + r * dz_stride + b * kBlock : nullptr; });
    const Share panels = share(panels_x + panels_h, thread, threads);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const bool of_x = p < panels_x;
      const S* const* row = of_x ? x_row : h_row;
      for (int64_t k = 0; k < depth; ++k)
        for (int c = 0; c < 4; ++c) {
          const int64_t column = (of_x ? p : p - panels_x) * kPanel + c * kBlock;
          pair_tile(right.tile(p, k, c), k * kDepth, (of_x ? s.I : s.H) - column, [&](int64_t r) {
            return r < n && row[r] != nullptr ? row[r] + column : nullptr;
          });
        }
    }
  }

  // Once all threads have laid theirs out.
  void weight_gradients(const S* dz, int64_t n, const Backward& a, float* staging) {
    tiles_fence();
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      const int64_t lanes = min<int64_t>(kBlock, s.H - u * kBlock);
      for (int gate = 0; gate < 4; gate += 2) {
        const int64_t first = (u * 4 + gate) * kBlock;
        const RowGroup g = {first, 2 * kBlock, {first, first + kBlock}, true};
        for (int64_t p = 0; p < panels_x + panels_h; ++p) {
          const bool of_x = p < panels_x;
          const int64_t N = of_x ? s.I : s.H, column = (of_x ? p : p - panels_x) * kPanel;
          S* gradient = static_cast<S*>(of_x ? a.grad_weight_ih : a.grad_weight_hh) + column;
          sum_products(g, {{right, p, left, rows, depth, rows / 2 - ceil_div(n, 2)}}, nullptr, 0,
                       staging, kPanel, kNothing);
          for (int64_t i = 0; i < 2 * kBlock; ++i)
            if (i % kBlock < lanes)
              store_row(gradient + ((gate + i / kBlock) * s.H + u * kBlock + i % kBlock) * N,
                        staging + i * kPanel, min<int64_t>(kPanel, N - column));
        }
      }
      if (a.grad_bias != nullptr) bias_gradient(dz, n, u, static_cast<S*>(a.grad_bias));
    }
  }

 private:
  void bias_gradient(const S* dz, int64_t n, int64_t u, S* to) {
    for (int64_t c = 0; c < kPanel; c += L) {
      Vec<float> sum{};
      for (int64_t r = 0; r < n; ++r) sum += load(dz + r * dz_stride + u * kPanel + c);
      const int64_t unit = u * kBlock + c % kBlock;
      store_n(to + c / kBlock * s.H + unit, sum, static_cast<int>(s.H - unit));
    }
  }
};

}  // namespace
}  // namespace seqmem::lstm
