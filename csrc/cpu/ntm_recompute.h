// Recomputes what every head saw in the steps of a segment: the memories between two checkpoints,
// their norms, and the weightings.
#pragma once

#include "../common/machine_saved.h"
#include "ntm_memory.h"

namespace seqmem::ntm {
namespace {

// One head in one step of one row; arrays of slots, and `memory` as [M][stride].
template <class C>
struct HeadStep {
  const C *memory, *norm, *before, *weights;
  C* dots;
  Head<C> head;
};

// One thread's; `rows` rows at a time.
template <class C>
class Recompute {
  const Shape& s;
  const Saved<C, Shape, Backward>& saved;
  const Layout<C, Shape>& layout;
  const Slots<C>& slots;
  const HeadLayout head_layout;
  const int64_t rows, matrix;
  int64_t writes = 0;  // write heads

  HeadStep<C>* head_steps;           // [rows][segment][heads]
  C *versions, *norms, *weightings;  // by row: [segment * writes], one more, [segment+1]
  const C *initial_memory, *initial_norm, *initial_weights;

 public:
  Recompute(const Shape& s, const Saved<C, Shape, Backward>& saved, const Layout<C, Shape>& layout,
            const Slots<C>& slots, int64_t rows)
      : s(s),
        saved(saved),
        layout(layout),
        slots(slots),
        head_layout(s.M, s.taps),
        rows(rows),
        matrix(s.M * slots.stride) {
    for (int64_t h = 0; h < s.heads; ++h) writes += s.kinds[h] == 'w';
  }

  void place(Carver& take) {
    const int64_t count = rows * s.segment * s.heads;
    head_steps = take.array<HeadStep<C>>(count);
    C* dots = take.array<C>(count * slots.stride);
    versions = take.array<C>(rows * s.segment * writes * matrix);
    norms = take.array<C>(rows * (s.segment * writes + 1) * slots.stride);
    weightings = take.array<C>(rows * (s.segment + 1) * s.heads * slots.stride);
    for (int64_t k = 0; dots != nullptr && k < count; ++k)
      head_steps[k].dots = dots + k * slots.stride;
  }

  // The state that `reset` returns to.
  void reset_to(const C* memory, const C* norm, const C* weights) {
    initial_memory = memory, initial_norm = norm, initial_weights = weights;
  }

  // The heads of the j-th row in step t.
  HeadStep<C>* steps_of(int64_t j, int64_t t) const {
    return head_steps + (j * s.segment + t % s.segment) * s.heads;
  }

  // Steps t0..t1 - 1 of row b, the j-th one, from the checkpoint before t0.
  void run(int64_t t0, int64_t t1, int64_t b, int64_t j) const {
    if (!layout.active(t0, b)) return;
    C* version = versions + j * s.segment * writes * matrix;
    C* version_norm = norms + j * (s.segment * writes + 1) * slots.stride;
    C* w = weightings + j * (s.segment + 1) * s.heads * slots.stride;
    const C* memory = saved.checkpoint(t0, b);
    slots.norms(memory, version_norm);
    const C *norm = version_norm, *before = w;
    version_norm += slots.stride;
    load_weightings(saved.weightings_before(t0, b), w);
    for (int64_t t = t0; t < t1 && layout.active(t, b); ++t) {
      w += s.heads * slots.stride;
      load_weightings(saved.weightings(t, b), w);
      if (layout.reset(t, b))
        memory = initial_memory, norm = initial_norm, before = initial_weights;
      HeadStep<C>* step = steps_of(j, t);
      const C* values = saved.values(t, b);
      for (int64_t h = 0; h < s.heads; ++h) {
        step[h].head = head_of(values, head_layout, s.M);
        values += head_layout.size(s.kinds[h] == 'w', s.M);
      }
      bool have_dots = false;
      for (int64_t h = 0; h < s.heads; ++h) {
        HeadStep<C>& one = step[h];
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
  void load_weightings(const C* from, C* to) const {
    for (int64_t h = 0; h < s.heads; ++h) slots.load_weights(from + h * s.N, to + h * slots.stride);
  }
};

}  // namespace
}  // namespace seqmem::ntm
