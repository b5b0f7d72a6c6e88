// The NTM's heads forward, one batch row at a time, with memories transposed to [M][stride], slots
// in lanes. Each head in order: similarity of the memory to the key, weighting (content, gate,
// shift, sharpen), then read or write; a write also gives the new norms and the next head's
// similarity. The memory of a row stays in L2.
#pragma once

#include "../common/machine_layout.h"
#include "ntm_memory.h"

namespace seqmem::ntm {
namespace {

template <class C>
class ForwardHeads {
  const ntm::Shape& s;
  const Forward& a;
  const Slots<C> slots;
  const HeadLayout head_layout;

  // Shared by all threads.
  C *memory, *norm, *weights;  // of all rows
  C *initial_memory, *initial_norm;
  // This thread's own.
  typename Slots<C>::Scratch scratch;
  HeadValues<C> values;
  Head<C>* head;
  C *dots, *read;

 public:
  using Shape = ntm::Shape;
  using Arguments = Forward;

  ForwardHeads(const Shape& s, const Forward& a)
      : s(s), a(a), slots(s), head_layout(s.M, s.taps), values(s) {}

  void place_shared(Carver& take) {
    memory = take.array<C>(s.B * slots.size());
    norm = take.array<C>(s.B * slots.stride);
    weights = take.array<C>(s.B * s.heads * slots.stride);
    initial_memory = take.array<C>(s.reset ? slots.size() : 0);
    initial_norm = take.array<C>(s.reset ? slots.stride : 0);
  }

  void place_own(Carver& take) {
    scratch.place(take, slots);
    values.place(take);
    head = take.array<Head<C>>(s.heads);
    dots = take.array<C>(slots.stride);
    read = take.array<C>(Layout<C, Shape>::padded_width(s.M));
  }

  void prepare(int thread) {
    values.prepare();
    if (s.reset == nullptr || thread != 0) return;
    slots.load_memory(static_cast<const C*>(a.initial.memory), initial_memory);
    slots.norms(initial_memory, initial_norm);
  }

  void load(int64_t b, const State<const void*>& state, int64_t from) {
    for (int64_t h = 0; h < s.heads; ++h)
      slots.load_weights(static_cast<const C*>(state.weightings) + (from * s.heads + h) * s.N,
                         weights_of(b, h));
    if (&state == &a.initial) {
      copy(initial_memory, memory_of(b), slots.size());
      copy(initial_norm, norm_of(b), slots.stride);
    } else {
      slots.load_memory(static_cast<const C*>(state.memory) + from * s.N * s.M, memory_of(b));
      slots.norms(memory_of(b), norm_of(b));
    }
  }

  void store(int64_t b) const {
    const State<void*>& to = a.final;
    for (int64_t h = 0; h < s.heads; ++h)
      copy<C>(weights_of(b, h), static_cast<C*>(to.weightings) + (b * s.heads + h) * s.N, s.N);
    slots.store_memory(memory_of(b), static_cast<C*>(to.memory) + b * s.N * s.M);
  }

  void keep(int64_t t, int64_t b) const {
    copy(memory_of(b), static_cast<C*>(a.checkpoints) + (t / s.segment * s.B + b) * slots.size(),
         slots.size());
  }

  void ended(int64_t t, int64_t b) const {
    if (a.trace != nullptr) zero(trace_of(t, b), s.heads * s.N);
  }

  void activate(int64_t n, C* const* p) const { values.activate(n, p); }

  // The heads of row b, in their order.
  void act(int64_t t, int64_t b, const C* activated, C* reads) {
    for (int64_t h = 0, from = 0; h < s.heads; ++h) {
      const bool writes = s.kinds[h] == 'w';
      head[h] = head_of(activated + from, head_layout, s.M);
      from += head_layout.size(writes, s.M);
    }
    bool have_dots = false;
    for (int64_t h = 0; h < s.heads; ++h) {
      if (!have_dots) slots.similarity(memory_of(b), head[h].key, dots);
      C* w = weights_of(b, h);
      slots.address(dots, norm_of(b), head[h], w, scratch, w);
      have_dots = false;
      if (s.kinds[h] == 'w') {
        have_dots = h + 1 < s.heads;
        slots.write(memory_of(b), memory_of(b), w, head[h], norm_of(b),
                    have_dots ? head[h + 1].key : nullptr, dots);
      } else {
        slots.read(memory_of(b), w, read);
        copy<C>(read, reads, s.M);
        reads += s.M;
      }
    }
    if (a.trace == nullptr) return;
    for (int64_t h = 0; h < s.heads; ++h) copy<C>(weights_of(b, h), trace_of(t, b) + h * s.N, s.N);
  }

 private:
  C* memory_of(int64_t b) const { return memory + b * slots.size(); }
  C* norm_of(int64_t b) const { return norm + b * slots.stride; }
  C* weights_of(int64_t b, int64_t h) const { return weights + (b * s.heads + h) * slots.stride; }
  C* trace_of(int64_t t, int64_t b) const {
    return static_cast<C*>(a.trace) + (t * s.B + b) * s.heads * s.N;
  }
};

}  // namespace
}  // namespace seqmem::ntm
