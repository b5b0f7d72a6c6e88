// What the parts of the NTM's kernel over time share: sizes, shared memory, sums over slots.
#pragma once

#include "block.cuh"
#include "ntm_sequence_kernel.h"

namespace seqmem::cuda {
namespace {

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32;
constexpr int kMostControl = kRowThreads / 4, kMostValues = kRowThreads / 4;
constexpr int kSlotThreads = 128, kSlotWarps = kSlotThreads / 32;  // one slot each, or several
constexpr int kValues = 8, kMostWidth = 4 * kValues;  // of a slot: in a lane, in all four

// ---- what the block shares ----------------------------------------------------------------------

__host__ __device__ constexpr int fours(int n) { return (n + 3) / 4; }

// x of one step: reads and h, each padded to fours, with zeros as far as a thread may read.
__host__ __device__ inline int input_floats(const NtmShape& s) {
  return 4 * fours(s.read_width) + kMostControl + 4;
}

// Fours of rows of the gates' weights in shared memory, an even number: all but `own`.
__host__ __device__ inline int shared_rows(const NtmShape& s, int own) {
  const int rows = (fours(s.read_width) + fours(s.control) - own + 1) / 2 * 2;
  return rows > 0 ? rows : 0;
}

// Hands out arrays, one after the other.
struct Floats {
  float* at;

  __device__ float* operator()(int count) {
    float* taken = at;
    at += count;
    return taken;
  }
};

struct Shared {
  float4* weights;    // [shared_rows, 4C]
  float* cosine;      // [N]
  float* gated;       // [N]
  float* largest;     // [kSlotWarps] of a reduction
  float* sums;        // [kSlotWarps] of another one
  float* inputs;      // x of even steps, of odd ones
  float* values;      // [kMostValues] head values, activated
  float* weightings;  // [Hd, N]
  float* partial;     // [kRowWarps, M] of a reading

  static int64_t bytes(const NtmShape& s, int own) {
    const int64_t floats = int64_t(shared_rows(s, own)) * 16 * s.control + 2 * input_floats(s) +
                           kMostValues + 2 * kSlotWarps + int64_t(s.slots) * (2 + s.heads) +
                           kRowWarps * s.width;
    return 4 * floats;
  }
  __device__ Shared(const NtmShape& s, int own, float4* base) : weights(base) {
    Floats take{reinterpret_cast<float*>(base + shared_rows(s, own) * 4 * s.control)};
    inputs = take(2 * input_floats(s));
    values = take(kMostValues);
    largest = take(kSlotWarps);
    sums = take(kSlotWarps);
    cosine = take(s.slots);
    gated = take(s.slots);
    weightings = take(s.heads * s.slots);
    partial = take(kRowWarps * s.width);
  }
};

// A barrier of the threads that have slots.
__device__ void sync_slots() { asm volatile("bar.sync 1, %0;" ::"n"(kSlotThreads) : "memory"); }

// The sum or the largest over the threads that have slots. The array is not that of the reduction
// before.
template <bool kLargest>
__device__ float reduce_slots(float x, float* of_warp) {
  static_assert(kSlotWarps == 4);
  const auto join = [](float a, float b) { return kLargest ? larger(a, b) : a + b; };
#pragma unroll
  for (int d = 1; d < 32; d *= 2) x = join(x, __shfl_xor_sync(~0u, x, d));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  sync_slots();
  const float4 all = *reinterpret_cast<const float4*>(of_warp);
  return join(join(all.x, all.y), join(all.z, all.w));
}

// Sums of several numbers.
template <int kCount>
__device__ void sum_over_slots(float (&x)[kCount], float* of_warp) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int d = 1; d < 32; d *= 2) x[k] += __shfl_xor_sync(~0u, x[k], d);
    if (threadIdx.x % 32 == 0) of_warp[k * kSlotWarps + threadIdx.x / 32] = x[k];
  }
  sync_slots();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float4 all = reinterpret_cast<const float4*>(of_warp)[k];
    x[k] = (all.x + all.y) + (all.z + all.w);
  }
}

__device__ float minus_infinity() { return -INFINITY; }

__device__ float sum_of_four(float x) { return sum_of_lanes(x, 4); }

__device__ float softplus(float x) { return fmaxf(x, 0.0f) + logf(1.0f + expf(-fabsf(x))); }

__device__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ void copy(const float* from, float* to, int count) {
  for (int k = threadIdx.x; k < count; k += kRowThreads) to[k] = from[k];
}

// ---- on the host

// Whether the kernels have threads for so many of each.
inline bool fits(const NtmShape& s) {
  return s.control <= kMostControl && s.values <= kMostValues && s.width <= kMostWidth &&
         s.slots <= 2 * kSlotThreads;
}

inline bool has_shared(int64_t bytes) {
  int device = 0, most = 0;
  const auto limit = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, limit, device) == cudaSuccess && bytes <= most;
}

// Calls f with a value of the storage type; false for float64.
template <class F>
bool with_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::Float: return f(float{}), true;
    case Storage::BFloat16: return f(__nv_bfloat16{}), true;
    case Storage::Half: return f(__half{}), true;
    default: return false;
  }
}

template <class Arguments>
cudaError_t launch_rows(void (*kernel)(NtmShape, Arguments), const NtmShape& s, const Arguments& a,
                        int64_t bytes, cudaStream_t stream) {
  if (s.batch == 0) return cudaSuccess;
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const cudaError_t error = cudaFuncSetAttribute(kernel, limit, int(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(s.batch));
  config.blockDim = dim3(kRowThreads);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, s, a);
}

}  // namespace
}  // namespace seqmem::cuda
