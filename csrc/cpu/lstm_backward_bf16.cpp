// LSTM backward in bf16 on tiles. Formulas: csrc/autograd/lstm.cpp; no projection of h.
//
//   prepare     dh, dc [B, ..] fp32 from grad_hy, grad_cy; packed weights
//   for each chunk of steps, from the last one:
//     cells     dz of the chunk's last step from dh and dc        bf16 [row][16 units][gate][unit]
//     for each step, from the last one, after a barrier if threads share units:
//       for each panel of 64 units, to and fro; for each group of up to 32 rows:
//         tiles = dz W_hh                after each product a few rows of the group before:
//         tiles to staging, in L1        dh of the step before, and of it dz and dc
//     operands  x^T, h^T: the chunk's x_t and h_{t-1}, transposed, columns shared out
//     sums      dW^T += [x, h]^T dz, so that the 4H columns of dz need no transpose; blocks of dz's
//               columns shared out; after the last chunk transposed into the weights' gradients
//     input     grad_input = dz W_ih, rows shared out
//   finish      dh, dc are the gradients of hx, cx
//
// A single step: lstm_backward_bf16_step.h.
#include "lstm_backward_bf16_step.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

template <class S>
class BackwardRun : KernelRun<Backward, Walk> {
  static constexpr int L = kLanes<float>;

  // Blocks of 16 units; of 32 columns of dz: i, f or g, o
  const int64_t units = ceil_div(s.H, kBlock), gate_blocks = 2 * units;
  // Of H and I columns
  const int64_t panels_h = ceil_div(s.H, kPanel), panels_x = ceil_div(s.I, kPanel);
  // Of [x, h], each rounded up to two tiles; x's alone
  const int64_t columns_x = ceil_div(s.I, 2 * kBlock) * 2 * kBlock;
  const int64_t columns = columns_x + ceil_div(s.H, 2 * kBlock) * 2 * kBlock;
  const int64_t dz_stride = gate_blocks * kDepth, c_stride = panels_h * kPanel;  // of a row
  // Steps and rows of a chunk, the latter in whole blocks
  const int64_t chunk = min(plan.chunk, s.T), capacity = ceil_div(chunk * s.B, kDepth) * kDepth;
  const bool wide = is_wide(most_rows), once = s.T == 1;
  const int64_t my_rows = ceil_div(s.B - row_begin, row_step);
  const Share my_panels = units_of(panels_h);  // of the hidden state
  const Share my_units{min(my_panels.begin * 4, units), min(my_panels.end * 4, units)};

  // Shared by all threads.
  S *dz, *transposed;          // [capacity + 16][dz_stride], [columns][capacity]
  float *dh, *dc, *dw, *bias;  // [B][c_stride], .., [gate_blocks][columns][32], [gate_blocks][32]
  const S **x_row, **h_row;    // of the chunk's rows
  int64_t* chunk_index;
  Panels input_panels{nullptr, gate_blocks, wide}, hidden_panels = input_panels;
  // This thread's own.
  Panels dz_pairs{nullptr, 0, false, 1};  // of 32 columns
  float* staging;                         // two of [32 rows][64]
  SingleStep<S> single{s, thread, threads};

 public:
  using KernelRun<Backward, Walk>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    dz = take.array<S>((capacity + kBlock) * dz_stride);
    const bool of_weights = a.grad_weight_ih != nullptr, summed = of_weights && !once;
    transposed = take.array<S>(summed ? columns * capacity : 0);
    dh = take.array<float>(s.B * c_stride);
    dc = take.array<float>(s.B * c_stride);
    dw = take.array<float>(summed ? gate_blocks * columns * 2 * kBlock : 0);
    bias = take.array<float>(gate_blocks * 2 * kBlock);
    x_row = take.array<const S*>(capacity);
    h_row = take.array<const S*>(capacity);
    chunk_index = take.array<int64_t>(capacity);
    const int64_t panel = gate_blocks * 4 * kTile;
    input_panels.data = take.array<S>(once || a.grad_input == nullptr ? 0 : panels_x * panel);
    hidden_panels.data = take.array<S>(once ? 0 : panels_h * panel);
    if (once) single.place_shared(take, of_weights);
    take.per_thread(thread, threads, [&] {
      if (once) single.place_own(take);
      dz_pairs.data = take.array<S>(capacity * 2 * kBlock);
      staging = take.array<float>(2 * 2 * kBlock * kPanel);
    });
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    if (once) {
      run_once();
    } else {
      run_chunks();
    }
    tiles_release();
    for (int64_t r = thread; r < s.B; r += threads) {
      if (a.grad_hx != nullptr)
        store_row(static_cast<S*>(a.grad_hx) + s.order[r] * s.H, dh + r * c_stride, s.H);
      if (a.grad_cx != nullptr)
        store_row(static_cast<S*>(a.grad_cx) + s.order[r] * s.H, dc + r * c_stride, s.H);
    }
  }

 private:
  void prepare() {
    if (!once) pack_weights();
    for (int64_t r = thread; r < s.B; r += threads) {
      const S* grad_hy = optional_row<S>(a.grad_hy, s.order[r], s.H);
      const S* grad_cy = optional_row<S>(a.grad_cy, s.order[r], s.H);
      for (int64_t i = 0; i < c_stride; i += L) {
        const int n = static_cast<int>(s.H - i);
        store(dh + r * c_stride + i, grad_hy == nullptr ? Vec<float>{} : load_n(grad_hy + i, n));
        store(dc + r * c_stride + i, grad_cy == nullptr ? Vec<float>{} : load_n(grad_cy + i, n));
      }
    }
  }

  void pack_weights() {
    const Share some = share(gate_blocks, thread, threads);
    for (int64_t k = some.begin; k < some.end; ++k) {
      const auto *weight_ih = static_cast<const S*>(a.weight_ih),
                 *weight_hh = static_cast<const S*>(a.weight_hh);
      if (a.grad_input != nullptr)
        pack_gate_rows(input_panels, k, weight_ih, s.H, k, s.I, 0, panels_x);
      pack_gate_rows(hidden_panels, k, weight_hh, s.H, k, s.H, 0, panels_h);
    }
  }

  void run_chunks() {
    bool fresh = true;
    for (int64_t last = s.T; last > 0; last -= chunk) {
      const int64_t first = max<int64_t>(last - chunk, 0);
      configure(my_rows);
      differentiate_rows(time_of(last - 1), 0, 0, active(time_of(last - 1)));
      int64_t n = 0;
      for (int64_t step = last - 1; step >= first; --step) n += run_step(step, first, n);
      barrier.wait();
      configure(kBlock);
      if (a.grad_weight_ih != nullptr) {
        transpose_operands(n);
        barrier.wait();
        tiles_fence();
        weight_gradients(n, fresh, first == 0);
      }
      if (a.grad_input != nullptr) input_gradients(n);
      fresh = false;
      barrier.wait();
    }
  }

  // A single step.
  void run_once() {
    const int64_t t = time_of(0), n = s.active[t];
    note_rows(t, 0);
    differentiate_rows(t, 0, 0, active(t));
    barrier.wait();
    configure(kBlock);
    if (a.grad_hx != nullptr)
      single.multiply(dz, n, a.weight_hh, s.H, [&](int64_t r, Share columns, const float* sums) {
        for (int64_t i = 0; i < columns.end - columns.begin; i += L)
          store(dh + r * c_stride + columns.begin + i,
                is_cut(s, t, r) ? Vec<float>{} : load(sums + i));
      });
    if (a.grad_input != nullptr)
      single.multiply(dz, n, a.weight_ih, s.I, [&](int64_t r, Share columns, const float* sums) {
        store_row(static_cast<S*>(a.grad_input) + chunk_index[r] * s.I + columns.begin, sums,
                  min(columns.end, s.I) - columns.begin);
      });
    if (a.grad_weight_ih != nullptr) {
      single.lay_out(dz, n, x_row, h_row);
      barrier.wait();
      single.weight_gradients(dz, n, a, staging);
    }
    barrier.wait();
  }

  // n: where this step's rows begin among the chunk's. Leaves dh and dc of the step before, and of
  // rows that go on within the chunk dz as well. Returns how many rows were active.
  int64_t run_step(int64_t step, int64_t first, int64_t n) {
    const int64_t t = time_of(step), count = active(t), end = n + s.active[t];
    note_rows(t, n);
    meet();
    const int64_t t_before = time_of(step - 1);
    const int64_t going_on = step > first ? min(count, active(t_before)) : 0;
    if (step > 0 || a.grad_hx != nullptr) {
      const S* left = dz + (n + row_begin) * dz_stride;
      const int64_t blocks = my_panels.end - my_panels.begin;
      int64_t v_done = 0, block_done = 0, turn = 0;
      const float* sums_done = nullptr;
      Pending pending((wide ? 1 : 2) * gate_blocks, [&](int64_t j) {
        const float* sums = sums_done + (j - block_done) * kPanel;
        float* to = dh + row(j) * c_stride + v_done * kPanel;
        const bool cut = is_cut(s, t, row(j));
        for (int i = 0; i < kPanel; i += L) store(to + i, cut ? Vec<float>{} : load(sums + i));
        if (j < going_on)
          for (int64_t u = v_done * 4; u < min(v_done * 4 + 4, units); ++u)
            differentiate(t_before, end, j, u);
      });
      tiles_fence();
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t v = my_panels.begin + zigzag(step, i, blocks);
        for (int64_t from = 0; from < count;) {
          const RowGroup g = row_group(from, count, wide);
          float* sums = staging + (turn++ & 1) * 2 * kBlock * kPanel;
          sum_products(g, {{hidden_panels, v, left, row_step * dz_stride, gate_blocks}}, nullptr, 0,
                       sums, kPanel, [&] { pending.slice(); });
          pending.finish();
          v_done = v, block_done = g.block[0], sums_done = sums;
          pending.start(g);
          from += g.count;
        }
      }
      pending.finish();
    }
    if (step > first) differentiate_rows(t_before, end, going_on, active(t_before));
    return s.active[t];
  }

  void differentiate_rows(int64_t t, int64_t n, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t u = my_units.begin; u < my_units.end; ++u) differentiate(t, n, j, u);
  }

  // dz of row j at time t, from dh and dc, which becomes that of the step before. The step's rows
  // begin at n. i, f, o: d pre = d gate * gate (1 - gate); g: d pre = d gate * (1 - gate^2).
  SEQMEM_INLINE void differentiate(int64_t t, int64_t n, int64_t j, int64_t u) {
    const int64_t r = row(j), at = index(t, r);
    const bool cut = is_cut(s, t, r);
    const S* c_before = cut ? nullptr : previous<S>(a.cells, a.cx, t, r, s.H);
    for (int l = 0; l < kBlock; l += L) {
      const int64_t unit = u * kBlock + l;
      const int lanes = static_cast<int>(s.H - unit);
      const auto arriving = [&](const void* grad, int64_t offset) {
        return grad == nullptr ? Vec<float>{} : load_n(static_cast<const S*>(grad) + offset, lanes);
      };
      const int64_t gate = at * 4 * s.H + unit;
      const S* gates = static_cast<const S*>(a.gates) + gate;
      const Vec<float> i = load_n(gates, lanes), f = load_n(gates + s.H, lanes);
      const Vec<float> g = load_n(gates + 2 * s.H, lanes), o = load_n(gates + 3 * s.H, lanes);
      const Vec<float> squashed_cell =
          cheap_tanh(load_n(static_cast<const S*>(a.cells) + at * s.H + unit, lanes));
      const Vec<float> dm =
          load(dh + r * c_stride + unit) + arriving(a.grad_output, at * a.grad_output_step + unit);
      const Vec<float> dc_total = load(dc + r * c_stride + unit) +
                                  arriving(a.grad_cells, at * s.H + unit) +
                                  dm * o * (1.0f - squashed_cell * squashed_cell);
      Vec<float> d_i = dc_total * g, d_g = dc_total * i, d_o = dm * squashed_cell, d_f{};
      if (c_before != nullptr) d_f = dc_total * load_n(c_before + unit, lanes);
      if (a.grad_gates != nullptr) {
        d_i += arriving(a.grad_gates, gate);
        d_f += arriving(a.grad_gates, gate + s.H);
        d_g += arriving(a.grad_gates, gate + 2 * s.H);
        d_o += arriving(a.grad_gates, gate + 3 * s.H);
      }
      S* out = dz + (n + r) * dz_stride + u * kPanel + l;
      store(out, first_lanes(d_i * i * (1.0f - i), lanes));
      store(out + kBlock, first_lanes(d_f * f * (1.0f - f), lanes));
      store(out + 2 * kBlock, first_lanes(d_g * (1.0f - g * g), lanes));
      store(out + 3 * kBlock, first_lanes(d_o * o * (1.0f - o), lanes));
      store(dc + r * c_stride + unit, cut ? Vec<float>{} : dc_total * f);
    }
  }

  // This thread's share of where the chunk's x_t and h_{t-1} lie; null is zero.
  void note_rows(int64_t t, int64_t n) {
    const Share some = share(s.active[t], thread, threads);
    for (int64_t r = some.begin; r < some.end; ++r) {
      chunk_index[n + r] = index(t, r);
      x_row[n + r] = static_cast<const S*>(a.input) + index(t, r) * s.I;
      h_row[n + r] = is_cut(s, t, r) ? nullptr : previous<S>(a.output, a.hx, t, r, s.H);
    }
  }

  // transposed[column][row] of the chunk's n rows, zeros up to a whole block of rows.
  void transpose_operands(int64_t n) {
    const Share blocks = share(columns / kBlock, thread, threads);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const bool of_x = b * kBlock < columns_x;
      const int64_t column = b * kBlock - (of_x ? 0 : columns_x), width = of_x ? s.I : s.H;
      const S* const* rows = of_x ? x_row : h_row;
      const auto at = [&](int64_t i) {
        return i < n && rows[i] != nullptr ? rows[i] + column : nullptr;
      };
      transpose_rows(transposed + b * kBlock * capacity, capacity, n, width - column, at);
    }
  }

  void weight_gradients(int64_t n, bool fresh, bool final) {
    const Share some = share(gate_blocks, thread, threads);
    for (int64_t k = some.begin; k < some.end; ++k) {
      pair_rows(k, n, fresh);
      if (final && a.grad_bias != nullptr)
        for (int i = 0; i < 2 * kBlock; i += L)
          store_n(static_cast<S*>(a.grad_bias) + first_gate(k, i) + i % kBlock,
                  load(bias + k * 2 * kBlock + i), static_cast<int>(lanes_of(k) - i % kBlock));
      for (int64_t column = 0; column < columns; column += 2 * kBlock) {
        float* sums = dw + (k * columns + column) * 2 * kBlock;
        const RowGroup g = {column, 2 * kBlock, {column, column + kBlock}, true};
        float* to = final ? staging : sums;
        sum_products(g, {{dz_pairs, 0, transposed, capacity, dz_pairs.depth}},
                     fresh ? nullptr : sums, 2 * kBlock, to, 2 * kBlock, kNothing);
        if (final) store_gradient(k, column, to);
      }
    }
  }

  // Of a block of dz's columns: the first one's row of the weights' gradients for its i-th column's
  // gate, and how many of its units exist.
  int64_t first_gate(int64_t k, int i) const {
    return (k % 2 * 2 + i / kBlock) * s.H + k / 2 * kBlock;
  }
  int64_t lanes_of(int64_t k) const { return min<int64_t>(kBlock, s.H - k / 2 * kBlock); }

  // Pairs of the chunk's rows of 32 columns of dz, and their sum, which is the bias's gradient.
  void pair_rows(int64_t k, int64_t n, bool fresh) {
    dz_pairs.depth = ceil_div(n, kDepth);
    for (int column = 0; column < 2 * kBlock; column += L) {
      const S* from = dz + k * kDepth + column;
      float* total = bias + k * 2 * kBlock + column;
      Vec<float> sum = fresh ? Vec<float>{} : load(total);
      for (int64_t i = 0; i < dz_pairs.depth * kBlock; ++i) {
        Vec<float> even{}, odd{};
        if (2 * i < n) even = load(from + 2 * i * dz_stride);
        if (2 * i + 1 < n) odd = load(from + (2 * i + 1) * dz_stride);
        sum += even + odd;
        const UintVec pairs = pairs_of(even, odd);
        S* to = dz_pairs.tile(0, i / kBlock, column / kBlock) + i % kBlock * kDepth;
        __builtin_memcpy(to + column % kBlock * 2, &pairs, sizeof pairs);
      }
      store(total, sum);
    }
    tiles_fence();
  }

  // sums [32 columns of x or h][2 gates][16 units]
  void store_gradient(int64_t k, int64_t column, const float* sums) {
    const bool of_x = column < columns_x;
    const int64_t width = of_x ? s.I : s.H;
    if (!of_x) column -= columns_x;
    S* gradient = static_cast<S*>(of_x ? a.grad_weight_ih : a.grad_weight_hh);
    for (int block = 0; block < 4; ++block) {
      const int64_t from = column + block / 2 * kBlock;
      if (from >= width) return;
      alignas(64) float square[kBlock][kBlock], rows[kBlock][kBlock];
      for (int i = 0; i < kBlock; ++i)
        __builtin_memcpy(square[i],
                         sums + (block / 2 * kBlock + i) * 2 * kBlock + block % 2 * kBlock,
                         sizeof square[i]);
      transpose_tile(square, rows[0], kBlock);
      for (int64_t i = 0; i < lanes_of(k); ++i)
        store_row(gradient + (first_gate(k, block % 2 * kBlock) + i) * width + from, rows[i],
                  min<int64_t>(kBlock, width - from));
    }
  }

  void input_gradients(int64_t n) {
    const int64_t most = wide ? kBlock : 2 * kBlock;
    const Share some = share(ceil_div(n, most), thread, threads);
    for (int64_t v = 0; v < panels_x; ++v)
      for (int64_t first = some.begin * most, end = min(some.end * most, n); first < end;) {
        const RowGroup g = row_group(first, end, wide);
        sum_products(g, {{input_panels, v, dz, dz_stride, gate_blocks}}, nullptr, 0, staging,
                     kPanel, kNothing);
        for (int64_t i = g.first; i < g.first + g.count; ++i)
          store_row(static_cast<S*>(a.grad_input) + chunk_index[i] * s.I + v * kPanel,
                    staging + (i - g.block[0]) * kPanel, min<int64_t>(kPanel, s.I - v * kPanel));
        first += g.count;
      }
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::BFloat16, Backward, Shape, Plan>::table;

}  // namespace seqmem::lstm
