// The NTM over time, backward, in one block of 512 threads for each batch row, with the
// controller's weights stationary as in ntm_sequence_kernel.cu. A row's memory and its gradient are
// in registers.
//
//   a segment    from its checkpoint: the memory that enters each step, by writing anew, kept in
//                global scratch
//   its steps, the last one first:
//     values     the head values, activated anew
//     heads      the last one first: the memory that it found, by writing anew; similarity, and the
//                gradient of its weighting through memory and reading (four lanes a slot); the
//                addressing and its gradient (a thread a slot); the gradients of the memory, and of
//                key, erase and add (four lanes a slot, sums over slots)
//     gates      four lanes have a unit: dh from the head values' gradients, then dz
//     inputs     four lanes have one of [reads, h]: its gradient from dz
//
// Weight gradients are left to products over all steps. Floor of a step at C 100, N 128, M 20, two
// heads: 192 kB of weights from shared memory, 1700 cycles, and about 2200 of latencies in each
// head: 6100 cycles, 3.5 us. A warp executes about 1000 instructions beside the heads and 900 in
// each, 900 more if it has slots (sm_90, 128 registers, no spills). Predicted: 9 us a step.
#include "ntm_sequence_gradients.h"

namespace seqmem::cuda {
namespace {

// A head's place among the head values, the last head first.
struct HeadPlace {
  int at, read_at;

  __device__ HeadPlace(const NtmShape& s) : at(s.values), read_at(s.read_width) {}
  __device__ bool enter(const NtmShape& s, int h) {
    const bool writes = s.writes >> h & 1;
    at -= s.width + 3 + s.taps + (writes ? 2 * s.width : 0);
    if (!writes) read_at -= s.width;
    return writes;
  }
};

// to += carried, carried = 0.
__device__ void hand_over(float* carried, float* to, int count) {
  for (int k = threadIdx.x; k < count; k += kRowThreads) {
    to[k] += carried[k];
    carried[k] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    backward_kernel(const NtmShape s, const NtmBackward a) {
  extern __shared__ float4 base[];
  auto& shared = *reinterpret_cast<BackwardShared*>(base);
  float* const d_weightings = shared.d_weightings(s);
  const int64_t b = blockIdx.x;
  const int length = a.lengths != nullptr ? int(a.lengths[b]) : int(s.steps);
  const int thread = int(threadIdx.x), lane = thread % 4, unit = thread / 4;

  for (int k = thread; k < 4 * kMostControl + kMostValues; k += kRowThreads) shared.dz[k] = 0;
  ControllerGradient<T> controller(s, a, shared);
  const AddressingGradient addressing(s, shared, d_weightings + s.heads * s.slots);
  Memory<kSlots> memory(s), gradient(s);
  if (thread < 4 * s.control) controller.d_cell = a.d_cell[b * s.control + unit];
  copy(a.d_hidden + b * s.control, shared.d_hidden, s.control);
  copy(a.d_reads + b * s.read_width, shared.d_reads, s.read_width);
  copy(a.d_weightings + b * s.heads * s.slots, d_weightings, s.heads * s.slots);
  gradient.template load<float>(a.d_memory, b * s.padded_memory, s.padded_width);
  const Activation activation_of = thread < s.values ? activation(s, thread) : Activation::kNone;
  // Where what enters a segment's step is kept.
  const auto entering = [&](int step) { return (b * s.segment + step) * s.padded_memory; };

  const auto load_values = [&](int64_t row) {
    if (thread >= s.values) return;
    const float x = a.record[row * s.record + 5 * s.control + thread];
    shared.raw[thread] = x;
    shared.values[thread] = activated(x, activation_of);
  };
  // `to` becomes what the first `heads` heads of a step leave of it.
  const auto rewrite = [&](Memory<kSlots>& to, int64_t row, int heads) {
    const float* p = shared.values;
#pragma unroll 1
    for (int h = 0; h < heads; ++h) {
      p += s.width + 3 + s.taps;
      if (!(s.writes >> h & 1)) continue;
      to.write([&](int n) { return one<T>(a.trace, (row * s.heads + h) * s.slots + n); }, p,
               p + s.width);
      p += 2 * s.width;
    }
  };

  const int segments = int((length + s.segment - 1) / s.segment);
  for (int segment = segments - 1; segment >= 0; --segment) {
    const int begin = segment * int(s.segment);
    const int end = begin + int(s.segment) < length ? begin + int(s.segment) : length;
    memory.template load<float>(a.checkpoints, (int64_t(segment) * s.batch + b) * s.checkpoint,
                                s.width);
#pragma unroll 1
    for (int t = begin; t < end; ++t) {
      const int64_t row = int64_t(t) * s.batch + b;
      if (t > begin && a.reset != nullptr && a.reset[row])
        memory.template load<float>(a.initial_memory, 0, s.padded_width);
      memory.template store<float>(a.memories, entering(t - begin));
      __syncthreads();  // the values of the step before have been read
      load_values(row);
      __syncthreads();
      rewrite(memory, row, s.heads);
    }

#pragma unroll 1
    for (int t = end - 1; t >= begin; --t) {
      const int64_t row = int64_t(t) * s.batch + b;
      const bool cut = a.reset != nullptr && a.reset[row], first = t == 0 && !cut;
      controller.fetch(row, b, first, cut);
      const int64_t features = t * a.f_t + b * a.f_b;
      const auto of_feature = [&](int k) {
        return a.grad_features == nullptr ? 0.0f : one<T>(a.grad_features, features + k * a.f_c);
      };
      __syncthreads();  // values, dp and reads of the step after have been used
      load_values(row);
      for (int k = thread; k < s.read_width; k += kRowThreads)
        shared.d_read[k] = shared.d_reads[k] + of_feature(s.control + k);
      __syncthreads();

      HeadPlace place(s);
#pragma unroll 1
      for (int h = s.heads - 1; h >= 0; --h) {
        const bool writes = place.enter(s, h);
        const float* const p = shared.values + place.at;
        const float *erase = p + s.width + 3 + s.taps, *add = erase + s.width;
        const float* const d_read = shared.d_read + place.read_at;
        memory.template load<float>(a.memories, entering(t - begin), s.width);
        rewrite(memory, row, h);

        memory.similarity(p, shared.cosine, shared.norm, shared.numbers);
        float x[kValues], y[kValues];
        memory.values_of(writes ? erase : d_read, x);
        memory.values_of(writes ? add : d_read, y);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          float sum = 0;
#pragma unroll
          for (int j = 0; j < kValues; ++j)
            sum += writes ? gradient.at(i, j) * (y[j] - memory.at(i, j) * x[j])
                          : memory.at(i, j) * y[j];
          sum = sum_of_four(sum);
          if (memory.speaks() && memory.there(i)) shared.by_weighting[memory.slot(i)] = sum;
        }
        __syncthreads();

        float* const dp = shared.dp + place.at;
        if (thread < kSlotThreads) {
          const int64_t at = (row * s.heads + h) * s.slots;
          const int64_t before = ((row - s.batch) * s.heads + h) * s.slots;
          addressing(
              place.at + s.width, d_weightings + h * s.slots,
              [&](int n) {
                return cut     ? a.initial_weightings[h * s.slots + n]
                       : first ? one<T>(a.weightings, (b * s.heads + h) * s.slots + n)
                               : one<T>(a.trace, before + n);
              },
              [&](int n) { return a.grad_trace == nullptr ? 0.0f : one<T>(a.grad_trace, at + n); },
              dp + s.width);
        }
        __syncthreads();

        float w[kSlots], by_dot[kSlots], by_norm[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const bool there = memory.there(i);
          w[i] = there ? shared.weighting[memory.slot(i)] : 0.0f;
          by_dot[i] = there ? shared.by_dot[memory.slot(i)] : 0.0f;
          by_norm[i] = there ? shared.by_norm[memory.slot(i)] : 0.0f;
        }
        const int of_warp = thread / 32 * s.width;
        memory.sum_slots(shared.partial[0] + of_warp,
                         [&](int i, int j) { return by_dot[i] * memory.at(i, j); });
        if (writes) {
          memory.sum_slots(shared.partial[1] + of_warp, [&](int i, int j) {
            return -w[i] * memory.at(i, j) * gradient.at(i, j);
          });
          memory.sum_slots(shared.partial[2] + of_warp,
                           [&](int i, int j) { return w[i] * gradient.at(i, j); });
        }
        memory.values_of(writes ? erase : d_read, x);
        memory.values_of(p, y);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          if (!memory.there(i)) continue;
#pragma unroll
          for (int j = 0; j < kValues; ++j) {
            float& d = gradient.at(i, j);
            d = writes ? d * (1.0f - w[i] * x[j]) : d + w[i] * x[j];
            d += by_dot[i] * y[j] - by_norm[i] * memory.at(i, j);
          }
        }
        __syncthreads();
        if (thread < (writes ? 3 : 1) * s.width) {
          const int vector = thread / s.width, m = thread % s.width;
          float sum = 0;
#pragma unroll
          for (int warp = 0; warp < kRowWarps; ++warp)
            sum += shared.partial[vector][warp * s.width + m];
          if (vector == 0) sum -= shared.numbers[1] * p[m];
          const float value = vector == 0 ? p[m] : vector == 1 ? erase[m] : add[m];
          if (vector == 1)
            sum *= value * (1.0f - value);
          else if (s.squash)
            sum *= 1.0f - value * value;
          dp[vector == 0 ? m : vector * s.width + 3 + s.taps + m] = sum;
        }
      }
      const float of_h = thread < 4 * s.control ? of_feature(unit) : 0.0f;
      __syncthreads();
      for (int k = thread; k < s.values; k += kRowThreads) a.dp[row * s.values + k] = shared.dp[k];
      controller.gates(row, of_h, shared);
      __syncthreads();
      controller.inputs(shared);

      if (!cut) continue;
      __syncthreads();
      hand_over(shared.d_hidden, a.i_hidden + b * s.control, s.control);
      hand_over(shared.d_reads, a.i_reads + b * s.read_width, s.read_width);
      hand_over(d_weightings, a.i_weightings + b * s.heads * s.slots, s.heads * s.slots);
      if (thread < 4 * s.control) {
        if (lane == 0) a.i_cell[b * s.control + unit] += controller.d_cell;
        controller.d_cell = 0;
      }
      gradient.each([&](int n, int m, float& d) {
        a.i_memory[b * s.padded_memory + n * s.padded_width + m] += d;
        d = 0;
      });
    }
  }

  __syncthreads();
  if (thread < 4 * s.control && lane == 0) a.d_cell[b * s.control + unit] = controller.d_cell;
  copy(shared.d_hidden, a.d_hidden + b * s.control, s.control);
  copy(shared.d_reads, a.d_reads + b * s.read_width, s.read_width);
  copy(d_weightings, a.d_weightings + b * s.heads * s.slots, s.heads * s.slots);
  gradient.each([&](int n, int m, float& d) {
    a.d_memory[b * s.padded_memory + n * s.padded_width + m] = d;
  });
}

template <class Use>
bool with_kernel(Storage storage, const Use& use) {
  return with_storage(storage, [&](auto tag) { use(backward_kernel<decltype(tag)>); });
}

}  // namespace

bool ntm_backward_sequence_serves(Storage storage, const NtmShape& s) {
  return fits(s) && s.slots <= kSlots * kSlotThreads && inputs_of(s) <= kMostInputs &&
         with_kernel(storage, [](auto) {}) && has_shared(BackwardShared::bytes(s));
}

cudaError_t ntm_backward_sequence(Storage storage, const NtmShape& s, const NtmBackward& a,
                                  cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_kernel(storage, [&](auto kernel) {
    error = launch_rows(kernel, s, a, BackwardShared::bytes(s), stream);
  });
  return error;
}

}  // namespace seqmem::cuda
