// The NTM's heads backward, one batch row at a time. The memories of a segment's steps are
// recomputed from its checkpoint (ntm_recompute.h); the heads in reverse take the gradients of
// reads, weightings and memory [M][stride], which stay in L2, to those of their values
// (ntm_memory_backward.h).
#pragma once

#include "../common/machine_carry.h"
#include "../common/machine_saved.h"
#include "ntm_memory_backward.h"
#include "ntm_recompute.h"

namespace seqmem::ntm {
namespace {

template <class C>
class BackwardHeads {
  const ntm::Shape& s;
  const Backward& a;
  const Layout<C, ntm::Shape>& layout;
  const Saved<C, ntm::Shape, Backward>& saved;
  const Slots<C> slots;
  const SlotsBackward<C> reverse;
  const HeadLayout head_layout;

  // Shared by all threads.
  C *initial_memory, *initial_norm, *initial_weights;
  // This thread's own.
  typename Slots<C>::Scratch scratch;
  HeadValues<C> values;
  Recompute<C> again;

 public:
  using Shape = ntm::Shape;
  using Arguments = Backward;
  using Carries = machine::Carries<C, Shape>;

  BackwardHeads(const Shape& s, const Backward& a, const Layout<C, Shape>& layout,
                const Saved<C, Shape, Backward>& saved, int64_t rows)
      : s(s),
        a(a),
        layout(layout),
        saved(saved),
        slots(s),
        reverse(slots),
        head_layout(s.M, s.taps),
        values(s),
        again(s, saved, layout, slots, rows) {}

  Carries carries() const { return Carries(s, layout, slots); }

  void place_shared(Carver& take) {
    initial_memory = take.array<C>(s.reset ? slots.size() : 0);
    initial_norm = take.array<C>(s.reset ? slots.stride : 0);
    initial_weights = take.array<C>(s.reset ? s.heads * slots.stride : 0);
    again.reset_to(initial_memory, initial_norm, initial_weights);
  }

  void place_own(Carver& take) {
    scratch.place(take, slots);
    values.place(take);
    again.place(take);
  }

  void prepare(int thread) {
    values.prepare();
    if (s.reset == nullptr || thread != 0) return;
    slots.load_memory(static_cast<const C*>(a.initial.memory), initial_memory);
    slots.norms(initial_memory, initial_norm);
    const C* weights = static_cast<const C*>(a.initial.weightings);
    for (int64_t h = 0; h < s.heads; ++h)
      slots.load_weights(weights + h * s.N, initial_weights + h * slots.stride);
  }

  void recompute(int64_t t0, int64_t t1, int64_t b, int64_t j) const { again.run(t0, t1, b, j); }

  // The heads of row b in reverse: from the carried gradients to dp and those of the step before.
  // What a head passes on to the memory waits for the head before it, to go there together.
  void back(int64_t t, int64_t b, int64_t j, const Carry<C>& c, const C* dread, C* dp) {
    const HeadStep<C>* step = again.steps_of(j, t);
    typename SlotsBackward<C>::Passing passing{};
    bool passing_writes = false;
    int64_t read = s.reads, from = s.P;
    for (int64_t h = s.heads - 1; h >= 0; --h) {
      const HeadStep<C>& one = step[h];
      const bool is_write = s.kinds[h] == 'w';
      from -= head_layout.size(is_write, s.M);
      C *part = dp + from, *dw = c.weights + h * slots.stride;
      if (a.grad_trace != nullptr) {
        const C* g = static_cast<const C*>(a.grad_trace) + ((t * s.B + b) * s.heads + h) * s.N;
        for (int64_t i = 0; i < s.N; ++i) dw[i] += g[i];
      }
      if (is_write) {
        const typename SlotsBackward<C>::Written to = {one.memory,
                                                       one.weights,
                                                       &one.head,
                                                       dw,
                                                       part + head_layout.erase,
                                                       part + head_layout.add};
        if (passing.memory == nullptr) {
          reverse.write_weights(to, c.memory);
        } else if (passing_writes) {
          reverse.template pass_to_write<true>(passing, to, c.memory, scratch);
        } else {
          reverse.template pass_to_write<false>(passing, to, c.memory, scratch);
        }
      } else {
        if (passing.memory != nullptr) pass(passing, passing_writes, c.memory);
        reverse.read_weights(one.memory, dread + --read * s.M, dw);
      }
      HeadGradients<C> d{};
      d.shift = part + head_layout.shift;
      if (s.taps == 3) {
        reverse.template address<3>(one.dots, one.norm, one.head, one.before, one.weights, dw,
                                    scratch, dw, d);
      } else {
        reverse.template address<0>(one.dots, one.norm, one.head, one.before, one.weights, dw,
                                    scratch, dw, d);
      }
      part[head_layout.beta] = d.beta, part[head_layout.gate] = d.gate,
      part[head_layout.gamma] = d.gamma;
      passing_writes = is_write;
      passing = {one.memory, one.weights, is_write ? one.head.erase : dread + read * s.M,
                 &one.head,  d.key_norm,  part};
    }
    if (passing.memory != nullptr) pass(passing, passing_writes, c.memory);
    values.back(saved.values(t, b), dp);
  }

 private:
  void pass(const typename SlotsBackward<C>::Passing& from, bool writes, C* dmemory) const {
    if (writes) {
      reverse.template pass<true>(from, dmemory, scratch);
    } else {
      reverse.template pass<false>(from, dmemory, scratch);
    }
  }
};

}  // namespace
}  // namespace seqmem::ntm
