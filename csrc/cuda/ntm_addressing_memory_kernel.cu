// The NTM's reading and writing on a GPU, one launch each, by slots or by columns as
// ntm_addressing_common.h says. Memories [N, M] and their gradients pass through registers, vector
// by vector; erase, add and the reads' gradients [H, M] are read from the caches for every slot.
//   read            by columns: reads_h = sum_n w_hn memory_n, over the slots of a group, then over
//                   the groups in shared memory
//   read_backward   by slots: grad_w_hn = memory_n . grad_h, over the group's lanes by shuffles;
//                   then grad_memory_n = sum_h w_hn grad_h
//   write           by slots: memory_n = memory_n (1 - w_hn erase_h) + w_hn add_h, head after head
//                   in registers
//   write_backward  x: the memory that head h found, g: the gradient by what it made; both are
//                   computed anew for each head
//     by slots      grad_w_hn = g . (add_h - x erase_h), the last head first; behind the first head
//                   grad_memory_n = g (1 - w_0n erase_0)
//     by columns    in blocks of their own: grad_add_h = sum_n w_hn g and
//                   grad_erase_h = -sum_n w_hn g x, as the sums of read
//
// Predicted 2 to 3 us each on an H100 where the launch sets the speed.
#include "ntm_addressing_common.h"

namespace seqmem::cuda {
namespace {

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

}  // namespace seqmem::cuda
