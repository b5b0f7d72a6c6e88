// LSTM forward over a whole sequence. Formulas: csrc/autograd/lstm.cpp.
//
//   prepare     h, c [B, ..] from hx, cx; bias_ih + bias_hh; packed weights, shared out by units
//   for each chunk of steps:
//     gather    pointers to the chunk's input rows (copies, where they are stored in 16 bits)
//     project   z = bias + W_ih x for all of them at once                           Path::Packed
//     for each step, with a barrier after it if threads share units:
//       for each vector of units, its weights read once for all rows of the step:
//         1  pre-activations of its four gates [rows][4][lanes], by one of the paths below
//         2  i, f, g, o, c, h in registers; gates and cells stored for the backward
//       h = weight_hr h, row blocks by panels                                       if projected
//
//   path        when                             why
//   Packed      plan.pack: many steps, or a      packed weights stream at the full rate of the
//               step of many rows, reuse them    tiles (lstm_packed.h, which names its products)
//   Transposed  else, a vector of rows or more   full rate without packing: the rows are the lanes
//   Dots        else                             nothing is prepared (lstm_dots.h)
//
// The path depends on the call alone, so that a row's bits do not depend on how rows are shared
// out.
#include "../common/gemm.h"
#include "../common/products.h"
#include "lstm_dots.h"
#include "lstm_forward_rows.h"
#include "lstm_kernel.h"
#include "lstm_packed.h"
#include "lstm_transposed.h"

namespace seqmem::lstm {
namespace {

enum class Path { Packed, Transposed, Dots };

template <class S>
class ForwardRun : KernelRun<Forward, Walk> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;  // all gates of a vector of units
  static constexpr bool copies_inputs = !std::is_same_v<S, C>;

  const int64_t units = ceil_div(s.H, L);  // vectors of units, all
  const Path path = plan.pack                    ? Path::Packed
                    : !copies_inputs && s.B >= L ? Path::Transposed
                                                 : Path::Dots;
  const Share mine = units_of(units);
  const int64_t chunk_rows = min(plan.chunk, s.T) * most_rows;

  InputRows<S> inputs{s, a};
  StateRows<S> state{s, a, *this};
  PackedGates<S> packed{s};
  TransposedRows<C> transposed;
  // Shared by all threads.
  C* bias;                 // [W * units]
  C *squashed, *panel_hr;  // where projected: o * tanh c [B, H_pad], weight_hr in panels

 public:
  using KernelRun<Forward, Walk>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    state.place(take);
    bias = take.array<C>(units * W);
    if (path == Path::Packed) packed.place_panels(take, units);
    squashed = take.array<C>(s.projected ? s.B * state.H_pad : 0);
    panel_hr = take.array<C>(s.projected ? state.P_pad * s.H : 0);
    take.per_thread(thread, threads, [&] {
      if (path == Path::Packed) {
        const int64_t my_units = plan.by_rows ? units : ceil_div(units, threads);
        packed.place_gates(take, mine.begin, my_units, chunk_rows);
      }
      if (path == Path::Transposed) transposed.place(take, most_rows, s.I, s.P);
      inputs.place(take, chunk_rows);
      state.place_rows(take, most_rows);
    });
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    for (int64_t first = 0; first < s.T; first += plan.chunk) {
      const int64_t last = min(first + plan.chunk, s.T);
      int64_t n = 0;
      for (int64_t step = first; step < last; ++step) n += inputs.gather(*this, time_of(step), n);
      if (path == Path::Packed)
        for (int64_t u = mine.begin; u < mine.end; ++u)
          packed.project(u, n, inputs.from(0), bias + u * W);
      n = 0;
      for (int64_t step = first; step < last; ++step) {
        n += run_step(step, n);
        meet();
      }
    }
  }

 private:
  void prepare() {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      add_biases<S>(bias + u * W, u, s.H, a);
      if (path == Path::Packed)
        packed.pack(u, static_cast<const S*>(a.weight_ih), static_cast<const S*>(a.weight_hh));
    }
    if (s.projected) pack_projection();
    state.start(thread, threads);
  }

  // panel_hr[block][k][lane] = weight_hr[block * L + lane][k]
  void pack_projection() {
    const S* weight = static_cast<const S*>(a.weight_hr);
    const Share blocks = share(state.P_pad / L, thread, threads);
    for (int64_t p = blocks.begin * L; p < blocks.end * L; ++p)
      for (int64_t k = 0; k < s.H; ++k)
        panel_hr[(p / L * s.H + k) * L + p % L] = p < s.P ? widen_one(weight[p * s.H + k]) : C(0);
  }

  // n: where this step's rows begin among the chunk's. Returns how many rows were active.
  int64_t run_step(int64_t step, int64_t n) {
    const int64_t t = time_of(step);
    const int64_t count = active(t);
    state.enter(step, t, count);
    const int64_t pairs = path == Path::Packed && count == 1 ? (mine.end - mine.begin) / 2 : 0;
    for (int64_t i = 0; i < pairs; ++i)
      step_two_units(t, n, mine.begin + 2 * zigzag(step, i, pairs));
    if constexpr (!copies_inputs)
      if (path == Path::Transposed)
        transposed.load_rows(inputs.from(n), s.I, state.hidden(), s.P, count);
    const int64_t rest = mine.begin + 2 * pairs, left = mine.end - rest;
    for (int64_t i = 0; i < left; ++i) step_units(t, n, count, rest + zigzag(step, i, left));
    if (s.projected) {
      for_row_blocks<C>(count, [&](auto block, int64_t start) {
        project_hidden<decltype(block)::value>(t, start);
      });
    }
    return count;
  }

  // A vector of units of all rows.
  SEQMEM_INLINE void step_units(int64_t t, int64_t n, int64_t count, int64_t u) {
    if (path == Path::Packed) packed.add_hidden(u, n, count, state.hidden());
    if constexpr (!copies_inputs)
      if (path == Path::Transposed)
        transposed.multiply(static_cast<const C*>(a.weight_ih) + u * L * s.I, s.I,
                            static_cast<const C*>(a.weight_hh) + u * L * s.P, s.P, bias + u * W,
                            s.H, min<int64_t>(L, s.H - u * L), count);
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      Vec<C> pre[R][4];
      if (path == Path::Packed) {
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int g = 0; g < 4; ++g) pre[r][g] = load(packed.gates(u, n + start + r) + g * L);
      } else if (path == Path::Transposed) {
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int g = 0; g < 4; ++g) pre[r][g] = transposed.gate(start + r, g);
      } else {
        dot_gates<R, S>(u, s.H, start, pre, RowsTimes<S>{inputs.from(n), a.weight_ih, s.I},
                        RowsTimes<S>{state.hidden(), a.weight_hh, s.P});
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int g = 0; g < 4; ++g) pre[r][g] += load(bias + u * W + g * L);
      }
      finish_rows<R>(t, start, u, pre);
    });
  }

  // Two vectors of units of a step with a single row.
  SEQMEM_INLINE void step_two_units(int64_t t, int64_t n, int64_t u) {
    Vec<C> pre[2][1][4];
    packed.two_units(u, n, state.hidden(), pre);
    SEQMEM_UNROLL
    for (int i = 0; i < 2; ++i) finish_rows<1>(t, 0, u + i, pre[i]);
  }

  // Activations, the new cell and the new hidden state of one vector of units, for R rows.
  template <int R>
  SEQMEM_INLINE void finish_rows(int64_t t, int64_t start, int64_t u, const Vec<C> (&pre)[R][4]) {
    Vec<C> o[R], argument[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<C> arguments[4] = {sigmoid_argument<C>(pre[r][0]), sigmoid_argument<C>(pre[r][1]),
                                   tanh_argument<C>(pre[r][2]), sigmoid_argument<C>(pre[r][3])};
      ExpParts<C> e[4];
      exp_parts<4, C>(arguments, e);
      const Vec<C> i = sigmoid_of<C>(e[0]), f = sigmoid_of<C>(e[1]), g = tanh_of<C>(e[2]);
      o[r] = sigmoid_of<C>(e[3]);
      const Vec<C> cell = sum_of_products(f, load(state.cell(start + r) + u * L), i, g);
      argument[r] = tanh_argument<C>(cell);
      state.save_gates(start + r, u, i, f, g, o[r]);
      state.set_cell(t, start + r, u, cell);
    }
    ExpParts<C> e[R];
    exp_parts<R, C>(argument, e);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<C> hidden = o[r] * tanh_of<C>(e[r]);
      if (s.projected) {
        store(squashed + row(start + r) * state.H_pad + u * L, hidden);
      } else {
        state.set_hidden(t, start + r, u, hidden);
      }
    }
  }

  template <int R>
  SEQMEM_INLINE void project_hidden(int64_t t, int64_t start) {
    const C* from[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) from[r] = squashed + row(start + r) * state.H_pad;
    for (int64_t b = 0; b < state.P_pad / L; ++b) {
      Vec<C> acc[R][1];
      start_sums(acc);
      tile_multiply<R, 1, C>(s.H, from, 1, panel_hr + b * s.H * L, L, L, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) state.set_hidden(t, start + r, b, acc[r][0]);
    }
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::lstm
