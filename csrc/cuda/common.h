// What the CUDA kernels share: storage and arithmetic types, and vectors of neighbouring elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace seqmem::cuda {
namespace {

// What elements stored as T are computed in.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

inline __device__ float widen(float x) { return x; }
inline __device__ double widen(double x) { return x; }
inline __device__ float widen(__half x) { return __half2float(x); }
inline __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
inline __device__ T narrow(typename Arithmetic<T>::type x) {
  return x;
}
template <>
__device__ __half narrow<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

inline __device__ float exponential(float x) { return expf(x); }
inline __device__ double exponential(double x) { return exp(x); }
inline __device__ float tangent(float x) { return tanhf(x); }
inline __device__ double tangent(double x) { return tanh(x); }

template <class A>
inline __device__ A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

template <class T, int Width>
struct alignas(sizeof(T) * Width) Vector {
  T lane[Width];
};

template <int Width, class T, class A>
inline __device__ void read(A (&to)[Width], const void* from, int64_t at) {
  const auto vector = *reinterpret_cast<const Vector<T, Width>*>(static_cast<const T*>(from) + at);
#pragma unroll
  for (int k = 0; k < Width; ++k) to[k] = widen(vector.lane[k]);
}

// Adds where the pointer is given.
template <int Width, class T, class A>
inline __device__ void add(A (&to)[Width], const void* from, int64_t at) {
  if (from == nullptr) return;
  A more[Width];
  read<Width, T>(more, from, at);
#pragma unroll
  for (int k = 0; k < Width; ++k) to[k] += more[k];
}

template <int Width, class T, class A>
inline __device__ void write(void* to, int64_t at, const A (&from)[Width], bool zero) {
  if (to == nullptr) return;
  Vector<T, Width> vector;
#pragma unroll
  for (int k = 0; k < Width; ++k) vector.lane[k] = narrow<T>(zero ? A(0) : from[k]);
  *reinterpret_cast<Vector<T, Width>*>(static_cast<T*>(to) + at) = vector;
}

// Whether every pointer allows vectors; one that is null does.
inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

}  // namespace
}  // namespace seqmem::cuda
