// A machine forward over a whole sequence. The threads pack the weights together; then each runs
// its own batch rows through time, a few of them at once:
//   once     the weights of controller and heads packed into panels (machine_forward_weights.h, or
//            in bf16 machine_forward_weights_bf16.h)
//   for each step, for the rows that are active:
//     pass 1  controller: z = W operand + bias, gates, new cell and hidden state, layer by layer
//     pass 2  p[P] = head_weight output + head_bias, then the activations of all heads' values
//     pass 3  the heads act on the memory of each row
//     pass 4  outputs to features; where a backward follows, the gates and p are saved, and what it
//             needs at the beginning of each segment
//
// An op's Heads have types Shape and Arguments, and
//   place_shared(carver), place_own(carver)  their buffers
//   prepare(thread)      before the first step; all threads meet after it
//   load(b, state, row)  row b's part of the state that a row has in a.state or a.initial
//   store(b)             to a.final
//   keep(t, b)           what the backward begins a segment with
//   ended(t, b)          zeros in what step t of row b would have left
//   activate(n, rows)    the values of n rows
//   act(t, b, values, reads)
#pragma once

#include "machine_forward_weights.h"
#include "products.h"

namespace seqmem::machine {
namespace {

template <class C, class Heads,
          template <class C_, class Shape, class Arguments> class Weights = ForwardWeights>
class ForwardRun {
  static constexpr int L = kLanes<C>;
  using Shape = typename Heads::Shape;
  using Arguments = typename Heads::Arguments;

  const Shape& s;
  const Arguments& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const Layout<C, Shape> layout;
  const int64_t at_once;  // rows that go through time together
  Weights<C, Shape, Arguments> weights;

  // Shared by all threads.
  C *x, *cell, *top, *p;
  int64_t* buffer_index;  // [B]: which of a row's two operands is read in this step
  // This thread's own.
  Heads heads;
  int64_t* row;
  const C** operand;
  C** result;

 public:
  ForwardRun(const Shape& s, const Arguments& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        layout(s),
        at_once(rows_at_once<C>(s, ceil_div(s.B, threads))),
        weights(s, a, layout, at_once),
        heads(s, a) {}

  // Places all buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    weights.place_shared(take);
    x = take.array<C>(operand_offset(s.layers));
    cell = take.array<C>(s.lstm ? s.layers * s.B * layout.C_pad : 0);
    top = take.array<C>(s.B * layout.C_pad);
    p = take.array<C>(s.B * layout.P_pad);
    buffer_index = take.array<int64_t>(s.B);
    heads.place_shared(take);
    take.per_thread(thread, threads, [&] {
      weights.place_own(take);
      heads.place_own(take);
      row = take.array<int64_t>(s.B);
      operand = take.array<const C*>(s.B);
      result = take.array<C*>(s.B);
    });
    return take.used();
  }

  void run() {
    weights.pack(thread, threads);
    heads.prepare(thread);
    const Share mine = share(s.B, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) load_state(b, a.state, b, s.B);
    barrier.wait();
    for (int64_t b = mine.begin; b < mine.end; b += at_once) {
      const int64_t end = min(b + at_once, mine.end);
      for (int64_t t = 0; t < s.T; ++t) step(t, b, end);
    }
    for (int64_t b = mine.begin; b < mine.end; ++b) store_state(b);
  }

 private:
  int64_t operand_offset(int64_t l) const {
    return layout.layer(l, 2 * s.B * layout.operand(0),
                        s.layers > 1 ? 2 * s.B * layout.operand(1) : 0);
  }
  C* operand_of(int64_t l, int64_t b, int64_t which) const {
    return x + operand_offset(l) + (which * s.B + b) * layout.operand(l);
  }
  C* cell_of(int64_t l, int64_t b) const { return cell + (l * s.B + b) * layout.C_pad; }
  C* saved_of(int64_t t, int64_t b) const {
    return static_cast<C*>(a.saved) + (t * s.B + b) * s.record();
  }
  C* features_of(int64_t t, int64_t b) const {
    return static_cast<C*>(a.features) + (t * s.B + b) * (s.C + layout.R);
  }

  // ---- before the first step

  // Row b's state becomes row `from` of a state of `rows` rows.
  template <class State>
  void load_state(int64_t b, const State& state, int64_t from, int64_t rows) {
    buffer_index[b] = 0;
    if (s.lstm) {
      for (int64_t l = 0; l < s.layers; ++l) {
        const int64_t row = (l * rows + from) * s.C;
        copy(static_cast<const C*>(state.hidden) + row,
             operand_of(l, b, 0) + layout.hidden_offset(l), s.C);
        copy(static_cast<const C*>(state.cell) + row, cell_of(l, b), s.C);
      }
    }
    copy(static_cast<const C*>(state.reads) + from * layout.R, operand_of(0, b, 0) + s.I, layout.R);
    heads.load(b, state, from);
  }

  void store_state(int64_t b) {
    const auto& to = a.final;
    if (s.lstm) {
      for (int64_t l = 0; l < s.layers; ++l) {
        const int64_t row = (l * s.B + b) * s.C;
        copy<C>(operand_of(l, b, buffer_index[b]) + layout.hidden_offset(l),
                static_cast<C*>(to.hidden) + row, s.C);
        copy<C>(cell_of(l, b), static_cast<C*>(to.cell) + row, s.C);
      }
    }
    copy<C>(operand_of(0, b, buffer_index[b]) + s.I, static_cast<C*>(to.reads) + b * layout.R,
            layout.R);
    heads.store(b);
  }

  // ---- one step

  void step(int64_t t, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t b = begin; b < end; ++b) {
      if (!layout.active(t, b)) {
        zero(features_of(t, b), s.C + layout.R);
        heads.ended(t, b);
        continue;
      }
      row[n++] = b;
      if (a.checkpoints != nullptr && t % s.segment == 0) heads.keep(t, b);
      if (layout.reset(t, b)) load_state(b, a.initial, 0, 1);
      copy(static_cast<const C*>(a.input) + (t * s.B + b) * s.I, operand_of(0, b, buffer_index[b]),
           s.I);
    }
    if (n == 0) return;
    for (int64_t l = 0; l < s.layers; ++l) s.lstm ? run_lstm(t, l, n) : run_dense(t, l, n);
    for (int64_t j = 0; j < n; ++j) {
      operand[j] = top + row[j] * layout.C_pad;
      result[j] = p + row[j] * layout.P_pad;
    }
    weights.heads(n, operand, result);
    heads.activate(n, result);
    for (int64_t j = 0; j < n; ++j) act(t, row[j]);
  }

  void run_lstm(int64_t t, int64_t l, int64_t n) {
    for (int64_t j = 0; j < n; ++j) operand[j] = operand_of(l, row[j], buffer_index[row[j]]);
    weights.gates(l, n, operand, [&](auto block, int64_t first, int64_t u, const auto& z) {
      finish_units<decltype(block)::value>(t, l, first, u, z);
    });
  }

  // Activations, the new cell and the new hidden state of one vector of units, for R rows.
  template <int R>
  SEQMEM_INLINE void finish_units(int64_t t, int64_t l, int64_t first, int64_t u,
                                  const Vec<C> (&z)[R][4]) {
    const int n = static_cast<int>(min<int64_t>(L, s.C - u * L));
    Vec<C> out[R], argument[R];
    for (int r = 0; r < R; ++r) {
      const int64_t b = row[first + r];
      const Vec<C> arguments[4] = {sigmoid_argument<C>(z[r][0]), sigmoid_argument<C>(z[r][1]),
                                   tanh_argument<C>(z[r][2]), sigmoid_argument<C>(z[r][3])};
      ExpParts<C> e[4];
      exp_parts<4, C>(arguments, e);
      const Vec<C> i = sigmoid_of<C>(e[0]), f = sigmoid_of<C>(e[1]), g = tanh_of<C>(e[2]);
      out[r] = sigmoid_of<C>(e[3]);
      C* c = cell_of(l, b) + u * L;
      const Vec<C> now = sum_of_products(f, load(c), i, g);
      store(c, now);
      argument[r] = tanh_argument<C>(now);
      if (a.saved == nullptr) continue;
      C* record = saved_of(t, b) + layout.record_gates(l) + u * L;
      // Five streams a row are more than the hardware prefetches, and a store waits for its line.
      SEQMEM_UNROLL
      for (int k = 0; k < 5; ++k) __builtin_prefetch(record + k * s.C + 2 * L, 1);
      store_n(record, i, n);
      store_n(record + s.C, f, n);
      store_n(record + 2 * s.C, g, n);
      store_n(record + 3 * s.C, out[r], n);
      store_n(record + 4 * s.C, now, n);
    }
    // All rows at once: a single polynomial would wait for its own results.
    ExpParts<C> e[R];
    exp_parts<R, C>(argument, e);
    for (int r = 0; r < R; ++r) {
      const int64_t b = row[first + r];
      const Vec<C> h = out[r] * tanh_of<C>(e[r]);
      store(operand_of(l, b, buffer_index[b] ^ 1) + layout.hidden_offset(l) + u * L, h);
      emit(t, l, b, u, h, n);
    }
  }

  // A vector of layer l's output goes to the layer above, or to the heads.
  SEQMEM_INLINE void emit(int64_t t, int64_t l, int64_t b, int64_t u, Vec<C> h, int n) {
    if (l + 1 == s.layers) {
      store(top + b * layout.C_pad + u * L, h);
    } else {
      store(operand_of(l + 1, b, buffer_index[b]) + layout.below_offset(l + 1) + u * L, h);
      if (a.saved != nullptr) store_n(saved_of(t, b) + layout.record_output(l) + u * L, h, n);
    }
  }

  void run_dense(int64_t t, int64_t l, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      operand[j] = operand_of(l, row[j], buffer_index[row[j]]);
      result[j] = top + row[j] * layout.C_pad;
    }
    weights.dense(l, n, operand, result);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t u = 0; u < layout.units; ++u)
        emit(t, l, row[j], u, tanh<C>(load(result[j] + u * L)),
             static_cast<int>(min<int64_t>(L, s.C - u * L)));
  }

  // The heads of row b: from their values to the reads, which the next step is fed.
  void act(int64_t t, int64_t b) {
    const C* values = p + b * layout.P_pad;
    C* reads = operand_of(0, b, buffer_index[b] ^ 1) + s.I;
    heads.act(t, b, values, reads);
    buffer_index[b] ^= 1;
    C* features = features_of(t, b);
    copy<C>(top + b * layout.C_pad, features, s.C);
    copy<C>(reads, features + s.C, layout.R);
    if (a.saved != nullptr) copy(values, saved_of(t, b) + layout.record_p(), s.P);
  }
};

}  // namespace
}  // namespace seqmem::machine
