// What the LSTM's persistent kernels share: exchanges between blocks that stay on the GPU over all
// steps, products on tensor cores, the bookkeeping of batch rows, and launches.
//
// Each block owns eight hidden units: their part of weight_hh stays in its registers, spread over
// eight warps that split the product's inner dimension, and c of its units too. What a step needs
// from the other blocks goes through the result itself, which is in L2: memory holds kNotYet until
// the owner of a unit has stored it (`publish`), and readers load until they find something else
// (`await`). So a step costs one store and one load through L2; no flag, no fence, no barrier of
// the grid. NaN is stored with its usual bits, which differ from kNotYet's.
//
// Blocks wait for each other, so all of a launch must be resident: it is a cooperative launch.
// Groups of blocks with different batch rows do not wait for each other.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.h"
#include "lstm_gates.h"
#include "lstm_persistent_kernel.h"

namespace seqmem::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnits = 8;               // of a block: one vector of 16 bytes
constexpr int kTile = 16;               // batch rows of one product
constexpr int kCells = kTile * kUnits;  // of a tile, one thread each
constexpr int kMaxHidden = 1024;
constexpr int kMaxTiles = 4;
template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements
template <class T>
constexpr int kInner = 4 * kVector<T>;  // of the inner dimension, that a warp takes at a time

// Bytes of partial sums: kWarps of each cell, for as many columns of a unit, in two buffers.
constexpr int shared_bytes(int tiles, int columns) {
  return 2 * tiles * kWarps * columns * kCells * int(sizeof(float));
}

// ---- memory that other blocks write -------------------------------------------------------------

using Words = uint4;  // one vector: eight elements of 16 bits, or four floats

__device__ Words load_through_l2(const void* from) {
  Words v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ void store_through_l2(void* to, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ void store_through_l2(void* to, Words v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ bool not_yet(Words v) { return v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u; }

// ---- products -----------------------------------------------------------------------------------

// mma.sync, which GPUs have from 8.0 on: `choose` refuses older ones, for which this compiles
// alone.
#if __CUDA_ARCH__ >= 800
#define SEQMEM_MMA(shape, type)                                              \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define SEQMEM_MMA(shape, type)
#endif
using Rows = uint32_t[4];     // of one product: words of two batch rows
using Columns = uint32_t[2];  // of a unit's weights

__device__ void multiply_add(float (&sum)[4], const Rows& a, const Columns& b, __nv_bfloat16) {
  SEQMEM_MMA("m16n8k16", "bf16");
}
__device__ void multiply_add(float (&sum)[4], const Rows& a, const Columns& b, __half) {
  SEQMEM_MMA("m16n8k16", "f16");
}

// The part of a float that TF32 keeps, and the rest, of which it keeps all but two bits. Volatile,
// or the weights' parts would stay in registers over all steps, and there is no room for twice as
// many.
template <int kWords>
__device__ void split(const uint32_t (&whole)[kWords], uint32_t (&high)[kWords],
                      uint32_t (&low)[kWords]) {
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    asm volatile("and.b32 %0, %1, 0xffffe000;" : "=r"(high[k]) : "r"(whole[k]));
    low[k] = __float_as_uint(__uint_as_float(whole[k]) - __uint_as_float(high[k]));
  }
}
__device__ void multiply_add_tf32(float (&sum)[4], const Rows& a, const Columns& b) {
  SEQMEM_MMA("m16n8k8", "tf32");
}
#undef SEQMEM_MMA

// Three products of TF32, as exact as float32 but for the product of the rests, 2^-22 of the whole.
__device__ void multiply_add(float (&sum)[4], const Rows& a, const Columns& b, float) {
  Rows a_high, a_low;
  Columns b_high, b_low;
  split(a, a_high, a_low);
  split(b, b_high, b_low);
  multiply_add_tf32(sum, a_low, b_high);
  multiply_add_tf32(sum, a_high, b_low);
  multiply_add_tf32(sum, a_high, b_high);
}

// sum += rows . weights over kInner<T> of the inner dimension. Products take it in any order that
// is the same for both: a lane holds neighbours, so that each of its loads is one vector.
template <class T>
__device__ void multiply_add(float (&sum)[4], const Words& low_row, const Words& high_row,
                             const Words& weights) {
  multiply_add(sum, {low_row.x, high_row.x, low_row.y, high_row.y}, {weights.x, weights.y}, T());
  multiply_add(sum, {low_row.z, high_row.z, low_row.w, high_row.w}, {weights.z, weights.w}, T());
}

// ---- waiting and publishing ---------------------------------------------------------------------

// Where a batch row's factor of the product is stored at this step: nowhere (zeros), in memory that
// has long been written, or in what another block may still be computing.
struct Source {
  const void* row;
  bool awaited;
};

// Vector number `lane % 4` of blocks `first`, `first + stride`, ... of kInner<T> columns, of two
// rows; what is kNotYet is loaded again. Columns from `width` on are zeros.
//
// kAsksFirst: for one vector before all others. All blocks asking for everything at once keep L2
// busy: bf16, H 768, 16 rows: 3.35 -> 2.73 us a step (H200). With more rows it costs a trip.
template <class T, bool kAsksFirst, int kBlocks>
__device__ void await(Words (&low)[kBlocks], Words (&high)[kBlocks], const Source& low_row,
                      const Source& high_row, int first, int stride, int width) {
  const int column = threadIdx.x % 4 * kVector<T>;
  const Words zeros = {};
  auto offset = [&](int k) { return (first + k * stride) * kInner<T> + column; };
  auto load = [&](const Source& source, int k) {
    return load_through_l2(static_cast<const T*>(source.row) + offset(k));
  };
  if constexpr (kAsksFirst) {
    const bool asks = low_row.row != nullptr && low_row.awaited && offset(0) < width;
    while (__any_sync(~0u, asks && not_yet(load(low_row, 0)))) {
    }
  }
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    const bool inside = offset(k) < width;
    low[k] = inside && low_row.row != nullptr ? load(low_row, k) : zeros;
    high[k] = inside && high_row.row != nullptr ? load(high_row, k) : zeros;
  }
  bool waiting;
  do {
    waiting = false;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      const bool low_missing = low_row.awaited && not_yet(low[k]);
      const bool high_missing = high_row.awaited && not_yet(high[k]);
      if (low_missing) low[k] = load(low_row, k);
      if (high_missing) high[k] = load(high_row, k);
      waiting |= low_missing || high_missing;
    }
  } while (__any_sync(~0u, waiting));
}

// The bits of one element, NaN with its usual ones.
template <class T>
__device__ uint32_t bits(float x) {
  if constexpr (sizeof(T) == 4) return x == x ? __float_as_uint(x) : 0x7fffffffu;
  const T stored = narrow<T>(x);
  const uint16_t found = *reinterpret_cast<const uint16_t*>(&stored);
  return found == 0xffff ? 0x7fff : found;
}

// Stores the thread's element where other blocks wait for it. All bits of a word come at once: of
// 16-bit elements the first of a row's eight threads stores all.
template <class T>
__device__ void publish(T* to, float x, bool there) {
  const uint32_t own = bits<T>(x);
  if constexpr (sizeof(T) == 4) {
    if (there) store_through_l2(to, own);
  } else {
    const uint32_t pair = own | __shfl_down_sync(~0u, own, 1) << 16;  // right in even threads
    const Words row = {__shfl_sync(~0u, pair, 0, kUnits), __shfl_sync(~0u, pair, 2, kUnits),
                       __shfl_sync(~0u, pair, 4, kUnits), __shfl_sync(~0u, pair, 6, kUnits)};
    if (there && threadIdx.x % kUnits == 0) store_through_l2(to, row);
  }
}

// ---- gates and rows -----------------------------------------------------------------------------

// Approximate where results are rounded to 16 bits.
template <class T>
__device__ float sigmoid_of(float x) {
  if constexpr (sizeof(T) == 4) return gate_sigmoid(x);
  return __fdividef(1.0f, 1.0f + __expf(-x));
}
template <class T>
__device__ float tanh_of(float x) {
  if constexpr (sizeof(T) == 4) return gate_tanh(x);
  return fmaf(2.0f, sigmoid_of<T>(2.0f * x), -1.0f);
}

template <class T>
__device__ float element(const void* from, int64_t at) {
  return from == nullptr ? 0.0f : widen(static_cast<const T*>(from)[at]);
}

__device__ int64_t row_of(const PersistentLayout& layout, int t, int64_t b) {
  return t * layout.t_stride + b * layout.b_stride;
}

__device__ int length_of(const PersistentLayout& layout, int64_t b) {
  if (b >= layout.batch) return 0;
  if (layout.lengths == nullptr) return int(layout.steps);
  return int(max(int64_t(0), min(layout.lengths[b], layout.steps)));
}

// Whether reset cuts the state between steps seam - 1 and seam of row b.
__device__ bool cut_at(const PersistentLayout& layout, int seam, int64_t b, int length) {
  return layout.reset != nullptr && seam < length && layout.reset[row_of(layout, seam, b)];
}

// ---- launches -----------------------------------------------------------------------------------

struct Grid {
  int groups, tiles;  // of blocks with batch rows of their own, of 16 rows in each

  int64_t rows() const { return int64_t(groups) * tiles * kTile; }
};

// Groups fill the multiprocessors before tiles fill a group.
inline Grid choose(int64_t batch, int64_t hidden) {
  int device = 0, multiprocessors = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess ||
      major < 8) {
    return {0, 0};
  }
  const int64_t most = multiprocessors / (hidden / kUnits), tiles = (batch + kTile - 1) / kTile;
  const int64_t groups = std::min(most, tiles);
  if (groups == 0) return {0, 0};
  int64_t each = 1;
  while (each < kMaxTiles && each * groups < tiles) each *= 2;
  return {int(groups), int(each)};
}

template <class Arguments>
cudaError_t launch(void (*kernel)(PersistentLayout, Arguments), const Grid& grid, int columns,
                   const PersistentLayout& layout, const Arguments& arguments,
                   cudaStream_t stream) {
  const int bytes = shared_bytes(grid.tiles, columns);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(layout.hidden / kUnits), unsigned(grid.groups));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, layout, arguments);
}

template <int n>
using Blocks = std::integral_constant<int, n>;

// Calls f with a value of the storage type and, for forward, the blocks of the inner dimension that
// each warp takes; few sizes of float32, since clusters serve where it is small.
template <class F>
cudaError_t with_size(Storage storage, int64_t hidden, const F& f) {
  const int64_t quarters = (hidden + 255) / 256;
  auto of_16_bits = [&](auto tag) {
    switch (quarters) {
      case 1: return f(tag, Blocks<1>());
      case 2: return f(tag, Blocks<2>());
      case 3: return f(tag, Blocks<3>());
      default: return f(tag, Blocks<4>());
    }
  };
  switch (storage) {
    case Storage::Float:
      if (quarters <= 2) return f(float(), Blocks<4>());
      if (quarters == 3) return f(float(), Blocks<6>());
      return f(float(), Blocks<8>());
    case Storage::Half: return of_16_bits(__half());
    case Storage::BFloat16: return of_16_bits(__nv_bfloat16());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace seqmem::cuda
