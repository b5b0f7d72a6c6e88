// Recomputes what the heads did in the steps of a segment: the memories between two checkpoints,
// their norms and similarities to the keys, and the weightings.
#pragma once

#include "../common/machine_saved.h"
#include "lrua_memory.h"

namespace seqmem::lrua {
namespace {

// One step of one row: `memory` [M][stride] as it left it; weightings and dots [heads][stride].
template <class C>
struct Step {
  const C *memory, *norm, *dots, *before, *written, *weights;
  const int64_t* slots;
  Head<C>* head;
};

// One thread's; `rows` rows at a time.
template <class C>
class Recompute {
  const Shape& s;
  const Backward& a;
  const Saved<C, Shape, Backward>& saved;
  const Layout<C, Shape>& layout;
  const Slots<C>& slots;
  const HeadValues<C>& values;
  const int64_t rows, matrix, weightings;

  Step<C>* steps;              // [rows][segment]
  Head<C>* heads;              // [rows][segment][heads]
  C *memories, *norms, *dots;  // by row and step
  C *written, *weights;        // likewise; of `weights` one more a row, what was there before
  C* kept;                     // [stride]
  const C *initial_memory, *initial_weights;

 public:
  Recompute(const Shape& s, const Backward& a, const Saved<C, Shape, Backward>& saved,
            const Layout<C, Shape>& layout, const Slots<C>& slots, const HeadValues<C>& values,
            int64_t rows)
      : s(s),
        a(a),
        saved(saved),
        layout(layout),
        slots(slots),
        values(values),
        rows(rows),
        matrix(slots.size()),
        weightings(s.heads * slots.stride) {}

  void place(Carver& take) {
    const int64_t count = rows * s.segment;
    steps = take.array<Step<C>>(count);
    heads = take.array<Head<C>>(count * s.heads);
    memories = take.array<C>(count * matrix);
    norms = take.array<C>(count * slots.stride);
    dots = take.array<C>(count * weightings);
    written = take.array<C>(count * weightings);
    weights = take.array<C>((count + rows) * weightings);
    kept = take.array<C>(slots.stride);
  }

  // The state that `reset` returns to.
  void reset_to(const C* memory, const C* weightings) {
    initial_memory = memory, initial_weights = weightings;
  }

  void prepare() const { slots.keep_all(kept); }

  // The j-th row in step t.
  const Step<C>& step_of(int64_t j, int64_t t) const {
    return steps[j * s.segment + t % s.segment];
  }

  // Steps t0..t1 - 1 of row b, the j-th one, from the checkpoint before t0.
  void run(int64_t t0, int64_t t1, int64_t b, int64_t j) const {
    if (!layout.active(t0, b)) return;
    const C* memory = saved.checkpoint(t0, b);
    C* w = weights + j * (s.segment + 1) * weightings;
    load_weights(saved.weightings_before(t0, b), w);
    const C* before = w;
    for (int64_t t = t0; t < t1 && layout.active(t, b); ++t) {
      const int64_t k = j * s.segment + t % s.segment;
      w += weightings;
      load_weights(saved.weightings(t, b), w);
      if (layout.reset(t, b)) memory = initial_memory, before = initial_weights;
      Head<C>* head = heads + k * s.heads;
      for (int64_t h = 0; h < s.heads; ++h) head[h] = values.head(saved.values(t, b), h);
      const int64_t* least = a.slots + (t * s.B + b) * s.heads;
      C *now = memories + k * matrix, *wrote = written + k * weightings;
      slots.write_weights(head, least, before, wrote);
      slots.write(memory, now, least, wrote, head, kept, norms + k * slots.stride,
                  dots + k * weightings);
      steps[k] = {now, norms + k * slots.stride, dots + k * weightings, before, wrote, w, least,
                  head};
      memory = now, before = w;
    }
  }

 private:
  void load_weights(const C* from, C* to) const {
    for (int64_t h = 0; h < s.heads; ++h) slots.load_weights(from + h * s.N, to + h * slots.stride);
  }
};

}  // namespace
}  // namespace seqmem::lrua
