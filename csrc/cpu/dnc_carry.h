// Gradients that a row of the Differentiable Neural Computer carries from step to step: those of
// machine_carry.h, and of weightings, usage and links.
#pragma once

#include "../common/machine_carry.h"
#include "dnc_kernel.h"

namespace seqmem::dnc {
namespace {

// Of slots: [stride], links [linked][N][stride], the others [heads][stride].
template <class C>
struct Carry : machine::Carry<C> {
  C *usage, *link, *precedence, *written, *read;
};

template <class C>
class Carries : public machine::Carries<C, Shape> {
  using Base = machine::Carries<C, Shape>;
  const Shape& s;
  const machine::Layout<C, Shape>& layout;
  const machine::SlotMatrix<C>& slots;

 public:
  using Carry = dnc::Carry<C>;

  Carries(const Shape& s, const machine::Layout<C, Shape>& layout,
          const machine::SlotMatrix<C>& slots)
      : Base(s, layout, slots), s(s), layout(layout), slots(slots) {}

  Carry* place(Carver& take, int64_t n) const {
    const int64_t units = (s.lstm ? s.layers : 0) * layout.C_pad, stride = slots.stride;
    auto out = take.array<Carry>(n);
    for (int64_t b = 0; b < n; ++b) {
      Carry one;
      one.hidden = take.array<C>(units);
      one.cell = take.array<C>(units);
      one.memory = take.array<C>(slots.size());
      one.weights = nullptr;
      one.reads = take.array<C>(machine::Layout<C, Shape>::padded_width(layout.R));
      one.usage = take.array<C>(stride);
      one.link = take.array<C>(s.linked() * s.N * stride);
      one.precedence = take.array<C>(s.linked() * stride);
      one.written = take.array<C>(s.writes * stride);
      one.read = take.array<C>(s.reads * stride);
      if (out != nullptr) out[b] = one;
    }
    return out;
  }

  // From row b of a final state's gradients, of which any may be absent.
  void load(const State<const void*>& from, int64_t b, const Carry& to) const {
    Base::load(from, b, to);
    each(from, to, [&](const void* part, C* x, int64_t n) {
      machine::zero(x, n * slots.stride);
      const C* rows = static_cast<const C*>(part) + b * n * s.N;
      for (int64_t k = 0; part != nullptr && k < n; ++k)
        slots.load_weights(rows + k * s.N, x + k * slots.stride);
    });
  }

  void clear(const Carry& c) const {
    Base::clear(c);
    each(State<void*>{}, c, [&](void*, C* x, int64_t n) { machine::zero(x, n * slots.stride); });
  }

  void add(const Carry& from, const Carry& to) const {
    Base::add(from, to);
    const State<const C*> given = {nullptr,         nullptr,      nullptr,   from.usage, from.link,
                                   from.precedence, from.written, from.read, nullptr,    nullptr};
    each(given, to, [&](const C* x, C* y, int64_t n) {
      for (int64_t i = 0; i < n * slots.stride; ++i) y[i] += x[i];
    });
  }

  // To row b of a state of `rows` rows.
  void store(const Carry& from, const State<void*>& state, int64_t b, int64_t rows) const {
    Base::store(from, state, b, rows);
    each(state, from, [&](void* part, C* x, int64_t n) {
      C* to = static_cast<C*>(part) + b * n * s.N;
      for (int64_t k = 0; k < n; ++k) machine::copy<C>(x + k * slots.stride, to + k * s.N, s.N);
    });
  }

  // To the initial state: the sum of all rows' shares, formed in the first one.
  void store_initial(const Carry* shares, int64_t n, const State<void*>& to) const {
    if (n == 0) {
      Base::store_initial(nullptr, 0, to);
      each(to, Carry{},
           [&](void* part, C*, int64_t rows) { machine::zero(static_cast<C*>(part), rows * s.N); });
      return;
    }
    for (int64_t b = 1; b < n; ++b) add(shares[b], shares[0]);
    store(shares[0], to, 0, 1);
  }

 private:
  // Calls f(the state's part, the carry's, rows of slots).
  template <class Pointer, class F>
  void each(const State<Pointer>& state, const Carry& c, F&& f) const {
    f(state.usage, c.usage, 1);
    f(state.link, c.link, s.linked() * s.N);
    f(state.precedence, c.precedence, s.linked());
    f(state.write_weights, c.written, s.writes);
    f(state.read_weights, c.read, s.reads);
  }
};

}  // namespace
}  // namespace seqmem::dnc
