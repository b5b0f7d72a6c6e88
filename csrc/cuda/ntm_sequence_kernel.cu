// The NTM over time, forward, in one block of 512 threads for each batch row, with the controller's
// weights stationary: read once, they stay in registers and in shared memory for all steps. So does
// the row's memory, in registers.
//
//   gates       thread o has gate o: z_o = zx_o + sum_k W_ko x_k, x = [reads, h]; the first 24 k's
//               weights in registers, the others in shared memory, four at a time. Then the four
//               lanes of a unit exchange their gates
//   values      four lanes have a head value, and a quarter of its weights each, in registers
//   similarity  four lanes have a slot, or two, and a quarter of its values each, in registers; so
//               for reading and writing, whose sums over slots are shuffles, then shared memory
//   addressing  the first 128 threads have a slot each, or two: most instructions are those of
//               softmax and power, which more threads would only repeat
//
// Barriers of the block: one after gates, values and the step, two in each head, three in one that
// reads; of the first 128 threads five in each head.
//
// Floor of a step at C 100, N 128, M 20, two heads: 154 kB of weights from shared memory and x for
// each warp, 1600 cycles; about 1000 of latencies in each head: 3600 cycles, 2 us. A warp executes
// about 750 instructions beside the heads and 250 in each, 350 more if it has slots (sm_90, 128
// registers, no spills). Predicted: 3 us a step, where Triton's kernel (`_triton/ntm_kernels.py`),
// which reads all weights from L2 in every step, was measured at 13.6.
#include "ntm_sequence_controller.h"
#include "ntm_sequence_slots.h"

namespace seqmem::cuda {
namespace {

template <class T, int kFours, int kSlots>
__global__ void __launch_bounds__(kRowThreads, 1)
    forward_kernel(const NtmShape s, const NtmForward a) {
  extern __shared__ float4 base[];
  const Shared shared(s, kFours, base);
  const int64_t b = blockIdx.x;
  const int length = a.lengths != nullptr ? int(a.lengths[b]) : int(s.steps);
  const int feature_width = s.control + s.read_width;

  for (int k = threadIdx.x; k < 2 * input_floats(s); k += kRowThreads) shared.inputs[k] = 0;
  __syncthreads();
  Controller<kFours> controller(s, a, shared);
  controller.start(a.hidden + b * s.control, a.cell + b * s.control, shared.inputs);
  copy(a.reads + b * s.read_width, shared.inputs, s.read_width);
  copy(a.weightings + b * s.heads * s.slots, shared.weightings, s.heads * s.slots);
  Memory<kSlots> memory(s);
  const Addressing<kSlots, const Shared> addressing(s, shared);
  memory.template load<T>(a.memory, b * s.slots * s.width, s.width);
  float z = length > 0 ? controller.first_sum(b) : 0.0f;
  __syncthreads();

#pragma unroll 1
  for (int t = 0; t < length; ++t) {
    const int64_t row = int64_t(t) * s.batch + b;
    float* const input = shared.inputs + t % 2 * input_floats(s);
    float* const next = shared.inputs + (1 - t % 2) * input_floats(s);
    if (a.reset != nullptr && a.reset[row]) {
      controller.start(a.initial_hidden, a.initial_cell, input);
      copy(a.initial_reads, input, s.read_width);
      copy(a.initial_weightings, shared.weightings, s.heads * s.slots);
      memory.template load<float>(a.initial_memory, 0, s.padded_width);
      __syncthreads();
    }
    if (a.checkpoints != nullptr && t % s.segment == 0)
      memory.template store<float>(a.checkpoints + (t / s.segment * s.batch + b) * s.checkpoint, 0);

    const float this_z = z;
    if (t + 1 < length) z = controller.first_sum(row + s.batch);
    controller.step(this_z, row, shared, input, next);
    __syncthreads();
    for (int c = threadIdx.x; c < s.control; c += kRowThreads)
      set_one<T>(a.features, row * feature_width + c, next[4 * fours(s.read_width) + c]);
    controller.head_values(row, next, shared.values);
    __syncthreads();

    const float* p = shared.values;
    int read_at = 0;
#pragma unroll 1
    for (int h = 0; h < s.heads; ++h) {
      float* const weighting = shared.weightings + h * s.slots;
      memory.similarity(p, shared.cosine);
      __syncthreads();
      if (threadIdx.x < kSlotThreads)
        addressing(p + s.width, weighting, [&](int n, float w) {
          set_one<T>(a.trace, (row * s.heads + h) * s.slots + n, w);
        });
      __syncthreads();
      p += s.width + 3 + s.taps;
      if (s.writes >> h & 1) {
        memory.write([&](int n) { return weighting[n]; }, p, p + s.width);
        p += 2 * s.width;
        continue;
      }
      memory.read(weighting, shared.partial + threadIdx.x / 32 * s.width);
      __syncthreads();
      if (int(threadIdx.x) < s.width) {
        const int m = int(threadIdx.x);
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < kRowWarps; ++warp) sum += shared.partial[warp * s.width + m];
        next[read_at + m] = sum;
        set_one<T>(a.features, row * feature_width + s.control + read_at + m, sum);
      }
      read_at += s.width;
    }
    __syncthreads();
  }

  controller.finish(b);
  const float* last = shared.inputs + length % 2 * input_floats(s);
  copy(last + 4 * fours(s.read_width), a.hidden_out + b * s.control, s.control);
  copy(last, a.reads + b * s.read_width, s.read_width);
  copy(shared.weightings, a.weightings + b * s.heads * s.slots, s.heads * s.slots);
  memory.template store<T>(a.memory_out, b * s.slots * s.width);
}

// Calls use(kernel, kFours) with the kernel for this storage and these sizes; false where there is
// none. As many weights are in registers as spill nothing on any GPU.
template <class Use>
bool with_kernel(Storage storage, const NtmShape& s, const Use& use) {
  return fits(s) && with_storage(storage, [&](auto tag) {
           using T = decltype(tag);
           if (s.slots <= kSlotThreads)
             use(forward_kernel<T, 6, 1>, 6);
           else
             use(forward_kernel<T, 0, 2>, 0);
         });
}

}  // namespace

bool ntm_forward_sequence_serves(Storage storage, const NtmShape& s) {
  int64_t bytes = 0;
  const auto count = [&](auto, int own) { bytes = Shared::bytes(s, own); };
  return with_kernel(storage, s, count) && has_shared(bytes);
}

cudaError_t ntm_forward_sequence(Storage storage, const NtmShape& s, const NtmForward& a,
                                 cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_kernel(storage, s, [&](auto kernel, int own) {
    error = launch_rows(kernel, s, a, Shared::bytes(s, own), stream);
  });
  return error;
}

}  // namespace seqmem::cuda
