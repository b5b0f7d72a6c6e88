// Just enough of CUDA to run csrc/cuda on the CPU: one block at a time, its threads in turn up to
// the next barrier or shuffle. It finds wrong arithmetic, not races.
#pragma once

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
