// What a machine's forward has saved for its backward, and what came before a step.
#pragma once

#include "machine_layout.h"

namespace seqmem::machine {
namespace {

template <class C, class Shape, class Backward>
class Saved {
  const Shape& s;
  const Backward& a;
  const Layout<C, Shape>& layout;

 public:
  Saved(const Shape& s, const Backward& a, const Layout<C, Shape>& layout)
      : s(s), a(a), layout(layout) {}

  static const C* in(const void* p, int64_t offset) { return static_cast<const C*>(p) + offset; }

  const C* input(int64_t t, int64_t b) const { return in(a.input, (t * s.B + b) * s.I); }
  const C* record(int64_t t, int64_t b) const { return in(a.saved, (t * s.B + b) * s.record()); }
  const C* gates(int64_t l, int64_t t, int64_t b) const {
    return record(t, b) + layout.record_gates(l);
  }
  const C* values(int64_t t, int64_t b) const { return record(t, b) + layout.record_p(); }
  const C* features(int64_t t, int64_t b) const {
    return in(a.features, (t * s.B + b) * (s.C + layout.R));
  }
  const C* output(int64_t l, int64_t t, int64_t b) const {
    return l + 1 == s.layers ? features(t, b) : record(t, b) + layout.record_output(l);
  }
  const C* checkpoint(int64_t t, int64_t b) const {
    return in(a.checkpoints, (t / s.segment * s.B + b) * s.M * s.stride());
  }
  // Of all heads.
  const C* weightings(int64_t t, int64_t b) const {
    return in(a.trace, (t * s.B + b) * s.heads * s.N);
  }

  const C* hidden_before(int64_t l, int64_t t, int64_t b) const {
    if (layout.reset(t, b)) return in(a.initial.hidden, l * s.C);
    return t == 0 ? in(a.state.hidden, (l * s.B + b) * s.C) : output(l, t - 1, b);
  }
  const C* cell_before(int64_t l, int64_t t, int64_t b) const {
    if (layout.reset(t, b)) return in(a.initial.cell, l * s.C);
    return t == 0 ? in(a.state.cell, (l * s.B + b) * s.C) : gates(l, t - 1, b) + 4 * s.C;
  }
  const C* reads_before(int64_t t, int64_t b) const {
    if (layout.reset(t, b)) return in(a.initial.reads, 0);
    return t == 0 ? in(a.state.reads, b * layout.R) : features(t - 1, b) + s.C;
  }
  // Those of the step before, also where `reset` replaces them.
  const C* weightings_before(int64_t t, int64_t b) const {
    return t == 0 ? in(a.state.weightings, b * s.heads * s.N) : weightings(t - 1, b);
  }
};

}  // namespace
}  // namespace seqmem::machine
