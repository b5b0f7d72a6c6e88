// The LSTM cell for small batches; see the header. Sums are taken in an order that depends on the
// sizes alone.
//
// Forward: a warp takes one unit and up to 8 rows of the batch. Its lanes share out the four gates'
// rows of both weights, each value of which meets all rows of the batch; the 32 sums then go to 32
// lanes (31 shuffles), which activate one gate each.
// Backward: some blocks take a tile of columns of a weight, for grad_input or grad_hx, the others a
// row of both weights for each warp, for the gradients of weights and biases.
//
// Floor: the weights once, 4 H (I + H) elements: 0.13 MB at H = I = 64 in float32, which the L2
// cache gives in less than a microsecond; 33 MB at 1024, 10 us from DRAM. Predicted on an H100: 2.5
// us at H = 64 and 4 us at B 16, H 128 for the forward, 3 to 4 us for the backward's products; 5 us
// of host time forward and 10 us backward, where cuBLAS took 20 and 40.
#include "lstm_cell_kernel.h"

#include "block.cuh"

namespace seqmem::cuda {
namespace {

constexpr int kMostRows = 8;         // of the batch, in registers
constexpr int kMostColumnLanes = 8;  // of a tile of columns
constexpr int64_t kBlocksWanted = 132;

// acc[r * 4 + q] += row q * H + unit of a weight [4H, K] times row first + r of x [B, K].
template <class T, int Width, int Rows, class A>
__device__ void multiply(A (&acc)[4 * Rows], const CellShape& s, const void* weight, const void* x,
                         int64_t K, int64_t unit, int64_t first) {
  for (int64_t k = (threadIdx.x % 32) * Width; k < K; k += 32 * Width) {
    A w[4][Width];
#pragma unroll
    for (int q = 0; q < 4; ++q) read<Width, T>(w[q], weight, (q * s.H + unit) * K + k);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      A v[Width] = {};
      if (first + r < s.B) read<Width, T>(v, x, (first + r) * K + k);
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int j = 0; j < Width; ++j) acc[r * 4 + q] += w[q][j] * v[j];
    }
  }
}

// Sums over the warp: that of value number lane / (32 / Count), a power of two of them.
template <int Count, int distance = 16, class A>
__device__ A scatter_sums(A (&x)[Count]) {
  if constexpr (distance == 0) {
    return x[0];
  } else if constexpr (Count == 1) {
    x[0] += __shfl_xor_sync(~0u, x[0], distance);
    return scatter_sums<1, distance / 2>(x);
  } else {
    constexpr int kHalf = Count / 2;
    const bool upper = threadIdx.x & distance;
    A sums[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A given = upper ? x[i] : x[i + kHalf], kept = upper ? x[i + kHalf] : x[i];
      sums[i] = kept + __shfl_xor_sync(~0u, given, distance);
    }
    return scatter_sums<kHalf, distance / 2>(sums);
  }
}

template <class T, int Width, int Rows>
__global__ void __launch_bounds__(kThreads, 1) cell_kernel(CellShape s, CellForward a) {
  using A = arithmetic_t<T>;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = int64_t(blockIdx.y) * Rows;
  if (unit >= s.H) return;  // the whole warp
  A acc[4 * Rows] = {};
  multiply<T, Width, Rows>(acc, s, a.weight_ih, a.input, s.I, unit, first);
  if (a.hx != nullptr) multiply<T, Width, Rows>(acc, s, a.weight_hh, a.hx, s.H, unit, first);
  A z = scatter_sums(acc);
  constexpr int kLanes = 32 / (4 * Rows);  // that hold the same sum
  const int lane = threadIdx.x % 32, gate = lane / kLanes % 4;
  const int64_t b = first + lane / kLanes / 4, column = gate * s.H + unit;
  if (a.bias_ih != nullptr) z += one<T>(a.bias_ih, column);
  if (a.bias_hh != nullptr) z += one<T>(a.bias_hh, column);
  z = gate == 2 ? tangent(z) : sigmoid(z);
  const int row = lane / (4 * kLanes) * 4;
  const A i = __shfl_sync(~0u, z, row * kLanes), f = __shfl_sync(~0u, z, (row + 1) * kLanes);
  const A g = __shfl_sync(~0u, z, (row + 2) * kLanes), o = __shfl_sync(~0u, z, (row + 3) * kLanes);
  if (b >= s.B || lane % kLanes != 0) return;
  set_one<T>(a.gates, b * 4 * s.H + column, z);
  if (gate != 0) return;
  const A before = a.cx != nullptr ? one<T>(a.cx, b * s.H + unit) : A(0);
  const A c = f * before + i * g;
  set_one<T>(a.cy, b * s.H + unit, c);
  set_one<T>(a.hy, b * s.H + unit, o * tangent(c));
}

// Blocks of the backward: tiles of columns for grad_input, then for grad_hx, then rows of weights.
struct Tiles {
  int lanes;  // of a group that takes a row of the tile
  int64_t of_input, of_state;
};

// A tile of columns of dz [B, 4H] weight [4H, K], for 8 rows of the batch.
template <class T, int Width>
__device__ void multiply_columns(const CellShape& s, const void* dz, const void* weight, void* out,
                                 int64_t K, int64_t tile, int lanes) {
  using A = arithmetic_t<T>;
  const int64_t first = int64_t(blockIdx.y) * kMostRows;
  const int64_t k = (tile * lanes + threadIdx.x % lanes) * Width;
  const int group = threadIdx.x / lanes;
  A sum[kMostRows * Width] = {};
  for (int64_t row = group; k < K && row < 4 * s.H; row += kThreads / lanes) {
    A w[Width];
    read<Width, T>(w, weight, row * K + k);
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      const A d = first + r < s.B ? one<T>(dz, (first + r) * 4 * s.H + row) : A(0);
#pragma unroll
      for (int j = 0; j < Width; ++j) sum[r * Width + j] += d * w[j];
    }
  }
  sum_of_groups<kMostColumnLanes>(sum, lanes);
  if (group != 0 || k >= K) return;
#pragma unroll
  for (int r = 0; r < kMostRows; ++r) {
    A part[Width];
#pragma unroll
    for (int j = 0; j < Width; ++j) part[j] = sum[r * Width + j];
    if (first + r < s.B) write<Width, T>(out, (first + r) * K + k, part, false);
  }
}

// One row of dz^T [4H, B] x [B, K], by a warp.
template <class T, int Width>
__device__ void multiply_row(const CellShape& s, const void* dz, const void* x, void* out,
                             int64_t K, int64_t row) {
  using A = arithmetic_t<T>;
  for (int64_t k = (threadIdx.x % 32) * Width; out != nullptr && k < K; k += 32 * Width) {
    A sum[Width] = {};
    for (int64_t b = 0; x != nullptr && b < s.B; ++b) {
      A v[Width];
      read<Width, T>(v, x, b * K + k);
      const A d = one<T>(dz, b * 4 * s.H + row);
#pragma unroll
      for (int j = 0; j < Width; ++j) sum[j] += d * v[j];
    }
    write<Width, T>(out, row * K + k, sum, false);
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 1)
    products_kernel(CellShape s, Tiles tiles, CellProducts a) {
  int64_t block = blockIdx.x;
  if (block < tiles.of_input)
    return multiply_columns<T, Width>(s, a.dz, a.weight_ih, a.grad_input, s.I, block, tiles.lanes);
  block -= tiles.of_input;
  if (block < tiles.of_state)
    return multiply_columns<T, Width>(s, a.dz, a.weight_hh, a.grad_hx, s.H, block, tiles.lanes);
  const int64_t row = (block - tiles.of_state) * kWarps + threadIdx.x / 32;
  if (blockIdx.y > 0 || row >= 4 * s.H) return;
  multiply_row<T, Width>(s, a.dz, a.input, a.grad_weight_ih, s.I, row);
  multiply_row<T, Width>(s, a.dz, a.hx, a.grad_weight_hh, s.H, row);
  if (a.grad_bias == nullptr || threadIdx.x % 32 != 0) return;
  arithmetic_t<T> sum = 0;
  for (int64_t b = 0; b < s.B; ++b) sum += one<T>(a.dz, b * 4 * s.H + row);
  set_one<T>(a.grad_bias, row, sum);
}

// Calls f with a value of the storage type and the width of vectors that the call allows.
template <class F>
cudaError_t with_vectors(Storage storage, const CellShape& s,
                         std::initializer_list<const void*> pointers, const F& f) {
  return with_type(storage, [&](auto tag) {
    constexpr int kWidth = 16 / sizeof(tag);
    return s.I % kWidth == 0 && s.H % kWidth == 0 && aligned(pointers) ? f(tag, Constant<kWidth>{})
                                                                       : f(tag, Constant<1>{});
  });
}

}  // namespace

cudaError_t lstm_cell_forward(Storage storage, const CellShape& s, const CellForward& a,
                              cudaStream_t stream) {
  return with_vectors(storage, s, {a.input, a.hx, a.weight_ih, a.weight_hh},
                      [&](auto tag, auto width) {
                        using T = decltype(tag);
                        const int64_t blocks = (s.H + kWarps - 1) / kWarps;
                        if (s.B == 1)
                          return launch(cell_kernel<T, width.value, 1>, blocks, 1, stream, s, a);
                        return launch(cell_kernel<T, width.value, kMostRows>, s.B == 0 ? 0 : blocks,
                                      (s.B + kMostRows - 1) / kMostRows, stream, s, a);
                      });
}

cudaError_t lstm_cell_products(Storage storage, const CellShape& s, const CellProducts& a,
                               cudaStream_t stream) {
  return with_vectors(storage, s,
                      {a.input, a.hx, a.weight_ih, a.weight_hh, a.grad_input, a.grad_hx,
                       a.grad_weight_ih, a.grad_weight_hh},
                      [&](auto tag, auto width) {
                        using T = decltype(tag);
                        Tiles tiles = {kMostColumnLanes, 0, 0};
                        auto of = [&](int64_t K, const void* out) {
                          const int64_t columns = tiles.lanes * width.value;
                          return out == nullptr ? 0 : (K + columns - 1) / columns;
                        };
                        auto count = [&] {
                          tiles.of_input = of(s.I, a.grad_input);
                          tiles.of_state = of(s.H, a.grad_hx);
                          return tiles.of_input + tiles.of_state;
                        };
                        // Narrower tiles make more blocks, down to the 32 bytes that are loaded at
                        // once.
                        while (count() < kBlocksWanted && tiles.lanes > 1 &&
                               tiles.lanes * width.value * int64_t(sizeof(T)) > 32)
                          tiles.lanes /= 2;
                        const bool of_weights = a.grad_weight_ih || a.grad_weight_hh || a.grad_bias;
                        const int64_t rows = of_weights ? (4 * s.H + kWarps - 1) / kWarps : 0;
                        const int64_t groups = (s.B + kMostRows - 1) / kMostRows;
                        return launch(products_kernel<T, width.value>, count() + rows,
                                      std::max<int64_t>(groups, 1), stream, s, tiles, a);
                      });
}

}  // namespace seqmem::cuda
