// The NTM's addressing on a GPU, forward and backward, by slots or by columns as
// ntm_addressing_common.h says. The block of a batch row and head has arrays of N slots in shared
// memory (ntm_addressing_slots.h); memory [N, M] passes through registers.
//   address, a block for each batch row and head
//     pass 1  by slots: dots[n] = memory_n . key, norms[n] = |memory_n|
//     pass 2  content = softmax(beta dots / (norms |key| + eps)); the result where taps = 0
//     pass 3  gated = prev_weights + gate (content - prev_weights)
//     pass 4  v[n] = sum_j shift_j gated[n - (j - r)]; weights = v^gamma / sum
//   address_backward, the same blocks: passes 1 to 4 anew, then
//     pass 5  by_v = gamma weights (grad - weights . grad) / v; the gradients of gamma and shift
//     pass 6  by_gated[n] = sum_j shift_j by_v[n + (j - r)]; those of gate and prev_weights
//     pass 7  by_logit = content (by_content - content . by_content); that of beta; and in global
//             memory the slopes of dots, norms and |key|
//   spread, over the memory once more
//     by slots    grad_memory_n = sum_h by_dot_hn key_h + by_norm_hn memory_n
//     by columns  in blocks of their own: grad_key = sum_n by_dot_n memory_n + by_key_norm key
//   similarity, where memory or arrays are large for one block: pass 1 in a launch of its own, with
//   many blocks a head, and the arrays in global memory
//
// Predicted 4 to 5 us, and 7 to 8 us backward (two launches), on an H100 where launches set the
// speed.
#include "ntm_addressing_common.h"
#include "ntm_addressing_slots.h"

namespace seqmem::cuda {
namespace {

constexpr int64_t kOneBlockMemory = 65536;  // values of a memory that one block reads quickly
constexpr double kEpsilon = 1e-8;           // beside the product of norms, as in the reference

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
