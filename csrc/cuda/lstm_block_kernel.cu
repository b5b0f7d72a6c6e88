// LSTM kernels that loop over time in one block for each batch row, for H up to 64: weight_hh in
// registers, h (forward) and dz (backward) in shared memory, one barrier a step.
//
// The four lanes of a unit split k between them (backward: the units whose gates they sum over).
//
// Floor of a forward step at H 64: 64 multiply-adds in each of 8 warps, 128 cycles, and about 250
// of latencies from h to h.
#include "lstm_cluster_common.h"

namespace seqmem::cuda {
namespace {

// Padded H is kWidth: each thread holds kWidth weights.
template <class T, int kWidth>
__global__ void __launch_bounds__(4 * kWidth, 2)
    forward_kernel(const Sequence sequence, const ClusterForward a) {
  __shared__ float4 state[2][kWidth / 4];

  const int unit = threadIdx.x / 4, quarter = threadIdx.x % 4, H = int(sequence.hidden);
  const int b = blockIdx.x, steps = int(sequence.steps), gate = quarter;
  const bool reverse = sequence.reverse, stored = unit < H;
  const int length = length_of(sequence, b);

  // After the sums across lanes each has its own gate: its weights are in that order.
  float weights[kWidth / 16][4][4];
#pragma unroll
  for (int j = 0; j < kWidth / 16; ++j) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int k = 4 * (quarter + 4 * j) + n;
        weights[j][n][g] =
            stored && k < H ? element<T>(a.weight_hh, ((g ^ gate) * H + unit) * H + k) : 0.0f;
      }
    }
  }
  const int first = reverse ? steps - 1 : 0;
  int at = row_of(sequence, first, b);  // of this step
  float bias = 0.0f, z = 0.0f, h = 0.0f, c = 0.0f;
  if (stored) {
    bias = element<T>(a.bias_ih, gate * H + unit) + element<T>(a.bias_hh, gate * H + unit);
    if (first < length) z = element<T>(a.z, int64_t(at) * (4 * H) + (gate * H + unit));
    if (!cut_at_start(sequence, b, length)) {
      h = element<T>(a.hx, int64_t(b) * H + unit);
      c = element<T>(a.cx, int64_t(b) * H + unit);
    }
  }
  if (quarter == 0) reinterpret_cast<float*>(state[0])[unit] = h;
  __syncthreads();

  for (int step = 0; step < steps; ++step) {
    // Ask for the next step's pre-activation now: it arrives while this step computes.
    const int t = reverse ? steps - 1 - step : step, next = reverse ? t - 1 : t + 1;
    const bool more = step + 1 < steps, active = stored && t < length;
    const int at_next = row_of(sequence, next, b);
    float z_next = 0.0f;
    if (more && stored && next < length)
      z_next = element<T>(a.z, int64_t(at_next) * (4 * H) + (gate * H + unit));
    const bool cut = more && (reverse ? cut_at(sequence, t, at, length)
                                      : cut_at(sequence, next, at_next, length));

    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
      const float4 four = state[step % 2][quarter + 4 * j];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        sums[g] = fmaf(weights[j][0][g], four.x, sums[g]);
        sums[g] = fmaf(weights[j][1][g], four.y, sums[g]);
        sums[g] = fmaf(weights[j][2][g], four.z, sums[g]);
        sums[g] = fmaf(weights[j][3][g], four.w, sums[g]);
      }
    }
    sums[0] += across(sums[2], 2);
    sums[1] += across(sums[3], 2);
    const float x = sums[0] + across(sums[1], 1) + z + bias;
    const float s = gate_sigmoid(gate == 2 ? 2.0f * x : x), tanh_x = gate_tanh_from(x, s);
    const float own = gate == 2 ? tanh_x : s;
    const float input = __shfl_sync(~0u, own, 0, 4), forget = __shfl_sync(~0u, own, 1, 4);
    const float candidate = __shfl_sync(~0u, own, 2, 4), output = __shfl_sync(~0u, own, 3, 4);
    const float c_new = forget * c + input * candidate;
    c = active ? c_new : c;
    h = active ? widen(narrow<T>(output * gate_tanh(c_new))) : h;
    const float h_stored = active ? h : 0.0f, c_stored = active ? c : 0.0f;
    if (cut) h = c = 0.0f;
    if (quarter == 0) reinterpret_cast<float*>(state[(step + 1) % 2])[unit] = h;
    __syncthreads();

    if (stored && (active || sequence.offsets == nullptr)) {
      if (a.gates != nullptr)
        store<T>(a.gates, int64_t(at) * (4 * H) + (gate * H + unit), active ? own : 0.0f);
      void* const to = quarter == 0 ? a.output : quarter == 1 ? a.cells : nullptr;
      if (to != nullptr) store<T>(to, int64_t(at) * H + unit, quarter == 0 ? h_stored : c_stored);
    }
    z = z_next;
    at = at_next;
  }
  if (stored && quarter == 0) {
    store<T>(a.hy, int64_t(b) * H + unit, h);
    store<T>(a.cy, int64_t(b) * H + unit, c);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(4 * kWidth, 2)
    backward_kernel(const Sequence sequence, const ClusterBackward a) {
  __shared__ float4 gradients[2][kWidth];

  const int unit = threadIdx.x / 4, quarter = threadIdx.x % 4, H = int(sequence.hidden);
  const int steps = int(sequence.steps);
  float weights[kWidth / 4][4];
#pragma unroll
  for (int j = 0; j < kWidth / 4; ++j) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int from = quarter + 4 * j;
      weights[j][g] =
          unit < H && from < H ? element<T>(a.weight_hh, (g * H + from) * H + unit) : 0.0f;
    }
  }
  BackwardCell<T> cell(sequence, a, blockIdx.x, unit, quarter == 0);

  for (int step = 0; step < steps; ++step) {
    float dz[4];
    cell.ask();
    cell.compute(dz);
#pragma unroll
    for (int g = 0; g < 4; ++g) dz[g] = widen(narrow<T>(dz[g]));
    if (quarter == 0) gradients[step % 2][unit] = {dz[0], dz[1], dz[2], dz[3]};
    __syncthreads();
    cell.store_dz(dz);

    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < kWidth / 4; ++j) {
      const float4 four = gradients[step % 2][quarter + 4 * j];
      sums[0] = fmaf(weights[j][0], four.x, sums[0]);
      sums[1] = fmaf(weights[j][1], four.y, sums[1]);
      sums[2] = fmaf(weights[j][2], four.z, sums[2]);
      sums[3] = fmaf(weights[j][3], four.w, sums[3]);
    }
    float d_h = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    d_h += across(d_h, 1);
    d_h += across(d_h, 2);
    cell.receive_of_this(d_h);
  }
  cell.store_state();
}

template <class Arguments>
cudaError_t launch(void (*wide)(Sequence, Arguments), void (*narrow)(Sequence, Arguments),
                   const Sequence& sequence, const Arguments& arguments, cudaStream_t stream) {
  if (sequence.batch == 0) return cudaSuccess;
  if (sequence.hidden > kBlockHidden) return cudaErrorInvalidValue;
  const bool half = sequence.hidden <= 32;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(sequence.batch));
  config.blockDim = dim3(half ? 128 : 256);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, half ? narrow : wide, sequence, arguments);
}

template <class T>
cudaError_t forward(const Sequence& sequence, const ClusterForward& a, cudaStream_t stream) {
  return launch(forward_kernel<T, 64>, forward_kernel<T, 32>, sequence, a, stream);
}
template <class T>
cudaError_t backward(const Sequence& sequence, const ClusterBackward& a, cudaStream_t stream) {
  return launch(backward_kernel<T, 64>, backward_kernel<T, 32>, sequence, a, stream);
}

}  // namespace

cudaError_t lstm_forward_block(Storage storage, const Sequence& sequence, const ClusterForward& a,
                               cudaStream_t stream) {
  switch (storage) {
    case Storage::Float: return forward<float>(sequence, a, stream);
    case Storage::BFloat16: return forward<__nv_bfloat16>(sequence, a, stream);
    case Storage::Half: return forward<__half>(sequence, a, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t lstm_backward_block(Storage storage, const Sequence& sequence, const ClusterBackward& a,
                                cudaStream_t stream) {
  switch (storage) {
    case Storage::Float: return backward<float>(sequence, a, stream);
    case Storage::BFloat16: return backward<__nv_bfloat16>(sequence, a, stream);
    case Storage::Half: return backward<__half>(sequence, a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace seqmem::cuda
