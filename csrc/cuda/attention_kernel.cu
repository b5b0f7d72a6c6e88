// Attention for small calls; see the header. A block takes 16 queries of one batch: their scores of
// all keys stay in shared memory, keys and values pass through it in tiles of 32.
//
// A thread computes 2 queries x 2 keys of a tile of scores, or 2 queries x 8 columns of an output,
// four at a time; both take 10 or fewer reads of shared memory for 32 multiplications of a warp.
// Backward, two launches: by queries dP = dO V^T + dW, dS and dQ; then by keys dK and dV, a block
// for each of the two, with 16 keys in the place of the queries.
//
// Floor at 8 x 512 x 512 x 64: 0.27 G multiplications forward, 9 us of float32 on an H100;
// predicted 25 us forward and 50 us backward, half of the arithmetic's speed at best. At 32 x 64 x
// 64 x 64: 6 and 12 us. Host time: 5 us forward, 10 us backward, where Triton's launches take 85
// and 150.
#include "attention_kernel.h"

#include "block.cuh"

namespace seqmem::cuda {
namespace {

constexpr int kRows = 16, kTile = 32;  // of the block, and of what passes through
constexpr int kBlock = 128;            // threads
constexpr int kColumnsAtOnce = 64;     // of an output: 16 threads of 4
constexpr int kMostColumns = 2 * kColumnsAtOnce;
constexpr int kSharedBytes = 49152;
constexpr int kCoefficientPitch = kTile + 4;
constexpr int64_t kMostProducts = int64_t(1) << 28;  // multiplications of a forward
constexpr double kMasked = -1e9;

__host__ __device__ constexpr int padded_to_four(int64_t n) { return int(n + 3) / 4 * 4; }
// From one row in shared memory to the next: no two rows begin in the same bank.
__host__ __device__ constexpr int pitch_of(int64_t width) { return padded_to_four(width) + 4; }
__host__ __device__ constexpr int padded_keys(int64_t Tk) {
  return int(Tk + kTile - 1) / kTile * kTile;
}

inline __device__ int64_t begin_of(const AttentionShape& s, const AttentionMatrix& m, int64_t n) {
  return n / s.heads * m.outer + n % s.heads * m.inner;
}

// Rows first, first + 1, ... of batch n's matrix [rows, width] into shared memory, zeros beyond.
template <class T, int Width, int Count, class A>
__device__ void load_rows(A* to, int pitch, const AttentionMatrix& m, int64_t begin, int64_t first,
                          int64_t rows, int width) {
  constexpr int kStore = Width < 4 ? Width : 4;
  const int vectors = width / Width;  // whole ones
  for (int i = threadIdx.x; i < Count * vectors; i += kBlock) {
    const int row = i / vectors, column = i % vectors * Width;
    A x[Width] = {};
    if (first + row < rows) read<Width, T>(x, m.data, begin + (first + row) * m.rows + column);
#pragma unroll
    for (int k = 0; k < Width; k += kStore) {
      A part[kStore];
#pragma unroll
      for (int j = 0; j < kStore; ++j) part[j] = x[k + j];
      write<kStore, A>(to, row * pitch + column + k, part, false);
    }
  }
  const int padding = padded_to_four(width) - width;
  for (int i = threadIdx.x; i < Count * padding; i += kBlock)
    to[i / padding * pitch + width + i % padding] = 0;
}

// This thread's two rows of the block and its place among the 16 that share them.
inline __device__ int row_of(int k) { return threadIdx.x / 16 + k * (kRows / 2); }
inline __device__ int place() { return threadIdx.x % 16; }

// x[i][j] = rows[row_of(i)] . tile[place + 16 j]
template <class A>
__device__ void dot_tile(A (&x)[2][2], const A* rows, const A* tile, int pitch, int width) {
  for (int d = 0; d < width; d += 4) {
    A a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      read<4, A>(a[i], rows, row_of(i) * pitch + d);
      read<4, A>(b[i], tile, (place() + 16 * i) * pitch + d);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) x[i][j] += a[i][k] * b[j][k];
  }
}

// sum[i][c] += coefficients[row_of(i), 0..31] tile[0..31, columns of c]
template <class A>
__device__ void add_tile(A (&sum)[2][2][4], const A* coefficients, int coefficient_pitch,
                         const A* tile, int pitch, int width) {
  for (int first = 0; first < kTile; first += 4) {
    A p[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      read<4, A>(p[i], coefficients, row_of(i) * coefficient_pitch + first);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = c * kColumnsAtOnce + place() * 4;
      if (column >= width) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        A x[4];
        read<4, A>(x, tile, (first + k) * pitch + column);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][c][j] += p[i][k] * x[j];
      }
    }
  }
}

// Into rows first.. of a dense [rows, width], times `factor`.
template <class T, class A>
__device__ void store_sums(void* out, int64_t begin, int64_t first, int64_t rows, int width,
                           const A (&sum)[2][2][4], A factor) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = c * kColumnsAtOnce + place() * 4 + j;
        if (first + row_of(i) < rows && column < width)
          set_one<T>(out, begin + (first + row_of(i)) * width + column, factor * sum[i][c][j]);
      }
}

// Shared memory: the block's rows, a tile, and an array [16, keys], with their pitches.
template <class A>
struct Arrays {
  int pitch, key_pitch;
  A *rows, *tile, *of_keys;

  __device__ Arrays(const AttentionShape& s, A* memory)
      : pitch(pitch_of(s.D > s.Dv ? s.D : s.Dv)),
        key_pitch(padded_keys(s.Tk) + 4),
        rows(memory),
        tile(rows + kRows * pitch),
        of_keys(tile + kTile * pitch) {}
};

template <class A>
__device__ A largest_of_warp(A x) {
  for (int d = 16; d > 0; d /= 2) x = larger(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

inline __device__ bool masked(const AttentionShape& s, const AttentionMatrix& mask, int64_t begin,
                              int64_t q, int64_t k) {
  return s.mask == MaskKind::Allowed &&
         static_cast<const bool*>(mask.data)[begin + q * mask.rows + k * mask.columns] == false;
}

template <class T, int Width>
__global__ void __launch_bounds__(kBlock, 4)
    forward_kernel(AttentionShape s, AttentionOperands a, void* output, void* weights) {
  using A = arithmetic_t<T>;
  alignas(32) __shared__ A memory[kSharedBytes / sizeof(A)];
  const Arrays<A> shared(s, memory);
  const int64_t tiles = (s.Tq + kRows - 1) / kRows, n = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kRows;
  const int64_t of_key = begin_of(s, a.key, n), of_value = begin_of(s, a.value, n);
  const int64_t of_mask = begin_of(s, a.mask, n);
  load_rows<T, Width, kRows>(shared.rows, shared.pitch, a.query, begin_of(s, a.query, n), first,
                             s.Tq, int(s.D));
  for (int64_t start = 0; start < s.Tk; start += kTile) {
    __syncthreads();
    load_rows<T, Width, kTile>(shared.tile, shared.pitch, a.key, of_key, start, s.Tk, int(s.D));
    __syncthreads();
    A x[2][2] = {};
    dot_tile(x, shared.rows, shared.tile, shared.pitch, padded_to_four(s.D));
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const int64_t q = first + row_of(i), k = start + place() + 16 * j;
        A score = A(s.scale) * x[i][j];
        if (q < s.Tq && k < s.Tk) {
          if (masked(s, a.mask, of_mask, q, k)) score = A(kMasked);
          if (s.mask == MaskKind::Added)
            score += one<T>(a.mask.data, of_mask + q * a.mask.rows + k * a.mask.columns);
        }
        if (k >= s.Tk || (s.causal && k > q)) score = -A(INFINITY);
        shared.of_keys[row_of(i) * shared.key_pitch + k] = score;
      }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kRows && first + row < s.Tq; row += kBlock / 32) {
    A* const scores = shared.of_keys + row * shared.key_pitch;
    A top = -A(INFINITY), total = 0;
    for (int k = lane; k < s.Tk; k += 32) top = larger(scores[k], top);
    top = largest_of_warp(top);
    for (int k = lane; k < s.Tk; k += 32) {
      scores[k] = exponential(scores[k] - top);
      total += scores[k];
    }
    total = sum_of_lanes(total, 32);
    for (int k = lane; k < padded_keys(s.Tk); k += 32) {
      scores[k] = k < s.Tk ? scores[k] / total : A(0);
      if (k < s.Tk) set_one<T>(weights, (n * s.Tq + first + row) * s.Tk + k, scores[k]);
    }
  }
  A sum[2][2][4] = {};
  for (int64_t start = 0; start < s.Tk; start += kTile) {
    __syncthreads();
    load_rows<T, Width, kTile>(shared.tile, shared.pitch, a.value, of_value, start, s.Tk,
                               int(s.Dv));
    __syncthreads();
    add_tile(sum, shared.of_keys + start, shared.key_pitch, shared.tile, shared.pitch, int(s.Dv));
  }
  store_sums<T>(output, n * s.Tq * s.Dv, first, s.Tq, int(s.Dv), sum, A(1));
}

template <class T, int Width>
__global__ void __launch_bounds__(kBlock, 4)
    backward_queries_kernel(AttentionShape s, AttentionOperands a, AttentionGradientOperands g) {
  using A = arithmetic_t<T>;
  alignas(32) __shared__ A memory[kSharedBytes / sizeof(A)];
  const Arrays<A> shared(s, memory);
  const int64_t tiles = (s.Tq + kRows - 1) / kRows, n = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kRows;
  const int64_t of_key = begin_of(s, a.key, n), of_value = begin_of(s, a.value, n);
  const int64_t of_mask = begin_of(s, a.mask, n), of_weights = begin_of(s, g.grad_weights, n);
  const bool by_output = g.grad_output.data != nullptr;
  if (by_output)
    load_rows<T, Width, kRows>(shared.rows, shared.pitch, g.grad_output,
                               begin_of(s, g.grad_output, n), first, s.Tq, int(s.Dv));
  for (int64_t start = 0; start < s.Tk; start += kTile) {
    A x[2][2] = {};
    if (by_output) {
      __syncthreads();
      load_rows<T, Width, kTile>(shared.tile, shared.pitch, a.value, of_value, start, s.Tk,
                                 int(s.Dv));
      __syncthreads();
      dot_tile(x, shared.rows, shared.tile, shared.pitch, padded_to_four(s.Dv));
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const int64_t q = first + row_of(i), k = start + place() + 16 * j;
        if (g.grad_weights.data != nullptr && q < s.Tq && k < s.Tk)
          x[i][j] += one<T>(g.grad_weights.data,
                            of_weights + q * g.grad_weights.rows + k * g.grad_weights.columns);
        shared.of_keys[row_of(i) * shared.key_pitch + k] = x[i][j];
      }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kRows; row += kBlock / 32) {
    const int64_t q = first + row, dense = (n * s.Tq + q) * s.Tk;
    A* const slopes = shared.of_keys + row * shared.key_pitch;
    const bool there = q < s.Tq;
    A mean = 0;
    for (int k = lane; there && k < s.Tk; k += 32) mean += one<T>(g.weights, dense + k) * slopes[k];
    mean = sum_of_lanes(mean, 32);
    for (int k = lane; k < padded_keys(s.Tk); k += 32) {
      const bool inside = there && k < s.Tk;
      A slope = inside ? one<T>(g.weights, dense + k) * (slopes[k] - mean) : A(0);
      if (inside && masked(s, a.mask, of_mask, q, k)) slope = 0;
      slopes[k] = slope;
      if (!inside) continue;
      set_one<A>(g.by_scores, dense + k, slope);
      set_one<T>(g.grad_mask, dense + k, slope);
    }
  }
  if (g.grad_query == nullptr) return;
  A sum[2][2][4] = {};
  for (int64_t start = 0; start < s.Tk; start += kTile) {
    __syncthreads();
    load_rows<T, Width, kTile>(shared.tile, shared.pitch, a.key, of_key, start, s.Tk, int(s.D));
    __syncthreads();
    add_tile(sum, shared.of_keys + start, shared.key_pitch, shared.tile, shared.pitch, int(s.D));
  }
  store_sums<T>(g.grad_query, n * s.Tq * s.D, first, s.Tq, int(s.D), sum, A(s.scale));
}

// out [Tk, width] = coefficients [Tq, Tk]^T of_queries [Tq, width], for 16 keys; C is the
// coefficients' storage type.
template <class T, int Width, class C, class A>
__device__ void gather_queries(const AttentionShape& s, const void* coefficients,
                               const AttentionMatrix& of_queries, void* out, int width, A factor,
                               A* memory) {
  const int pitch = pitch_of(width);
  A *const by_key = memory, *const tile = memory + kRows * kCoefficientPitch;
  const int64_t tiles = (s.Tk + kRows - 1) / kRows, n = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kRows, begin = begin_of(s, of_queries, n);
  A sum[2][2][4] = {};
  for (int64_t start = 0; start < s.Tq; start += kTile) {
    __syncthreads();
    load_rows<T, Width, kTile>(tile, pitch, of_queries, begin, start, s.Tq, width);
    for (int i = threadIdx.x; i < kRows * kTile; i += kBlock) {
      const int64_t q = start + i / kRows, k = first + i % kRows;
      by_key[i % kRows * kCoefficientPitch + i / kRows] =
          q < s.Tq && k < s.Tk ? one<C>(coefficients, (n * s.Tq + q) * s.Tk + k) : A(0);
    }
    __syncthreads();
    add_tile(sum, by_key, kCoefficientPitch, tile, pitch, width);
  }
  store_sums<T>(out, n * s.Tk * width, first, s.Tk, width, sum, factor);
}

template <class T, int Width>
__global__ void __launch_bounds__(kBlock, 4)
    backward_keys_kernel(AttentionShape s, AttentionOperands a, AttentionGradientOperands g) {
  using A = arithmetic_t<T>;
  alignas(32) __shared__ A memory[kRows * kCoefficientPitch + kTile * pitch_of(kMostColumns)];
  if (g.grad_key != nullptr && blockIdx.y == 0)
    gather_queries<T, Width, A>(s, g.by_scores, a.query, g.grad_key, int(s.D), A(s.scale), memory);
  else
    gather_queries<T, Width, T>(s, g.weights, g.grad_output, g.grad_value, int(s.Dv), A(1), memory);
}

// Calls f with a value of the storage type and the width of vectors that all operands allow.
template <class F>
cudaError_t with_vectors(Storage storage, const AttentionShape& s,
                         std::initializer_list<AttentionMatrix> operands, const F& f) {
  return with_type(storage, [&](auto tag) {
    constexpr int kWidth = 16 / sizeof(tag);
    bool fast = s.D % kWidth == 0 && s.Dv % kWidth == 0;
    for (const AttentionMatrix& m : operands)
      fast = fast && aligned({m.data}) && m.outer % kWidth == 0 && m.inner % kWidth == 0 &&
             m.rows % kWidth == 0;
    return fast ? f(tag, Constant<kWidth>{}) : f(tag, Constant<1>{});
  });
}

int64_t blocks_of(const AttentionShape& s, int64_t rows) {
  return s.N * ((rows + kRows - 1) / kRows);
}

}  // namespace

bool small_attention(Storage storage, const AttentionShape& s) {
  const int64_t size = storage == Storage::Double ? 8 : 4, width = std::max(s.D, s.Dv);
  if (width > kMostColumns || s.Tk > kSharedBytes) return false;
  const int64_t numbers =
      (kRows + kTile) * pitch_of(width) + kRows * int64_t(padded_keys(s.Tk) + 4);
  return numbers * size <= kSharedBytes && s.N * s.Tq * s.Tk * (s.D + s.Dv) <= kMostProducts;
}

cudaError_t attention_forward(Storage storage, const AttentionShape& s, const AttentionOperands& a,
                              void* output, void* weights, cudaStream_t stream) {
  return with_vectors(storage, s, {a.query, a.key, a.value}, [&](auto tag, auto width) {
    return launch<kBlock>(forward_kernel<decltype(tag), width.value>, blocks_of(s, s.Tq), 1, stream,
                          s, a, output, weights);
  });
}

cudaError_t attention_backward(Storage storage, const AttentionShape& s, const AttentionOperands& a,
                               const AttentionGradientOperands& g, cudaStream_t stream) {
  return with_vectors(storage, s, {a.query, a.key, a.value, g.grad_output},
                      [&](auto tag, auto width) {
                        using T = decltype(tag);
                        cudaError_t error = cudaSuccess;
                        if (g.grad_query || g.grad_key || g.grad_mask)
                          error = launch<kBlock>(backward_queries_kernel<T, width.value>,
                                                 blocks_of(s, s.Tq), 1, stream, s, a, g);
                        const int wanted = (g.grad_key != nullptr) + (g.grad_value != nullptr);
                        if (error != cudaSuccess || wanted == 0) return error;
                        return launch<kBlock>(backward_keys_kernel<T, width.value>,
                                              blocks_of(s, s.Tk), wanted, stream, s, a, g);
                      });
}

}  // namespace seqmem::cuda
