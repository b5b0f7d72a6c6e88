// LSTM kernels that loop over time in one block for each batch row, for H up to 64: weight_hh in
// registers, h (forward) and dz (backward) in shared memory, one barrier a step.
//
// The four lanes of a unit split the product's inner dimension between them, and after it each has
// one gate. A step is one chain of latencies, so whatever h or dh is not needed for is done beside
// the product: what a step loads is asked for two steps before, and backward's factors are computed
// one step before.
//
// Floor of a forward step at H 64: 64 multiply-adds in each of 8 warps, 128 cycles, and about 350
// of latencies from h to h: 0.25 us. Backward: 128 and about 150, 0.15 us.
#include "lstm_cluster_common.h"

namespace seqmem::cuda {
namespace {

// ---- what both share ----------------------------------------------------------------------------

// A batch row's steps. Plain ones have neither lengths nor resets nor packed rows.
template <bool kPlain>
struct Steps {
  const Sequence& sequence;
  const int b, count, length, back;  // back: from a step to the one before it

  __device__ Steps(const Sequence& s, int b)
      : sequence(s),
        b(b),
        count(int(s.steps)),
        length(kPlain ? count : length_of(s, b)),
        back(s.reverse ? 1 : -1) {}

  // Which step comes k-th; maybe none.
  __device__ int number(int k) const { return sequence.reverse ? count - 1 - k : k; }
  __device__ bool active(int t) const { return t >= 0 && t < (kPlain ? count : length); }
  __device__ int row(int t) const {
    if constexpr (!kPlain) return row_of(sequence, t, b);
    return t * int(sequence.t_stride) + b * int(sequence.b_stride);
  }
  // Whether the state is cut between step t and the one before it.
  __device__ bool cut(int t) const {
    if constexpr (kPlain) return false;
    const int later = sequence.reverse ? t + 1 : t;
    return cut_at(sequence, later, row(later), length);
  }
  // Rows beyond a length are zeros, packed ones do not exist.
  __device__ bool stored(bool active) const {
    return kPlain || active || sequence.offsets == nullptr;
  }
};

// A column of [rows, width]; nothing where the tensor is absent.
template <class T>
struct Column {
  const char* first;
  int bytes;  // of a row

  __device__ Column(const void* tensor, int width, int column)
      : first(tensor == nullptr ? nullptr
                                : static_cast<const char*>(tensor) + column * int(sizeof(T))),
        bytes(width * int(sizeof(T))) {}

  __device__ const T* at(int row) const {
    return reinterpret_cast<const T*>(first + int64_t(row) * bytes);
  }
  __device__ float load(bool wanted, int row) const {
    return wanted && first != nullptr ? widen(*at(row)) : 0.0f;
  }
  __device__ void store(bool wanted, int row, float x) const {
    if (wanted && first != nullptr) *const_cast<T*>(at(row)) = narrow<T>(x);
  }
};

// Shared memory by its address, which is a register: from a name it would be computed every step.
__device__ uint32_t kept_address(const void* shared) {
  uint32_t address = address_of(shared);
  asm volatile("" : "+r"(address));
  return address;
}
__device__ float4 load_shared(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// sums += weights * what is kept, over a lane's share of the inner dimension.
template <int kFours>
__device__ void multiply_add(float (&sums)[4], const float (&weights)[kFours][4], uint32_t from) {
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const float4 four = load_shared(from + 64 * j);
    sums[0] = fmaf(weights[j][0], four.x, sums[0]);
    sums[1] = fmaf(weights[j][1], four.y, sums[1]);
    sums[2] = fmaf(weights[j][2], four.z, sums[2]);
    sums[3] = fmaf(weights[j][3], four.w, sums[3]);
  }
}

// ---- forward ------------------------------------------------------------------------------------

// Padded H is kWidth: each thread holds kWidth weights.
template <class T, int kWidth, bool kPlain>
__global__ void __launch_bounds__(4 * kWidth, 2)
    forward_kernel(const Sequence sequence, const ClusterForward a) {
  __shared__ float4 state[2][kWidth / 4];
  constexpr uint32_t kBytes = sizeof(state[0]);

  const int unit = threadIdx.x / 4, gate = threadIdx.x % 4, H = int(sequence.hidden);
  const int b = blockIdx.x;
  const bool there = unit < H;
  const Steps<kPlain> steps(sequence, b);

  // After the sums across lanes each has its own gate: its weights are in that order.
  float weights[kWidth / 16][4][4];
#pragma unroll
  for (int j = 0; j < kWidth / 16; ++j) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int k = 4 * (gate + 4 * j) + n;
        weights[j][n][g] =
            there && k < H ? element<T>(a.weight_hh, ((g ^ gate) * H + unit) * H + k) : 0.0f;
      }
    }
  }
  const Column<T> zs(a.z, 4 * H, gate * H + unit), gates(a.gates, 4 * H, gate * H + unit);
  // The first lane of a unit stores h, the second c.
  const Column<T> states(gate == 0 ? a.output : gate == 1 ? a.cells : nullptr, H, unit);
  float bias = 0.0f, h = 0.0f, c = 0.0f;
  if (there) {
    bias = element<T>(a.bias_ih, gate * H + unit) + element<T>(a.bias_hh, gate * H + unit);
    if (!cut_at_start(sequence, b, steps.length)) {
      h = element<T>(a.hx, int64_t(b) * H + unit);
      c = element<T>(a.cx, int64_t(b) * H + unit);
    }
  }
  auto z_of = [&](int t) { return zs.load(there && steps.active(t), steps.row(t)); };
  float z = z_of(steps.number(0)), z_next = z_of(steps.number(1));
  const uint32_t kept = kept_address(state);
  if (gate == 0) store_shared(kept + 4 * unit, h);
  __syncthreads();

  uint32_t side = 0;
  for (int step = 0; step < steps.count; ++step, side ^= kBytes) {
    const int t = steps.number(step), next = steps.number(step + 1);
    const bool active = there && steps.active(t);
    const float z_after = z_of(steps.number(step + 2));
    const bool cut = step + 1 < steps.count && steps.cut(next);

    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) {
      const float4 four = load_shared(kept + side + 16 * gate + 64 * j);
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
    const float x = sums[0] + across(sums[1], 1) + (z + bias);
    const float s = gate_sigmoid(gate == 2 ? 2.0f * x : x), tanh_x = gate_tanh_from(x, s);
    const float own = gate == 2 ? tanh_x : s;
    const float input = __shfl_sync(~0u, own, 0, 4), forget = __shfl_sync(~0u, own, 1, 4);
    const float candidate = __shfl_sync(~0u, own, 2, 4), output = __shfl_sync(~0u, own, 3, 4);
    const float c_new = forget * c + input * candidate;
    const float h_new = widen(narrow<T>(output * gate_tanh(c_new)));
    c = active ? c_new : c;
    h = active ? h_new : h;
    const float of_step = gate == 0 ? h : c;
    if (cut) h = c = 0.0f;
    if (gate == 0) store_shared(kept + (side ^ kBytes) + 4 * unit, h);
    __syncthreads();

    const bool stored = there && steps.stored(active);
    const int row = steps.row(t);
    gates.store(stored, row, active ? own : 0.0f);
    states.store(stored, row, active ? of_step : 0.0f);
    z = z_next;
    z_next = z_after;
  }
  if (there && gate == 0) {
    store<T>(a.hy, int64_t(b) * H + unit, h);
    store<T>(a.cy, int64_t(b) * H + unit, c);
  }
}

// ---- backward -----------------------------------------------------------------------------------

// What a lane loads of one step: its gate, and what all lanes of a unit have in common.
struct Saved {
  float gate, grad_output, c_before, grad_gate, grad_cell;
  bool cut;
};

// What turns the gradients of h and c into a lane's dz and the c before: dz = x * of_state + added,
// where x is dh for the output gate and dc for the others; dc = dc + dh * of_hidden.
struct Factors {
  float of_state, added, of_hidden, forget, grad_output, grad_cell;
  bool cut;
};

template <class T, int kWidth, bool kPlain>
__global__ void __launch_bounds__(4 * kWidth, 2)
    backward_kernel(const Sequence sequence, const ClusterBackward a) {
  __shared__ float4 gradients[2][kWidth];
  constexpr uint32_t kBytes = sizeof(gradients[0]);

  const int unit = threadIdx.x / 4, gate = threadIdx.x % 4, H = int(sequence.hidden);
  const int b = blockIdx.x;
  const bool there = unit < H;
  const int64_t state = int64_t(b) * H + unit;
  const Steps<kPlain> steps(sequence, b);

  float weights[kWidth / 4][4];
#pragma unroll
  for (int j = 0; j < kWidth / 4; ++j) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int from = gate + 4 * j;
      weights[j][g] = there && from < H ? element<T>(a.weight_hh, (g * H + from) * H + unit) : 0.0f;
    }
  }
  const int column = gate * H + unit;
  const Column<T> gates(a.gates, 4 * H, column), grad_gates(a.grad_gates, 4 * H, column);
  const Column<T> cells(a.cells, H, unit), grad_cells(a.grad_cells, H, unit);
  const Column<T> grad_output(a.grad_output, H, unit), dzs(a.dz, 4 * H, column);
  const float c_first = there ? element<T>(a.cx, state) : 0.0f;
  float d_h = there ? element<T>(a.grad_hy, state) : 0.0f;
  float d_c = there ? element<T>(a.grad_cy, state) : 0.0f;

  // The last step comes first.
  auto number = [&](int k) { return steps.number(steps.count - 1 - k); };
  auto load = [&](int t) {
    const bool active = there && steps.active(t);
    const int before = t + steps.back, row = steps.row(t);
    Saved s;
    s.gate = gates.load(active, row);
    s.grad_output = grad_output.load(active, row);
    s.grad_gate = grad_gates.load(active, row);
    s.grad_cell = grad_cells.load(active, row);
    s.cut = active && steps.cut(t);
    const bool first = t == (sequence.reverse ? steps.length - 1 : 0);
    // Of a step beyond the length too: what it has before it is the last one's c.
    s.c_before = cells.load(there && steps.active(before), steps.row(before));
    if (first) s.c_before = c_first;
    return s;
  };
  auto factors = [&](const Saved& s, float c) {
    const float i = __shfl_sync(~0u, s.gate, 0, 4), forget = __shfl_sync(~0u, s.gate, 1, 4);
    const float g = __shfl_sync(~0u, s.gate, 2, 4), o = __shfl_sync(~0u, s.gate, 3, 4);
    const float tanh_c = gate_tanh(c), c_before = s.cut ? 0.0f : s.c_before;
    const float slope = gate == 2 ? 1.0f - s.gate * s.gate : s.gate * (1.0f - s.gate);
    const float other = gate == 0 ? g : gate == 1 ? c_before : gate == 2 ? i : tanh_c;
    return Factors{.of_state = other * slope,
                   .added = s.grad_gate * slope,
                   .of_hidden = o * (1.0f - tanh_c * tanh_c),
                   .forget = forget,
                   .grad_output = s.grad_output,
                   .grad_cell = s.grad_cell,
                   .cut = s.cut};
  };
  const uint32_t kept = kept_address(gradients);
  const int last = number(0);
  Saved saved = load(last), next = load(number(1)), after = load(number(2));
  Factors f = factors(saved, cells.load(there && steps.active(last), steps.row(last)));
  float c = saved.c_before;  // of the step whose factors come next

  uint32_t side = 0;
  for (int step = 0; step < steps.count; ++step, side ^= kBytes) {
    const int t = number(step);
    const bool active = there && steps.active(t);
    const float d_hidden = d_h + f.grad_output;
    const float d_cell = fmaf(d_hidden, f.of_hidden, d_c + f.grad_cell);
    const float x = fmaf(gate == 3 ? d_hidden : d_cell, f.of_state, f.added);
    const float dz = active ? widen(narrow<T>(x)) : 0.0f;
    store_shared(kept + side + 4 * threadIdx.x, dz);
    __syncthreads();

    dzs.store(there && steps.stored(active), steps.row(t), dz);
    d_c = active ? (f.cut ? 0.0f : d_cell * f.forget) : d_c;
    const bool cut = f.cut;
    f = factors(next, c);
    c = next.c_before;
    next = after;
    after = load(number(step + 3));

    float sums[4] = {};
    multiply_add(sums, weights, kept + side + 16 * gate);
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    sum += across(sum, 1);
    sum += across(sum, 2);
    d_h = active ? (cut ? 0.0f : sum) : d_h;
  }
  if (there && gate == 0 && a.grad_hx != nullptr) store<T>(a.grad_hx, state, d_h);
  if (there && gate == 1 && a.grad_cx != nullptr) store<T>(a.grad_cx, state, d_c);
}

// ---- launches -----------------------------------------------------------------------------------

template <class Arguments>
using Kernel = void (*)(Sequence, Arguments);

// kernels: by whether H is at most 32, then by whether steps are plain.
template <class Arguments>
cudaError_t launch(const Kernel<Arguments> (&kernels)[2][2], const Sequence& sequence,
                   const Arguments& arguments, cudaStream_t stream) {
  if (sequence.batch == 0) return cudaSuccess;
  if (sequence.hidden > kBlockHidden) return cudaErrorInvalidValue;
  const bool half = sequence.hidden <= 32;
  const bool plain =
      sequence.lengths == nullptr && sequence.reset == nullptr && sequence.offsets == nullptr;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(sequence.batch));
  config.blockDim = dim3(half ? 128 : 256);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernels[half][plain], sequence, arguments);
}

template <class T>
cudaError_t forward(const Sequence& sequence, const ClusterForward& a, cudaStream_t stream) {
  static constexpr Kernel<ClusterForward> kKernels[2][2] = {
      {forward_kernel<T, 64, false>, forward_kernel<T, 64, true>},
      {forward_kernel<T, 32, false>, forward_kernel<T, 32, true>}};
  return launch(kKernels, sequence, a, stream);
}
template <class T>
cudaError_t backward(const Sequence& sequence, const ClusterBackward& a, cudaStream_t stream) {
  static constexpr Kernel<ClusterBackward> kKernels[2][2] = {
      {backward_kernel<T, 64, false>, backward_kernel<T, 64, true>},
      {backward_kernel<T, 32, false>, backward_kernel<T, 32, true>}};
  return launch(kKernels, sequence, a, stream);
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
