// Arrays of one number per slot [N], of one batch row and head, and the steps of the addressing's
// passes over them. A block makes them: `similarity` by slots, the others one slot a thread, 256 at
// once. They lie in shared memory, or in global memory where the launch gives a workspace.
#pragma once

#include "block.cuh"
#include "ntm_addressing_kernel.h"

namespace seqmem::cuda {
namespace {

constexpr int kSharedBytes = 24576;  // for the arrays

// Arrays of N numbers of one batch row and head.
enum ForwardArray { kDot, kNorm, kForwardArrays };  // then K, content, u at kDot; v at kNorm
enum BackwardArray { kContent = kForwardArrays, kGated, kShifted, kPower, kByShifted, kArrays };

// dots[n] = M_n . key and norms[n] = |M_n|, for the slots first, first + step, ... below N. All
// threads of the block take part.
template <class T, int Width, class A>
__device__ void similarity(const Shape& s, const void* memory, const void* key, int64_t b,
                           int64_t head, int lanes, int64_t start, int64_t step, A* dots,
                           A* norms) {
  const int lane = threadIdx.x % lanes;
  for (int64_t first = start; first < s.N; first += step) {
    const int64_t n = first + threadIdx.x / lanes;
    A dot = 0, squares = 0;
#pragma unroll 4
    for (int64_t m = lane * Width; n < s.N && m < s.M; m += lanes * Width) {
      A x[Width], y[Width];
      read<Width, T>(x, memory, (b * s.N + n) * s.M + m);
      read<Width, T>(y, key, head * s.M + m);
#pragma unroll
      for (int k = 0; k < Width; ++k) {
        dot += x[k] * y[k];
        squares += x[k] * x[k];
      }
    }
    dot = sum_of_lanes(dot, lanes);
    squares = sum_of_lanes(squares, lanes);
    if (lane == 0 && n < s.N) {
      dots[n] = dot;
      norms[n] = root(squares);
    }
  }
}

// Where a block's arrays are; one of `count` numbers per slot.
template <class A>
__device__ A* arrays_of(const Shape& s, A* workspace, int count) {
  __shared__ double shared[kSharedBytes / sizeof(double)];
  return workspace != nullptr ? workspace + int64_t(blockIdx.x) * count * s.N
                              : reinterpret_cast<A*>(shared);
}

template <class T, class A>
__device__ A norm_of_key(const Shape& s, const void* key, int64_t head) {
  A squares = 0;
  for (int64_t m = threadIdx.x; m < s.M; m += kThreads) {
    const A x = one<T>(key, head * s.M + m);
    squares += x * x;
  }
  return root(sum_of_block(squares));
}

// Slot n - by around N slots, |by| <= N.
inline __device__ int64_t around(int64_t n, int64_t by, int64_t N) {
  const int64_t i = n - by;
  return i < 0 ? i + N : i >= N ? i - N : i;
}

// v_n = sum_j shift_j u_(n - (j - r)), or with `backwards` u_(n + (j - r)).
template <class T, class A>
__device__ A shifted(const Shape& s, const void* shift, int64_t head, const A* u, int64_t n,
                     bool backwards) {
  A sum = 0;
  for (int64_t j = 0; j < s.taps; ++j) {
    const int64_t by = j - s.taps / 2;
    sum += one<T>(shift, head * s.taps + j) * u[around(n, backwards ? -by : by, s.N)];
  }
  return sum;
}

template <class A>
__device__ A minus_infinity() {
  return -A(INFINITY);
}

// gamma log v, which sharpening takes the softmax of; slots at zero or below stay at zero.
template <class A>
__device__ A power(A v, A gamma) {
  return v <= A(0) ? minus_infinity<A>() : gamma * logarithm(v);
}

// The softmax over slots of what `z(n)` gives, without the division: powers[n] and their sum.
template <class A, class F>
__device__ A exponentials(const Shape& s, A* powers, const F& z) {
  A top = minus_infinity<A>(), sum = 0;
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
    powers[n] = z(n);
    top = larger(powers[n], top);
  }
  top = largest_of_block(top);
  if (top == minus_infinity<A>()) top = 0;
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
    powers[n] = exponential(powers[n] - top);
    sum += powers[n];
  }
  return sum_of_block(sum);
}

}  // namespace
}  // namespace seqmem::cuda
