// Backward of the LSTM with zoneout and layer normalisation. Formulas:
// csrc/autograd/lstm_regularized.cpp.
//
//   prepare      dh, dc [B, ..] from grad_hy, grad_cy; packed weights and parameters by units
//   for each chunk of steps, from the last one:
//     for each step, from the last one ("|" a barrier where threads share units; where they share
//     rows, passes 1 to 3 go over kRowsAtOnce rows at a time, whose values stay in L1):
//       1  y = tanh(N(c)), dn; with norms the sums of N's derivative  |
//       2  dc, dz, dc of the step before; with norms the sums for dv  |
//       3  with norms dv, the gradient of W_hh h
//       4  copies of x_t and h_{t-1} for the weights' sums  |
//       5  dh of the step before = dv W_hh + what zoneout kept
//     norms      dx, the gradient of W_ih x; sums of gains           lstm_regularized_sums.h
//     sums       of biases and weights                               lstm_backward_sums.h
//     input      grad_input = dx W_ih                                lstm_backward_products.h
//   finish       dh, dc are the gradients of hx, cx
//
// Without norms dx and dv are dz. A chunk's dz, dx and dv stay in L2 until their products are
// formed.
#include "../common/gemm.h"
#include "../common/products.h"
#include "lstm_backward_sums.h"
#include "lstm_common.h"
#include "lstm_regularized_rows.h"
#include "lstm_regularized_sums.h"

namespace seqmem::lstm_regularized {
namespace {

template <class S>
class BackwardRun : Walk {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr int64_t kRowsAtOnce = 4, kGroup = RowMeans<C>::kGroup;

  const Plan& plan;
  const Backward& call;
  const lstm::Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;

  const bool norms;
  const int64_t units, H_pad;         // vectors of units; H rounded up to vectors
  const int64_t my_rows, chunk_rows;  // at most
  const bool packs;
  const Valid<C> valid;
  Share mine;  // this thread's vectors of units

  // Shared by all threads.
  GateGradients<C> dz, dx, dv;
  WeightProduct<S> input_product, hidden_product;
  WeightSums<S> sums;
  NormSums<S> norm_sums;
  C *dh, *dc, *kept_h;  // [B, H_pad]; the last: what zoneout hands past the step
  NormVectors<C> parameters;
  int64_t* chunk_index;  // row indices of the chunk
  // This thread's own; the sums' parts are shared where units are.
  ZoneoutRows<C> zoneout_h, zoneout_c;
  RowMeans<C> of_v, of_c;
  C *input_rows, *y;  // y [rows, H_pad]
  int64_t* row_index;

 public:
  BackwardRun(const Shape& s, const Plan& plan, const Backward& call, int thread, int threads,
              SpinBarrier& barrier)
      : Walk(s, plan, thread, threads),
        plan(plan),
        call(call),
        a(call.layer),
        thread(thread),
        threads(threads),
        barrier(barrier),
        norms(call.norms.gain_ih != nullptr),
        units(ceil_div(s.H, L)),
        H_pad(units * L),
        my_rows(plan.by_rows ? ceil_div(s.B, threads) : s.B),
        chunk_rows(min(plan.chunk, s.T) * s.B),
        packs(plan.pack || !std::is_same_v<S, C> || s.I % L != 0 || s.H % L != 0),
        valid(s.H),
        dz(units),
        dx(units),
        dv(units),
        input_product(a.weight_ih, s.H, s.I, packs),
        hidden_product(a.weight_hh, s.H, s.H, packs),
        sums(s, a, dz, norms ? dx : dz, norms ? dv : dz),
        norm_sums(s, call, parameters, dz, dx),
        zoneout_h(call.zoneout_h),
        zoneout_c(call.zoneout_c),
        of_v(s.H, 4),
        of_c(s.H, 1) {
    // Whole groups of vectors: they are the columns of packed weights as well.
    mine = plan.by_rows ? Share{0, units} : share(ceil_div(units, kGroup), thread, threads);
    if (!plan.by_rows) mine = {mine.begin * kGroup, min(mine.end * kGroup, units)};
  }

  int64_t place(char* base) {
    Carver take(base);
    dh = take.array<C>(s.B * H_pad);
    dc = take.array<C>(s.B * H_pad);
    kept_h = take.array<C>(s.B * H_pad);
    dz.data = take.array<C>(chunk_rows * dz.stride);
    dx.data = take.array<C>(norms ? chunk_rows * dz.stride : 0);
    dv.data = take.array<C>(norms ? chunk_rows * dz.stride : 0);
    input_product.place(take);
    hidden_product.place(take);
    sums.place(take, chunk_rows);
    if (norms) norm_sums.place(take, chunk_rows);
    if (norms) parameters.place(take, units);
    chunk_index = take.array<int64_t>(chunk_rows);
    if (!plan.by_rows) place_parts(take);
    take.per_thread(thread, threads, [&] {
      if (plan.by_rows) place_parts(take);
      zoneout_h.place(take, my_rows);
      zoneout_c.place(take, my_rows);
      input_rows = take.array<C>((chunk_rows / threads + 1) * W);
      row_index = take.array<int64_t>(my_rows);
      y = take.array<C>(my_rows * H_pad);
      for (RowMeans<C>* each : {&of_v, &of_c})
        if (norms) each->place_totals(take, my_rows);
    });
    return take.used();
  }

  void run() {
    prepare();
    barrier.wait();
    bool first_chunk = true;
    for (int64_t last = s.T; last > 0; last -= plan.chunk) {
      const int64_t first = max<int64_t>(last - plan.chunk, 0);
      int64_t n = 0;
      for (int64_t step = last - 1; step >= first; --step) n += run_step(step, n);
      barrier.wait();
      if (norms && (a.grad_input != nullptr || a.grad_weight_ih != nullptr)) {
        norm_sums.rows(n, chunk_index, thread, threads);
        barrier.wait();
        norm_sums.add(n, first_chunk, thread, threads);
      }
      sums.add(n, first_chunk, thread, threads);
      if (a.grad_input != nullptr)
        input_product.multiply_rows(norms ? dx : dz, share(n, thread, threads), chunk_index,
                                    static_cast<S*>(a.grad_input), input_rows);
      first_chunk = false;
      barrier.wait();
    }
    for (int64_t r = thread; r < s.B; r += threads) {
      if (a.grad_hx != nullptr)
        store_row(static_cast<S*>(a.grad_hx) + s.order[r] * s.H, dh + r * H_pad, s.H);
      if (a.grad_cx != nullptr)
        store_row(static_cast<S*>(a.grad_cx) + s.order[r] * s.H, dc + r * H_pad, s.H);
    }
    sums.finish(thread, threads);
    if (call.grad_gain_ih != nullptr) norm_sums.finish(thread, threads);
  }

 private:
  void place_parts(Carver& take) {
    for (RowMeans<C>* each : {&of_v, &of_c})
      if (norms) each->place_parts(take, my_rows);
  }

  void meet() {
    if (!plan.by_rows) barrier.wait();
  }

  void prepare() {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      sums.clear(u);
      if (a.grad_input != nullptr) input_product.pack(u);
      hidden_product.pack(u);
      if (!norms) continue;
      load_gates<S>(parameters.gain_ih + u * W, call.norms.gain_ih, 4, u, s.H);
      load_gates<S>(parameters.gain_hh + u * W, call.norms.gain_hh, 4, u, s.H);
      load_gates<S>(parameters.gain_c + u * L, call.norms.gain_c, 1, u, s.H);
      load_gates<S>(parameters.shift_c + u * L, call.norms.shift_c, 1, u, s.H);
    }
    for (int64_t r = thread; r < s.B; r += threads) {
      load_row_or_zero(dh + r * H_pad, optional_row<S>(a.grad_hy, s.order[r], s.H), s.H);
      load_row_or_zero(dc + r * H_pad, optional_row<S>(a.grad_cy, s.order[r], s.H), s.H);
    }
  }

  // n: where this step's rows begin among the chunk's. Returns how many were active.
  int64_t run_step(int64_t step, int64_t n) {
    const int64_t t = time_of(step);
    const int64_t count = active(t);
    for (int64_t j = 0; j < count; ++j) {
      row_index[j] = index(t, row(j));
      const int64_t number = t * s.B + s.order[row(j)];
      zoneout_h.enter(j, number);
      zoneout_c.enter(j, number);
    }
    const int64_t at_once = plan.by_rows ? kRowsAtOnce : max<int64_t>(count, 1);
    for (int64_t j = 0; j < count; j += at_once) {
      const Share rows = {j, min(j + at_once, count)};
      if (norms)
        for (int64_t i = rows.begin; i < rows.end; ++i)
          fetch_row<S>(call.saved.v, row_index[i], 4 * s.H);
      for (int64_t i = rows.end; i < min(rows.end + at_once, count); ++i)
        fetch_row<S>(a.gates, row_index[i], 4 * s.H);
      differentiate_step(t, n, rows);
    }
    copy_operands(t, n);
    if (step == 0 && a.grad_hx == nullptr) return s.active[t];
    meet();
    const Share columns = plan.by_rows ? Share{0, units} : mine;
    const auto multiply = [&](auto vectors, int64_t v) {
      hidden_gradient<decltype(vectors)::value>(t, n, count, v);
    };
    const int64_t whole = (columns.end - columns.begin) / 4, rest = columns.begin + 4 * whole;
    for (int64_t i = 0; i < whole; ++i)
      multiply(std::integral_constant<int, 4>{}, columns.begin + 4 * zigzag(step, i, whole));
    for_count<3>(columns.end - rest, [&](auto vectors) { multiply(vectors, rest); });
    return s.active[t];
  }

  void differentiate_step(int64_t t, int64_t n, Share rows) {
    // f(row, vector of units, sum, sum), along a row, as memory is fetched ahead.
    const auto each = [&](RowMeans<C>& means, auto f) {
      for (int64_t j = rows.begin; j < rows.end; ++j)
        for (int64_t group = mine.begin; group < mine.end; group += kGroup) {
          Vec<C> p{}, q{};
          for (int64_t u = group; u < min(group + kGroup, mine.end); ++u) f(j, u, p, q);
          if (norms) means.put(group, j, p, q);
        }
      if (!norms) return;
      meet();
      means.finish(rows.begin, rows.end);
    };
    each(of_c, [&](int64_t j, int64_t u, Vec<C>& p, Vec<C>& q) {
      differentiate_hidden(t, j, u, n, p, q);
      if (!norms) differentiate_cell(t, j, u, n, p, q);
    });
    if (!norms) return;
    each(of_v,
         [&](int64_t j, int64_t u, Vec<C>& p, Vec<C>& q) { differentiate_cell(t, j, u, n, p, q); });
    for (int64_t j = rows.begin; j < rows.end; ++j)
      for (int64_t u = mine.begin; u < mine.end; ++u) differentiate_recurrent(j, u, n);
  }

  // Elements of an optional gradient of a sequence tensor at (t, row j), or zero.
  SEQMEM_INLINE Vec<C> arriving(const void* grad, int64_t stride, int64_t j, int64_t u) {
    if (grad == nullptr) return Vec<C>{};
    return load_n(static_cast<const S*>(grad) + row_index[j] * stride + u * L, lanes_of(u));
  }
  SEQMEM_INLINE int lanes_of(int64_t u) const {
    return static_cast<int>(min<int64_t>(L, s.H - u * L));
  }

  SEQMEM_INLINE const S* gates_row(int64_t j, int64_t u) const {
    return static_cast<const S*>(a.gates) + row_index[j] * 4 * s.H + u * L;
  }

  struct Gates {
    Vec<C> i, f, g, o, before;  // before: the c that entered the step
  };
  SEQMEM_INLINE Gates gates_of(int64_t t, int64_t j, int64_t u) {
    const int lanes = lanes_of(u);
    const S* gates = gates_row(j, u);
    return {load_n(gates, lanes), load_n(gates + s.H, lanes), load_n(gates + 2 * s.H, lanes),
            load_n(gates + 3 * s.H, lanes), previous_cell(t, row(j), u)};
  }

  SEQMEM_INLINE Vec<C> previous_cell(int64_t t, int64_t r, int64_t u) {
    if (is_cut(s, t, r)) return Vec<C>{};
    const S* from = previous<S>(a.cells, a.cx, t, r, s.H);
    return from == nullptr ? Vec<C>{} : load_n(from + u * L, lanes_of(u));
  }

  // Pass 1: dh becomes that of the h before zoneout.
  SEQMEM_INLINE void differentiate_hidden(int64_t t, int64_t j, int64_t u, int64_t n, Vec<C>& p,
                                          Vec<C>& q) {
    const int64_t r = row(j), unit = u * L, place = (n + r) * norm_sums.stride + unit;
    Vec<C> o, cell, c_hat{};
    if (norms) {
      o = load_n(gates_row(j, u) + 3 * s.H, lanes_of(u));
      c_hat = norm_sums.c_hat(row_index[j], u);
      cell = c_hat * load(parameters.gain_c + unit) + load(parameters.shift_c + unit);
    } else {
      const Gates x = gates_of(t, j, u);
      o = x.o;
      cell = sum_of_products(x.f, x.before, x.i, x.g);
    }
    const Vec<C> squashed = tanh<C>(cell);
    store(y + j * H_pad + unit, squashed);
    Vec<C> d = load(dh + r * H_pad + unit) + arriving(a.grad_output, a.grad_output_step, j, u);
    if (zoneout_h.any()) {
      const Vec<C> share = zoneout_h.kept(j, u);
      store(kept_h + r * H_pad + unit, d * share);
      d *= C(1) - share;
    }
    store(dh + r * H_pad + unit, d);
    if (!norms) return;
    const Vec<C> dn = d * o * (C(1) - squashed * squashed);
    store(norm_sums.dn + place, dn);
    const Vec<C> scaled = dn * load(parameters.gain_c + unit);
    p += scaled;
    q += scaled * c_hat;
  }

  // Pass 2. i, f, o: d pre = d gate * gate (1 - gate); g: d pre = d gate * (1 - gate^2).
  SEQMEM_INLINE void differentiate_cell(int64_t t, int64_t j, int64_t u, int64_t n, Vec<C>& p,
                                        Vec<C>& q) {
    const int64_t r = row(j), unit = u * L, place = (n + r) * norm_sums.stride + unit;
    const int lanes = lanes_of(u);
    const Gates x = gates_of(t, j, u);
    const Vec<C> d_hidden = load(dh + r * H_pad + unit), squashed = load(y + j * H_pad + unit);
    Vec<C> d = load(dc + r * H_pad + unit) + arriving(a.grad_cells, s.H, j, u), kept{};
    if (zoneout_c.any()) {
      const Vec<C> share = zoneout_c.kept(j, u);
      kept = d * share;
      d *= C(1) - share;
    }
    if (norms) {
      const Vec<C> scaled = load(norm_sums.dn + place) * load(parameters.gain_c + unit);
      d += norm_sums.scale(row_index[j], 2) * valid(u) *
           (scaled - of_c.a[j] - norm_sums.c_hat(row_index[j], u) * of_c.b[j]);
    } else {
      d += d_hidden * x.o * (C(1) - squashed * squashed);
    }
    Vec<C> d_i = d * x.g, d_f = d * x.before, d_g = d * x.i, d_o = d_hidden * squashed;
    if (a.grad_gates != nullptr) {
      const S* extra = static_cast<const S*>(a.grad_gates) + row_index[j] * 4 * s.H + unit;
      d_i += load_n(extra, lanes);
      d_f += load_n(extra + s.H, lanes);
      d_g += load_n(extra + 2 * s.H, lanes);
      d_o += load_n(extra + 3 * s.H, lanes);
    }
    const Vec<C> z[4] = {d_i * x.i * (C(1) - x.i), d_f * x.f * (C(1) - x.f),
                         d_g * (C(1) - x.g * x.g), d_o * x.o * (C(1) - x.o)};
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) store(dz.of(u, n + r) + g * L, z[g]);
    store(dc + r * H_pad + unit, is_cut(s, t, r) ? Vec<C>{} : d * x.f + kept);
    if (!norms) return;
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const Vec<C> v = norm_sums.v_hat(row_index[j], u, g);
      const Vec<C> scaled = z[g] * load(parameters.gain_hh + u * W + g * L);
      p += scaled;
      q += scaled * v;
      store(dx.of(u, n + r) + g * L, v);
    }
  }

  // Pass 3: until all dz of the chunk are there, dx holds W_hh h, normalised.
  SEQMEM_INLINE void differentiate_recurrent(int64_t j, int64_t u, int64_t n) {
    const int64_t r = row(j);
    const Vec<C> scale = valid(u) * norm_sums.scale(row_index[j], 1);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const Vec<C> scaled =
          load(dz.of(u, n + r) + g * L) * load(parameters.gain_hh + u * W + g * L);
      const Vec<C> v = load(dx.of(u, n + r) + g * L);
      store(dv.of(u, n + r) + g * L, scale * (scaled - of_v.a[j] - v * of_v.b[j]));
    }
  }

  // This thread's share of the chunk's copies of x_t and h_{t-1}, and of their row indices.
  void copy_operands(int64_t t, int64_t n) {
    const Share some = share(s.active[t], thread, threads);
    for (int64_t r = some.begin; r < some.end; ++r) {
      chunk_index[n + r] = index(t, r);
      if (a.grad_weight_ih != nullptr) sums.copy_row(*this, t, r, n + r);
    }
  }

  // NV vectors of dh of the step before.
  template <int NV>
  SEQMEM_INLINE void hidden_gradient(int64_t t, int64_t n, int64_t count, int64_t v) {
    C* to = dh + row_begin * H_pad + v * L;
    const int64_t stride = row_step * H_pad;
    hidden_product.template multiply<NV>(
        norms ? dv : dz, count, [&](int64_t j) { return n + row(j); }, v, to, stride);
    for (int64_t j = 0; j < count; ++j) {
      const bool cut = is_cut(s, t, row(j));
      if (!cut && !zoneout_h.any()) continue;
      const C* kept = kept_h + row(j) * H_pad + v * L;
      SEQMEM_UNROLL
      for (int i = 0; i < NV; ++i) {
        C* place = to + j * stride + i * L;
        store(place, cut ? Vec<C>{} : load(place) + load(kept + i * L));
      }
    }
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::lstm_regularized
