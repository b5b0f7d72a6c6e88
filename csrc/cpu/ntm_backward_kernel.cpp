// NTM backward over a whole sequence.
//
// Time runs backwards in chunks of segments. Within a segment every thread first computes the
// memories of its rows again from the segment's checkpoint, then goes back through its steps; the
// gradients of pre-activations stay in the chunk's buffers, from which all threads together form
// the weights' gradients.
#include "ntm_carry.h"
#include "ntm_memory_backward.h"
#include "ntm_recompute.h"
#include "ntm_weights.h"

namespace seqmem::ntm {
namespace {

template <class C>
class BackwardRun {
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;

  const Shape& s;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const Layout<C> at;
  const Slots<C> slots;
  const SlotsBackward<C> back;
  const HeadLayout layout;
  const int64_t rows;  // that go through time together
  const Left<C> left;
  const Carries<C> carries;
  WeightGradients<C> weights;

  // Shared by all threads.
  C *panels, *panels_head;
  C *initial_memory, *initial_norm, *initial_weights;
  Carry<C>*carry, *to_initial;  // [B]
  // This thread's own.
  HeadRoom<C> room;
  HeadValues<C> values;
  Recompute<C> again;
  C *dtop, *dx, *line, *dread;
  int64_t* row;
  const C** operand;
  C** result;

 public:
  BackwardRun(const Shape& s, const Backward& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        at(s),
        slots(s),
        back(slots),
        layout(s.M, s.taps),
        rows(rows_together<C>(s, ceil_div(s.B, threads))),
        left(s, a, at),
        carries(s, at, slots),
        weights(s, a, at, thread, threads),
        values(s),
        again(s, left, at, slots, rows) {}

  // Places all buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    panels = take.array<C>(panel_at(s.layers));
    panels_head = take.array<C>(ceil_div(s.C, W) * W * s.P);
    weights.place(take);
    initial_memory = take.array<C>(s.reset ? s.M * slots.stride : 0);
    initial_norm = take.array<C>(s.reset ? slots.stride : 0);
    initial_weights = take.array<C>(s.reset ? s.heads * slots.stride : 0);
    carry = carries.place(take, s.B);
    to_initial = carries.place(take, initial_wanted() ? s.B : 0);
    for (int i = 0; i < threads; ++i) {
      HeadRoom<C> own;
      HeadValues<C> own_values(s);
      own.place(take, slots);
      own_values.place(take);
      again.place(take, i == thread);
      C* own_line = take.array<C>(max(at.Cs, max(at.operand(0), at.operand(1))));
      C* own_dtop = take.array<C>(rows * at.Cs);
      C* own_dx = take.array<C>(rows * max(at.operand(0), at.operand(1)));
      C* own_dread = take.array<C>(Layout<C>::room(at.R));
      int64_t* own_row = take.array<int64_t>(rows);
      const C** own_operand = take.array<const C*>(rows);
      C** own_result = take.array<C*>(rows);
      if (i != thread) continue;
      room = own, values.use(own_values), line = own_line, dtop = own_dtop, dx = own_dx;
      dread = own_dread, row = own_row, operand = own_operand, result = own_result;
    }
    again.reset_to(initial_memory, initial_norm, initial_weights);
    return take.used();
  }

  void run() {
    pack();
    values.prepare();
    const Share mine = share(s.B, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      carries.begin(a.grad_final, b, carry[b]);
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
      carries.put(carry[b], a.grad_state, b, s.B);
    barrier.wait();
    if (weights.wanted) weights.store();
    if (thread == 0 && a.grad_initial.memory != nullptr)
      carries.put_initial(to_initial, s.reset == nullptr ? 0 : s.B, a.grad_initial);
  }

 private:
  bool initial_wanted() const { return s.reset != nullptr && a.grad_initial.memory != nullptr; }

  int64_t panel_size(int64_t l) const { return ceil_div(at.K(l), W) * W * at.gates(); }
  int64_t panel_at(int64_t l) const { return at.layer(l, panel_size(0), panel_size(1)); }

  // ---- before the last step

  void pack() {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(at.gates(), thread, threads);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        zero(line, at.operand(l));
        copy(given(a.controller[at.weight_ih(l)], j * at.below(l)), line + at.at_below(l),
             at.below(l));
        if (s.lstm)
          copy(given(a.controller[at.weight_hh(l)], j * s.C), line + at.at_hidden(l), s.C);
        pack_line(panels + panel_at(l), at.gates(), j, at.K(l));
      }
    }
    const Share mine = share(s.P, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      zero(line, at.Cs);
      copy(given(a.head_weight, j * s.C), line, s.C);
      pack_line(panels_head, s.P, j, s.C);
    }
    if (weights.wanted) weights.clear();
    if (s.reset == nullptr || thread != 0) return;
    slots.enter(given(a.initial.memory, 0), initial_memory);
    slots.norms(initial_memory, initial_norm);
    for (int64_t h = 0; h < s.heads; ++h)
      slots.enter_weights(given(a.initial.weightings, h * s.N), initial_weights + h * slots.stride);
  }
  static const C* given(const void* p, int64_t offset) { return Left<C>::in(p, offset); }

  // panels[p][j][4 vectors] = line
  void pack_line(C* to, int64_t depth, int64_t j, int64_t width) {
    for (int64_t p = 0; p * W < width; ++p)
      for (int64_t i = 0; i < W && p * W + i < width; i += L)
        store(to + (p * depth + j) * W + i, load(line + p * W + i));
  }

  // ---- steps end - 1 down to first of rows begin..stop - 1

  void run_rows(int64_t first, int64_t end, int64_t begin, int64_t stop) {
    for (int64_t t0 = (end - 1) / s.segment * s.segment; t0 >= first; t0 -= s.segment) {
      const int64_t t1 = min(t0 + s.segment, end);
      for (int64_t b = begin; b < stop; ++b) again.run(t0, t1, b, b - begin);
      for (int64_t t = t1 - 1; t >= t0; --t) step(t, begin, stop);
    }
  }

  void step(int64_t t, int64_t begin, int64_t stop) {
    int64_t n = 0;
    for (int64_t b = begin; b < stop; ++b) {
      if (at.alive(t, b)) {
        row[n++] = b;
      } else {
        if (a.grad_input != nullptr) zero(grad_input(t, b), s.I);
        if (weights.wanted) weights.keep_nothing(t, b);
      }
    }
    if (n == 0) return;
    for (int64_t j = 0; j < n; ++j) {
      heads(t, row[j], again.at_step(row[j] - begin, t));
      operand[j] = weights.dp_of(t, row[j]);
      result[j] = dtop + j * at.Cs;
    }
    multiply<C>(n, operand, s.P, panels_head, at.units, nullptr, result);
    for (int64_t j = 0; j < n; ++j) {
      add_grad_features(t, row[j], 0, s.C, dtop + j * at.Cs);
      if (weights.wanted) weights.keep_top(t, row[j], left.features(t, row[j]));
    }
    for (int64_t l = s.layers - 1; l >= 0; --l) layer(t, l, n);
    for (int64_t j = 0; j < n; ++j) {
      if (!at.reset(t, row[j])) continue;
      if (initial_wanted()) carries.add(carry[row[j]], to_initial[row[j]]);
      carries.clear(carry[row[j]]);
    }
  }

  C* grad_input(int64_t t, int64_t b) const {
    return static_cast<C*>(a.grad_input) + (t * s.B + b) * s.I;
  }

  // to += n values of the features' gradient, which is often one number or dense.
  void add_grad_features(int64_t t, int64_t b, int64_t first, int64_t n, C* to) const {
    if (a.grad_features == nullptr) return;
    const int64_t* stride = a.grad_features_strides;
    const C* from = given(a.grad_features, t * stride[0] + b * stride[1] + first * stride[2]);
    const int64_t step = stride[2];
    if (step == 0) {
      for (int64_t i = 0; i < n; ++i) to[i] += *from;
    } else if (step == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] += from[i * step];
    }
  }

  // The heads of row b in reverse: from the carried gradients to dp and those of the step before.
  // What a head passes on to the memory waits for the head before it, to go there together.
  void heads(int64_t t, int64_t b, Seen<C>* step) {
    const Carry<C>& c = carry[b];
    copy(c.reads, dread, at.R);
    add_grad_features(t, b, s.C, at.R, dread);
    C* dp = weights.dp_of(t, b);
    typename SlotsBackward<C>::Passing passing{};
    bool passing_writes = false;
    int64_t read = s.reads, from = s.P;
    for (int64_t h = s.heads - 1; h >= 0; --h) {
      const Seen<C>& one = step[h];
      const bool is_write = s.kinds[h] == 'w';
      from -= layout.size(is_write, s.M);
      C *part = dp + from, *dw = c.weights + h * slots.stride;
      if (a.grad_trace != nullptr) {
        const C* g = given(a.grad_trace, ((t * s.B + b) * s.heads + h) * s.N);
        for (int64_t i = 0; i < s.N; ++i) dw[i] += g[i];
      }
      if (is_write) {
        const typename SlotsBackward<C>::Written to = {
            one.memory, one.weights, &one.head, dw, part + layout.erase, part + layout.add};
        if (passing.memory == nullptr) {
          back.write_weights(to, c.memory);
        } else if (passing_writes) {
          back.template pass_to_write<true>(passing, to, c.memory, room.scratch);
        } else {
          back.template pass_to_write<false>(passing, to, c.memory, room.scratch);
        }
      } else {
        if (passing.memory != nullptr) pass(passing, passing_writes, c.memory);
        back.read_weights(one.memory, dread + --read * s.M, dw);
      }
      HeadGradients<C> d{};
      d.shift = part + layout.shift;
      if (s.taps == 3) {
        back.template address<3>(one.dots, one.norm, one.head, one.before, one.weights, dw,
                                 room.scratch, dw, d);
      } else {
        back.template address<0>(one.dots, one.norm, one.head, one.before, one.weights, dw,
                                 room.scratch, dw, d);
      }
      part[layout.beta] = d.beta, part[layout.gate] = d.gate, part[layout.gamma] = d.gamma;
      passing_writes = is_write;
      passing = {one.memory, one.weights, is_write ? one.head.erase : dread + read * s.M,
                 &one.head,  d.key_norm,  part};
    }
    if (passing.memory != nullptr) pass(passing, passing_writes, c.memory);
    values.back(left.values(t, b), dp);
  }

  void pass(const typename SlotsBackward<C>::Passing& from, bool writes, C* dmemory) const {
    if (writes) {
      back.template pass<true>(from, dmemory, room.scratch);
    } else {
      back.template pass<false>(from, dmemory, room.scratch);
    }
  }

  // From dtop, the gradient of layer l's output, to that of what it was computed from.
  void layer(int64_t t, int64_t l, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t b = row[j];
      s.lstm ? lstm_gates(t, l, b, dtop + j * at.Cs) : dense_gates(t, l, b, dtop + j * at.Cs);
      operand[j] = weights.dz_of(l, t, b);
      result[j] = dx + j * at.operand(l);
      if (weights.wanted)
        weights.keep_operand(l, t, b, s.lstm ? left.hidden_before(l, t, b) : nullptr,
                             l > 0 ? left.output(l - 1, t, b) : left.input(t, b),
                             left.reads_before(t, b));
    }
    multiply<C>(n, operand, at.gates(), panels + panel_at(l), ceil_div(at.K(l), L), nullptr,
                result);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t b = row[j];
      const C* from = dx + j * at.operand(l);
      if (l == 0) {
        if (a.grad_input != nullptr) copy(from, grad_input(t, b), s.I);
        copy(from + s.I, carry[b].reads, at.R);
      } else {
        copy(from + at.at_below(l), dtop + j * at.Cs, s.C);
      }
      if (s.lstm) copy(from + at.at_hidden(l), carry[b].hidden + l * at.Cs, s.C);
    }
  }

  void lstm_gates(int64_t t, int64_t l, int64_t b, const C* dh) {
    const C *gates = left.gates(l, t, b), *before = left.cell_before(l, t, b);
    C *to = weights.dz_of(l, t, b), *dc = carry[b].cell + l * at.Cs;
    const C* carried = carry[b].hidden + l * at.Cs;
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
    const C* y = left.output(l, t, b);
    C* to = weights.dz_of(l, t, b);
    for (int64_t u = 0; u < s.C; ++u) to[u] = dh[u] * (C(1) - y[u] * y[u]);
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Backward> backward_kernel = {Entry<BackwardRun, Backward>::workspace,
                                          Entry<BackwardRun, Backward>::run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::ntm
