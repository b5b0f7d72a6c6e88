// Memories between two checkpoints, computed again: what every head saw in the steps of a segment.
#pragma once

#include "ntm_left.h"

namespace seqmem::ntm {
namespace {

// One head in one step of one row; arrays of slots, and `memory` as [M][stride].
template <class C>
struct Seen {
  const C *memory, *norm, *before, *weights;
  C* dots;
  Head<C> head;
};

// One thread's; `rows` rows at a time.
template <class C>
class Recompute {
  const Shape& s;
  const Left<C>& left;
  const Layout<C>& at;
  const Slots<C>& slots;
  const HeadLayout layout;
  const int64_t rows, matrix;
  int64_t writes = 0;  // write heads

  Seen<C>* seen;                     // [rows][segment][heads]
  C *versions, *norms, *weightings;  // by row: [segment * writes], one more, [segment+1]
  const C *initial_memory, *initial_norm, *initial_weights;

 public:
  Recompute(const Shape& s, const Left<C>& left, const Layout<C>& at, const Slots<C>& slots,
            int64_t rows)
      : s(s),
        left(left),
        at(at),
        slots(slots),
        layout(s.M, s.taps),
        rows(rows),
        matrix(s.M * slots.stride) {
    for (int64_t h = 0; h < s.heads; ++h) writes += s.kinds[h] == 'w';
  }

  void place(Carver& take, bool mine) {
    const int64_t count = rows * s.segment * s.heads;
    auto own_seen = take.array<Seen<C>>(count);
    C* dots = take.array<C>(count * slots.stride);
    C* own_versions = take.array<C>(rows * s.segment * writes * matrix);
    C* own_norms = take.array<C>(rows * (s.segment * writes + 1) * slots.stride);
    C* own_weightings = take.array<C>(rows * (s.segment + 1) * s.heads * slots.stride);
    if (!mine) return;
    seen = own_seen, versions = own_versions, norms = own_norms, weightings = own_weightings;
    for (int64_t k = 0; own_seen != nullptr && k < count; ++k)
      seen[k].dots = dots + k * slots.stride;
  }

  // The state that `reset` returns to.
  void reset_to(const C* memory, const C* norm, const C* weights) {
    initial_memory = memory, initial_norm = norm, initial_weights = weights;
  }

  // The heads of the j-th row in step t.
  Seen<C>* at_step(int64_t j, int64_t t) const {
    return seen + (j * s.segment + t % s.segment) * s.heads;
  }

  // Steps t0..t1 - 1 of row b, the j-th one, from the checkpoint before t0.
  void run(int64_t t0, int64_t t1, int64_t b, int64_t j) const {
    if (!at.alive(t0, b)) return;
    C* version = versions + j * s.segment * writes * matrix;
    C* version_norm = norms + j * (s.segment * writes + 1) * slots.stride;
    C* w = weightings + j * (s.segment + 1) * s.heads * slots.stride;
    const C* memory = left.checkpoint(t0, b);
    slots.norms(memory, version_norm);
    const C *norm = version_norm, *before = w;
    version_norm += slots.stride;
    enter(left.weightings_before(t0, b), w);
    for (int64_t t = t0; t < t1 && at.alive(t, b); ++t) {
      w += s.heads * slots.stride;
      enter(left.weightings(t, b), w);
      if (at.reset(t, b)) memory = initial_memory, norm = initial_norm, before = initial_weights;
      Seen<C>* step = at_step(j, t);
      const C* values = left.values(t, b);
      for (int64_t h = 0; h < s.heads; ++h) {
        step[h].head = head_of(values, layout, s.M);
        values += layout.size(s.kinds[h] == 'w', s.M);
      }
      bool have_dots = false;
      for (int64_t h = 0; h < s.heads; ++h) {
        Seen<C>& one = step[h];
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

 private:
  void enter(const C* from, C* to) const {
    for (int64_t h = 0; h < s.heads; ++h)
      slots.enter_weights(from + h * s.N, to + h * slots.stride);
  }
};

}  // namespace
}  // namespace seqmem::ntm
