// The NTM functionals on a GPU; see the header. Sums are taken in an order that depends on the
// sizes alone, so that a call gives the same bits every time.
//
// Blocks are 256 threads in groups of neighbouring lanes. Two ways to share out a memory [N, M]:
//   by slots    a group takes a slot, its lanes the slot's vectors; sums over M are shuffles
//   by columns  a group takes a slot, and the block a tile of the slot's vectors for all N slots;
//               sums over N are shuffles, then shared memory
// Addressing takes one block per batch row and head: dot products by slots, then arrays of N slots
// in shared memory, each thread with its own slots and six reductions over the block. Where the
// memory is large for one block, the dot products are a launch of their own and the arrays lie in
// global memory.
//
// Floor: each memory and each gradient of one is read or written once (write's backward and
// addressing's backward read it twice, the second time from the L2 cache), so that B N M = 64 x 128
// x 20 float32 takes about 1 us where DRAM sets the speed. Below that the launch does: predicted 2
// to 3 us for read, write and their backwards, 4 to 5 us for addressing, 7 to 8 us for its backward
// (two launches) on an H100, and 3 to 6 us of host time a call.
#include "ntm_addressing_kernel.h"

#include "block.cuh"

namespace seqmem::cuda {
namespace {

constexpr int64_t kBlocksWanted = 264;      // twice the multiprocessors of an H100
constexpr int kSharedBytes = 24576;         // for addressing's arrays of slots
constexpr int64_t kOneBlockMemory = 65536;  // values of a memory that one block reads quickly
constexpr double kEpsilon = 1e-8;           // beside the product of norms, as in the reference

// ---- how a call is shared out

struct Plan {
  int lanes;         // of a group that takes a slot
  int column_lanes;  // the same where the block takes a tile of columns
  int64_t tiles;     // of columns
  int64_t slot_blocks, column_blocks;
};

template <class T, int Width>
Plan plan(const Shape& s) {
  const int64_t vectors = s.M / Width;
  Plan p = {1};
  while (p.lanes < 32 && p.lanes < vectors) p.lanes *= 2;
  auto blocks = [&](int lanes) { return s.B * s.H * ((vectors + lanes - 1) / lanes); };
  p.column_lanes = p.lanes;
  // Narrower tiles make more blocks, down to the 32 bytes that are loaded at once.
  while (p.column_lanes > 1 && p.column_lanes * Width * int(sizeof(T)) > 32 &&
         blocks(p.column_lanes) < kBlocksWanted && kThreads / p.column_lanes < s.N)
    p.column_lanes /= 2;
  p.tiles = (vectors + p.column_lanes - 1) / p.column_lanes;
  p.slot_blocks = (s.B * s.N * p.lanes + kThreads - 1) / kThreads;
  p.column_blocks = s.B * s.H * p.tiles;
  return p;
}

// This group's slot of all B N.
struct Slot {
  int lane, lanes;
  int64_t b, n;
  bool inside;

  __device__ Slot(const Shape& s, int lanes) : lane(threadIdx.x % lanes), lanes(lanes) {
    const int64_t slot = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
    inside = slot < s.B * s.N;
    b = inside ? slot / s.N : 0;
    n = inside ? slot % s.N : 0;
  }
  __device__ int64_t memory(const Shape& s) const { return (b * s.N + n) * s.M; }
  __device__ int64_t of_head(const Shape& s, int64_t h) const { return (b * s.H + h) * s.N + n; }
};

// This thread's vector of a tile of columns, for one batch row and head.
struct Columns {
  int group, groups;
  int64_t b, h, m;  // m: the vector's first value
  bool inside;

  template <int Width>
  __device__ static Columns make(const Shape& s, const Plan& p, int64_t block) {
    Columns c;
    const int64_t head = block / p.tiles, tile = block % p.tiles;
    c.group = threadIdx.x / p.column_lanes;
    c.groups = kThreads / p.column_lanes;
    c.b = head / s.H;
    c.h = head % s.H;
    c.m = (tile * p.column_lanes + threadIdx.x % p.column_lanes) * Width;
    c.inside = c.m < s.M;
    return c;
  }
  __device__ int64_t memory(const Shape& s, int64_t n) const { return (b * s.N + n) * s.M + m; }
  __device__ bool writes() const { return group == 0 && inside; }
};

// ---- reading

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    read_kernel(Shape s, Plan p, const void* memory, const void* weights, void* reads) {
  using A = arithmetic_t<T>;
  const auto c = Columns::make<Width>(s, p, blockIdx.x);
  const int64_t head = c.b * s.H + c.h;
  A sum[Width] = {};
  if (c.inside) {
#pragma unroll 4
    for (int64_t n = c.group; n < s.N; n += c.groups) {
      A x[Width];
      read<Width, T>(x, memory, c.memory(s, n));
      const A w = one<T>(weights, head * s.N + n);
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] += w * x[k];
    }
  }
  sum_of_groups<32>(sum, p.column_lanes);
  if (c.writes()) write<Width, T>(reads, head * s.M + c.m, sum, false);
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    read_backward_kernel(Shape s, Plan p, const void* memory, const void* weights, const void* grad,
                         void* grad_memory, void* grad_weights) {
  using A = arithmetic_t<T>;
  const Slot slot(s, p.lanes);
  if (grad_weights != nullptr)
    for (int64_t h = 0; h < s.H; ++h) {
      A sum = 0;
      for (int64_t m = slot.lane * Width; slot.inside && m < s.M; m += slot.lanes * Width) {
        A x[Width], g[Width];
        read<Width, T>(x, memory, slot.memory(s) + m);
        read<Width, T>(g, grad, (slot.b * s.H + h) * s.M + m);
#pragma unroll
        for (int k = 0; k < Width; ++k) sum += x[k] * g[k];
      }
      sum = sum_of_lanes(sum, slot.lanes);
      if (slot.inside && slot.lane == 0) set_one<T>(grad_weights, slot.of_head(s, h), sum);
    }
  if (grad_memory == nullptr || !slot.inside) return;
  for (int64_t m = slot.lane * Width; m < s.M; m += slot.lanes * Width) {
    A sum[Width] = {};
    for (int64_t h = 0; h < s.H; ++h) {
      A g[Width];
      read<Width, T>(g, grad, (slot.b * s.H + h) * s.M + m);
      const A w = one<T>(weights, slot.of_head(s, h));
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] += w * g[k];
    }
    write<Width, T>(grad_memory, slot.memory(s) + m, sum, false);
  }
}

// ---- writing

// The vector that one slot's memory holds at m, as the heads first..last - 1 leave it.
template <class T, int Width, class A>
__device__ void written(A (&x)[Width], const Shape& s, const Write& a, int64_t b, int64_t n,
                        int64_t m, int64_t heads) {
  for (int64_t h = 0; h < heads; ++h) {
    A erase[Width], add[Width];
    read<Width, T>(erase, a.erase, (b * s.H + h) * s.M + m);
    read<Width, T>(add, a.add, (b * s.H + h) * s.M + m);
    const A w = one<T>(a.weights, (b * s.H + h) * s.N + n);
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] = x[k] * (A(1) - w * erase[k]) + w * add[k];
  }
}

// The gradient by what head h made, from that by what the last head made.
template <class T, int Width, class A>
__device__ void back_to_head(A (&g)[Width], const Shape& s, const Write& a, int64_t b, int64_t n,
                             int64_t m, int64_t h) {
  for (int64_t later = s.H - 1; later > h; --later) {
    A erase[Width];
    read<Width, T>(erase, a.erase, (b * s.H + later) * s.M + m);
    const A w = one<T>(a.weights, (b * s.H + later) * s.N + n);
#pragma unroll
    for (int k = 0; k < Width; ++k) g[k] *= A(1) - w * erase[k];
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2) write_kernel(Shape s, Plan p, Write a, void* out) {
  const Slot slot(s, p.lanes);
  if (!slot.inside) return;
  for (int64_t m = slot.lane * Width; m < s.M; m += slot.lanes * Width) {
    arithmetic_t<T> x[Width];
    read<Width, T>(x, a.memory, slot.memory(s) + m);
    written<T>(x, s, a, slot.b, slot.n, m, s.H);
    write<Width, T>(out, slot.memory(s) + m, x, false);
  }
}

// The first blocks take the gradients of memory and weights by slots, the rest those of erase and
// add by columns. Each computes anew what a head found and its gradient: 4 operations a head.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    write_backward_kernel(Shape s, Plan p, Write a, const void* grad, WriteGradients out) {
  using A = arithmetic_t<T>;
  if (blockIdx.x < p.slot_blocks) {
    const Slot slot(s, p.lanes);
    for (int64_t h = out.weights != nullptr ? s.H - 1 : 0; h >= 0; --h) {
      A sum = 0;
      for (int64_t m = slot.lane * Width; slot.inside && m < s.M; m += slot.lanes * Width) {
        A x[Width], g[Width], erase[Width], add[Width];
        read<Width, T>(x, a.memory, slot.memory(s) + m);
        read<Width, T>(g, grad, slot.memory(s) + m);
        read<Width, T>(erase, a.erase, (slot.b * s.H + h) * s.M + m);
        read<Width, T>(add, a.add, (slot.b * s.H + h) * s.M + m);
        written<T>(x, s, a, slot.b, slot.n, m, h);
        back_to_head<T>(g, s, a, slot.b, slot.n, m, h);
        const A w = one<T>(a.weights, slot.of_head(s, h));
#pragma unroll
        for (int k = 0; k < Width; ++k) {
          sum += g[k] * (add[k] - x[k] * erase[k]);
          g[k] *= A(1) - w * erase[k];
        }
        if (h == 0) write<Width, T>(out.memory, slot.memory(s) + m, g, false);
      }
      sum = sum_of_lanes(sum, slot.lanes);
      if (slot.inside && slot.lane == 0) set_one<T>(out.weights, slot.of_head(s, h), sum);
    }
    return;
  }
  const auto c = Columns::make<Width>(s, p, blockIdx.x - p.slot_blocks);
  const int64_t head = c.b * s.H + c.h;
  A by_erase[Width] = {}, by_add[Width] = {};
  if (c.inside) {
#pragma unroll 2
    for (int64_t n = c.group; n < s.N; n += c.groups) {
      A x[Width], g[Width];
      read<Width, T>(x, a.memory, c.memory(s, n));
      read<Width, T>(g, grad, c.memory(s, n));
      written<T>(x, s, a, c.b, n, c.m, c.h);
      back_to_head<T>(g, s, a, c.b, n, c.m, c.h);
      const A w = one<T>(a.weights, head * s.N + n);
#pragma unroll
      for (int k = 0; k < Width; ++k) {
        by_add[k] += w * g[k];
        by_erase[k] -= w * g[k] * x[k];
      }
    }
  }
  sum_of_groups<32>(by_erase, p.column_lanes);
  sum_of_groups<32>(by_add, p.column_lanes);
  if (!c.writes()) return;
  write<Width, T>(out.erase, head * s.M + c.m, by_erase, false);
  write<Width, T>(out.add, head * s.M + c.m, by_add, false);
}

// ---- addressing

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

// The dot products alone, where one block a head would take long: block x, y has the slots of tile
// y of head x.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    similarity_kernel(Shape s, Addressing a, int lanes, arithmetic_t<T>* workspace, int arrays) {
  arithmetic_t<T>* found = workspace + int64_t(blockIdx.x) * arrays * s.N;
  const int64_t slots = kThreads / lanes;
  similarity<T, Width>(s, a.memory, a.key, blockIdx.x / s.H, blockIdx.x, lanes, blockIdx.y * slots,
                       gridDim.y * slots, found + kDot * s.N, found + kNorm * s.N);
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

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    address_kernel(Shape s, Addressing a, int lanes, void* weights, arithmetic_t<T>* workspace) {
  using A = arithmetic_t<T>;
  const int64_t head = blockIdx.x;
  A* const dots = arrays_of(s, workspace, kForwardArrays);
  A* const norms = dots + s.N;
  if (workspace == nullptr) {
    const int64_t slots = kThreads / lanes;
    similarity<T, Width>(s, a.memory, a.key, head / s.H, head, lanes, 0, slots, dots, norms);
  }
  const A key_norm = norm_of_key<T, A>(s, a.key, head);  // and dots and norms are there
  const A beta = one<T>(a.beta, head);
  const A sum = exponentials(
      s, dots, [&](int64_t n) { return beta * (dots[n] / (norms[n] * key_norm + A(kEpsilon))); });
  if (s.taps == 0) {
    for (int64_t n = threadIdx.x; n < s.N; n += kThreads)
      set_one<T>(weights, head * s.N + n, dots[n] / sum);
    return;
  }
  const A gate = one<T>(a.gate, head), gamma = one<T>(a.gamma, head);
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
    const A prev = one<T>(a.prev_weights, head * s.N + n);
    dots[n] = prev + gate * (dots[n] / sum - prev);
  }
  __syncthreads();
  const A total = exponentials(s, norms, [&](int64_t n) {
    return power(shifted<T>(s, a.shift, head, dots, n, false), gamma);
  });
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads)
    set_one<T>(weights, head * s.N + n, norms[n] / (total == A(0) ? A(1) : total));
}

// What the gradients by memory and key are made of: dM = sum_h by_dot key + by_norm M, dk = sum_n
// by_dot M + by_key_norm k.
template <class A>
struct Slopes {
  A* by_dot;       // [B, H, N]
  A* by_norm;      // [B, H, N]
  A* by_key_norm;  // [B, H]
};

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    address_backward_kernel(Shape s, Addressing a, int lanes, const void* grad,
                            AddressingGradients out, Slopes<arithmetic_t<T>> slopes,
                            arithmetic_t<T>* workspace) {
  using A = arithmetic_t<T>;
  const int64_t head = blockIdx.x;
  A* const similar = arrays_of(s, workspace, kArrays);
  A *const norms = similar + kNorm * s.N, *const content = similar + kContent * s.N;
  A *const gated = similar + kGated * s.N, *const v = similar + kShifted * s.N;
  A *const powers = similar + kPower * s.N, *const by_v = similar + kByShifted * s.N;
  if (workspace == nullptr) {
    const int64_t slots = kThreads / lanes;
    similarity<T, Width>(s, a.memory, a.key, head / s.H, head, lanes, 0, slots, similar, norms);
  }
  const A key_norm = norm_of_key<T, A>(s, a.key, head);
  const A beta = one<T>(a.beta, head);
  const A sum = exponentials(s, content, [&](int64_t n) {
    similar[n] /= norms[n] * key_norm + A(kEpsilon);
    return beta * similar[n];
  });
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads) content[n] /= sum;

  // by_content: by the content, at by_v; mean: its product with the content.
  A mean = 0;
  auto by_weight = [&](int64_t n) { return one<T>(grad, head * s.N + n); };
  if (s.taps == 0) {
    for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
      by_v[n] = by_weight(n);
      mean += by_v[n] * content[n];
    }
    mean = sum_of_block(mean);
  } else {
    const A gate = one<T>(a.gate, head), gamma = one<T>(a.gamma, head);
    auto prev = [&](int64_t n) { return one<T>(a.prev_weights, head * s.N + n); };
    for (int64_t n = threadIdx.x; n < s.N; n += kThreads)
      gated[n] = prev(n) + gate * (content[n] - prev(n));
    __syncthreads();
    A total = exponentials(s, powers, [&](int64_t n) {
      v[n] = shifted<T>(s, a.shift, head, gated, n, false);
      return power(v[n], gamma);
    });
    if (total == A(0)) total = 1;
    A pull = 0;
    for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
      powers[n] /= total;
      pull += powers[n] * by_weight(n);
    }
    pull = sum_of_block(pull);
    A sums[3] = {};  // by gamma, by the gate, and mean
    for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
      const A by_power = powers[n] * (by_weight(n) - pull);
      const bool empty = v[n] <= A(0);
      by_v[n] = empty ? A(0) : gamma * by_power / v[n];
      sums[0] += empty ? A(0) : by_power * logarithm(v[n]);
    }
    __syncthreads();
    if (out.shift != nullptr)  // a warp for each tap
      for (int64_t j = threadIdx.x / 32; j < s.taps; j += kWarps) {
        A by_tap = 0;
        for (int64_t n = threadIdx.x % 32; n < s.N; n += 32)
          by_tap += by_v[n] * gated[around(n, j - s.taps / 2, s.N)];
        by_tap = sum_of_lanes(by_tap, 32);
        if (threadIdx.x % 32 == 0) set_one<T>(out.shift, head * s.taps + j, by_tap);
      }
    for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
      const A by_gated = shifted<T>(s, a.shift, head, by_v, n, true);
      sums[1] += by_gated * (content[n] - prev(n));
      sums[2] += gate * by_gated * content[n];
      set_one<T>(out.prev_weights, head * s.N + n, (A(1) - gate) * by_gated);
      v[n] = gate * by_gated;
    }
    reduce_block<3, false>(sums);
    if (threadIdx.x == 0) {
      set_one<T>(out.gamma, head, sums[0]);
      set_one<T>(out.gate, head, sums[1]);
    }
    mean = sums[2];
  }
  const A* const by_content = s.taps == 0 ? by_v : v;
  A sums[2] = {};  // by beta, by the key's norm
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads) {
    const A by_logit = content[n] * (by_content[n] - mean), norm = norms[n];
    const A by_dot = beta * by_logit / (norm * key_norm + A(kEpsilon));
    const A lost = by_dot * similar[n];
    sums[0] += by_logit * similar[n];
    sums[1] -= lost * norm;
    slopes.by_dot[head * s.N + n] = by_dot;
    slopes.by_norm[head * s.N + n] = norm == A(0) ? A(0) : -lost * key_norm / norm;
  }
  reduce_block<2, false>(sums);
  if (threadIdx.x != 0) return;
  set_one<T>(out.beta, head, sums[0]);
  slopes.by_key_norm[head] = key_norm == A(0) ? A(0) : sums[1] / key_norm;
}

// The first blocks take the memory's gradient by slots, the rest the keys' by columns.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    spread_kernel(Shape s, Plan p, Addressing a, AddressingGradients out,
                  Slopes<arithmetic_t<T>> slopes) {
  using A = arithmetic_t<T>;
  if (blockIdx.x < p.slot_blocks) {
    const Slot slot(s, p.lanes);
    if (!slot.inside || out.memory == nullptr) return;
    for (int64_t m = slot.lane * Width; m < s.M; m += slot.lanes * Width) {
      A x[Width], sum[Width] = {}, by_norm = 0;
      read<Width, T>(x, a.memory, slot.memory(s) + m);
      for (int64_t h = 0; h < s.H; ++h) {
        A key[Width];
        read<Width, T>(key, a.key, (slot.b * s.H + h) * s.M + m);
        const A by_dot = slopes.by_dot[slot.of_head(s, h)];
        by_norm += slopes.by_norm[slot.of_head(s, h)];
#pragma unroll
        for (int k = 0; k < Width; ++k) sum[k] += by_dot * key[k];
      }
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] += by_norm * x[k];
      write<Width, T>(out.memory, slot.memory(s) + m, sum, false);
    }
    return;
  }
  const auto c = Columns::make<Width>(s, p, blockIdx.x - p.slot_blocks);
  const int64_t head = c.b * s.H + c.h;
  A sum[Width] = {};
  if (c.inside) {
#pragma unroll 4
    for (int64_t n = c.group; n < s.N; n += c.groups) {
      A x[Width];
      read<Width, T>(x, a.memory, c.memory(s, n));
      const A by_dot = slopes.by_dot[head * s.N + n];
#pragma unroll
      for (int k = 0; k < Width; ++k) sum[k] += by_dot * x[k];
    }
  }
  sum_of_groups<32>(sum, p.column_lanes);
  if (!c.writes()) return;
  A key[Width];
  read<Width, T>(key, a.key, head * s.M + c.m);
#pragma unroll
  for (int k = 0; k < Width; ++k) sum[k] += slopes.by_key_norm[head] * key[k];
  write<Width, T>(out.key, head * s.M + c.m, sum, false);
}

// ---- launches

// Calls f with a value of the storage type and the width of vectors that the call allows.
template <class F>
cudaError_t with_vectors(Storage storage, const Shape& s,
                         std::initializer_list<const void*> pointers, const F& f) {
  return with_type(storage, [&](auto tag) {
    constexpr int kWidth = 16 / sizeof(tag);
    return s.M % kWidth == 0 && aligned(pointers) ? f(tag, Constant<kWidth>{})
                                                  : f(tag, Constant<1>{});
  });
}

int64_t size_of_number(Storage storage) { return storage == Storage::Double ? 8 : 4; }

// Whether addressing has its arrays in global memory, and its dot products in a launch before.
bool large(Storage storage, const Shape& s, int arrays) {
  return arrays * s.N * size_of_number(storage) > kSharedBytes || s.N * s.M > kOneBlockMemory;
}

int64_t numbers_of_arrays(Storage storage, const Shape& s, int arrays) {
  return large(storage, s, arrays) ? s.B * s.H * arrays * s.N : 0;
}

// Lanes of a group for addressing: few, so that more slots are read at once.
int lanes_of_block(const Shape& s, int64_t vectors) {
  int lanes = vectors > 1 ? 2 : 1;
  while (lanes < 32 && lanes < vectors && s.N * lanes < kThreads) lanes *= 2;
  return lanes;
}

// How addressing begins: the dot products where they are a launch of their own.
template <class T, int Width>
cudaError_t launch_similarity(const Shape& s, const Addressing& a, arithmetic_t<T>* workspace,
                              int arrays, cudaStream_t stream) {
  const int lanes = plan<T, Width>(s).lanes;
  const int64_t tiles = (s.N * lanes + kThreads - 1) / kThreads;
  return launch(similarity_kernel<T, Width>, s.B * s.H, std::min<int64_t>(tiles, 65535), stream, s,
                a, lanes, workspace, arrays);
}

}  // namespace

cudaError_t ntm_read(Storage storage, const Shape& s, const void* memory, const void* weights,
                     void* reads, cudaStream_t stream) {
  return with_vectors(storage, s, {memory, reads}, [&](auto tag, auto width) {
    using T = decltype(tag);
    const Plan p = plan<T, width.value>(s);
    return launch(read_kernel<T, width.value>, p.column_blocks, 1, stream, s, p, memory, weights,
                  reads);
  });
}

cudaError_t ntm_read_backward(Storage storage, const Shape& s, const void* memory,
                              const void* weights, const void* grad, void* grad_memory,
                              void* grad_weights, cudaStream_t stream) {
  return with_vectors(storage, s, {memory, grad, grad_memory}, [&](auto tag, auto width) {
    using T = decltype(tag);
    const Plan p = plan<T, width.value>(s);
    return launch(read_backward_kernel<T, width.value>, p.slot_blocks, 1, stream, s, p, memory,
                  weights, grad, grad_memory, grad_weights);
  });
}

cudaError_t ntm_write(Storage storage, const Shape& s, const Write& a, void* out,
                      cudaStream_t stream) {
  return with_vectors(storage, s, {a.memory, a.erase, a.add, out}, [&](auto tag, auto width) {
    using T = decltype(tag);
    const Plan p = plan<T, width.value>(s);
    return launch(write_kernel<T, width.value>, p.slot_blocks, 1, stream, s, p, a, out);
  });
}

cudaError_t ntm_write_backward(Storage storage, const Shape& s, const Write& a, const void* grad,
                               const WriteGradients& out, cudaStream_t stream) {
  return with_vectors(storage, s, {a.memory, a.erase, a.add, grad, out.memory, out.erase, out.add},
                      [&](auto tag, auto width) {
                        using T = decltype(tag);
                        Plan p = plan<T, width.value>(s);
                        if (out.memory == nullptr && out.weights == nullptr) p.slot_blocks = 0;
                        if (out.erase == nullptr && out.add == nullptr) p.column_blocks = 0;
                        return launch(write_backward_kernel<T, width.value>,
                                      p.slot_blocks + p.column_blocks, 1, stream, s, p, a, grad,
                                      out);
                      });
}

int64_t ntm_address_workspace(Storage storage, const Shape& s) {
  return numbers_of_arrays(storage, s, kForwardArrays);
}

int64_t ntm_address_backward_workspace(Storage storage, const Shape& s) {
  return s.B * s.H * (2 * s.N + 1) + numbers_of_arrays(storage, s, kArrays);
}

cudaError_t ntm_address(Storage storage, const Shape& s, const Addressing& a, void* weights,
                        void* workspace, cudaStream_t stream) {
  return with_vectors(storage, s, {a.memory, a.key}, [&](auto tag, auto width) {
    using T = decltype(tag);
    arithmetic_t<T>* arrays = nullptr;
    if (large(storage, s, kForwardArrays)) {
      arrays = static_cast<arithmetic_t<T>*>(workspace);
      const cudaError_t error =
          launch_similarity<T, width.value>(s, a, arrays, kForwardArrays, stream);
      if (error != cudaSuccess) return error;
    }
    return launch(address_kernel<T, width.value>, s.B * s.H, 1, stream, s, a,
                  lanes_of_block(s, s.M / width.value), weights, arrays);
  });
}

cudaError_t ntm_address_backward(Storage storage, const Shape& s, const Addressing& a,
                                 const void* grad, const AddressingGradients& out, void* workspace,
                                 cudaStream_t stream) {
  return with_vectors(
      storage, s, {a.memory, a.key, out.memory, out.key}, [&](auto tag, auto width) {
        using T = decltype(tag);
        using A = arithmetic_t<T>;
        const int64_t heads = s.B * s.H;
        A* const numbers = static_cast<A*>(workspace);
        const Slopes<A> slopes = {numbers, numbers + heads * s.N, numbers + 2 * heads * s.N};
        A* arrays = nullptr;
        cudaError_t error = cudaSuccess;
        if (large(storage, s, kArrays)) {
          arrays = slopes.by_key_norm + heads;
          error = launch_similarity<T, width.value>(s, a, arrays, kArrays, stream);
          if (error != cudaSuccess) return error;
        }
        error = launch(address_backward_kernel<T, width.value>, heads, 1, stream, s, a,
                       lanes_of_block(s, s.M / width.value), grad, out, slopes, arrays);
        if (error != cudaSuccess) return error;
        Plan p = plan<T, width.value>(s);
        if (out.memory == nullptr) p.slot_blocks = 0;
        if (out.key == nullptr) p.column_blocks = 0;
        return launch(spread_kernel<T, width.value>, p.slot_blocks + p.column_blocks, 1, stream, s,
                      p, a, out, slopes);
      });
}

}  // namespace seqmem::cuda
