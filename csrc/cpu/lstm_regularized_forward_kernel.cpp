// Forward of the LSTM with zoneout and layer normalisation. Formulas:
// csrc/autograd/lstm_regularized.cpp.
//
//   prepare     as lstm_forward_kernel.cpp; the norms' parameters by vectors of units
//   for each chunk of steps:
//     project   x = W_ih x of all its rows (plus the biases without norms), vectors of units by
//     rows for each step:
//       without norms, for each vector of units: z = x + W_hh h, gates, c and h, at once
//       with norms, "|" a barrier where threads share units:
//         1  v = W_hh h, its sums  |
//         2  z = N(x) + N(v) + b; gates; the new c and its sums; c mixed with the c before  |
//         3  h = o tanh(N(c)), mixed with the h before
//
// x of a chunk and v of a step stay in L2. Weights are packed (lstm_packed.h), but for a step of
// less than a vector of rows, which would not repay it (lstm_dots.h).
#include "../common/gemm.h"
#include "../common/products.h"
#include "lstm_dots.h"
#include "lstm_forward_rows.h"
#include "lstm_packed.h"
#include "lstm_regularized_rows.h"

namespace seqmem::lstm_regularized {
namespace {

template <class S>
class ForwardRun : KernelRun<Forward, Walk> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;

  const bool norms = a.norms.gain_ih != nullptr, dots = !plan.pack && s.B < L;
  const int64_t units = ceil_div(s.H, L);
  const Share mine = units_of(units);
  const int64_t chunk_rows = min(plan.chunk, s.T) * most_rows;  // at most
  const Valid<C> valid{s.H};

  InputRows<S> inputs{s, a.layer};
  StateRows<S> state{s, a.layer, *this};
  PackedWeight<S> weight_ih{s.H, s.I}, weight_hh{s.H, s.H};
  ZoneoutRows<C> zoneout_h{a.zoneout_h}, zoneout_c{a.zoneout_c};
  RowMoments<C> of_x{s.H, 4}, of_v{s.H, 4}, of_c{s.H, 1};
  // Shared by all threads: [units][gate][lane], [units][lane].
  C *bias, *gain_ih, *gain_hh, *gain_c, *shift_c;
  // This thread's own, by its vectors of units: [..][rows of the chunk][gate][lane],
  // [..][rows][gate][lane], [..][rows][lane].
  C *x, *v, *fresh, *open;

 public:
  using KernelRun<Forward, Walk>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    state.place(take);
    bias = take.array<C>(units * W);
    gain_ih = take.array<C>(norms ? units * W : 0);
    gain_hh = take.array<C>(norms ? units * W : 0);
    gain_c = take.array<C>(norms ? units * L : 0);
    shift_c = take.array<C>(norms ? units * L : 0);
    if (!dots) weight_ih.place(take, units);
    if (!dots) weight_hh.place(take, units);
    if (!plan.by_rows) place_parts(take);
    take.per_thread(thread, threads, [&] {
      const int64_t my_units = plan.by_rows ? units : ceil_div(units, threads);
      if (plan.by_rows) place_parts(take);
      inputs.place(take, chunk_rows);
      state.place_rows(take, most_rows);
      zoneout_h.place(take, most_rows);
      zoneout_c.place(take, most_rows);
      x = take.array<C>(my_units * chunk_rows * W);
      if (!norms) return;
      of_x.place_totals(take, chunk_rows);
      of_v.place_totals(take, most_rows);
      of_c.place_totals(take, most_rows);
      v = take.array<C>(my_units * most_rows * W);
      fresh = take.array<C>(my_units * most_rows * L);
      open = take.array<C>(my_units * most_rows * L);
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
      project(n);
      n = 0;
      for (int64_t step = first; step < last; ++step) {
        n += run_step(step, n);
        meet();
      }
    }
  }

 private:
  void place_parts(Carver& take) {
    if (!norms) return;
    of_x.place_parts(take, chunk_rows);
    of_v.place_parts(take, most_rows);
    of_c.place_parts(take, most_rows);
  }

  C* x_of(int64_t u, int64_t row) const { return x + ((u - mine.begin) * chunk_rows + row) * W; }
  C* v_of(int64_t u, int64_t j) const { return v + ((u - mine.begin) * most_rows + j) * W; }
  int64_t unit_of(int64_t u, int64_t j) const { return ((u - mine.begin) * most_rows + j) * L; }

  void prepare() {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      add_biases<S>(bias + u * W, u, s.H, a.layer);
      if (!dots) weight_ih.pack(u, static_cast<const S*>(a.layer.weight_ih));
      if (!dots) weight_hh.pack(u, static_cast<const S*>(a.layer.weight_hh));
      if (!norms) continue;
      load_gates<S>(gain_ih + u * W, a.norms.gain_ih, 4, u, s.H);
      load_gates<S>(gain_hh + u * W, a.norms.gain_hh, 4, u, s.H);
      load_gates<S>(gain_c + u * L, a.norms.gain_c, 1, u, s.H);
      load_gates<S>(shift_c + u * L, a.norms.shift_c, 1, u, s.H);
    }
    state.start(thread, threads);
  }

  void project(int64_t n) {
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const C* start = bias + u * W;
      multiply(weight_ih, {inputs.from(0), a.layer.weight_ih, s.I}, u, n, x_of(u, 0),
               [&](int g, const C*) { return norms ? Vec<C>{} : load(start + g * L); });
      if (norms) put_gates(of_x, u, n, x_of(u, 0));
    }
    if (!norms) return;
    meet();
    of_x.finish(n);
  }

  // to[n][4][lanes] = start plus the product of n rows, by the weight packed or not.
  template <class Start>
  void multiply(const PackedWeight<S>& packed, const RowsTimes<S>& product, int64_t u, int64_t n,
                C* to, const Start& start_of) {
    if (!dots) return packed.multiply(u, n, product.rows, to, start_of);
    for_row_blocks<C>(n, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      Vec<C> gates[R][4];
      dot_gates<R, S>(u, s.H, start, gates, product);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) {
        C* here = to + (start + r) * W + g * L;
        store(here, start_of(g, here) + gates[r][g] * valid(u));
      }
    });
  }

  void put_gates(RowMoments<C>& moments, int64_t u, int64_t rows, const C* from) {
    for (int64_t j = 0; j < rows; ++j, from += W) {
      const Vec<C> gates[4] = {load(from), load(from + L), load(from + 2 * L), load(from + 3 * L)};
      moments.template put<4>(u, j, gates, valid(u));
    }
  }

  // n: where this step's rows begin among the chunk's. Returns how many rows were active.
  int64_t run_step(int64_t step, int64_t n) {
    const int64_t t = time_of(step);
    const int64_t count = active(t), own = mine.end - mine.begin;
    state.enter(step, t, count);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t number = t * s.B + s.order[row(j)];
      zoneout_h.enter(j, number);
      zoneout_c.enter(j, number);
    }
    const RowsTimes<S> hidden = {state.hidden(), a.layer.weight_hh, s.H};
    for (int64_t i = 0; i < own; ++i) {
      const int64_t u = mine.begin + zigzag(step, i, own);
      if (norms) {
        multiply(weight_hh, hidden, u, count, v_of(u, 0), [](int, const C*) { return Vec<C>{}; });
        put_gates(of_v, u, count, v_of(u, 0));
      } else {
        multiply(weight_hh, hidden, u, count, x_of(u, n),
                 [](int, const C* so_far) { return load(so_far); });
        for_row_blocks<C>(count, [&](auto block, int64_t start) {
          finish_plain<decltype(block)::value>(t, n, start, u);
        });
      }
    }
    if (norms) run_norms(t, n, count);
    return count;
  }

  void run_norms(int64_t t, int64_t n, int64_t count) {
    meet();
    of_v.finish(count);
    for (int64_t u = mine.begin; u < mine.end; ++u)
      for (int64_t j = 0; j < count; ++j) update_cell(t, n, j, u);
    meet();
    of_c.finish(count);
    for (int64_t u = mine.begin; u < mine.end; ++u)
      for_row_blocks<C>(count, [&](auto block, int64_t start) {
        update_hidden<decltype(block)::value>(t, start, u);
      });
    if (a.saved.scales == nullptr || mine.begin != 0) return;
    for (int64_t j = 0; j < count; ++j) {
      C* to = static_cast<C*>(a.saved.scales) + state.index(j) * 3;
      to[0] = of_x.b[n + j], to[1] = of_v.b[j], to[2] = of_c.b[j];
    }
  }

  // Gates from their pre-activations, saved; returns the new c, not mixed yet.
  SEQMEM_INLINE Vec<C> cell_of(int64_t j, int64_t u, const Vec<C> (&pre)[4], Vec<C>& o) {
    const Vec<C> arguments[4] = {sigmoid_argument<C>(pre[0]), sigmoid_argument<C>(pre[1]),
                                 tanh_argument<C>(pre[2]), sigmoid_argument<C>(pre[3])};
    ExpParts<C> e[4];
    exp_parts<4, C>(arguments, e);
    const Vec<C> i = sigmoid_of<C>(e[0]), f = sigmoid_of<C>(e[1]), g = tanh_of<C>(e[2]);
    o = sigmoid_of<C>(e[3]);
    state.save_gates(j, u, i, f, g, o);
    return sum_of_products(f, load(state.cell(j) + u * L), i, g);
  }

  SEQMEM_INLINE void mix_cell(int64_t t, int64_t j, int64_t u, Vec<C> cell) {
    state.set_cell(t, j, u, zoneout_c.mix(j, u, load(state.cell(j) + u * L), cell));
  }
  SEQMEM_INLINE void mix_hidden(int64_t t, int64_t j, int64_t u, Vec<C> hidden) {
    state.set_hidden(t, j, u, zoneout_h.mix(j, u, load(state.hidden()[j] + u * L), hidden));
  }

  template <int R>
  SEQMEM_INLINE void finish_plain(int64_t t, int64_t n, int64_t start, int64_t u) {
    Vec<C> o[R], argument[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const C* z = x_of(u, n + start + r);
      const Vec<C> pre[4] = {load(z), load(z + L), load(z + 2 * L), load(z + 3 * L)};
      const Vec<C> cell = cell_of(start + r, u, pre, o[r]);
      argument[r] = tanh_argument<C>(cell);
      mix_cell(t, start + r, u, cell);
    }
    ExpParts<C> e[R];
    exp_parts<R, C>(argument, e);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) mix_hidden(t, start + r, u, o[r] * tanh_of<C>(e[r]));
  }

  SEQMEM_INLINE void update_cell(int64_t t, int64_t n, int64_t j, int64_t u) {
    const C *xs = x_of(u, n + j), *vs = v_of(u, j);
    const Vec<C> x_mean = splat(of_x.a[n + j]), x_scale = splat(of_x.b[n + j]);
    const Vec<C> v_mean = splat(of_v.a[j]), v_scale = splat(of_v.b[j]);
    Vec<C> pre[4], x_hat[4], v_hat[4], o;
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      x_hat[g] = (load(xs + g * L) - x_mean) * x_scale;
      v_hat[g] = (load(vs + g * L) - v_mean) * v_scale;
      pre[g] = sum_of_products(load(gain_ih + u * W + g * L), x_hat[g],
                               load(gain_hh + u * W + g * L), v_hat[g]) +
               load(bias + u * W + g * L);
    }
    save(a.saved.x, j, u, x_hat);
    save(a.saved.v, j, u, v_hat);
    const Vec<C> cell[1] = {cell_of(j, u, pre, o)};
    of_c.template put<1>(u, j, {cell[0] * valid(u)}, valid(u));
    store(fresh + unit_of(u, j), cell[0]);
    store(open + unit_of(u, j), o);
    mix_cell(t, j, u, cell[0]);
  }

  // Vector u of row j, of G values a unit.
  template <int G>
  SEQMEM_INLINE void save(void* to, int64_t j, int64_t u, const Vec<C> (&values)[G]) {
    if (to == nullptr) return;
    const int n = static_cast<int>(min<int64_t>(L, s.H - u * L));
    S* out = static_cast<S*>(to) + state.index(j) * G * s.H + u * L;
    SEQMEM_UNROLL
    for (int g = 0; g < G; ++g) store_n(out + g * s.H, values[g], n);
  }

  template <int R>
  SEQMEM_INLINE void update_hidden(int64_t t, int64_t start, int64_t u) {
    const Vec<C> gain = load(gain_c + u * L), shift = load(shift_c + u * L);
    Vec<C> argument[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const int64_t j = start + r;
      const Vec<C> c_hat[1] = {(load(fresh + unit_of(u, j)) - of_c.a[j]) * of_c.b[j]};
      save(a.saved.c, j, u, c_hat);
      argument[r] = tanh_argument<C>(c_hat[0] * gain + shift);
    }
    ExpParts<C> e[R];
    exp_parts<R, C>(argument, e);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<C> o = load(open + unit_of(u, start + r));
      mix_hidden(t, start + r, u, o * tanh_of<C>(e[r]));
    }
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::lstm_regularized
