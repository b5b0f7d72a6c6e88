// Kernels in blocks of kThreads in one dimension: sums over a block's threads, and launches.
#pragma once

#include "../common/storage.h"
#include "common.h"

namespace seqmem::cuda {
namespace {

template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

template <class T>
__device__ arithmetic_t<T> one(const void* from, int64_t at) {
  return widen(static_cast<const T*>(from)[at]);
}

template <class T>
__device__ void set_one(void* to, int64_t at, arithmetic_t<T> x) {
  if (to != nullptr) static_cast<T*>(to)[at] = narrow<T>(x);
}

inline __device__ float root(float x) { return sqrtf(x); }
inline __device__ double root(double x) { return sqrt(x); }
inline __device__ float logarithm(float x) { return logf(x); }
inline __device__ double logarithm(double x) { return log(x); }

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class A>
__device__ A larger(A a, A b) {
  return a > b ? a : b;  // b where one of them is NaN, which the sums notice
}

template <class A>
__device__ A sum_of_lanes(A x, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Sums over the block, or the largest of each, in every thread.
template <int Count, bool largest, class A>
__device__ void reduce_block(A (&x)[Count]) {
  __shared__ A of_warp[kWarps][Count];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < Count; ++k)
    for (int d = 16; d > 0; d /= 2) {
      const A other = __shfl_xor_sync(~0u, x[k], d);
      x[k] = largest ? larger(x[k], other) : x[k] + other;
    }
  __syncthreads();  // the last reduction has been read
  if (lane == 0)
    for (int k = 0; k < Count; ++k) of_warp[warp][k] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    x[k] = of_warp[0][k];
    for (int w = 1; w < kWarps; ++w)
      x[k] = largest ? larger(x[k], of_warp[w][k]) : x[k] + of_warp[w][k];
  }
}

template <class A>
__device__ A sum_of_block(A x) {
  A one[1] = {x};
  reduce_block<1, false>(one);
  return one[0];
}

template <class A>
__device__ A largest_of_block(A x) {
  A one[1] = {x};
  reduce_block<1, true>(one);
  return one[0];
}

// Sums over the block's groups of `lanes` neighbouring lanes, lane by lane; the first group has
// them.
template <int MostLanes, int Width, class A>
__device__ void sum_of_groups(A (&x)[Width], int lanes) {
  __shared__ A of_warp[kWarps][MostLanes][Width];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = lanes; d < 32; d *= 2)
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] += __shfl_xor_sync(~0u, x[k], d);
  __syncthreads();
  if (lane < lanes)
#pragma unroll
    for (int k = 0; k < Width; ++k) of_warp[warp][lane][k] = x[k];
  __syncthreads();
  if (threadIdx.x >= lanes) return;
  for (int w = 1; w < kWarps; ++w)
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] += of_warp[w][lane][k];
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls f with a value of the storage type.
template <class F>
cudaError_t with_type(Storage storage, const F& f) {
  switch (storage) {
    case Storage::Float: return f(float{});
    case Storage::Double: return f(double{});
    case Storage::BFloat16: return f(__nv_bfloat16{});
    case Storage::Half: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

template <int threads = kThreads, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks), unsigned(blocks_y));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace
}  // namespace seqmem::cuda
