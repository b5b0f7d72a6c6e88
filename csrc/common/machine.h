// What the ops of a machine, a controller with a memory of slots, know about its kernels' layout.
#pragma once

#include <cstdint>

namespace seqmem::machine {

// The stride of a row of N slots: whole vectors of every ISA, and no power of two, whose rows would
// share cache sets.
template <class Int>
Int slot_stride(const Int& N) {
  return ((N + 15) / 16 / 2 * 2 + 1) * 16;
}

// The forward keeps the memory that enters each segment of about sqrt(T) steps, at least so many;
// the backward recomputes the memories in between.
constexpr int64_t kShortestSegment = 8;

}  // namespace seqmem::machine
