// A machine backward over a whole sequence. Every thread takes its own batch rows back through
// time, a few of them at once, in chunks of segments:
//   once     weights packed into panels (machine_backward_weights.h, or in bf16
//            machine_backward_weights_bf16.h)
//   for each chunk of steps, for each of its segments, last first:
//     pass 1  what the heads need of the segment's steps is recomputed from its checkpoint
//     for each step, last first:
//       pass 2  the heads in reverse: from the gradients of reads and of what a row carries to
//               those of the heads' values dp[P]
//       pass 3  doutput[C] = dp head_weight + grad_features
//       pass 4  the controller's layers in reverse: doutput -> dz (gates) -> gradients of the
//               operand
//   then  pass 5  dz and operands of the chunk -> weights' gradients, by all threads at once
//                 (machine_weight_gradients.h)
//
// An op's Heads have types Shape, Arguments and Carries (as machine_carry.h), and
//   place_shared(carver), place_own(carver)  their buffers
//   carries()
//   most_rows(shape)              if there is such a bound on the rows that go through time at once
//   prepare(thread)               before the last step; all threads meet after it
//   recompute(begin, end, b, j)   the steps of a segment of row b, the j-th of `rows`
//   back(t, b, j, carry, dreads, dp)
#pragma once

#include "machine_backward_weights.h"
#include "machine_carry.h"
#include "machine_saved.h"
#include "machine_weight_gradients.h"

namespace seqmem::machine {
namespace {

// to += n values of the features' gradient, which is often one number or dense.
template <class C, class Backward>
void add_grad_features(const Backward& a, int64_t t, int64_t b, int64_t first, int64_t n, C* to) {
  if (a.grad_features == nullptr) return;
  const int64_t* stride = a.grad_features_strides;
  const C* from =
      static_cast<const C*>(a.grad_features) + t * stride[0] + b * stride[1] + first * stride[2];
  const int64_t step = stride[2];
  if (step == 0) {
    for (int64_t i = 0; i < n; ++i) to[i] += *from;
  } else if (step == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i * step];
  }
}

template <class C, class Heads,
          template <class C_, class Shape, class Arguments> class Weights = BackwardWeights,
          template <class C_> class Outer = OuterProducts>
class BackwardRun {
  static constexpr int L = kLanes<C>;
  using Shape = typename Heads::Shape;
  using Arguments = typename Heads::Arguments;
  using Carries = typename Heads::Carries;

  const Shape& s;
  const Arguments& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const Layout<C, Shape> layout;
  const int64_t rows;  // that go through time together
  const Saved<C, Shape, Arguments> saved;
  Weights<C, Shape, Arguments> packed;
  WeightGradients<C, Shape, Arguments, Outer<C>> weights;

  // Shared by all threads.
  typename Carries::Carry *carry, *to_initial;  // [B]
  // This thread's own.
  Heads heads;
  const Carries carries;
  C *dtop, *dx, *dreads;
  int64_t* row;
  const C** operand;
  C** result;

 public:
  BackwardRun(const Shape& s, const Arguments& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        layout(s),
        rows(group(s, ceil_div(s.B, threads))),
        saved(s, a, layout),
        packed(s, a, layout, rows),
        weights(s, a, layout, thread, threads),
        heads(s, a, layout, saved, rows),
        carries(heads.carries()) {}

  // Places all buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    packed.place_shared(take);
    weights.place_shared(take);
    heads.place_shared(take);
    carry = carries.place(take, s.B);
    to_initial = carries.place(take, initial_wanted() ? s.B : 0);
    take.per_thread(thread, threads, [&] {
      packed.place_own(take);
      weights.place_own(take);
      heads.place_own(take);
      dtop = take.array<C>(rows * layout.C_pad);
      dx = take.array<C>(rows * max(layout.operand(0), layout.operand(1)));
      dreads = take.array<C>(Layout<C, Shape>::padded_width(layout.R));
      row = take.array<int64_t>(rows);
      operand = take.array<const C*>(rows);
      result = take.array<C*>(rows);
    });
    return take.used();
  }

  void run() {
    packed.pack(thread, threads);
    if (weights.wanted) weights.clear();
    heads.prepare(thread);
    const Share mine = share(s.B, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      carries.load(a.grad_final, b, carry[b]);
      if (initial_wanted()) carries.clear(to_initial[b]);
    }
    barrier.wait();
    for (int64_t first = ceil_div(s.T, weights.chunk) * weights.chunk - weights.chunk; first >= 0;
         first -= weights.chunk) {
      const int64_t end = min(first + weights.chunk, s.T);
      for (int64_t b = mine.begin; b < mine.end; b += rows)
        run_rows(first, end, b, min(b + rows, mine.end));
      if (!weights.wanted) continue;
      barrier.wait();
      weights.add((end - first) * s.B);
      barrier.wait();
    }
    for (int64_t b = mine.begin; b < mine.end && a.grad_state.memory != nullptr; ++b)
      carries.store(carry[b], a.grad_state, b, s.B);
    barrier.wait();
    if (weights.wanted) weights.store();
    if (thread == 0 && a.grad_initial.memory != nullptr)
      carries.store_initial(to_initial, s.reset == nullptr ? 0 : s.B, a.grad_initial);
  }

 private:
  // How many of n rows go through time at once.
  static int64_t group(const Shape& s, int64_t n) {
    const int64_t rows = rows_at_once<C>(s, n);
    if constexpr (requires { Heads::most_rows(s); }) {
      return min(rows, Heads::most_rows(s));
    } else {
      return rows;
    }
  }

  bool initial_wanted() const { return s.reset != nullptr && a.grad_initial.memory != nullptr; }

  // ---- steps end - 1 down to first of rows begin..stop - 1

  void run_rows(int64_t first, int64_t end, int64_t begin, int64_t stop) {
    for (int64_t t0 = (end - 1) / s.segment * s.segment; t0 >= first; t0 -= s.segment) {
      const int64_t t1 = min(t0 + s.segment, end);
      for (int64_t b = begin; b < stop; ++b) heads.recompute(t0, t1, b, b - begin);
      for (int64_t t = t1 - 1; t >= t0; --t) step(t, begin, stop);
    }
  }

  void step(int64_t t, int64_t begin, int64_t stop) {
    int64_t n = 0;
    for (int64_t b = begin; b < stop; ++b) {
      if (layout.active(t, b)) {
        row[n++] = b;
      } else {
        if (a.grad_input != nullptr) zero(grad_input(t, b), s.I);
        if (weights.wanted) weights.keep_nothing(t, b);
      }
    }
    if (n == 0) return;
    for (int64_t j = 0; j < n; ++j) {
      const auto& c = carry[row[j]];
      copy(c.reads, dreads, layout.R);
      add_grad_features(a, t, row[j], s.C, layout.R, dreads);
      C* dp = weights.dp_of(t, row[j]);
      heads.back(t, row[j], row[j] - begin, c, dreads, dp);
      operand[j] = dp;
      result[j] = dtop + j * layout.C_pad;
    }
    packed.heads(n, operand, result);
    for (int64_t j = 0; j < n; ++j) {
      add_grad_features(a, t, row[j], 0, s.C, dtop + j * layout.C_pad);
      if (weights.wanted) weights.keep_top(t, row[j], saved.features(t, row[j]));
    }
    for (int64_t l = s.layers - 1; l >= 0; --l) layer(t, l, n);
    for (int64_t j = 0; j < n; ++j) {
      if (!layout.reset(t, row[j])) continue;
      if (initial_wanted()) carries.add(carry[row[j]], to_initial[row[j]]);
      carries.clear(carry[row[j]]);
    }
  }

  C* grad_input(int64_t t, int64_t b) const {
    return static_cast<C*>(a.grad_input) + (t * s.B + b) * s.I;
  }

  // From dtop, the gradient of layer l's output, to that of what it was computed from.
  void layer(int64_t t, int64_t l, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t b = row[j];
      s.lstm ? lstm_gates(t, l, b, dtop + j * layout.C_pad)
             : dense_gates(t, l, b, dtop + j * layout.C_pad);
      operand[j] = weights.dz_of(l, t, b);
      result[j] = dx + j * layout.operand(l);
      if (weights.wanted)
        weights.keep_operand(l, t, b, s.lstm ? saved.hidden_before(l, t, b) : nullptr,
                             l > 0 ? saved.output(l - 1, t, b) : saved.input(t, b),
                             saved.reads_before(t, b));
    }
    packed.layer(l, n, operand, result);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t b = row[j];
      const C* from = dx + j * layout.operand(l);
      if (l == 0) {
        if (a.grad_input != nullptr) copy(from, grad_input(t, b), s.I);
        copy(from + s.I, carry[b].reads, layout.R);
      } else {
        copy(from + layout.below_offset(l), dtop + j * layout.C_pad, s.C);
      }
      if (s.lstm) copy(from + layout.hidden_offset(l), carry[b].hidden + l * layout.C_pad, s.C);
    }
  }

  void lstm_gates(int64_t t, int64_t l, int64_t b, const C* dh) {
    const C *gates = saved.gates(l, t, b), *before = saved.cell_before(l, t, b);
    C *to = weights.dz_of(l, t, b), *dc = carry[b].cell + l * layout.C_pad;
    const C* carried = carry[b].hidden + l * layout.C_pad;
    auto one = [&](int64_t u, int n, Vec<C> squashed) {
      const Vec<C> i = load_n(gates + u, n), f = load_n(gates + s.C + u, n);
      const Vec<C> g = load_n(gates + 2 * s.C + u, n), o = load_n(gates + 3 * s.C + u, n);
      const Vec<C> h = load(dh + u) + load(carried + u);
      const Vec<C> c = load(dc + u) + h * o * (C(1) - squashed * squashed);
      store_n(to + u, c * g * i * (C(1) - i), n);
      store_n(to + s.C + u, c * load_n(before + u, n) * f * (C(1) - f), n);
      store_n(to + 2 * s.C + u, c * i * (C(1) - g * g), n);
      store_n(to + 3 * s.C + u, h * squashed * o * (C(1) - o), n);
      store(dc + u, c * f);
    };
    const C* cell = gates + 4 * s.C;
    int64_t u = 0;
    for (; u + 2 * L <= s.C; u += 2 * L) {
      const Vec<C> arguments[2] = {tanh_argument<C>(load(cell + u)),
                                   tanh_argument<C>(load(cell + u + L))};
      ExpParts<C> e[2];
      exp_parts<2, C>(arguments, e);
      one(u, L, tanh_of<C>(e[0]));
      one(u + L, L, tanh_of<C>(e[1]));
    }
    for (; u < s.C; u += L) {
      const int n = static_cast<int>(min<int64_t>(L, s.C - u));
      one(u, n, tanh<C>(load_n(cell + u, n)));
    }
  }

  void dense_gates(int64_t t, int64_t l, int64_t b, const C* dh) {
    const C* y = saved.output(l, t, b);
    C* to = weights.dz_of(l, t, b);
    for (int64_t u = 0; u < s.C; ++u) to[u] = dh[u] * (C(1) - y[u] * y[u]);
  }
};

}  // namespace
}  // namespace seqmem::machine
