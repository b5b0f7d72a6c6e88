// NTM backward over a whole sequence.
//
// Time runs backwards in chunks of segments. Within a segment every thread first computes the
// memories of its rows again from the segment's checkpoint, then goes back through its steps; the
// gradients of pre-activations stay in the chunk's buffers, from which all threads together form
// the weights' gradients, each its own rows of every weight.
#include "ntm_sequence_common.h"
#include "ntm_sequence_kernel.h"
#include "ntm_sequence_memory_backward.h"

namespace seqmem::ntm_sequence {
namespace {

template <class C>
class BackwardRun {
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr int64_t kChunkBytes = 8 << 20, kDepth = 64;

  // What one row carries from step to step, or one row's share of the gradient of `initial`.
  struct Carry {
    C *hidden, *cell;  // [layers, room(C)]
    C* memory;         // [M][stride]
    C* weights;        // [heads][stride]
    C* reads;          // room(R)
  };
  // What the recomputation of a segment leaves for one head in one step of one row.
  struct Seen {
    const C *memory, *norm, *before, *weights;
    C* dots;
    Head<C> head;
  };

  const Shape& s;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  const Layout<C> at;
  const Slots<C> slots;
  const SlotsBackward<C> back;
  const int64_t matrix;  // room of a memory
  const int64_t chunk;   // steps
  const bool weights_wanted;
  int64_t writes = 0, rows = 0;  // write heads; rows that go through time together

  // Shared by all threads.
  C *panels, *panels_head, *sums, *sums_head;
  C *dz, *operands, *dp, *tops;  // of a chunk
  C *initial_memory, *initial_norm, *initial_weights;
  Carry *carry, *to_initial;  // [B]
  // This thread's own.
  HeadRoom<C> room;
  Seen* seen;  // [rows][segment][heads]
  C *versions, *version_norms, *weightings;
  C *values, *dtop, *dx, *line;
  HeadGradients<C> d;
  C* dread;
  int64_t *row, *steps;
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
        matrix(s.M * slots.stride),
        chunk(steps_at_once(s)),
        weights_wanted(a.grad_controller != nullptr) {
    for (int64_t h = 0; h < s.heads; ++h) writes += s.kinds[h] == 'w';
    rows = min(rows_together<C>(s), ceil_div(s.B, threads));
  }

  // Places all buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    panels = take.array<C>(panel_at(s.layers));
    panels_head = take.array<C>(ceil_div(s.C, W) * W * s.P);
    sums = take.array<C>(sums_at(s.layers));
    sums_head = take.array<C>(s.P * at.Cs);
    dz = take.array<C>(s.layers * chunk * s.B * at.gates_stride());
    operands = take.array<C>(operands_at(s.layers));
    dp = take.array<C>(chunk * s.B * at.Ps);
    tops = take.array<C>(chunk * s.B * at.Cs);
    initial_memory = take.array<C>(s.reset ? matrix : 0);
    initial_norm = take.array<C>(s.reset ? slots.stride : 0);
    initial_weights = take.array<C>(s.reset ? s.heads * slots.stride : 0);
    carry = place_carries(take, s.B);
    to_initial = place_carries(take, initial_wanted() ? s.B : 0);
    for (int i = 0; i < threads; ++i) {
      HeadRoom<C> own;
      own.place(take, slots);
      auto own_seen = take.array<Seen>(rows * s.segment * s.heads);
      C* own_dots = take.array<C>(rows * s.segment * s.heads * slots.stride);
      C* own_values = take.array<C>(rows * s.segment * s.heads * HeadRoom<C>::head_size(s));
      C* own_versions = take.array<C>(rows * s.segment * writes * matrix);
      C* own_norms = take.array<C>(rows * (s.segment * writes + 1) * slots.stride);
      C* own_weightings = take.array<C>(rows * (s.segment + 1) * s.heads * slots.stride);
      C* own_line = take.array<C>(max(max(at.Ps, at.Cs), max(at.operand(0), at.operand(1))));
      C* own_dtop = take.array<C>(rows * at.Cs);
      C* own_dx = take.array<C>(rows * max(at.operand(0), at.operand(1)));
      C* own_gradients = take.array<C>(HeadRoom<C>::head_size(s));
      C* own_dread = take.array<C>(Layout<C>::room(at.R));
      int64_t* own_row = take.array<int64_t>(rows);
      int64_t* own_steps = take.array<int64_t>(rows);
      const C** own_operand = take.array<const C*>(rows);
      C** own_result = take.array<C*>(rows);
      if (i != thread) continue;
      room = own, seen = own_seen, values = own_values, versions = own_versions;
      version_norms = own_norms, weightings = own_weightings, line = own_line, dtop = own_dtop;
      dx = own_dx, row = own_row, steps = own_steps, operand = own_operand, result = own_result;
      dread = own_dread;
      Head<C> named{};
      if (base != nullptr) HeadRoom<C>::attach(named, own_gradients, s);
      d = {named.key, named.erase, named.add, named.shift, 0, 0, 0, 0};
      if (base == nullptr) continue;
      for (int64_t k = 0; k < rows * s.segment * s.heads; ++k) {
        seen[k].dots = own_dots + k * slots.stride;
        HeadRoom<C>::attach(seen[k].head, values + k * HeadRoom<C>::head_size(s), s);
      }
    }
    return take.used();
  }

  void run() {
    pack();
    const Share mine = share(s.B, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) begin_row(b);
    barrier.wait();
    for (int64_t first = ceil_div(s.T, chunk) * chunk - chunk; first >= 0; first -= chunk) {
      const int64_t end = min(first + chunk, s.T);
      for (int64_t b = mine.begin; b < mine.end; b += rows)
        run_rows(first, end, b, min(b + rows, mine.end));
      if (!weights_wanted) continue;
      barrier.wait();
      add_weight_gradients((end - first) * s.B);
      barrier.wait();
    }
    for (int64_t b = mine.begin; b < mine.end; ++b) end_row(b);
    barrier.wait();
    if (weights_wanted) store_weight_gradients();
    if (thread == 0 && a.grad_initial.memory != nullptr) store_initial_gradients();
  }

 private:
  // Whole segments, so many that a chunk's buffers stay near the cache.
  static int64_t steps_at_once(const Shape& s) {
    const Layout<C> at(s);
    int64_t step = at.Ps + at.Cs + at.operand(0) + (s.layers - 1) * at.operand(1);
    step = (step + s.layers * at.gates_stride()) * max<int64_t>(s.B, 1) * sizeof(C);
    const int64_t segments = max<int64_t>(1, kChunkBytes / step / s.segment);
    return min(segments, max<int64_t>(1, ceil_div(s.T, s.segment))) * s.segment;
  }

  bool initial_wanted() const { return s.reset != nullptr && a.grad_initial.memory != nullptr; }

  Carry* place_carries(Carver& take, int64_t n) {
    auto out = take.array<Carry>(n);
    const int64_t layers = s.lstm ? s.layers : 0;
    for (int64_t b = 0; b < n; ++b) {
      const Carry one = {take.array<C>(layers * at.Cs), take.array<C>(layers * at.Cs),
                         take.array<C>(matrix), take.array<C>(s.heads * slots.stride),
                         take.array<C>(Layout<C>::room(at.R))};
      if (out != nullptr) out[b] = one;
    }
    return out;
  }

  int64_t vectors(int64_t l) const { return ceil_div(at.K(l), L); }
  int64_t panel_size(int64_t l) const { return ceil_div(at.K(l), W) * W * at.gates(); }
  int64_t panel_at(int64_t l) const { return at.layer(l, panel_size(0), panel_size(1)); }
  int64_t sums_at(int64_t l) const {
    return at.layer(l, at.gates() * at.operand(0), at.gates() * at.operand(1));
  }
  int64_t operands_at(int64_t l) const {
    return at.layer(l, chunk * s.B * at.operand(0), chunk * s.B * at.operand(1));
  }
  // Rows of a chunk's buffers.
  int64_t place_of(int64_t t, int64_t b) const { return t % chunk * s.B + b; }
  C* dz_of(int64_t l, int64_t t, int64_t b) const {
    return dz + (l * chunk * s.B + place_of(t, b)) * at.gates_stride();
  }
  C* operand_of(int64_t l, int64_t t, int64_t b) const {
    return operands + operands_at(l) + place_of(t, b) * at.operand(l);
  }
  C* dp_of(int64_t t, int64_t b) const { return dp + place_of(t, b) * at.Ps; }
  C* top_of(int64_t t, int64_t b) const { return tops + place_of(t, b) * at.Cs; }
  Seen* seen_of(int64_t j, int64_t t) const {
    return seen + (j * s.segment + t % s.segment) * s.heads;
  }

  // ---- what the forward left

  template <class X>
  static const C* in(const X* p, int64_t offset) {
    return static_cast<const C*>(p) + offset;
  }
  const C* record(int64_t t, int64_t b) const { return in(a.saved, (t * s.B + b) * s.record()); }
  const C* features(int64_t t, int64_t b) const {
    return in(a.features, (t * s.B + b) * (s.C + at.R));
  }
  const C* output(int64_t l, int64_t t, int64_t b) const {
    return l + 1 == s.layers ? features(t, b) : record(t, b) + at.record_output(l);
  }
  const C* hidden_before(int64_t l, int64_t t, int64_t b) const {
    if (at.reset(t, b)) return in(a.initial.hidden, l * s.C);
    return t == 0 ? in(a.state.hidden, (l * s.B + b) * s.C) : output(l, t - 1, b);
  }
  const C* cell_before(int64_t l, int64_t t, int64_t b) const {
    if (at.reset(t, b)) return in(a.initial.cell, l * s.C);
    if (t == 0) return in(a.state.cell, (l * s.B + b) * s.C);
    return record(t - 1, b) + at.record_gates(l) + 4 * s.C;
  }
  const C* reads_before(int64_t t, int64_t b) const {
    if (at.reset(t, b)) return in(a.initial.reads, 0);
    return t == 0 ? in(a.state.reads, b * at.R) : features(t - 1, b) + s.C;
  }

  // ---- before the last step

  void pack() {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(at.gates(), thread, threads);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        zero(line, at.operand(l));
        copy(in(a.controller[at.weight_ih(l)], j * at.below(l)), line + at.at_below(l),
             at.below(l));
        if (s.lstm) copy(in(a.controller[at.weight_hh(l)], j * s.C), line + at.at_hidden(l), s.C);
        pack_line(panels + panel_at(l), at.gates(), j, at.K(l));
        zero(sums + sums_at(l) + j * at.operand(l), at.operand(l));
      }
    }
    const Share mine = share(s.P, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      zero(line, at.Cs);
      copy(in(a.head_weight, j * s.C), line, s.C);
      pack_line(panels_head, s.P, j, s.C);
      zero(sums_head + j * at.Cs, at.Cs);
    }
    if (s.reset == nullptr || thread != 0) return;
    slots.enter(in(a.initial.memory, 0), initial_memory);
    slots.norms(initial_memory, initial_norm);
    for (int64_t h = 0; h < s.heads; ++h)
      slots.enter_weights(in(a.initial.weightings, h * s.N), initial_weights + h * slots.stride);
  }

  // panels[p][j][4 vectors] = line
  void pack_line(C* to, int64_t depth, int64_t j, int64_t width) {
    for (int64_t p = 0; p * W < width; ++p)
      for (int64_t i = 0; i < W && p * W + i < width; i += L)
        store(to + (p * depth + j) * W + i, load(line + p * W + i));
  }

  void begin_row(int64_t b) {
    const Carry& c = carry[b];
    const State<const void*>& g = a.grad_final;
    auto given = [&](const void* from, int64_t offset, C* to, int64_t n) {
      if (from == nullptr) {
        zero(to, n);
      } else {
        copy(in(from, offset), to, n);
      }
    };
    for (int64_t l = 0; s.lstm && l < s.layers; ++l) {
      given(g.hidden, (l * s.B + b) * s.C, c.hidden + l * at.Cs, s.C);
      given(g.cell, (l * s.B + b) * s.C, c.cell + l * at.Cs, s.C);
    }
    given(g.reads, b * at.R, c.reads, at.R);
    zero(c.weights, s.heads * slots.stride);
    for (int64_t h = 0; h < s.heads && g.weightings != nullptr; ++h)
      slots.enter_weights(in(g.weightings, (b * s.heads + h) * s.N), c.weights + h * slots.stride);
    zero(c.memory, matrix);
    if (g.memory != nullptr) slots.enter(in(g.memory, b * s.N * s.M), c.memory);
    if (initial_wanted()) clear(to_initial[b]);
  }

  void clear(const Carry& c) {
    if (s.lstm) {
      zero(c.hidden, s.layers * at.Cs);
      zero(c.cell, s.layers * at.Cs);
    }
    zero(c.memory, matrix);
    zero(c.weights, s.heads * slots.stride);
    zero(c.reads, at.R);
  }

  // ---- steps end - 1 down to first of rows begin..stop - 1

  void run_rows(int64_t first, int64_t end, int64_t begin, int64_t stop) {
    for (int64_t t0 = (end - 1) / s.segment * s.segment; t0 >= first; t0 -= s.segment) {
      const int64_t t1 = min(t0 + s.segment, end);
      for (int64_t b = begin; b < stop; ++b) recompute(t0, t1, b, b - begin);
      for (int64_t t = t1 - 1; t >= t0; --t) step(t, begin, stop);
    }
  }

  // The memories, norms and similarities that the heads of row b saw in steps t0..t1 - 1.
  void recompute(int64_t t0, int64_t t1, int64_t b, int64_t j) {
    if (!at.alive(t0, b)) return;
    const HeadLayout layout(s.M, s.taps);
    C* version = versions + j * s.segment * writes * matrix;
    C* version_norm = version_norms + j * (s.segment * writes + 1) * slots.stride;
    C* w = weightings + j * (s.segment + 1) * s.heads * slots.stride;
    const C* memory = in(a.checkpoints, (t0 / s.segment * s.B + b) * matrix);
    slots.norms(memory, version_norm);
    const C* norm = version_norm;
    version_norm += slots.stride;
    const C* before = w;
    enter_trace(t0 == 0 ? in(a.state.weightings, b * s.heads * s.N) : trace(t0 - 1, b), w);
    for (int64_t t = t0; t < t1 && at.alive(t, b); ++t) {
      w += s.heads * slots.stride;
      enter_trace(trace(t, b), w);
      if (at.reset(t, b)) memory = initial_memory, norm = initial_norm, before = initial_weights;
      copy(record(t, b) + at.record_p(), line, s.P);
      Seen* step = seen_of(j, t);
      for (int64_t h = 0, from = 0; h < s.heads; ++h) {
        const bool is_write = s.kinds[h] == 'w';
        activate_head(line + from, s.M, s.taps, is_write, s.squash, step[h].head);
        from += layout.size(is_write, s.M);
      }
      bool have_dots = false;
      for (int64_t h = 0; h < s.heads; ++h) {
        Seen& one = step[h];
        one.memory = memory, one.norm = norm;
        one.before = before + h * slots.stride, one.weights = w + h * slots.stride;
        if (!have_dots) slots.similarity(memory, one.head.key, one.dots);
        have_dots = s.kinds[h] == 'w' && h + 1 < s.heads;
        if (s.kinds[h] != 'w') continue;
        slots.write(memory, version, one.weights, one.head, version_norm,
                    have_dots ? step[h + 1].head.key : nullptr,
                    have_dots ? step[h + 1].dots : nullptr);
        memory = version, norm = version_norm;
        version += matrix, version_norm += slots.stride;
      }
      before = w;
    }
  }

  const C* trace(int64_t t, int64_t b) const { return in(a.trace, (t * s.B + b) * s.heads * s.N); }
  void enter_trace(const C* from, C* to) const {
    for (int64_t h = 0; h < s.heads; ++h)
      slots.enter_weights(from + h * s.N, to + h * slots.stride);
  }

  void step(int64_t t, int64_t begin, int64_t stop) {
    int64_t n = 0;
    for (int64_t b = begin; b < stop; ++b) {
      if (at.alive(t, b)) {
        row[n++] = b;
      } else {
        skip(t, b);
      }
    }
    if (n == 0) return;
    for (int64_t j = 0; j < n; ++j) {
      heads(t, row[j], seen_of(row[j] - begin, t));
      operand[j] = dp_of(t, row[j]);
      result[j] = dtop + j * at.Cs;
    }
    multiply<C>(n, operand, s.P, panels_head, at.units, nullptr, result);
    for (int64_t j = 0; j < n; ++j) {
      C* to = dtop + j * at.Cs;
      for (int64_t u = 0; u < s.C; ++u) to[u] += grad_feature(t, row[j], u);
      if (weights_wanted) keep_operand(features(t, row[j]), s.C, nullptr, 0, top_of(t, row[j]));
    }
    for (int64_t l = s.layers - 1; l >= 0; --l) layer(t, l, n);
    for (int64_t j = 0; j < n; ++j)
      if (at.reset(t, row[j])) hand_to_initial(row[j]);
  }

  C grad_feature(int64_t t, int64_t b, int64_t i) const {
    if (a.grad_features == nullptr) return 0;
    const int64_t* stride = a.grad_features_strides;
    return *in(a.grad_features, t * stride[0] + b * stride[1] + i * stride[2]);
  }

  // A row that has ended has no gradients in this step.
  void skip(int64_t t, int64_t b) {
    if (a.grad_input != nullptr) zero(static_cast<C*>(a.grad_input) + (t * s.B + b) * s.I, s.I);
    if (!weights_wanted) return;
    for (int64_t l = 0; l < s.layers; ++l) {
      zero(dz_of(l, t, b), at.gates());
      zero(operand_of(l, t, b), at.operand(l));
    }
    zero(dp_of(t, b), s.P);
    zero(top_of(t, b), at.Cs);
  }

  // to = [first, second, 1], zero up to a whole vector: the one's gradient is the bias'.
  void keep_operand(const C* first, int64_t n, const C* second, int64_t m, C* to) const {
    copy(first, to, n);
    if (m > 0) copy(second, to + n, m);
    to[n + m] = 1;
    for (int64_t i = n + m + 1; i % L != 0; ++i) to[i] = 0;
  }

  // The heads of row b in reverse: from the carried gradients to dp and those of the step before.
  void heads(int64_t t, int64_t b, Seen* step) {
    const Carry& c = carry[b];
    for (int64_t i = 0; i < at.R; ++i) dread[i] = c.reads[i] + grad_feature(t, b, s.C + i);
    const HeadLayout layout(s.M, s.taps);
    int64_t read = s.reads, from = s.P;
    for (int64_t h = s.heads - 1; h >= 0; --h) {
      Seen& one = step[h];
      const bool is_write = s.kinds[h] == 'w';
      from -= layout.size(is_write, s.M);
      C* dw = c.weights + h * slots.stride;
      if (a.grad_trace != nullptr) {
        const C* g = in(a.grad_trace, ((t * s.B + b) * s.heads + h) * s.N);
        for (int64_t i = 0; i < s.N; ++i) dw[i] += g[i];
      }
      if (is_write) {
        back.write_weights(one.memory, c.memory, one.weights, one.head, dw, d);
      } else {
        back.read_weights(one.memory, dread + --read * s.M, dw);
      }
      if (s.taps == 3) {
        back.template address<3>(one.dots, one.norm, one.head, one.before, one.weights, dw,
                                 room.scratch, dw, d);
      } else {
        back.template address<0>(one.dots, one.norm, one.head, one.before, one.weights, dw,
                                 room.scratch, dw, d);
      }
      if (is_write) {
        back.write_memory(one.memory, c.memory, one.weights, one.head, room.scratch, d);
      } else {
        back.read_memory(one.memory, c.memory, one.weights, dread + read * s.M, one.head,
                         room.scratch, d);
      }
      head_values(one.head, is_write, dp_of(t, b) + from);
    }
  }

  // From the gradients of a head's parameters to those of its part of p.
  void head_values(const Head<C>& head, bool is_write, C* to) const {
    const HeadLayout layout(s.M, s.taps);
    const C norm = head.key_norm > C(0) ? d.key_norm / head.key_norm : C(0);
    auto through = [&](C x) { return s.squash ? C(1) - x * x : C(1); };
    for (int64_t m = 0; m < s.M; ++m)
      to[m] = (d.key[m] + norm * head.key[m]) * through(head.key[m]);
    to[layout.beta] = d.beta * head.beta_slope;
    to[layout.gate] = d.gate * head.gate * (C(1) - head.gate);
    to[layout.gamma] = d.gamma * head.gamma_slope;
    C inside = 0;
    for (int64_t j = 0; j < s.taps; ++j) inside += head.shift[j] * d.shift[j];
    for (int64_t j = 0; j < s.taps; ++j)
      to[layout.shift + j] = head.shift[j] * (d.shift[j] - inside);
    for (int64_t m = 0; is_write && m < s.M; ++m) {
      to[layout.erase + m] = d.erase[m] * head.erase[m] * (C(1) - head.erase[m]);
      to[layout.add + m] = d.add[m] * through(head.add[m]);
    }
  }

  // From dtop, the gradient of layer l's output, to that of what it was computed from.
  void layer(int64_t t, int64_t l, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t b = row[j];
      s.lstm ? lstm_gates(t, l, b, dtop + j * at.Cs) : dense_gates(t, l, b, dtop + j * at.Cs);
      operand[j] = dz_of(l, t, b);
      result[j] = dx + j * at.operand(l);
      if (!weights_wanted) continue;
      const C* hidden = s.lstm ? hidden_before(l, t, b) : nullptr;
      if (l > 0) {
        if (s.lstm) {
          keep_operand(hidden, s.C, output(l - 1, t, b), s.C, operand_of(l, t, b));
        } else {
          keep_operand(output(l - 1, t, b), s.C, nullptr, 0, operand_of(l, t, b));
        }
      } else {
        C* to = operand_of(0, t, b);
        copy(in(a.input, (t * s.B + b) * s.I), to, s.I);
        if (at.R > 0) copy(reads_before(t, b), to + s.I, at.R);
        keep_operand(hidden, at.recurrent(), nullptr, 0, to + at.below(0));
        for (int64_t i = at.K(0) + 1; i % L != 0; ++i) to[i] = 0;
      }
    }
    multiply<C>(n, operand, at.gates(), panels + panel_at(l), vectors(l), nullptr, result);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t b = row[j];
      const C* from = dx + j * at.operand(l);
      if (l == 0) {
        if (a.grad_input != nullptr)
          copy(from, static_cast<C*>(a.grad_input) + (t * s.B + b) * s.I, s.I);
        copy(from + s.I, carry[b].reads, at.R);
      } else {
        copy(from + at.at_below(l), dtop + j * at.Cs, s.C);
      }
      if (s.lstm) copy(from + at.at_hidden(l), carry[b].hidden + l * at.Cs, s.C);
    }
  }

  void lstm_gates(int64_t t, int64_t l, int64_t b, const C* dh) {
    const C *gates = record(t, b) + at.record_gates(l), *before = cell_before(l, t, b);
    C *to = dz_of(l, t, b), *dc = carry[b].cell + l * at.Cs;
    const C* carried = carry[b].hidden + l * at.Cs;
    for (int64_t u = 0; u < s.C; u += L) {
      const int n = static_cast<int>(min<int64_t>(L, s.C - u));
      const Vec<C> i = load_n(gates + u, n), f = load_n(gates + s.C + u, n);
      const Vec<C> g = load_n(gates + 2 * s.C + u, n), o = load_n(gates + 3 * s.C + u, n);
      const Vec<C> squashed = tanh<C>(load_n(gates + 4 * s.C + u, n));
      const Vec<C> h = load_n(dh + u, n) + load_n(carried + u, n);
      const Vec<C> c = load_n(dc + u, n) + h * o * (C(1) - squashed * squashed);
      store_n(to + u, c * g * i * (C(1) - i), n);
      store_n(to + s.C + u, c * load_n(before + u, n) * f * (C(1) - f), n);
      store_n(to + 2 * s.C + u, c * i * (C(1) - g * g), n);
      store_n(to + 3 * s.C + u, h * squashed * o * (C(1) - o), n);
      store_n(dc + u, c * f, n);
    }
  }

  void dense_gates(int64_t t, int64_t l, int64_t b, const C* dh) {
    const C* y = output(l, t, b);
    C* to = dz_of(l, t, b);
    for (int64_t u = 0; u < s.C; ++u) to[u] = dh[u] * (C(1) - y[u] * y[u]);
  }

  void hand_to_initial(int64_t b) {
    if (initial_wanted()) add(carry[b], to_initial[b]);
    clear(carry[b]);
  }

  void add(const Carry& from, const Carry& to) {
    auto plus = [](const C* x, C* y, int64_t n) {
      for (int64_t i = 0; i < n; ++i) y[i] += x[i];
    };
    for (int64_t l = 0; s.lstm && l < s.layers; ++l) {
      plus(from.hidden + l * at.Cs, to.hidden + l * at.Cs, s.C);
      plus(from.cell + l * at.Cs, to.cell + l * at.Cs, s.C);
    }
    for (int64_t m = 0; m < s.M; ++m)
      plus(from.memory + m * slots.stride, to.memory + m * slots.stride, s.N);
    for (int64_t h = 0; h < s.heads; ++h)
      plus(from.weights + h * slots.stride, to.weights + h * slots.stride, s.N);
    plus(from.reads, to.reads, at.R);
  }

  // ---- the weights' gradients

  void add_weight_gradients(int64_t n) {
    for (int64_t l = 0; l < s.layers; ++l)
      add_outer(n, dz + l * chunk * s.B * at.gates_stride(), at.gates_stride(), at.gates(),
                operands + operands_at(l), at.operand(l), ceil_div(at.K(l) + 1, L),
                sums + sums_at(l));
    add_outer(n, dp, at.Ps, s.P, tops, at.Cs, ceil_div(s.C + 1, L), sums_head);
  }

  // total[j][.] += sum over n rows of from[.][j] b[.], with rows of total as wide as those of b.
  void add_outer(int64_t n, const C* from, int64_t from_step, int64_t outputs, const C* b,
                 int64_t step, int64_t vectors, C* total) {
    const Share mine = share(outputs, thread, threads);
    for (int64_t k = 0; k < n; k += kDepth) {
      const int64_t depth = min(kDepth, n - k);
      for_row_blocks<C>(mine.end - mine.begin, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const C* column[R];
        C* to[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          column[r] = from + k * from_step + mine.begin + start + r;
          to[r] = total + (mine.begin + start + r) * step;
        }
        for_panels(vectors, [&](auto columns, int64_t v) {
          constexpr int NV = decltype(columns)::value;
          Vec<C> acc[R][NV];
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int i = 0; i < NV; ++i) acc[r][i] = load(to[r] + (v + i) * L);
          tile_multiply<R, NV, C>(depth, column, from_step, b + k * step + v * L, L, step, acc);
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int i = 0; i < NV; ++i) store(to[r] + (v + i) * L, acc[r][i]);
        });
      });
    }
  }

  void store_weight_gradients() {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(at.gates(), thread, threads);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        const C* from = sums + sums_at(l) + j * at.operand(l);
        copy(from + at.at_below(l), wanted(at.weight_ih(l)) + j * at.below(l), at.below(l));
        wanted(at.bias(l))[j] = from[at.K(l)];
        if (!s.lstm) continue;
        copy(from + at.at_hidden(l), wanted(at.weight_hh(l)) + j * s.C, s.C);
        wanted(at.bias(l) + 1)[j] = from[at.K(l)];
      }
    }
    const Share mine = share(s.P, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      copy<C>(sums_head + j * at.Cs, static_cast<C*>(a.grad_head_weight) + j * s.C, s.C);
      static_cast<C*>(a.grad_head_bias)[j] = sums_head[j * at.Cs + s.C];
    }
  }
  C* wanted(int64_t i) const { return static_cast<C*>(a.grad_controller[i]); }

  // ---- after the first step

  void end_row(int64_t b) {
    if (a.grad_state.memory != nullptr) put(carry[b], a.grad_state, b, s.B);
  }

  // One row's gradients to row `to` of a state of `count` rows.
  void put(const Carry& from, const State<void*>& state, int64_t to, int64_t count) const {
    for (int64_t l = 0; s.lstm && l < s.layers; ++l) {
      const int64_t at_row = (l * count + to) * s.C;
      copy<C>(from.hidden + l * at.Cs, static_cast<C*>(state.hidden) + at_row, s.C);
      copy<C>(from.cell + l * at.Cs, static_cast<C*>(state.cell) + at_row, s.C);
    }
    slots.leave(from.memory, static_cast<C*>(state.memory) + to * s.N * s.M);
    for (int64_t h = 0; h < s.heads; ++h)
      copy<C>(from.weights + h * slots.stride,
              static_cast<C*>(state.weightings) + (to * s.heads + h) * s.N, s.N);
    copy<C>(from.reads, static_cast<C*>(state.reads) + to * at.R, at.R);
  }

  void store_initial_gradients() {
    if (s.reset == nullptr || s.B == 0) {
      const State<void*>& g = a.grad_initial;
      const int64_t layers = s.lstm ? s.layers : 0;
      zero(static_cast<C*>(g.hidden), layers * s.C);
      zero(static_cast<C*>(g.cell), layers * s.C);
      zero(static_cast<C*>(g.memory), s.N * s.M);
      zero(static_cast<C*>(g.weightings), s.heads * s.N);
      zero(static_cast<C*>(g.reads), at.R);
      return;
    }
    for (int64_t b = 1; b < s.B; ++b) add(to_initial[b], to_initial[0]);
    put(to_initial[0], a.grad_initial, 0, 1);
  }
};

}  // namespace

namespace SEQMEM_ISA {
extern const Kernel<Backward> backward_kernel;
const Kernel<Backward> backward_kernel = {Entry<BackwardRun, Backward>::workspace,
                                          Entry<BackwardRun, Backward>::run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::ntm_sequence
