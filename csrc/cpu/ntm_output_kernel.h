// The small output layer of a network: y = q W^T + b and its derivative on one thread. torch wakes
// a team for each product, which takes longer than the product does. Compiled once per ISA.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/storage.h"

namespace seqmem::ntm {

// At least so many features: a vector's lanes, of any ISA and type.
inline constexpr int64_t kFewestFeatures = 16;

struct OutputShape {
  int64_t rows, features, outputs;
};

// Storage type S is float or double.
struct OutputForward {
  const void *input, *weight, *bias;  // [rows, features], [outputs, features], [outputs]
  void* output;                       // [rows, outputs]
  void* workspace;                    // of no bytes
};

struct OutputBackward {
  const void *grad_output, *input, *weight;    // [rows, outputs]
  void *grad_input, *grad_weight, *grad_bias;  // each may be null
  void* workspace;
};

SEQMEM_FOR_EACH_ISA(extern const Kernel<OutputForward, OutputShape> output_forward_kernel;
                    extern const Kernel<OutputBackward, OutputShape> output_backward_kernel;)

}  // namespace seqmem::ntm
