// Gradients that a row carries from step to step, and those of the state that `reset` returns to.
#pragma once

#include "machine_layout.h"
#include "machine_slots.h"

namespace seqmem::machine {
namespace {

template <class C>
struct Carry {
  C *hidden, *cell;  // [layers, room(C)]
  C* memory;         // [M][stride]
  C* weights;        // [heads][stride]
  C* reads;          // room(R)
};

template <class C, class Shape>
class Carries {
  const Shape& s;
  const Layout<C, Shape>& layout;
  const SlotMatrix<C>& slots;
  const int64_t matrix, layers;

 public:
  using Carry = machine::Carry<C>;

  Carries(const Shape& s, const Layout<C, Shape>& layout, const SlotMatrix<C>& slots)
      : s(s),
        layout(layout),
        slots(slots),
        matrix(s.M * slots.stride),
        layers(s.lstm ? s.layers : 0) {}

  Carry* place(Carver& take, int64_t n) const {
    auto out = take.array<Carry>(n);
    for (int64_t b = 0; b < n; ++b) {
      const Carry one = {take.array<C>(layers * layout.C_pad), take.array<C>(layers * layout.C_pad),
                         take.array<C>(matrix), take.array<C>(s.heads * slots.stride),
                         take.array<C>(Layout<C, Shape>::padded_width(layout.R))};
      if (out != nullptr) out[b] = one;
    }
    return out;
  }

  // From row b of a final state's gradients, of which any may be absent.
  template <class State>
  void load(const State& from, int64_t b, const Carry& to) const {
    auto given = [&](const void* part, int64_t offset, C* x, int64_t n) {
      if (part == nullptr) {
        zero(x, n);
      } else {
        copy(static_cast<const C*>(part) + offset, x, n);
      }
    };
    for (int64_t l = 0; l < layers; ++l) {
      given(from.hidden, (l * s.B + b) * s.C, to.hidden + l * layout.C_pad, s.C);
      given(from.cell, (l * s.B + b) * s.C, to.cell + l * layout.C_pad, s.C);
    }
    given(from.reads, b * layout.R, to.reads, layout.R);
    zero(to.weights, s.heads * slots.stride);
    if (from.weightings != nullptr) {
      const C* weights = static_cast<const C*>(from.weightings) + b * s.heads * s.N;
      for (int64_t h = 0; h < s.heads; ++h)
        slots.load_weights(weights + h * s.N, to.weights + h * slots.stride);
    }
    zero(to.memory, matrix);
    if (from.memory != nullptr)
      slots.load_memory(static_cast<const C*>(from.memory) + b * s.N * s.M, to.memory);
  }

  void clear(const Carry& c) const {
    zero(c.hidden, layers * layout.C_pad);
    zero(c.cell, layers * layout.C_pad);
    zero(c.memory, matrix);
    zero(c.weights, s.heads * slots.stride);
    zero(c.reads, layout.R);
  }

  void add(const Carry& from, const Carry& to) const {
    auto plus = [](const C* x, C* y, int64_t n) {
      for (int64_t i = 0; i < n; ++i) y[i] += x[i];
    };
    for (int64_t l = 0; l < layers; ++l) {
      plus(from.hidden + l * layout.C_pad, to.hidden + l * layout.C_pad, s.C);
      plus(from.cell + l * layout.C_pad, to.cell + l * layout.C_pad, s.C);
    }
    for (int64_t m = 0; m < s.M; ++m)
      plus(from.memory + m * slots.stride, to.memory + m * slots.stride, s.N);
    for (int64_t h = 0; h < s.heads; ++h)
      plus(from.weights + h * slots.stride, to.weights + h * slots.stride, s.N);
    plus(from.reads, to.reads, layout.R);
  }

  // To row b of a state of `rows` rows.
  template <class State>
  void store(const Carry& from, const State& state, int64_t b, int64_t rows) const {
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t row = (l * rows + b) * s.C;
      copy<C>(from.hidden + l * layout.C_pad, static_cast<C*>(state.hidden) + row, s.C);
      copy<C>(from.cell + l * layout.C_pad, static_cast<C*>(state.cell) + row, s.C);
    }
    slots.store_memory(from.memory, static_cast<C*>(state.memory) + b * s.N * s.M);
    for (int64_t h = 0; h < s.heads; ++h)
      copy<C>(from.weights + h * slots.stride,
              static_cast<C*>(state.weightings) + (b * s.heads + h) * s.N, s.N);
    copy<C>(from.reads, static_cast<C*>(state.reads) + b * layout.R, layout.R);
  }

  // To the initial state: the sum of all rows' shares, formed in the first one.
  template <class State>
  void store_initial(const Carry* shares, int64_t n, const State& to) const {
    if (n == 0) {
      zero(static_cast<C*>(to.hidden), layers * s.C);
      zero(static_cast<C*>(to.cell), layers * s.C);
      zero(static_cast<C*>(to.memory), s.N * s.M);
      zero(static_cast<C*>(to.weightings), s.heads * s.N);
      zero(static_cast<C*>(to.reads), layout.R);
      return;
    }
    for (int64_t b = 1; b < n; ++b) add(shares[b], shares[0]);
    store(shares[0], to, 0, 1);
  }
};

}  // namespace
}  // namespace seqmem::machine
