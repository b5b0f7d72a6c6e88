// LSTM kernels whose blocks stay on the GPU over all steps; see the header.
//
// Each block owns eight hidden units: their rows of weight_hh stay in its registers, spread over
// eight warps that split the product's inner dimension, and c of its units too. What a step needs
// from the other blocks goes through the result itself, which is in L2: memory holds kNotYet until
// the owner of a unit has stored it, and readers load until they find something else. So a step
// costs one store and one load through L2; no flag, no fence, no barrier of the grid. NaN is stored
// with its usual bits, which differ from kNotYet's.
//
// Blocks wait for each other, so all of a launch must be resident: it is a cooperative launch.
// Groups of blocks with different batch rows do not wait for each other.
//
// Floor of a forward step at H 768, 16 rows: 24 kB of h to each of 96 blocks through L2 0.45 us,
// the trip through L2 0.7 us, products and sums 0.2 us. Backward exchanges dz, four times as much.
#include "lstm_persistent_kernel.h"

#include <algorithm>

#include "common.h"
#include "lstm_gates.h"

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

// ---- forward ------------------------------------------------------------------------------------

template <class T, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const PersistentLayout layout, const PersistentForward a) {
  extern __shared__ float partial[];  // [2][kTiles][kWarps][4][kCells]
  constexpr int kAtOnce = kBlocks <= (kTiles == 4 ? 4 : 6) ? kBlocks : kBlocks / 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int H = int(layout.hidden), steps = int(layout.steps), unit0 = blockIdx.x * kUnits;
  const int64_t b0 = int64_t(blockIdx.y) * kTiles * kTile;
  const bool reverse = layout.reverse;

  // Of unit lane / 4 and gate g.
  Words weights[4][kBlocks];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      const int at = (warp + k * kWarps) * kInner<T> + lane % 4 * kVector<T>;
      const T* from =
          static_cast<const T*>(a.weight_hh) + (int64_t(g) * H + unit0 + lane / 4) * H + at;
      weights[g][k] = at < H ? *reinterpret_cast<const Words*>(from) : Words{};
    }
  }

  // The two rows of each tile whose products this lane feeds.
  int lengths[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      lengths[m][r] = length_of(layout, b0 + m * kTile + lane / 4 + 8 * r);
  }

  // The cells that this thread computes: of every tile, or of every second one.
  constexpr int kOwn = (kTiles + 1) / 2;
  const int half = thread / kCells, cell = thread % kCells, unit = unit0 + cell % kUnits;
  const bool owner = half < kTiles;
  float bias[4], c[kOwn], h[kOwn];
  int own_length[kOwn];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int64_t at = int64_t(g) * H + unit;
    bias[g] = element<T>(a.bias_ih, at) + element<T>(a.bias_hh, at);
  }
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    const bool there = owner && b < layout.batch;
    own_length[m] = there ? length_of(layout, b) : 0;
    c[m] = there ? a.c[b * H + unit] : 0.0f;
    h[m] = there ? element<T>(a.hx, b * H + unit) : 0.0f;
  }

  // What a step needs besides h: asked for a step before where registers allow, or before waiting.
  constexpr bool kAhead = kTiles == 1;
  float asked_z[kOwn][4] = {};
  bool asked_cut[kOwn] = {};
  auto ask = [&](int step) {
    const int t = reverse ? steps - 1 - step : step, seam = reverse ? t + 1 : t;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
      if (step >= steps || t >= own_length[m]) continue;
#pragma unroll
      for (int g = 0; g < 4; ++g)
        asked_z[m][g] = element<T>(a.z, (row_of(layout, t, b) * 4 + g) * H + unit);
      asked_cut[m] = cut_at(layout, seam, b, own_length[m]);
    }
  };
  if constexpr (kAhead) ask(0);

  for (int step = 0; step < steps; ++step) {
    const int t = reverse ? steps - 1 - step : step, before = reverse ? t + 1 : t - 1;
    const int seam = reverse ? t + 1 : t;

    if constexpr (!kAhead) ask(step);
    float z[kOwn][4];
    bool cut[kOwn];
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      cut[m] = asked_cut[m];
#pragma unroll
      for (int g = 0; g < 4; ++g) z[m][g] = asked_z[m][g];
    }
    if constexpr (kAhead) ask(step + 1);

    float* const sums = partial + step % 2 * (kTiles * kWarps * 4 * kCells);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Source source[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t b = b0 + m * kTile + lane / 4 + 8 * r;
        const int length = lengths[m][r];
        const bool zeros = t >= length || cut_at(layout, seam, b, length);
        const bool awaited = !zeros && before >= 0 && before < length;
        const T* given = static_cast<const T*>(awaited ? a.output : a.hx);
        const int64_t row = awaited ? row_of(layout, before, b) : b;
        source[r] = {zeros || given == nullptr ? nullptr : given + row * H, awaited};
      }
      float sum[4][4] = {};
#pragma unroll
      for (int k = 0; k < kBlocks; k += kAtOnce) {
        Words low[kAtOnce], high[kAtOnce];
        await<T, kTiles == 1>(low, high, source[0], source[1], warp + k * kWarps, kWarps, H);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n)
            multiply_add<T>(sum[g], low[n], high[n], weights[g][k + n]);
        }
      }
      float* const to = sums + (m * kWarps + warp) * 4 * kCells + lane / 4 * kUnits + lane % 4 * 2;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        *reinterpret_cast<float2*>(to + g * kCells) = {sum[g][0], sum[g][1]};
        *reinterpret_cast<float2*>(to + g * kCells + 8 * kUnits) = {sum[g][2], sum[g][3]};
      }
    }
    __syncthreads();

    if (!owner) continue;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int tile = 2 * m + half;
      if (tile >= kTiles) break;
      const int64_t b = b0 + tile * kTile + cell / kUnits, at = row_of(layout, t, b);
      float gates[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        gates[g] = z[m][g] + bias[g];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          gates[g] += sums[((tile * kWarps + w) * 4 + g) * kCells + cell];
        }
        gates[g] = g == 2 ? tanh_of<T>(gates[g]) : sigmoid_of<T>(gates[g]);
      }
      const bool active = t < own_length[m];
      if (active) {
        c[m] = (cut[m] ? 0.0f : gates[1] * c[m]) + gates[0] * gates[2];
        h[m] = gates[3] * tanh_of<T>(c[m]);
      }
      publish(static_cast<T*>(a.output) + at * H + unit, active ? h[m] : 0.0f, b < layout.batch);
      if (b >= layout.batch) continue;
      if (a.gates != nullptr) {
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          static_cast<T*>(a.gates)[(at * 4 + g) * H + unit] = narrow<T>(active ? gates[g] : 0.0f);
        }
      }
      if (a.cells != nullptr) {
        static_cast<T*>(a.cells)[at * H + unit] = narrow<T>(active ? c[m] : 0.0f);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    if (!owner || 2 * m + half >= kTiles || b >= layout.batch) continue;
    static_cast<T*>(a.hy)[b * H + unit] = narrow<T>(h[m]);
    a.c[b * H + unit] = c[m];
  }
}

// ---- backward -----------------------------------------------------------------------------------

// A vector of elements that are `stride` apart.
template <class T>
__device__ Words gathered(const T* from, int stride) {
  union {
    Words words;
    T elements[kVector<T>];
  } vector;
#pragma unroll
  for (int n = 0; n < kVector<T>; ++n) vector.elements[n] = from[int64_t(n) * stride];
  return vector.words;
}

// The inner dimension is that of dz: kBlocks of kInner<T> for each warp, as many at a time as
// registers hold.
template <class T, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const PersistentLayout layout, const PersistentBackward a) {
  extern __shared__ float partial[];  // [2][kTiles][kWarps][kCells]
  constexpr int kAtOnce = kTiles == 4 || kBlocks == 32 ? 4 : kBlocks <= 12 ? kBlocks : 8;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int H = int(layout.hidden), steps = int(layout.steps), unit0 = blockIdx.x * kUnits;
  const int64_t b0 = int64_t(blockIdx.y) * kTiles * kTile;
  const bool reverse = layout.reverse;

  // Of unit lane / 4: eight rows of weight_hh.
  Words weights[kBlocks];
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    const int at = (warp + k * kWarps) * kInner<T> + lane % 4 * kVector<T>;
    const T* const column = static_cast<const T*>(a.weight_hh) + int64_t(at) * H + unit0 + lane / 4;
    weights[k] = at < 4 * H ? gathered(column, H) : Words{};
  }
  int lengths[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      lengths[m][r] = length_of(layout, b0 + m * kTile + lane / 4 + 8 * r);
  }

  constexpr int kOwn = (kTiles + 1) / 2;
  const int half = thread / kCells, cell = thread % kCells, unit = unit0 + cell % kUnits;
  const bool owner = half < kTiles;
  float d_c[kOwn];
  int own_length[kOwn];
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    const bool there = owner && b < layout.batch;
    own_length[m] = there ? length_of(layout, b) : 0;
    d_c[m] = there ? a.d_c[b * H + unit] : 0.0f;
  }

  for (int step = 0; step < steps; ++step) {
    const int t = reverse ? step : steps - 1 - step;
    const int after = reverse ? t - 1 : t + 1, before = reverse ? t + 1 : t - 1;
    const int seam_after = reverse ? t : t + 1, seam_before = reverse ? t + 1 : t;

    // Asked for before waiting.
    float gates[kOwn][4] = {}, d_gates[kOwn][4] = {}, cells[kOwn] = {}, c_before[kOwn] = {};
    float d_h[kOwn] = {}, d_cell[kOwn] = {};
    bool cut[kOwn] = {};
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits, at = row_of(layout, t, b);
      const int length = own_length[m];
      if (t >= length) continue;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        gates[m][g] = element<T>(a.gates, (at * 4 + g) * H + unit);
        d_gates[m][g] = element<T>(a.grad_gates, (at * 4 + g) * H + unit);
      }
      cells[m] = element<T>(a.cells, at * H + unit);
      cut[m] = cut_at(layout, seam_before, b, length);
      if (!cut[m]) {
        const bool inside = before >= 0 && before < length;
        c_before[m] = inside ? element<T>(a.cells, row_of(layout, before, b) * H + unit)
                             : element<T>(a.cx, b * H + unit);
      }
      d_h[m] = element<T>(a.grad_output, at * H + unit);
      if (after < 0 || after >= length) d_h[m] += element<T>(a.grad_hy, b * H + unit);
      d_cell[m] = element<T>(a.grad_cells, at * H + unit);
    }

    float* const sums = partial + step % 2 * (kTiles * kWarps * kCells);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Source source[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t b = b0 + m * kTile + lane / 4 + 8 * r;
        const int length = lengths[m][r];
        const bool awaited =
            t < length && after >= 0 && after < length && !cut_at(layout, seam_after, b, length);
        const T* dz = static_cast<const T*>(a.dz);
        source[r] = {awaited ? dz + row_of(layout, after, b) * 4 * H : nullptr, awaited};
      }
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < kBlocks; k += kAtOnce) {
        Words low[kAtOnce], high[kAtOnce];
        await<T, false>(low, high, source[0], source[1], warp + k * kWarps, kWarps, 4 * H);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) multiply_add<T>(sum, low[n], high[n], weights[k + n]);
      }
      float* const to = sums + (m * kWarps + warp) * kCells + lane / 4 * kUnits + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
      *reinterpret_cast<float2*>(to + 8 * kUnits) = {sum[2], sum[3]};
    }
    __syncthreads();

    if (!owner) continue;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int tile = 2 * m + half;
      if (tile >= kTiles) break;
      const int64_t b = b0 + tile * kTile + cell / kUnits, at = row_of(layout, t, b);
      float d_output = d_h[m];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) d_output += sums[(tile * kWarps + w) * kCells + cell];
      const float i = gates[m][0], f = gates[m][1], g = gates[m][2], o = gates[m][3];
      const float tanh_c = tanh_of<T>(cells[m]);
      const float d_state = d_c[m] + d_cell[m] + d_output * o * (1.0f - tanh_c * tanh_c);
      float dz[4] = {(d_gates[m][0] + d_state * g) * i * (1.0f - i),
                     (d_gates[m][1] + d_state * c_before[m]) * f * (1.0f - f),
                     (d_gates[m][2] + d_state * i) * (1.0f - g * g),
                     (d_gates[m][3] + d_output * tanh_c) * o * (1.0f - o)};
      const bool active = t < own_length[m];
      if (active) d_c[m] = cut[m] ? 0.0f : d_state * f;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        publish(static_cast<T*>(a.dz) + (at * 4 + q) * H + unit, active ? dz[q] : 0.0f,
                b < layout.batch);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    if (owner && 2 * m + half < kTiles && b < layout.batch) a.d_c[b * H + unit] = d_c[m];
  }
}

// ---- launches -----------------------------------------------------------------------------------

struct Grid {
  int groups, tiles;  // of blocks with batch rows of their own, of 16 rows in each

  int64_t rows() const { return int64_t(groups) * tiles * kTile; }
};

// Groups fill the multiprocessors before tiles fill a group.
Grid choose(int64_t batch, int64_t hidden) {
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

template <class T, int kBlocks>
cudaError_t forward(const PersistentLayout& layout, const PersistentForward& a, const Grid& grid,
                    cudaStream_t stream) {
  const auto kernel = grid.tiles == 1   ? forward_kernel<T, kBlocks, 1>
                      : grid.tiles == 2 ? forward_kernel<T, kBlocks, 2>
                                        : forward_kernel<T, kBlocks, 4>;
  return launch(kernel, grid, 4, layout, a, stream);
}

template <class T, int kBlocks>
cudaError_t backward(const PersistentLayout& layout, const PersistentBackward& a, const Grid& grid,
                     cudaStream_t stream) {
  const auto kernel = grid.tiles == 1   ? backward_kernel<T, 4 * kBlocks, 1>
                      : grid.tiles == 2 ? backward_kernel<T, 4 * kBlocks, 2>
                                        : backward_kernel<T, 4 * kBlocks, 4>;
  return launch(kernel, grid, 1, layout, a, stream);
}

}  // namespace

int64_t lstm_persistent_rows(Storage storage, int64_t batch, int64_t hidden) {
  if (storage == Storage::Double || hidden % kUnits != 0 || hidden > kMaxHidden || hidden == 0 ||
      batch == 0)
    return 0;
  return choose(batch, hidden).rows();
}

// By the blocks of the inner dimension that each warp takes; few sizes of float32, since clusters
// serve where it is small.
#define SEQMEM_BY_SIZE(function)                                             \
  const Grid grid = choose(layout.batch, layout.hidden);                     \
  const int64_t quarters = (layout.hidden + 255) / 256;                      \
  switch (storage) {                                                         \
    case Storage::Float:                                                     \
      if (quarters <= 2) return function<float, 4>(layout, a, grid, stream); \
      if (quarters == 3) return function<float, 6>(layout, a, grid, stream); \
      return function<float, 8>(layout, a, grid, stream);                    \
    case Storage::Half: SEQMEM_OF_16_BITS(function, __half)                  \
    case Storage::BFloat16: SEQMEM_OF_16_BITS(function, __nv_bfloat16)       \
    default: return cudaErrorInvalidValue;                                   \
  }
#define SEQMEM_OF_16_BITS(function, T)                       \
  switch (quarters) {                                        \
    case 1: return function<T, 1>(layout, a, grid, stream);  \
    case 2: return function<T, 2>(layout, a, grid, stream);  \
    case 3: return function<T, 3>(layout, a, grid, stream);  \
    default: return function<T, 4>(layout, a, grid, stream); \
  }

cudaError_t lstm_forward_persistent(Storage storage, const PersistentLayout& layout,
                                    const PersistentForward& a,
                                    cudaStream_t stream){SEQMEM_BY_SIZE(forward)}

cudaError_t lstm_backward_persistent(Storage storage, const PersistentLayout& layout,
                                     const PersistentBackward& a, cudaStream_t stream) {
  SEQMEM_BY_SIZE(backward)
}

}  // namespace seqmem::cuda
