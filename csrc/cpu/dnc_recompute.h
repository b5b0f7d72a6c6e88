// Forms again what the steps of a segment saw: memories and links between two checkpoints, by their
// elementwise recurrences alone, and padded weightings.
#pragma once

#include "../common/machine_saved.h"
#include "dnc_step.h"

namespace seqmem::dnc {
namespace {

// One step of one row: what enters it and, of memory and weightings, what it leaves.
template <class C>
struct Seen {
  const C *memory, *norm, *link, *precedence, *usage, *written, *read;  // entering
  const C *memory_after, *norm_after, *usage_after, *written_after, *read_after;
  const C* values;              // of the interface, activated
  const C *forward, *backward;  // of the links, only where they are sharpened
};

// One thread's; `rows` rows at a time.
template <class C>
class Recompute {
  using Saved = machine::Saved<C, Shape, Backward>;
  const Shape& s;
  const Backward& a;
  const Saved& saved;
  const Layout<C, Shape>& layout;
  const Slots<C>& slots;
  const int64_t rows, matrix, links, precedences, weightings, directions, width;
  Seen<C>* seen;  // [rows][segment]
  // By row: [segment + 1] each, but [segment] for the last two.
  C *memories, *norms, *all_links, *all_precedences, *all_weightings, *all_values, *all_directions;
  C* psi;
  const C* initial = nullptr;  // the state that `reset` returns to, as `load` lays it out

 public:
  Recompute(const Shape& s, const Backward& a, const Saved& saved, const Layout<C, Shape>& layout,
            const Slots<C>& slots, int64_t values_size, int64_t rows)
      : s(s),
        a(a),
        saved(saved),
        layout(layout),
        slots(slots),
        rows(rows),
        matrix(slots.size()),
        links(s.linked() * s.N * slots.stride),
        precedences(s.linked() * slots.stride),
        weightings((1 + s.writes + s.reads) * slots.stride),
        directions(s.sharpen ? s.linked() * s.reads * slots.stride : 0),
        width(values_size) {}

  void place(Carver& take) {
    const int64_t steps = rows * (s.segment + 1);
    seen = take.array<Seen<C>>(rows * s.segment);
    memories = take.array<C>(steps * matrix);
    norms = take.array<C>(steps * slots.stride);
    all_links = take.array<C>(steps * links);
    all_precedences = take.array<C>(steps * precedences);
    all_weightings = take.array<C>(steps * weightings);
    all_values = take.array<C>(rows * s.segment * width);
    all_directions = take.array<C>(rows * s.segment * 2 * directions);
    psi = take.array<C>(slots.stride);
  }

  // memory, norm, links, precedences, weightings.
  int64_t initial_size() const { return matrix + slots.stride + links + precedences + weightings; }
  void reset_to(const C* state) { initial = state; }
  void load_initial(C* to) const {
    slots.load_memory(static_cast<const C*>(a.initial.memory), to);
    slots.norms(to, to + matrix, C(s.norm_floor));
    C* x = to + matrix + slots.stride;
    load_rows(a.initial.link, 0, s.linked() * s.N, x);
    load_rows(a.initial.precedence, 0, s.linked(), x + links);
    x += links + precedences;
    load_rows(a.initial.usage, 0, 1, x);
    load_rows(a.initial.write_weights, 0, s.writes, x + slots.stride);
    load_rows(a.initial.read_weights, 0, s.reads, x + (1 + s.writes) * slots.stride);
  }

  const Seen<C>& step_of(int64_t j, int64_t t) const { return seen[j * s.segment + t % s.segment]; }

  // Steps t0..t1 - 1 of row b, the j-th one, from the checkpoint before t0.
  void run(int64_t t0, int64_t t1, int64_t b, int64_t j, const Values<C>& values) const {
    if (!layout.active(t0, b)) return;
    const int64_t first = j * (s.segment + 1), stride = slots.stride;
    C *memory = memories + first * matrix, *norm = norms + first * stride;
    C *link = all_links + first * links, *precedence = all_precedences + first * precedences;
    C* w = all_weightings + first * weightings;
    const C* kept = Saved::in(a.checkpoints, (t0 / s.segment * s.B + b) * s.checkpoint());
    load_rows(kept, 0, s.M, memory);
    slots.norms(memory, norm, C(s.norm_floor));
    load_rows(kept + s.M * s.N, 0, s.linked() * s.N, link);
    load_rows(kept + (s.M + s.linked() * s.N) * s.N, 0, s.linked(), precedence);
    load_weightings(t0, b, w);
    Seen<C> now{};
    now.memory = memory, now.norm = norm, now.link = link, now.precedence = precedence;
    enter(now, w);
    for (int64_t t = t0; t < t1 && layout.active(t, b); ++t) {
      if (layout.reset(t, b)) {
        const C* x = initial + matrix + stride;
        now.memory = initial, now.norm = initial + matrix, now.link = x, now.precedence = x + links;
        enter(now, x + links + precedences);
      }
      memory += matrix, norm += stride, link += links, precedence += precedences, w += weightings;
      const int64_t k = j * s.segment + t % s.segment;
      C *x = all_values + k * width, *forward = all_directions + k * 2 * directions;
      values.run(saved.values(t, b), x);
      load_weightings(t + 1, b, w);
      now.values = x, now.forward = forward, now.backward = forward + directions;
      now.memory_after = memory, now.norm_after = norm, now.usage_after = w;
      now.written_after = w + stride, now.read_after = w + (1 + s.writes) * stride;
      seen[k] = now;
      if (s.deallocate)
        slots.each([&](int64_t i) { store(psi + i, slots.kept(x + slots.at.free, now.read, i)); });
      slots.write(now.memory, memory, now.written_after, x, psi, norm);
      for (int64_t h = 0; h < s.linked(); ++h) {
        const int64_t l = h * s.N * stride, p = h * stride, d = h * s.reads * stride;
        move_links<C>(s.N, stride, now.link + l, link + l, now.written_after + p,
                      now.precedence + p, s.sharpen ? s.reads : 0, now.read,
                      s.sharpen ? forward + d : nullptr,
                      s.sharpen ? forward + directions + d : nullptr);
      }
      if (s.links) slots.precede(now.written_after, now.precedence, precedence);
      now.memory = memory, now.norm = norm, now.link = link, now.precedence = precedence;
      enter(now, w);
    }
  }

 private:
  void enter(Seen<C>& now, const C* w) const {
    now.usage = w;
    now.written = w + slots.stride;
    now.read = w + (1 + s.writes) * slots.stride;
  }

  void load_rows(const void* from, int64_t row, int64_t n, C* to) const {
    const C* x = static_cast<const C*>(from) + row * n * s.N;
    for (int64_t k = 0; k < n; ++k) slots.load_weights(x + k * s.N, to + k * slots.stride);
  }

  // Usage and weightings after step t - 1, also where `reset` replaces them.
  void load_weightings(int64_t t, int64_t b, C* to) const {
    const int64_t row = t == 0 ? b : (t - 1) * s.B + b;
    load_rows(t == 0 ? a.state.usage : a.usage_trace, row, 1, to);
    load_rows(t == 0 ? a.state.write_weights : a.write_trace, row, s.writes, to + slots.stride);
    load_rows(t == 0 ? a.state.read_weights : a.read_trace, row, s.reads,
              to + (1 + s.writes) * slots.stride);
  }
};

}  // namespace
}  // namespace seqmem::dnc
