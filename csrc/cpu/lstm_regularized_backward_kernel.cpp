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
// The loop: lstm_backward_rows.h. Without norms dx and dv are dz. A chunk's dz, dx and dv stay in
// L2 until their products are formed.
#include "../common/products.h"
#include "lstm_backward_rows.h"
#include "lstm_regularized_rows.h"
#include "lstm_regularized_sums.h"

namespace seqmem::lstm_regularized {
namespace {

template <class S>
class BackwardRun : KernelRun<Backward, Walk> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr int64_t kRowsAtOnce = 4, kGroup = RowMeans<C>::kGroup;

  const bool norms = a.norms.gain_ih != nullptr;
  const Valid<C> valid{s.H};
  BackwardRows<S> rows{*this, a.layer, norms};
  const int64_t units = rows.units, H_pad = rows.H_pad;

  // Shared by all threads.
  NormSums<S> norm_sums{s, a, parameters, rows.dz, rows.dx};
  NormVectors<C> parameters;
  // This thread's own; the sums' parts are shared where units are.
  ZoneoutRows<C> zoneout_h{a.zoneout_h}, zoneout_c{a.zoneout_c};
  RowMeans<C> of_v{s.H, 4}, of_c{s.H, 1};
  C* y;  // [rows, H_pad]

 public:
  using KernelRun<Backward, Walk>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    rows.place(take);
    if (zoneout_h.any()) rows.kept_h = take.array<C>(s.B * H_pad);
    if (norms) norm_sums.place(take, rows.chunk_rows);
    if (norms) parameters.place(take, units);
    if (!plan.by_rows) place_parts(take);
    take.per_thread(thread, threads, [&] {
      if (plan.by_rows) place_parts(take);
      rows.place_own(take);
      zoneout_h.place(take, most_rows);
      zoneout_c.place(take, most_rows);
      y = take.array<C>(most_rows * H_pad);
      for (RowMeans<C>* each : {&of_v, &of_c})
        if (norms) each->place_totals(take, most_rows);
    });
    return take.used();
  }

  void run() {
    rows.run(*this);
    if (a.grad_gain_ih != nullptr) norm_sums.finish(thread, threads);
  }

  void prepare(int64_t u) {
    if (!norms) return;
    load_gates<S>(parameters.gain_ih + u * W, a.norms.gain_ih, 4, u, s.H);
    load_gates<S>(parameters.gain_hh + u * W, a.norms.gain_hh, 4, u, s.H);
    load_gates<S>(parameters.gain_c + u * L, a.norms.gain_c, 1, u, s.H);
    load_gates<S>(parameters.shift_c + u * L, a.norms.shift_c, 1, u, s.H);
  }

  void differentiate(int64_t t, int64_t n, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t number = t * s.B + s.order[row(j)];
      zoneout_h.enter(j, number);
      zoneout_c.enter(j, number);
    }
    const int64_t at_once = plan.by_rows ? kRowsAtOnce : max<int64_t>(count, 1);
    for (int64_t j = 0; j < count; j += at_once) {
      const Share part = {j, min(j + at_once, count)};
      if (norms)
        for (int64_t i = part.begin; i < part.end; ++i)
          fetch_row<S>(a.saved.v, rows.row_index[i], 4 * s.H);
      for (int64_t i = part.end; i < min(part.end + at_once, count); ++i)
        fetch_row<S>(a.layer.gates, rows.row_index[i], 4 * s.H);
      differentiate_rows(t, n, part);
    }
  }

  void finish_chunk(int64_t n, bool first_chunk) {
    if (!norms || (a.layer.grad_input == nullptr && a.layer.grad_weight_ih == nullptr)) return;
    norm_sums.rows(n, rows.chunk_index, thread, threads);
    barrier.wait();
    norm_sums.add(n, first_chunk, thread, threads);
  }

 private:
  void place_parts(Carver& take) {
    for (RowMeans<C>* each : {&of_v, &of_c})
      if (norms) each->place_parts(take, most_rows);
  }

  void differentiate_rows(int64_t t, int64_t n, Share part) {
    // f(row, vector of units, sum, sum), along a row, as memory is fetched ahead.
    const auto each = [&](RowMeans<C>& means, auto f) {
      for (int64_t j = part.begin; j < part.end; ++j)
        for (int64_t group = rows.mine.begin; group < rows.mine.end; group += kGroup) {
          Vec<C> p{}, q{};
          for (int64_t u = group; u < min(group + kGroup, rows.mine.end); ++u) f(j, u, p, q);
          if (norms) means.put(group, j, p, q);
        }
      if (!norms) return;
      meet();
      means.finish(part.begin, part.end);
    };
    each(of_c, [&](int64_t j, int64_t u, Vec<C>& p, Vec<C>& q) {
      differentiate_hidden(t, j, u, n, p, q);
      if (!norms) differentiate_cell(t, j, u, n, p, q);
    });
    if (!norms) return;
    each(of_v,
         [&](int64_t j, int64_t u, Vec<C>& p, Vec<C>& q) { differentiate_cell(t, j, u, n, p, q); });
    for (int64_t j = part.begin; j < part.end; ++j)
      for (int64_t u = rows.mine.begin; u < rows.mine.end; ++u) differentiate_recurrent(j, u, n);
  }

  // Pass 1: dh becomes that of the h before zoneout.
  SEQMEM_INLINE void differentiate_hidden(int64_t t, int64_t j, int64_t u, int64_t n, Vec<C>& p,
                                          Vec<C>& q) {
    const int64_t r = row(j), unit = u * L, place = (n + r) * norm_sums.stride + unit;
    Vec<C> o, cell, c_hat{};
    if (norms) {
      o = load_n(static_cast<const S*>(a.layer.gates) + (rows.row_index[j] * 4 + 3) * s.H + unit,
                 rows.lanes_of(u));
      c_hat = norm_sums.c_hat(rows.row_index[j], u);
      cell = c_hat * load(parameters.gain_c + unit) + load(parameters.shift_c + unit);
    } else {
      auto x = rows.gates_of(t, j, u);
      opaque(x.f);  // else GCC multiplies where it loads, and does not fuse that with the sum
      o = x.o;
      cell = sum_of_products(x.f, x.before, x.i, x.g);
    }
    const Vec<C> squashed = tanh<C>(cell);
    store(y + j * H_pad + unit, squashed);
    Vec<C> d = rows.hidden_gradient(j, u);
    if (zoneout_h.any()) {
      const Vec<C> share = zoneout_h.kept(j, u);
      store(rows.kept_h + r * H_pad + unit, d * share);
      d *= C(1) - share;
    }
    store(rows.dh + r * H_pad + unit, d);
    if (!norms) return;
    const Vec<C> dn = d * o * (C(1) - squashed * squashed);
    store(norm_sums.dn + place, dn);
    const Vec<C> scaled = dn * load(parameters.gain_c + unit);
    p += scaled;
    q += scaled * c_hat;
  }

  // Pass 2.
  SEQMEM_INLINE void differentiate_cell(int64_t t, int64_t j, int64_t u, int64_t n, Vec<C>& p,
                                        Vec<C>& q) {
    const int64_t r = row(j), unit = u * L, place = (n + r) * norm_sums.stride + unit;
    const auto x = rows.gates_of(t, j, u);
    const Vec<C> d_hidden = load(rows.dh + r * H_pad + unit), squashed = load(y + j * H_pad + unit);
    Vec<C> d = rows.cell_gradient(j, u), kept{};
    if (zoneout_c.any()) {
      const Vec<C> share = zoneout_c.kept(j, u);
      kept = d * share;
      d *= C(1) - share;
    }
    if (norms) {
      const Vec<C> scaled = load(norm_sums.dn + place) * load(parameters.gain_c + unit);
      d += norm_sums.scale(rows.row_index[j], 2) * valid(u) *
           (scaled - of_c.a[j] - norm_sums.c_hat(rows.row_index[j], u) * of_c.b[j]);
    } else {
      d += d_hidden * x.o * (C(1) - squashed * squashed);
    }
    Vec<C> z[4];
    rows.differentiate_gates(j, u, x, d, d_hidden * squashed, z);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) store(rows.dz.of(u, n + r) + g * L, z[g]);
    store(rows.dc + r * H_pad + unit, x.cut ? Vec<C>{} : d * x.f + kept);
    if (!norms) return;
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const Vec<C> v = norm_sums.v_hat(rows.row_index[j], u, g);
      const Vec<C> scaled = z[g] * load(parameters.gain_hh + u * W + g * L);
      p += scaled;
      q += scaled * v;
      store(rows.dx.of(u, n + r) + g * L, v);
    }
  }

  // Pass 3: until all dz of the chunk are there, dx holds W_hh h, normalised.
  SEQMEM_INLINE void differentiate_recurrent(int64_t j, int64_t u, int64_t n) {
    const int64_t r = row(j);
    const Vec<C> scale = valid(u) * norm_sums.scale(rows.row_index[j], 1);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) {
      const Vec<C> scaled =
          load(rows.dz.of(u, n + r) + g * L) * load(parameters.gain_hh + u * W + g * L);
      const Vec<C> v = load(rows.dx.of(u, n + r) + g * L);
      store(rows.dv.of(u, n + r) + g * L, scale * (scaled - of_v.a[j] - v * of_v.b[j]));
    }
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::lstm_regularized
