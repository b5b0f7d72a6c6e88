// LSTM forward in bf16 on tiles. Formulas: csrc/autograd/lstm.cpp; no projection of h.
//
//   prepare     h [B, ..] bf16 and c [B, ..] fp32 from hx, cx; bias_ih + bias_hh; packed weights.
//               Those of a single step are packed block by block, right before their product: they
//               stay in L2 and are not written to memory
//   for each chunk of steps (a single step where plan.chunk is 0):
//     copy      the chunk's input rows, so that they end in whole tiles
//     project   z = bias + W_ih x for all of them at once                      if plan.chunk > 0
//     for each step, with a barrier after it if threads share units:
//       for each block of 16 units, to and fro; for each group of up to 32 rows:
//         tiles = bias + W_ih x, or z
//         tiles += W_hh h               after each product a few rows of the group before:
//         tiles to staging, in L1       gates, c, h and results from their staging
//
// Tiles cannot gather rows: where a reset cuts the next step off, zeros are stored as its h and c.
#include "../common/products.h"
#include "lstm_bf16.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

template <class S>
class ForwardRun : KernelRun<Forward, Walk> {
  static constexpr int L = kLanes<float>;

  const int64_t units = ceil_div(s.H, kBlock);  // blocks of units
  const Share mine = units_of(units);
  // I, H, H rounded up to whole tiles
  const int64_t x_stride = ceil_div(s.I, kDepth) * kDepth;
  const int64_t h_stride = ceil_div(s.H, kDepth) * kDepth, c_stride = units * kBlock;
  const bool fused = plan.chunk == 0;  // inputs are projected within the step
  const bool once =
      s.T == 1 && (threads == 1 || !plan.by_rows);  // each block meets one thread once
  const int64_t my_rows = ceil_div(s.B - row_begin, row_step);
  const int64_t chunk = fused ? 1 : min(plan.chunk, s.T), chunk_rows = chunk * most_rows;

  // Shared by all threads, but for the panels of a block that is needed once.
  S* h[2];          // [B][h_stride], of this step and the next
  float *c, *bias;  // [B][c_stride], [units][4][16]
  Panels input_panels{nullptr, x_stride / kDepth, is_wide(most_rows)};
  Panels hidden_panels{nullptr, h_stride / kDepth, is_wide(most_rows)};
  // This thread's own.
  S* x;                // [chunk_rows + 16][x_stride]
  float *z, *staging;  // [chunk_rows + 16][my units][4][16]; two of [32 rows][4][16]

 public:
  using KernelRun<Forward, Walk>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    for (S*& buffer : h) buffer = take.array<S>(s.B * h_stride);
    c = take.array<float>(s.B * c_stride);
    bias = take.array<float>(units * kPanel);
    auto take_panels = [&](int64_t blocks) {
      for (Panels* panels : {&input_panels, &hidden_panels})
        panels->data = take.array<S>(blocks * panels->depth * 4 * kTile);
    };
    if (!once) take_panels(units);
    const int64_t my_units = plan.by_rows ? units : ceil_div(units, threads);
    take.per_thread(thread, threads, [&] {
      if (once) take_panels(1);
      x = take.array<S>((chunk_rows + kBlock) * x_stride);
      z = take.array<float>(fused ? 0 : (chunk_rows + kBlock) * my_units * kPanel);
      staging = take.array<float>(2 * 2 * kBlock * kPanel);
    });
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    configure(my_rows);
    for (int64_t first = 0; first < s.T; first += chunk) {
      const int64_t last = min(first + chunk, s.T);
      int64_t n = 0;
      for (int64_t step = first; step < last; ++step) n += copy_inputs(time_of(step), n);
      if (!fused) project(n);
      n = 0;
      for (int64_t step = first; step < last; ++step) {
        n += run_step(step, n);
        meet();
      }
    }
    tiles_release();
  }

 private:
  void prepare() {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      for (int i = 0; i < kPanel; i += L) {
        const int64_t unit = u * kBlock + i % kBlock, at = i / kBlock * s.H + unit;
        const int n = static_cast<int>(s.H - unit);
        Vec<float> b{};
        if (a.bias_ih != nullptr) b += load_n(static_cast<const S*>(a.bias_ih) + at, n);
        if (a.bias_hh != nullptr) b += load_n(static_cast<const S*>(a.bias_hh) + at, n);
        store(bias + u * kPanel + i, b);
      }
      if (once) continue;
      pack(input_panels, u, u);
      pack(hidden_panels, u, u);
    }
    for (int64_t r = thread; r < s.B; r += threads) {
      const S* hx = optional_row<S>(a.hx, s.order[r], s.H);
      const S* cx = optional_row<S>(a.cx, s.order[r], s.H);
      if (r >= s.active[0]) {  // an empty sequence hands its state on
        copy_row(static_cast<S*>(a.hy) + s.order[r] * s.H, hx, s.H, s.H);
        copy_row(static_cast<S*>(a.cy) + s.order[r] * s.H, cx, s.H, s.H);
      }
      if (!s.reverse && is_cut(s, 0, r)) hx = cx = nullptr;
      for (S* buffer : h) copy_row(buffer + r * h_stride, hx, s.H, h_stride);
      for (int64_t i = 0; i < c_stride; i += L)
        store(c + r * c_stride + i,
              cx == nullptr ? Vec<float>{} : load_n(cx + i, static_cast<int>(s.H - i)));
    }
  }

  static constexpr int64_t kAhead = 8 * kDepth;  // so far ahead memory is asked for a row

  // The gates of a block of units as this panel: their weights' rows, transposed by pairs of k.
  void pack(const Panels& panels, int64_t panel, int64_t u) {
    const bool of_input = &panels == &input_panels;
    const S* weight = static_cast<const S*>(of_input ? a.weight_ih : a.weight_hh);
    const int64_t K = of_input ? s.I : s.H;
    const int64_t rows = min<int64_t>(kBlock, s.H - u * kBlock);
    for (int g = 0; g < 4; ++g)
      for (int64_t k = 0; k < panels.depth; ++k) {
        alignas(64) float square[kBlock][kBlock];
        const int64_t width = min<int64_t>(kDepth, K - k * kDepth);
        for (int64_t i = 0; i < kBlock; ++i) {
          const S* from = weight + (g * s.H + u * kBlock + i) * K + k * kDepth;
          __builtin_prefetch(from + kAhead, 0, 2);  // into L2: rows of 2 KiB share two sets of L1
          if (i < rows && width == kDepth) {
            __builtin_memcpy(square[i], from, sizeof square[i]);
          } else {
            copy_row(reinterpret_cast<S*>(square[i]), i < rows ? from : nullptr, width, kDepth);
          }
        }
        transpose_tile(square, reinterpret_cast<float*>(panels.tile(panel, k, g)), kBlock);
      }
  }

  // The panel of a block of units, packed by now.
  int64_t panel_of(const Panels& panels, int64_t u) {
    if (!once) return u;
    pack(panels, 0, u);
    return 0;
  }

  // to[0..width-1] = from[0..n-1], then zeros; all zeros where from is null.
  static void copy_row(S* to, const S* from, int64_t n, int64_t width) {
    if (from == nullptr) n = 0;
    if (n > 0) __builtin_memcpy(to, from, n * sizeof(S));
    __builtin_memset(static_cast<void*>(to + n), 0, (width - n) * sizeof(S));
  }

  // Puts the input rows active at time t at position n of x; returns how many.
  int64_t copy_inputs(int64_t t, int64_t n) {
    const int64_t count = active(t);
    for (int64_t j = 0; j < count; ++j)
      copy_row(x + (n + j) * x_stride, static_cast<const S*>(a.input) + index(t, row(j)) * s.I, s.I,
               x_stride);
    return count;
  }

  // Where the pre-activations of a block of units start, and the next row's.
  float* z_of(int64_t n, int64_t u) const { return z + n * z_stride() + (u - mine.begin) * kPanel; }
  int64_t z_stride() const { return (mine.end - mine.begin) * kPanel; }

  Term input_term(int64_t panel) const {
    return {input_panels, panel, x, x_stride, input_panels.depth};
  }

  // z = bias + W_ih x
  void project(int64_t n) {
    configure(kBlock);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const Term input = input_term(panel_of(input_panels, u));
      for (int64_t first = 0; first < n;) {
        const RowGroup g = row_group(first, n, input_panels.wide);
        sum_products(g, {input}, bias + u * kPanel, 0, z_of(g.block[0], u), z_stride(), kNothing);
        first += g.count;
      }
    }
    configure(my_rows);
  }

  // n: where this step's rows begin among the chunk's. Returns how many were active. All groups of
  // rows meet a panel in turn, so that it comes from beyond L2 once a step.
  int64_t run_step(int64_t step, int64_t n) {
    const int64_t count = active(time_of(step)), blocks = mine.end - mine.begin;
    const bool wide = hidden_panels.wide;
    const S* before = h[step & 1] + row_begin * h_stride;
    int64_t u_done = 0, block_done = 0, turn = 0;
    const float* sums_done = nullptr;
    Pending pending(
        (wide ? 1 : 2) * (hidden_panels.depth + (fused ? input_panels.depth : 0)),
        [&](int64_t j) { finish(step, j, u_done, sums_done + (j - block_done) * kPanel); });
    const auto slice = [&] { pending.slice(); };
    tiles_fence();
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t u = mine.begin + zigzag(step, i, blocks);
      const int64_t panel = panel_of(hidden_panels, u);
      const int64_t input_panel = fused ? panel_of(input_panels, u) : 0;
      for (int64_t first = 0; first < count;) {
        const RowGroup g = row_group(first, count, wide);
        float* sums = staging + (turn++ & 1) * 2 * kBlock * kPanel;
        const Term hidden_term = {hidden_panels, panel, before, row_step * h_stride,
                                  hidden_panels.depth};
        if (fused)
          sum_products(g, {input_term(input_panel), hidden_term}, bias + u * kPanel, 0, sums,
                       kPanel, slice);
        else
          sum_products(g, {hidden_term}, z_of(n + g.block[0], u), z_stride(), sums, kPanel, slice);
        pending.finish();
        u_done = u, block_done = g.block[0], sums_done = sums;
        pending.start(g);
        first += g.count;
      }
    }
    pending.finish();
    return count;
  }

  // Row j's gates, new cell and new h of a block of units.
  SEQMEM_INLINE void finish(int64_t step, int64_t j, int64_t u, const float* sums) {
    const int64_t t = time_of(step), r = row(j), at = index(t, r);
    const bool last = is_last(s, t, r);
    const bool cut = step + 1 < s.T && is_cut(s, time_of(step + 1), r);
    for (int l = 0; l < kBlock; l += L, sums += L) {
      const int64_t unit = u * kBlock + l;
      const int n = static_cast<int>(s.H - unit);
      if (n <= 0) return;  // zero since prepare()
      const Vec<float> i = cheap_sigmoid(load(sums)), f = cheap_sigmoid(load(sums + kBlock)),
                       g = cheap_tanh(load(sums + 2 * kBlock)),
                       o = cheap_sigmoid(load(sums + 3 * kBlock));
      float* state = c + r * c_stride + unit;
      const Vec<float> cell = sum_of_products(f, load(state), i, g);
      const Vec<float> hidden = first_lanes(o * cheap_tanh(cell), n);
      store(state, cut ? Vec<float>{} : cell);
      store(h[(step + 1) & 1] + r * h_stride + unit, cut ? Vec<float>{} : hidden);
      store_n(static_cast<S*>(a.output) + at * s.H + unit, hidden, n);
      if (a.gates != nullptr) {
        S* gates = static_cast<S*>(a.gates) + at * 4 * s.H + unit;
        store_n(gates, i, n);
        store_n(gates + s.H, f, n);
        store_n(gates + 2 * s.H, g, n);
        store_n(gates + 3 * s.H, o, n);
      }
      if (a.cells != nullptr) store_n(static_cast<S*>(a.cells) + at * s.H + unit, cell, n);
      if (!last) continue;
      if (a.hy != nullptr) store_n(static_cast<S*>(a.hy) + s.order[r] * s.H + unit, hidden, n);
      if (a.cy != nullptr) store_n(static_cast<S*>(a.cy) + s.order[r] * s.H + unit, cell, n);
    }
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::BFloat16, Forward, Shape, Plan>::table;

}  // namespace seqmem::lstm
