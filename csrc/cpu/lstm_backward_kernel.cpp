// LSTM backward over a whole sequence. Formulas: csrc/autograd/lstm.cpp.
//
//   prepare      dh, dc [B, ..] from grad_hy, grad_cy; packed weights, shared out by units
//   for each chunk of steps, from the last one:
//     for each step, from the last one:
//       1  dm = weight_hr^T (grad_output + dh)                       if projected
//       2  cell: dz (the gradient of the gates' pre-activations) and dc of the step before,
//          elementwise from the saved gates and cells               [row][vector of units][gate]
//       3  copies of x_t and h_{t-1} for the weights' sums
//       4  dh of the step before = dz W_hh, after a barrier if threads share units
//     sums       the weights' gradients += dz^T [x, h] of the chunk  lstm_backward_sums.h
//     input      grad_input = dz W_ih of the chunk                   lstm_backward_products.h
//   finish       dh, dc are the gradients of hx, cx
//
// A chunk's dz stays in L2 until both products of it are formed.
#include "../common/gemm.h"
#include "lstm_backward_sums.h"
#include "lstm_common.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

template <class S>
class BackwardRun : Walk {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;

  const Plan& plan;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;

  const int64_t units, H_pad, P_pad;  // vectors of units; H and P rounded up to vectors
  const int64_t chunk_rows;           // at most
  const bool packs;  // weights are copied; they must be where lanes or types differ
  Share mine;        // this thread's vectors of units

  // Shared by all threads.
  GateGradients<C> dz;
  WeightProduct<S> input_product, hidden_product;
  WeightSums<S> sums;
  C *dh, *dc, *dm, *panel_hr;  // [B, P_pad], [B, H_pad], [B, H_pad], [units][P][lane]
  int64_t* chunk_index;        // row indices of the chunk
  // This thread's own.
  C* dx;
  const C** dh_row;
  int64_t* row_index;

 public:
  BackwardRun(const Shape& s, const Plan& plan, const Backward& a, int thread, int threads,
              SpinBarrier& barrier)
      : Walk(s, plan, thread, threads),
        plan(plan),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        units(ceil_div(s.H, L)),
        H_pad(units * L),
        P_pad(padded<C>(s.P)),
        chunk_rows(min(plan.chunk, s.T) * s.B),
        packs(plan.pack || !std::is_same_v<S, C> || s.I % L != 0 || s.P % L != 0),
        dz(units),
        input_product(a.weight_ih, s.H, s.I, packs),
        hidden_product(a.weight_hh, s.H, s.P, packs),
        sums(s, a, dz, dz, dz) {
    // Whole groups of 4 vectors: they are the columns of packed weights as well.
    mine = plan.by_rows ? Share{0, units} : share(ceil_div(units, 4), thread, threads);
    if (!plan.by_rows) mine = {mine.begin * 4, min(mine.end * 4, units)};
  }

  int64_t place(char* base) {
    Carver take(base);
    dh = take.array<C>(s.B * P_pad);
    dc = take.array<C>(s.B * H_pad);
    dm = take.array<C>(s.projected ? s.B * H_pad : 0);
    dz.data = take.array<C>(chunk_rows * dz.stride);
    input_product.place(take);
    hidden_product.place(take);
    sums.place(take, chunk_rows);
    panel_hr = take.array<C>(s.projected ? s.P * H_pad : 0);
    chunk_index = take.array<int64_t>(chunk_rows);
    take.per_thread(thread, threads, [&] {
      dx = take.array<C>((chunk_rows / threads + 1) * W);
      dh_row = take.array<const C*>(s.B);
      row_index = take.array<int64_t>(s.B);
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
      sums.add(n, first_chunk, thread, threads);
      if (a.grad_input != nullptr)
        input_product.multiply_rows(dz, share(n, thread, threads), chunk_index,
                                    static_cast<S*>(a.grad_input), dx);
      first_chunk = false;
      barrier.wait();
    }
    for (int64_t r = thread; r < s.B; r += threads) {
      if (a.grad_hx != nullptr)
        store_row(static_cast<S*>(a.grad_hx) + s.order[r] * s.P, dh + r * P_pad, s.P);
      if (a.grad_cx != nullptr)
        store_row(static_cast<S*>(a.grad_cx) + s.order[r] * s.H, dc + r * H_pad, s.H);
    }
    sums.finish(thread, threads);
  }

 private:
  void prepare() {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      sums.clear(u);
      if (a.grad_input != nullptr) input_product.pack(u);
      hidden_product.pack(u);
      if (s.projected) pack_projection(u);
    }
    for (int64_t r = thread; r < s.B; r += threads) {
      load_row_or_zero(dh + r * P_pad, optional_row<S>(a.grad_hy, s.order[r], s.P), s.P);
      load_row_or_zero(dc + r * H_pad, optional_row<S>(a.grad_cy, s.order[r], s.H), s.H);
    }
  }

  void pack_projection(int64_t u) {
    const S* weight = static_cast<const S*>(a.weight_hr) + u * L;
    for (int64_t p = 0; p < s.P; ++p)
      store(panel_hr + (u * s.P + p) * L, load_n(weight + p * s.H, static_cast<int>(s.H - u * L)));
  }

  // n: where this step's rows begin among the chunk's. Returns how many were active.
  int64_t run_step(int64_t step, int64_t n) {
    const int64_t t = time_of(step);
    const int64_t count = active(t);
    for (int64_t j = 0; j < count; ++j) row_index[j] = index(t, row(j));
    if (s.projected) unproject(count, n);
    for (int64_t j = 0; j < count; ++j)  // along a row, as memory is fetched ahead
      for (int64_t u = mine.begin; u < mine.end; ++u) differentiate_cell(t, j, u, n);
    copy_operands(t, n);
    if (step == 0 && a.grad_hx == nullptr) return s.active[t];
    if (!plan.by_rows) barrier.wait();
    const Share columns = plan.by_rows ? Share{0, P_pad / L} : mine;
    const auto multiply = [&](auto vectors, int64_t v) {
      hidden_gradient<decltype(vectors)::value>(t, n, count, v);
    };
    const int64_t whole = (columns.end - columns.begin) / 4, rest = columns.begin + 4 * whole;
    for (int64_t i = 0; i < whole; ++i)
      multiply(std::integral_constant<int, 4>{}, columns.begin + 4 * zigzag(step, i, whole));
    for_count<3>(columns.end - rest, [&](auto vectors) { multiply(vectors, rest); });
    return s.active[t];
  }

  // dm = (grad_output + dh) weight_hr; the left factor is kept for weight_hr's gradient.
  void unproject(int64_t count, int64_t n) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = row(j);
      C* total = sums.dh_projected + (n + r) * sums.h_stride;
      for (int64_t i = 0; i < P_pad; i += L)
        store(total + i,
              load(dh + r * P_pad + i) + arriving(a.grad_output, a.grad_output_step, j, s.P, i));
      dh_row[j] = total;
    }
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      for (int64_t u = 0; u < units; ++u) {
        Vec<C> acc[R][1];
        start_sums(acc);
        tile_multiply<R, 1, C>(s.P, dh_row + start, 1, panel_hr + u * s.P * L, L, L, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) store(dm + row(start + r) * H_pad + u * L, acc[r][0]);
      }
    });
  }

  // Elements i.. of an optional gradient of a sequence tensor at (t, row j), or zero.
  SEQMEM_INLINE Vec<C> arriving(const void* grad, int64_t stride, int64_t j, int64_t width,
                                int64_t i) {
    if (grad == nullptr) return Vec<C>{};
    return load_n(static_cast<const S*>(grad) + row_index[j] * stride + i,
                  static_cast<int>(min<int64_t>(L, width - i)));
  }

  // i, f, o: d pre = d gate * gate (1 - gate); g: d pre = d gate * (1 - gate^2).
  SEQMEM_INLINE void differentiate_cell(int64_t t, int64_t j, int64_t u, int64_t n) {
    const int64_t r = row(j), unit = u * L;
    const int lanes = static_cast<int>(min<int64_t>(L, s.H - unit));
    const S* gates = static_cast<const S*>(a.gates) + row_index[j] * 4 * s.H + unit;
    const Vec<C> i = load_n(gates, lanes), f = load_n(gates + s.H, lanes);
    const Vec<C> g = load_n(gates + 2 * s.H, lanes), o = load_n(gates + 3 * s.H, lanes);
    const Vec<C> squashed_cell =
        tanh<C>(load_n(static_cast<const S*>(a.cells) + row_index[j] * s.H + unit, lanes));
    const Vec<C> dm_total = s.projected
                                ? load(dm + r * H_pad + unit)
                                : load(dh + r * P_pad + unit) +
                                      arriving(a.grad_output, a.grad_output_step, j, s.H, unit);
    const Vec<C> dc_total = load(dc + r * H_pad + unit) +
                            arriving(a.grad_cells, s.H, j, s.H, unit) +
                            dm_total * o * (C(1) - squashed_cell * squashed_cell);
    const bool cut = is_cut(s, t, r);
    Vec<C> d_i = dc_total * g, d_f = dc_total * previous_cell(t, r, unit, lanes, cut);
    Vec<C> d_g = dc_total * i, d_o = dm_total * squashed_cell;
    if (a.grad_gates != nullptr) {
      const S* extra = static_cast<const S*>(a.grad_gates) + row_index[j] * 4 * s.H + unit;
      d_i += load_n(extra, lanes);
      d_f += load_n(extra + s.H, lanes);
      d_g += load_n(extra + 2 * s.H, lanes);
      d_o += load_n(extra + 3 * s.H, lanes);
    }
    C* out = dz.of(u, n + r);
    store(out, d_i * i * (C(1) - i));
    store(out + L, d_f * f * (C(1) - f));
    store(out + 2 * L, d_g * (C(1) - g * g));
    store(out + 3 * L, d_o * o * (C(1) - o));
    store(dc + r * H_pad + unit, cut ? Vec<C>{} : dc_total * f);
    if (s.projected) store(sums.squashed + (n + r) * sums.m_stride + unit, o * squashed_cell);
  }

  SEQMEM_INLINE Vec<C> previous_cell(int64_t t, int64_t r, int64_t unit, int lanes, bool cut) {
    if (cut) return Vec<C>{};
    const S* from = previous<S>(a.cells, a.cx, t, r, s.H);
    return from == nullptr ? Vec<C>{} : load_n(from + unit, lanes);
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
    C* to = dh + row_begin * P_pad + v * L;
    const int64_t stride = row_step * P_pad;
    hidden_product.template multiply<NV>(
        dz, count, [&](int64_t j) { return n + row(j); }, v, to, stride);
    if (s.reset == nullptr) return;
    for (int64_t j = 0; j < count; ++j)
      if (is_cut(s, t, row(j)))
        for (int i = 0; i < NV; ++i) store(to + j * stride + i * L, Vec<C>{});
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::lstm
