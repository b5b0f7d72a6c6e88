// LSTM forward over a whole sequence.
//
// Weights are packed into panels of one vector of units by kGates gates. Six rows by two vectors
// is the tile that asks least of the second cache, where the panels lie: a pass of all rows over a
// narrow panel finds it in the first. The gates of a vector of units meet in z, still cached.
#include "../common/gemm.h"
#include "lstm_common.h"
#include "lstm_kernel.h"
#include "lstm_turned.h"

namespace seqmem::lstm {
namespace {

constexpr int kRows = 6, kGates = SEQMEM_VEC_BYTES == 64 ? 4 : 2;

template <class S>
class ForwardRun : Walk {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;       // all gates of a vector of units
  static constexpr int V = kGates * L;  // a panel's width
  static constexpr bool copies_inputs = !std::is_same_v<S, C>;

  const Plan& plan;
  const Forward& a;
  const int thread, threads;
  SpinBarrier& barrier;

  const int64_t units;   // vectors of units, all
  const int64_t Hs, Ps;  // H and P rounded up to vectors
  const bool turns;      // a batch meets unpacked weights: decided by B alone, so that a row's bits
                         // do not depend on how rows are shared out
  Share mine;            // this thread's vectors of units
  int64_t capacity;      // rows of a chunk

  // Shared by all threads.
  C *h[2], *c, *zeros, *panel_ih, *panel_hh, *bias, *squashed, *panel_hr;
  // This thread's own.
  C *z, *x_copy;
  const C **x_row, **h_row, **c_row;
  int64_t* row_index;
  Turned<C> turned;

 public:
  ForwardRun(const Shape& s, const Plan& plan, const Forward& a, int thread, int threads,
             SpinBarrier& barrier)
      : Walk(s, plan, thread, threads),
        plan(plan),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        units(ceil_div(s.H, L)),
        Hs(units * L),
        Ps(ceil_div(s.P, L) * L),
        turns(!plan.pack && !copies_inputs && s.B >= L) {
    mine = plan.by_rows ? Share{0, units} : share(units, thread, threads);
    capacity = min(plan.chunk, s.T) * (plan.by_rows ? ceil_div(s.B, threads) : s.B);
  }

  // Places all buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    h[0] = take.array<C>(s.B * Ps);
    h[1] = take.array<C>(s.B * Ps);
    c = take.array<C>(s.B * Hs);
    zeros = take.array<C>(max(Ps, Hs));
    bias = take.array<C>(units * W);
    panel_ih = take.array<C>(plan.pack ? units * s.I * W : 0);
    panel_hh = take.array<C>(plan.pack ? units * s.P * W : 0);
    squashed = take.array<C>(s.projected ? s.B * Hs : 0);
    panel_hr = take.array<C>(s.projected ? Ps * s.H : 0);
    const int64_t my_rows = plan.by_rows ? ceil_div(s.B, threads) : s.B;
    const int64_t my_units = plan.by_rows ? units : ceil_div(units, threads);
    for (int i = 0; i < threads; ++i) {
      C* own_z = take.array<C>(plan.pack ? capacity * my_units * W : 0);
      C* own_copy = take.array<C>(copies_inputs ? capacity * s.I : 0);
      auto own_x = take.array<const C*>(capacity);
      auto own_h = take.array<const C*>(my_rows);
      auto own_c = take.array<const C*>(my_rows);
      auto own_index = take.array<int64_t>(my_rows);
      Turned<C> own_turned;
      if (turns) own_turned.place(take, my_rows, s.I, s.P);
      if (i != thread) continue;
      z = own_z, x_copy = own_copy, x_row = own_x, h_row = own_h, c_row = own_c;
      row_index = own_index, turned = own_turned;
    }
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    for (int64_t first = 0; first < s.T; first += plan.chunk) {
      const int64_t last = min(first + plan.chunk, s.T);
      int64_t n = 0;
      for (int64_t step = first; step < last; ++step) n += gather_inputs(time_of(step), n);
      if (plan.pack) project_inputs(n);
      n = 0;
      for (int64_t step = first; step < last; ++step) {
        n += run_step(step, n);
        if (!plan.by_rows) barrier.wait();
      }
    }
  }

 private:
  // ---- before the first step
  // ---------------------------------------------------------------------

  void prepare() {
    const Share packed = share(units, thread, threads);
    for (int64_t u = packed.begin; u < packed.end; ++u) {
      pack_bias(u);
      if (!plan.pack) continue;
      pack_panel(panel_ih + u * s.I * W, static_cast<const S*>(a.weight_ih), u, s.I);
      pack_panel(panel_hh + u * s.P * W, static_cast<const S*>(a.weight_hh), u, s.P);
    }
    if (s.projected) pack_projection();
    if (thread == 0)
      for (int64_t i = 0; i < max(Ps, Hs); ++i) zeros[i] = 0;
    for (int64_t r = thread; r < s.B; r += threads) {
      copy_padded(h[0] + r * Ps, at_row(static_cast<const S*>(a.hx), s.order[r] * s.P), s.P, Ps);
      copy_padded(h[1] + r * Ps, at_row(static_cast<const S*>(a.hx), s.order[r] * s.P), s.P, Ps);
      copy_padded(c + r * Hs, at_row(static_cast<const S*>(a.cx), s.order[r] * s.H), s.H, Hs);
      if (r >= s.active[0]) {  // an empty sequence hands its state on
        store_row(static_cast<S*>(a.hy) + s.order[r] * s.P, h[0] + r * Ps, s.P);
        store_row(static_cast<S*>(a.cy) + s.order[r] * s.H, c + r * Hs, s.H);
      }
    }
  }

  void pack_bias(int64_t u) {
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * s.H + u * L;
      const int n = static_cast<int>(s.H - u * L);
      Vec<C> b{};
      if (a.bias_ih != nullptr) b += load_n(static_cast<const S*>(a.bias_ih) + at, n);
      if (a.bias_hh != nullptr) b += load_n(static_cast<const S*>(a.bias_hh) + at, n);
      store(bias + u * W + g * L, b);
    }
  }

  // panel[gate / kGates][k][gate % kGates][lane] = weight[gate * H + u * L + lane][k], zero beyond
  // the last unit.
  void pack_panel(C* panel, const S* weight, int64_t u, int64_t K) {
    const int64_t lanes = min<int64_t>(L, s.H - u * L);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const S* from = weight + (g * s.H + u * L) * K;
      C* to = panel + g / kGates * K * V + g % kGates * L;
      pack_transposed(to, V, from, K, lanes, K);
    }
  }

  // panel_hr[block][k][lane] = weight_hr[block * L + lane][k]
  void pack_projection() {
    const S* weight = static_cast<const S*>(a.weight_hr);
    const Share blocks = share(Ps / L, thread, threads);
    for (int64_t p = blocks.begin * L; p < blocks.end * L; ++p)
      for (int64_t k = 0; k < s.H; ++k)
        panel_hr[(p / L * s.H + k) * L + p % L] = p < s.P ? widen_one(weight[p * s.H + k]) : C(0);
  }

  // ---- the input's share of the gates, for a chunk of steps
  // -----------------------------------------

  // Collects the input rows alive at time t at position n of x_row; returns how many.
  int64_t gather_inputs(int64_t t, int64_t n) {
    const int64_t count = alive(t);
    for (int64_t j = 0; j < count; ++j) {
      const S* x = static_cast<const S*>(a.input) + index(t, row(j)) * s.I;
      if constexpr (copies_inputs) {
        C* copy = x_copy + (n + j) * s.I;
        for (int64_t i = 0; i < s.I; i += L) {
          const int lanes = static_cast<int>(s.I - i);
          store_n(copy + i, load_n(x + i, lanes), lanes);
        }
        x_row[n + j] = copy;
      } else {
        x_row[n + j] = x;
      }
    }
    return count;
  }

  C* z_at(int64_t n, int64_t u) const { return z + ((u - mine.begin) * capacity + n) * W; }

  // A vector of units' gates of n rows, from `first` on: start(gate, row) plus a row times a panel.
  template <class Start>
  SEQMEM_INLINE void multiply_panel(int64_t u, int64_t first, int64_t n, const C* const* row,
                                    int64_t K, const C* panel, const Start& start_of) {
    if (n <= kTileRows<C>) return multiply_panels<4 / kGates>(u, first, n, row, K, panel, start_of);
    for (int g = 0; g < 4; g += kGates, panel += K * V) {
      for_row_blocks<C, kRows>(n, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        C* to = z_at(first + start, u) + g * L;
        Vec<C> acc[R][kGates];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int v = 0; v < kGates; ++v) acc[r][v] = start_of(g + v, to + r * W + v * L);
        tile_multiply<R, kGates, C>(K, row + start, 1, panel, L, V, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int v = 0; v < kGates; ++v) store(to + r * W + v * L, acc[r][v]);
      });
    }
  }

  // The same for rows too few to fill a tile with one panel's sums: all P panels at once.
  template <int P, class Start>
  SEQMEM_INLINE void multiply_panels(int64_t u, int64_t first, int64_t n, const C* const* row,
                                     int64_t K, const C* panel, const Start& start_of) {
    for_row_blocks<C>(n, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      C* to = z_at(first + start, u);
      Vec<C> acc[R][P][kGates];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) acc[r][g / kGates][g % kGates] = start_of(g, to + r * W + g * L);
      panels_multiply(K, row + start, panel, K * V, V, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) store(to + r * W + g * L, acc[r][g / kGates][g % kGates]);
    });
  }

  void project_inputs(int64_t n) {
    for (int64_t u = mine.begin; u < mine.end; ++u)
      multiply_panel(u, 0, n, x_row, s.I, panel_ih + u * s.I * W,
                     [&](int g, const C*) { return load(bias + u * W + g * L); });
  }

  // ---- one step
  // ------------------------------------------------------------------------------------

  // n: where this step's rows begin among the chunk's. Returns how many rows were alive.
  int64_t run_step(int64_t step, int64_t n) {
    const int64_t t = time_of(step);
    const int64_t count = alive(t);
    for (int64_t j = 0; j < count; ++j) {
      const bool cut = is_cut(s, t, row(j));
      row_index[j] = index(t, row(j));
      h_row[j] = cut ? zeros : h[step & 1] + row(j) * Ps;
      c_row[j] = cut ? zeros : c + row(j) * Hs;
    }
    C* next = h[(step + 1) & 1];
    const int64_t pairs = plan.pack && count == 1 ? (mine.end - mine.begin) / 2 : 0;
    for (int64_t i = 0; i < pairs; ++i)
      step_one_row(t, n, mine.begin + 2 * zigzag(step, i, pairs), next);
    if constexpr (!copies_inputs)
      if (turns) turned.turn(x_row + n, s.I, h_row, s.P, count);
    const int64_t rest = mine.begin + 2 * pairs, left = mine.end - rest;
    for (int64_t i = 0; i < left; ++i) {
      const int64_t u = rest + zigzag(step, i, left);
      if constexpr (!copies_inputs)
        if (turns) {
          step_turned(t, count, u, next);
          continue;
        }
      if (plan.pack)
        multiply_panel(u, n, count, h_row, s.P, panel_hh + u * s.P * W,
                       [](int, const C* so_far) { return load(so_far); });
      for_row_blocks<C>(count, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        Vec<C> acc[R][4];
        if (plan.pack) {
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int g = 0; g < 4; ++g) acc[r][g] = load(z_at(n + start + r, u) + g * L);
        } else {
          dot_gates<R>(u, x_row + n + start, h_row + start, acc);
        }
        finish_rows<R>(t, start, u, acc, next);
      });
    }
    if (s.projected) {
      for_row_blocks<C>(count, [&](auto block, int64_t start) {
        project_hidden<decltype(block)::value>(t, start, next);
      });
    }
    return count;
  }

  // One vector of units of a step, rows in the lanes.
  void step_turned(int64_t t, int64_t count, int64_t u, C* next) {
    turned.multiply(static_cast<const C*>(a.weight_ih) + u * L * s.I, s.I,
                    static_cast<const C*>(a.weight_hh) + u * L * s.P, s.P, bias + u * W, s.H,
                    min<int64_t>(L, s.H - u * L), count);
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      Vec<C> acc[R][4];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) acc[r][g] = turned.at(start + r, g);
      finish_rows<R>(t, start, u, acc, next);
    });
  }

  // Two vectors of units of a step with a single row.
  SEQMEM_INLINE void step_one_row(int64_t t, int64_t n, int64_t u, C* next) {
    constexpr int panels = 4 / kGates;  // of a vector of units
    Vec<C> acc[1][2 * panels][kGates];
    SEQMEM_UNROLL
    for (int p = 0; p < 2 * panels; ++p) SEQMEM_UNROLL
    for (int v = 0; v < kGates; ++v)
      acc[0][p][v] = load(z_at(n, u + p / panels) + (p % panels * kGates + v) * L);
    panels_multiply(s.P, h_row, panel_hh + u * s.P * W, s.P * V, V, acc);
    SEQMEM_UNROLL
    for (int p = 0; p < 2; ++p) {
      Vec<C> pre[1][4];
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) pre[0][g] = acc[0][p * panels + g / kGates][g % kGates];
      finish_rows<1>(t, 0, u + p, pre, next);
    }
  }

  // The gates' pre-activations straight from the weights as they lie.
  template <int R>
  SEQMEM_INLINE void dot_gates(int64_t u, const C* const* x, const C* const* hidden,
                               Vec<C> (&acc)[R][4]) {
    constexpr int Q =
        R == 1 && L >= 8 ? 2 : 1;  // fours of units: one row needs more sums in flight
    constexpr int room = (L + 3) / 4 * 4;
    C out[R][4][room];
    Vec<C> nothing[1];
    start_sums(nothing);
    for (C* p = out[0][0]; p < out[0][0] + R * 4 * room; p += L) store(p, nothing[0]);
    const int64_t lanes = min<int64_t>(L, s.H - u * L);
    for (int g = 0; g < 4; ++g) {
      for (int64_t l = 0; l < lanes; l += 4 * Q) {
        const S *rows_ih[4 * Q], *rows_hh[4 * Q];
        SEQMEM_UNROLL
        for (int i = 0; i < 4 * Q; ++i) {
          const int64_t unit = g * s.H + min<int64_t>(u * L + l + i, s.H - 1);
          rows_ih[i] = static_cast<const S*>(a.weight_ih) + unit * s.I;
          rows_hh[i] = static_cast<const S*>(a.weight_hh) + unit * s.P;
        }
        Vec<C> sums[R][4 * Q];
        start_sums(sums);
        tile_dot<R, 4 * Q, C, S>(s.I, x, rows_ih, sums);
        tile_dot<R, 4 * Q, C, S>(s.P, hidden, rows_hh, sums);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int q = 0; q < Q; ++q) {
          const Vec<C> four[4] = {sums[r][4 * q], sums[r][4 * q + 1], sums[r][4 * q + 2],
                                  sums[r][4 * q + 3]};
          store_sums4<C>(out[r][g] + l + 4 * q, four);
        }
      }
    }
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) acc[r][g] = load(out[r][g]) + load(bias + u * W + g * L);
  }

  // Activations, the new cell and the new hidden state of one vector of units, for R rows.
  template <int R>
  SEQMEM_INLINE void finish_rows(int64_t t, int64_t start, int64_t u, const Vec<C> (&pre)[R][4],
                                 C* next) {
    const int n = static_cast<int>(min<int64_t>(L, s.H - u * L));
    Vec<C> o[R], argument[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<C> arguments[4] = {sigmoid_argument<C>(pre[r][0]), sigmoid_argument<C>(pre[r][1]),
                                   tanh_argument<C>(pre[r][2]), sigmoid_argument<C>(pre[r][3])};
      ExpParts<C> e[4];
      exp_parts<4, C>(arguments, e);
      const Vec<C> i = sigmoid_of<C>(e[0]), f = sigmoid_of<C>(e[1]), g = tanh_of<C>(e[2]);
      o[r] = sigmoid_of<C>(e[3]);
      const Vec<C> cell = f * load(c_row[start + r] + u * L) + i * g;
      argument[r] = tanh_argument<C>(cell);
      const int64_t b = row(start + r), at = row_index[start + r];
      store(c + b * Hs + u * L, cell);
      if (a.gates != nullptr) {
        S* gates = static_cast<S*>(a.gates) + at * 4 * s.H + u * L;
        store_n(gates, i, n);
        store_n(gates + s.H, f, n);
        store_n(gates + 2 * s.H, g, n);
        store_n(gates + 3 * s.H, o[r], n);
      }
      if (a.cells != nullptr) store_n(static_cast<S*>(a.cells) + at * s.H + u * L, cell, n);
      if (a.cy != nullptr && is_last(s, t, b))
        store_n(static_cast<S*>(a.cy) + s.order[b] * s.H + u * L, cell, n);
    }
    ExpParts<C> e[R];
    exp_parts<R, C>(argument, e);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<C> hidden = o[r] * tanh_of<C>(e[r]);
      if (s.projected) {
        store(squashed + row(start + r) * Hs + u * L, hidden);
      } else {
        emit_hidden(t, start + r, u, hidden, next);
      }
    }
  }

  // Block b of the row's new h goes to the output and, as it was stored, to the next step.
  SEQMEM_INLINE void emit_hidden(int64_t t, int64_t j, int64_t b, Vec<C> hidden, C* next) {
    const int64_t r = row(j);
    const int n = static_cast<int>(min<int64_t>(L, s.P - b * L));
    store(next + r * Ps + b * L, rounded_to<S>(hidden));
    store_n(static_cast<S*>(a.output) + row_index[j] * s.P + b * L, hidden, n);
    if (a.hy != nullptr && is_last(s, t, r))
      store_n(static_cast<S*>(a.hy) + s.order[r] * s.P + b * L, hidden, n);
  }

  template <int R>
  SEQMEM_INLINE void project_hidden(int64_t t, int64_t start, C* next) {
    const C* from[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) from[r] = squashed + row(start + r) * Hs;
    for (int64_t b = 0; b < Ps / L; ++b) {
      Vec<C> acc[R][1];
      start_sums(acc);
      tile_multiply<R, 1, C>(s.H, from, 1, panel_hr + b * s.H * L, L, L, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) emit_hidden(t, start + r, b, acc[r][0], next);
    }
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape, Plan> forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::lstm
