// The backward's loop over chunks and steps, and rows as it reads and writes them. A kernel adds
// how a step is differentiated:
//
//   prepare(u)                   what it needs of a vector of units
//   differentiate(t, n, count)   dz of a step of `count` rows, and dc of the step before; n is
//                                where the step's rows begin among the chunk's
//   finish_chunk(n, first)       of n rows, before the sums over them
//
// where `separate`, dx and dv too: the gradients of W_ih x and W_hh h, which are dz else.
#pragma once

#include "lstm_backward_sums.h"

namespace seqmem::lstm {
namespace {

template <class S>
class BackwardRows {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;

  const Walk& walk;
  const Shape& s = walk.s;
  const Backward& a;
  const bool separate;
  // Whether weights are packed: where it pays, and always where they are of another type.
  const bool packs = walk.plan.pack || !std::is_same_v<S, C>;
  C* input_rows;
  WeightProduct<S> input_product{a.weight_ih, s.H, s.I, packs};
  WeightProduct<S> hidden_product{a.weight_hh, s.H, s.P, packs};

 public:
  const int64_t units = ceil_div(s.H, L);  // vectors of units
  const int64_t H_pad = padded<C>(s.H), P_pad = padded<C>(s.P);
  const int64_t chunk_rows = min(walk.plan.chunk, s.T) * s.B;  // at most
  // This thread's units: whole groups of 4 vectors, the columns of packed weights as well.
  const Share groups = walk.units_of(ceil_div(units, 4));
  const Share mine = {groups.begin * 4, min(groups.end * 4, units)};

  // Shared by all threads.
  GateGradients<C> dz{units}, own_dx{units}, own_dv{units};
  const GateGradients<C>&dx = separate ? own_dx : dz, &dv = separate ? own_dv : dz;
  WeightSums<S> sums{s, a, dz, dx, dv};
  C *dh, *dc;            // [B, P_pad], [B, H_pad]
  C* kept_h = nullptr;   // [B, P_pad]: what is handed past the step; null where nothing is
  int64_t* chunk_index;  // row indices of the chunk
  // This thread's own.
  int64_t* row_index;  // of the step

  BackwardRows(const Walk& walk, const Backward& a, bool separate)
      : walk(walk), a(a), separate(separate) {}

  void place(Carver& take) {
    dh = take.array<C>(s.B * P_pad);
    dc = take.array<C>(s.B * H_pad);
    dz.data = take.array<C>(chunk_rows * dz.stride);
    own_dx.data = take.array<C>(separate ? chunk_rows * dz.stride : 0);
    own_dv.data = take.array<C>(separate ? chunk_rows * dz.stride : 0);
    input_product.place(take);
    hidden_product.place(take);
    sums.place(take, chunk_rows);
    chunk_index = take.array<int64_t>(chunk_rows);
  }
  void place_own(Carver& take) {
    input_rows = take.array<C>((chunk_rows / walk.threads + 1) * W);
    row_index = take.array<int64_t>(walk.most_rows);
  }

  template <class Kernel>
  void run(Kernel& kernel) {
    const int thread = walk.thread, threads = walk.threads;
    start(kernel);
    walk.barrier.wait();
    bool first_chunk = true;
    for (int64_t last = s.T; last > 0; last -= walk.plan.chunk) {
      const int64_t first = max<int64_t>(last - walk.plan.chunk, 0);
      int64_t n = 0;
      for (int64_t step = last - 1; step >= first; --step) n += run_step(kernel, step, n);
      walk.barrier.wait();
      kernel.finish_chunk(n, first_chunk);
      sums.add(n, first_chunk, thread, threads);
      if (a.grad_input != nullptr)
        input_product.multiply_rows(dx, share(n, thread, threads), chunk_index,
                                    static_cast<S*>(a.grad_input), input_rows);
      first_chunk = false;
      walk.barrier.wait();
    }
    for (int64_t r = thread; r < s.B; r += threads) {
      if (a.grad_hx != nullptr)
        store_row(static_cast<S*>(a.grad_hx) + s.order[r] * s.P, dh + r * P_pad, s.P);
      if (a.grad_cx != nullptr)
        store_row(static_cast<S*>(a.grad_cx) + s.order[r] * s.H, dc + r * H_pad, s.H);
    }
    sums.finish(thread, threads);
  }

  SEQMEM_INLINE int lanes_of(int64_t u) const {
    return static_cast<int>(min<int64_t>(L, s.H - u * L));
  }

  // Vector v of row j's dh, u of its dc, with what arrives at the step from outside.
  SEQMEM_INLINE Vec<C> hidden_gradient(int64_t j, int64_t v) const {
    return load(dh + walk.row(j) * P_pad + v * L) +
           arriving(a.grad_output, a.grad_output_step, s.P, j, v);
  }
  SEQMEM_INLINE Vec<C> cell_gradient(int64_t j, int64_t u) const {
    return load(dc + walk.row(j) * H_pad + u * L) + arriving(a.grad_cells, s.H, s.H, j, u);
  }

  struct Gates {
    Vec<C> i, f, g, o, before;  // before: the c that entered the step
    bool cut;                   // whether it was zeroed
  };
  SEQMEM_INLINE Gates gates_of(int64_t t, int64_t j, int64_t u) const {
    const int lanes = lanes_of(u);
    const S* gates = static_cast<const S*>(a.gates) + row_index[j] * 4 * s.H + u * L;
    const int64_t r = walk.row(j);
    const bool cut = is_cut(s, t, r);
    const S* from = cut ? nullptr : walk.previous<S>(a.cells, a.cx, t, r, s.H);
    return {load_n(gates, lanes),
            load_n(gates + s.H, lanes),
            load_n(gates + 2 * s.H, lanes),
            load_n(gates + 3 * s.H, lanes),
            from == nullptr ? Vec<C>{} : load_n(from + u * L, lanes),
            cut};
  }

  // From the gradients of c and of o. i, f, o: d pre = d gate * gate (1 - gate);
  // g: d pre = d gate * (1 - gate^2).
  SEQMEM_INLINE void differentiate_gates(int64_t j, int64_t u, const Gates& x, Vec<C> d, Vec<C> d_o,
                                         Vec<C> (&z)[4]) const {
    Vec<C> d_i = d * x.g, d_f = d * x.before, d_g = d * x.i;
    if (a.grad_gates != nullptr) {
      const int lanes = lanes_of(u);
      const S* extra = static_cast<const S*>(a.grad_gates) + row_index[j] * 4 * s.H + u * L;
      d_i += load_n(extra, lanes);
      d_f += load_n(extra + s.H, lanes);
      d_g += load_n(extra + 2 * s.H, lanes);
      d_o += load_n(extra + 3 * s.H, lanes);
    }
    z[0] = d_i * x.i * (C(1) - x.i);
    z[1] = d_f * x.f * (C(1) - x.f);
    z[2] = d_g * (C(1) - x.g * x.g);
    z[3] = d_o * x.o * (C(1) - x.o);
  }

 private:
  // One thread's share.
  template <class Kernel>
  void start(Kernel& kernel) {
    const Share some = share(units, walk.thread, walk.threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      sums.clear(u);
      if (a.grad_input != nullptr) input_product.pack(u);
      hidden_product.pack(u);
      kernel.prepare(u);
    }
    for (int64_t r = walk.thread; r < s.B; r += walk.threads) {
      load_row_or_zero(dh + r * P_pad, optional_row<S>(a.grad_hy, s.order[r], s.P), s.P);
      load_row_or_zero(dc + r * H_pad, optional_row<S>(a.grad_cy, s.order[r], s.H), s.H);
    }
  }

  // Returns how many rows were active.
  template <class Kernel>
  int64_t run_step(Kernel& kernel, int64_t step, int64_t n) {
    const int64_t t = walk.time_of(step), count = walk.active(t);
    for (int64_t j = 0; j < count; ++j) row_index[j] = walk.index(t, walk.row(j));
    kernel.differentiate(t, n, count);
    copy_operands(t, n);
    if (step == 0 && a.grad_hx == nullptr) return s.active[t];
    walk.meet();
    const Share columns = walk.plan.by_rows ? Share{0, P_pad / L} : mine;
    const auto multiply = [&](auto vectors, int64_t v) {
      step_back<decltype(vectors)::value>(t, n, count, v);
    };
    const int64_t whole = (columns.end - columns.begin) / 4, rest = columns.begin + 4 * whole;
    for (int64_t i = 0; i < whole; ++i)
      multiply(std::integral_constant<int, 4>{}, columns.begin + 4 * zigzag(step, i, whole));
    for_count<3>(columns.end - rest, [&](auto vectors) { multiply(vectors, rest); });
    return s.active[t];
  }

  // This thread's share of the chunk's copies of x_t and h_{t-1}, and of their row indices.
  void copy_operands(int64_t t, int64_t n) {
    const Share some = share(s.active[t], walk.thread, walk.threads);
    for (int64_t r = some.begin; r < some.end; ++r) {
      chunk_index[n + r] = walk.index(t, r);
      if (a.grad_weight_ih != nullptr) sums.copy_row(walk, t, r, n + r);
    }
  }

  // NV vectors of dh of the step before.
  template <int NV>
  SEQMEM_INLINE void step_back(int64_t t, int64_t n, int64_t count, int64_t v) {
    C* to = dh + walk.row_begin * P_pad + v * L;
    const int64_t stride = walk.row_step * P_pad;
    hidden_product.template multiply<NV>(
        dv, count, [&](int64_t j) { return n + walk.row(j); }, v, to, stride);
    if (s.reset == nullptr && kept_h == nullptr) return;
    for (int64_t j = 0; j < count; ++j) {
      const bool cut = is_cut(s, t, walk.row(j));
      if (!cut && kept_h == nullptr) continue;
      const C* kept = kept_h + walk.row(j) * P_pad + v * L;
      SEQMEM_UNROLL
      for (int i = 0; i < NV; ++i) {
        C* place = to + j * stride + i * L;
        store(place, cut ? Vec<C>{} : load(place) + load(kept + i * L));
      }
    }
  }

  // Vector v of an optional gradient [rows, width] of row j, or zero.
  SEQMEM_INLINE Vec<C> arriving(const void* grad, int64_t stride, int64_t width, int64_t j,
                                int64_t v) const {
    if (grad == nullptr) return Vec<C>{};
    return load_n(static_cast<const S*>(grad) + row_index[j] * stride + v * L,
                  static_cast<int>(min<int64_t>(L, width - v * L)));
  }
};

}  // namespace
}  // namespace seqmem::lstm
