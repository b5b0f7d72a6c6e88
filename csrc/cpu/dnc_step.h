// What a step of a row computes on the way to its new state, for the forward and, once more, for
// the backward.
#pragma once

#include "dnc_links.h"
#include "dnc_slots.h"

namespace seqmem::dnc {
namespace {

// One thread's scratch; weightings [heads][stride].
template <class C>
struct Step {
  C* values;      // of the interface, activated
  C *psi, *used;  // [stride]
  C *write_content, *read_content, *allocation;
  C* usages;              // [writes][stride]: what each write head sees
  C *forward, *backward;  // [writes][reads][stride]: of the links
  C *scaled, *logs;       // [2][writes][reads][stride]: of sharpened directions
  C *write_dots, *read_dots, *write_norm, *read_norm;
  C *write_mask, *read_mask, *write_key_norms, *read_key_norms;
  typename SlotMatrix<C>::Content content;
  Sorter<C> sorter;

  void place(Carver& take, const Slots<C>& slots, int64_t values_size) {
    const Shape& s = slots.s;
    const int64_t stride = slots.stride, directions = s.linked() * s.reads * stride;
    const int64_t sharpened = s.sharpen ? 2 * directions : 0;
    values = take.array<C>(values_size);
    psi = take.array<C>(stride);
    used = take.array<C>(stride);
    write_content = take.array<C>(s.writes * stride);
    read_content = take.array<C>(s.reads * stride);
    allocation = take.array<C>(s.writes * stride);
    usages = take.array<C>(s.writes * stride);
    forward = take.array<C>(directions);
    backward = take.array<C>(directions);
    scaled = take.array<C>(sharpened);
    logs = take.array<C>(sharpened);
    write_dots = take.array<C>(s.writes * stride);
    read_dots = take.array<C>(s.reads * stride);
    write_norm = take.array<C>(s.masks ? s.writes * stride : 0);
    read_norm = take.array<C>(s.masks ? s.reads * stride : 0);
    write_mask = take.array<C>(s.writes * s.M);
    read_mask = take.array<C>(s.reads * s.M);
    write_key_norms = take.array<C>(s.writes);
    read_key_norms = take.array<C>(s.reads);
    content.place(take, slots);
    sorter.place(take, s.N);
  }
};

// The step's parts, in their order; `norm` are the norms of a memory's slots.
template <class C>
class Steps {
  const Slots<C>& slots;
  const Shape& s;
  const Parts& at;
  const int64_t stride;
  using Lookup = typename Slots<C>::Lookup;

 public:
  explicit Steps(const Slots<C>& slots)
      : slots(slots), s(slots.s), at(slots.at), stride(slots.stride) {}

  Lookup writes(const Step<C>& x, C* norm) const {
    return {s.writes,
            x.values + at.write_keys,
            x.values + at.write_strengths,
            s.masks ? x.values + at.write_masks : nullptr,
            x.write_dots,
            x.write_content,
            s.masks ? x.write_norm : norm,
            x.write_mask,
            x.write_key_norms};
  }
  Lookup reads(const Step<C>& x, C* norm) const {
    return {s.reads,
            x.values + at.read_keys,
            x.values + at.read_strengths,
            s.masks ? x.values + at.read_masks : nullptr,
            x.read_dots,
            x.read_content,
            s.masks ? x.read_norm : norm,
            x.read_mask,
            x.read_key_norms};
  }

  // Weightings w to write with, from the usage and the memory's content; w may be null.
  void write_weights(Step<C>& x, const C* usage, const C* memory, C* norm, C* w) const {
    slots.look_up(memory, writes(x, norm), x.content);
    for (int64_t h = 0; h < s.writes; ++h) {
      C *u = x.usages + h * stride, *a = x.allocation + h * stride;
      if (h == 0) copy(usage, u, slots.vectors * slots.L);
      slots.allocate(u, s.softmax ? C(1) + x.values[at.allocation_strengths + h] : C(0), x.used,
                     x.sorter, a);
      const C gate = x.values[at.allocation + h], write = x.values[at.write + h];
      const C* content = x.write_content + h * stride;
      slots.each([&](int64_t i) {
        const Vec<C> one = load(a + i), before = load(u + i);
        if (w != nullptr)
          store(w + h * stride + i, write * (gate * one + (C(1) - gate) * load(content + i)));
        if (h + 1 < s.writes)
          store(u + stride + i, before + (C(1) - before) * (gate * write) * one);
      });
    }
  }

  // Both directions of all heads, sharpened where asked for.
  C* direction(C* of, int64_t h, int64_t r) const { return of + (h * s.reads + r) * stride; }

  void sharpen(const Step<C>& x) const {
    for (int64_t h = 0; h < s.writes; ++h) {
      for (int64_t r = 0; r < s.reads; ++r) {
        const int64_t backward = s.writes * s.reads * stride;
        C *f = direction(x.forward, h, r), *b = direction(x.backward, h, r);
        C *scaled = direction(x.scaled, h, r), *logs = direction(x.logs, h, r);
        slots.sharpen(f, C(1) + x.values[at.forward_sharpness + r], scaled, logs);
        slots.sharpen(b, C(1) + x.values[at.backward_sharpness + r], scaled + backward,
                      logs + backward);
      }
    }
  }

  // q = sum_h pi_b backward_h + pi_c content + sum_h pi_f forward_h
  void mix(const Step<C>& x, C* q) const {
    for (int64_t r = 0; r < s.reads; ++r) {
      const C* modes = x.values + at.modes + r * at.directions;
      const C* content = x.read_content + r * stride;
      slots.each([&](int64_t i) {
        Vec<C> sum = load(content + i);
        if (s.links) sum *= modes[s.writes];
        for (int64_t h = 0; h < s.linked(); ++h)
          sum += modes[h] * load(direction(x.backward, h, r) + i) +
                 modes[s.writes + 1 + h] * load(direction(x.forward, h, r) + i);
        store(q + r * stride + i, sum);
      });
    }
  }
};

}  // namespace
}  // namespace seqmem::dnc
