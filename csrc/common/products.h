// Sums of products that always round alike, for kernel sources compiled once per ISA.
#pragma once

#include "gemm.h"

namespace seqmem {
namespace {

// a b + c d, where c d is rounded before the sum. Which of the two products becomes part of a fused
// multiply-add would else be the compiler's choice, and Clang's differs between blocks of different
// numbers of rows: a row's bits would depend on how rows are shared out.
template <class V>
SEQMEM_INLINE V sum_of_products(V a, V b, V c, V d) {
  V rounded = c * d;
  opaque(rounded);
  return a * b + rounded;
}

}  // namespace
}  // namespace seqmem
