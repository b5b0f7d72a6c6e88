// The gates of the LSTM's kernels for float32, from the approximate ex2 and rcp: 3.5e-6 off
// relatively at the most, at sigmoid's lower end.
#pragma once

#include <cuda_runtime.h>

namespace seqmem::cuda {
namespace {

// 1 / (1 + exp(-x)); exact 0 and 1 at the ends, NaN stays NaN.
inline __device__ float gate_sigmoid(float x) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return r;
}

// tanh(x) from sigmoid(2 x), which cancels near zero: there a polynomial, as in _triton/common.py.
inline __device__ float gate_tanh_from(float x, float sigmoid_2x) {
  const float s = x * x;
  float p = fmaf(-6.09671416590819757e-3f, s, 2.09971789990747506e-2f);
  p = fmaf(p, s, -5.38509095785135808e-2f);
  p = fmaf(p, s, 1.33327697369763279e-1f);
  p = fmaf(p, s, -3.33333289441342546e-1f);
  const float near = fmaf(x * s, p, x), far = fmaf(2.0f, sigmoid_2x, -1.0f);
  return fabsf(x) < 0.625f ? near : far;
}
inline __device__ float gate_tanh(float x) { return gate_tanh_from(x, gate_sigmoid(2.0f * x)); }

}  // namespace
}  // namespace seqmem::cuda
