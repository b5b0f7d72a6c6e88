// The cluster kernels for 16-bit storage; lstm_cluster_common.h describes the exchanges between
// blocks, which are the same. Products go to tensor cores with sums in float32: weights are the
// left factor, in registers as mma.m16n8k16 takes them, the 8 batch rows of a tile the right one.
//
// Products take the inner dimension in any order that is the same for both factors: a lane holds
// eight neighbours of each block of 32, so that each of its loads from shared memory is one vector.
//
// Floor of a forward step at H 256: 64 products in each multiprocessor, 130 cycles, and the trip to
// the other blocks, about 300. At H 512 256 products, 260 cycles or more.
#include "lstm_cluster_common.h"

namespace seqmem::cuda {
namespace {

constexpr int kTile = 8;  // batch rows

// Padded H is kWidth. A warp computes the gates of four units.
template <int kWidth>
struct Shape {
  static constexpr int kBlocks = kWidth <= 128 ? 8 : 16;
  static constexpr int kUnits = kWidth / kBlocks;  // of each block
  static constexpr int kThreads = 8 * kUnits;
  // So that several clusters share the multiprocessors where the registers allow.
  static constexpr int kBlocksAtOnce = kWidth <= 128   ? 4
                                       : kWidth <= 256 ? 3
                                       : kWidth <= 384 ? 2
                                                       : 1;
};

#if __CUDA_ARCH__ >= 900

constexpr int kInner = 32;  // of the inner dimension, in one vector of each of four lanes

// Elements from one batch row to the next in shared memory, so that the vectors of two rows lie in
// different banks.
template <int kColumns>
constexpr int kRowStride = kColumns % 64 == 32 ? kColumns : kColumns + 32;

template <class T>
__device__ uint32_t bits(float x) {
  const T stored = narrow<T>(x);
  return *reinterpret_cast<const uint16_t*>(&stored);
}

// Two times four elements `stride` apart, the second four `next` further on, as words; the first
// `count` of the eight, then zeros.
__device__ void gather(uint32_t (&to)[4], const void* from, int offset, int stride, int next,
                       int count) {
  const auto* const element = static_cast<const uint16_t*>(from) + offset;
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    const uint32_t low = n < count ? element[n % 4 * stride + n / 4 * next] : 0;
    const uint32_t high = n + 1 < count ? element[(n + 1) % 4 * stride + n / 4 * next] : 0;
    to[n / 2] = low | high << 16;
  }
}

// sum += [low; high] rows, each eight neighbours of 32, times the rows of `right`.
__device__ void multiply_add(float (&sum)[4], const uint32_t* low, const uint32_t* high,
                             uint32_t right0, uint32_t right1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(right0), "r"(right1));
}
__device__ void multiply_add(float (&sum)[4], const uint32_t* low, const uint32_t* high,
                             uint32_t right0, uint32_t right1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(right0), "r"(right1));
}

__device__ void send(uint32_t to, uint32_t low, uint32_t high, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
          "r"(to),
      "r"(low), "r"(high), "r"(barrier)
      : "memory");
}

#endif  // __CUDA_ARCH__ >= 900

// ---- forward ------------------------------------------------------------------------------------

// The 16 rows of a warp's left factor are gates i and f of its four units, then g and o. So a lane
// of the first half of the warp gets i and g of a unit in two batch rows, and the lane 16 further
// f and o; they exchange one row each.
template <class T, int kWidth>
__global__ void __launch_bounds__(Shape<kWidth>::kThreads, Shape<kWidth>::kBlocksAtOnce)
    forward_kernel(const Sequence sequence, const ClusterForward a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kWidth>;
  constexpr uint32_t kExchangedBytes = kWidth * kTile * sizeof(T);
  __shared__ alignas(16) uint16_t state[2][kTile][kRowStride<kWidth>];
  __shared__ alignas(8) uint64_t barriers[2];

  const int thread = threadIdx.x, lane = thread % 32, H = int(sequence.hidden);
  const bool upper = lane >= 16;
  const int unit0 = block_in_cluster() * S::kUnits + thread / 32 * 4, unit = unit0 + lane / 4 % 4;
  const int b0 = blockIdx.x / S::kBlocks * kTile, b = b0 + lane % 4 * 2 + upper;
  const int steps = int(sequence.steps);
  const bool reverse = sequence.reverse, stored = unit < H && b < sequence.batch;
  const int length = stored ? length_of(sequence, b) : 0;

  const Arrival arrival = {address_of(barriers)};
  if (thread == 0) arrival.start(kExchangedBytes);

  uint32_t weights[kWidth / kInner][2][4];  // of gates i and g, or f and o
#pragma unroll
  for (int j = 0; j < kWidth / kInner; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = kInner * j + lane % 4 * 8, row = (2 * half + upper) * H + unit;
      gather(weights[j][half], a.weight_hh, row * H + k, 1, 4, unit < H ? H - k : 0);
    }
  }
  float bias[4] = {}, z[4] = {}, h = 0.0f, c = 0.0f;
  const int first = reverse ? steps - 1 : 0;
  int at = row_of(sequence, first, b);  // of this step
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int offset = g * H + unit;
    if (unit < H) bias[g] = element<T>(a.bias_ih, offset) + element<T>(a.bias_hh, offset);
    if (first < length) z[g] = element<T>(a.z, int64_t(at) * (4 * H) + offset);
  }
  if (stored && !cut_at_start(sequence, b, length)) {
    h = element<T>(a.hx, int64_t(b) * H + unit);
    c = element<T>(a.cx, int64_t(b) * H + unit);
  }
  for (int n = thread; n < kWidth * kTile; n += S::kThreads) {
    const int r = n / kWidth, k = n % kWidth;
    const int from = b0 + r;
    const bool zero =
        k >= H || from >= sequence.batch || cut_at_start(sequence, from, length_of(sequence, from));
    state[0][r][k] = zero ? 0 : uint16_t(bits<T>(element<T>(a.hx, int64_t(from) * H + k)));
  }
  cluster_barrier();

  // This lane sends four units of row `lane % 8` to every fourth block.
  const int source = lane % 2 * 16 + lane % 8 / 2;  // has the first of those units
  const uint32_t state_address = address_of(&state[0][lane % 8][unit0]);

  for (int step = 0; step < steps; ++step) {
    // Ask for the next step's pre-activations now: they arrive while this step computes.
    const int t = reverse ? steps - 1 - step : step, next = reverse ? t - 1 : t + 1;
    const bool more = step + 1 < steps, active = t < length;
    const int at_next = row_of(sequence, next, b);
    float z_next[4] = {};
    if (more && next < length) {
      const int64_t from = int64_t(at_next) * (4 * H) + unit;
#pragma unroll
      for (int g = 0; g < 4; ++g) z_next[g] = element<T>(a.z, from + g * H);
    }
    const bool cut = more && (reverse ? cut_at(sequence, t, at, length)
                                      : cut_at(sequence, next, at_next, length));
    if (step > 0) {
      arrival.wait(step - 1);
      if (thread == 0) arrival.expect((step - 1) % 2, kExchangedBytes);
    }

    float sums[4][4] = {};  // of every fourth product: they do not wait for each other
#pragma unroll
    for (int j = 0; j < kWidth / kInner; ++j) {
      const uint4 rows =
          *reinterpret_cast<const uint4*>(&state[step % 2][lane / 4][kInner * j + lane % 4 * 8]);
      multiply_add(sums[2 * j % 4], weights[j][0], weights[j][1], rows.x, rows.y, T());
      multiply_add(sums[2 * j % 4 + 1], weights[j][0] + 2, weights[j][1] + 2, rows.z, rows.w, T());
    }
    float sum[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) sum[n] = (sums[0][n] + sums[1][n]) + (sums[2][n] + sums[3][n]);
    const float other0 = across(upper ? sum[0] : sum[1], 16);
    const float other1 = across(upper ? sum[2] : sum[3], 16);
    const float input = gate_sigmoid((upper ? other0 : sum[0]) + z[0] + bias[0]);
    const float forget = gate_sigmoid((upper ? sum[1] : other0) + z[1] + bias[1]);
    const float candidate = gate_tanh((upper ? other1 : sum[2]) + z[2] + bias[2]);
    const float output = gate_sigmoid((upper ? sum[3] : other1) + z[3] + bias[3]);
    const float c_new = forget * c + input * candidate;
    c = active ? c_new : c;
    h = active ? widen(narrow<T>(output * gate_tanh(c_new))) : h;
    const float h_stored = active ? h : 0.0f, c_stored = active ? c : 0.0f;
    if (cut) h = c = 0.0f;

    const uint32_t own = bits<T>(h);
    const uint32_t pair = own | __shfl_down_sync(~0u, own, 4) << 16;  // right in even units
    const uint32_t low = __shfl_sync(~0u, pair, source);
    const uint32_t high = __shfl_sync(~0u, pair, source + 8);
    if (more) {
      const uint32_t slot = step % 2;  // of the exchange; h goes to the other buffer
      const uint32_t to = state_address + (1 - slot) * uint32_t(sizeof(state[0]));
#pragma unroll
      for (int n = 0; n < S::kBlocks / 4; ++n) {
        const uint32_t receiver = distance_to(lane / 8 + 4 * n, arrival.address);
        send(to + receiver, low, high, arrival.address + 8 * slot + receiver);
      }
    }
    if (stored && (active || sequence.offsets == nullptr)) {
      if (a.gates != nullptr) {
        const float gates[4] = {input, forget, candidate, output};
#pragma unroll
        for (int g = 0; g < 4; ++g)
          store<T>(a.gates, int64_t(at) * (4 * H) + (g * H + unit), active ? gates[g] : 0.0f);
      }
      const int64_t state = int64_t(at) * H + unit;
      store<T>(a.output, state, h_stored);
      if (a.cells != nullptr) store<T>(a.cells, state, c_stored);
    }
#pragma unroll
    for (int g = 0; g < 4; ++g) z[g] = z_next[g];
    at = at_next;
  }
  if (stored) {
    store<T>(a.hy, int64_t(b) * H + unit, h);
    store<T>(a.cy, int64_t(b) * H + unit, c);
  }
#endif
}

// ---- backward -----------------------------------------------------------------------------------

// The rows of a warp's left factor are k, its columns the block's units, four gates of each.
template <class T, int kWidth>
__global__ void __launch_bounds__(Shape<kWidth>::kThreads, Shape<kWidth>::kBlocksAtOnce)
    backward_kernel(const Sequence sequence, const ClusterBackward a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kWidth>;
  constexpr int kRows = S::kBlocks / 4;  // of 16 k
  constexpr int kColumns = 4 * S::kUnits;
  constexpr uint32_t kExchangedBytes = kWidth * kTile * sizeof(float);
#if __CUDA_ARCH__ >= 1000
  constexpr int kPartsAtOnce = kWidth == 384 ? 2 : 8;  // more would spill there
#else
  constexpr int kPartsAtOnce = 8;
#endif
  __shared__ float parts[2][S::kBlocks][S::kUnits][kTile];
  __shared__ alignas(16) uint16_t gradients[2][kTile][kRowStride<kColumns>];
  __shared__ alignas(8) uint64_t barriers[2];

  const int thread = threadIdx.x, lane = thread % 32;
  const int H = int(sequence.hidden), steps = int(sequence.steps), block = block_in_cluster();
  const int b0 = blockIdx.x / S::kBlocks * kTile;

  const Arrival arrival = {address_of(barriers)};
  if (thread == 0) arrival.start(kExchangedBytes);

  const int k0 = thread / 32 * kRows * 16 + lane / 4;
  uint32_t weights[kRows][2][kColumns / kInner][4];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = k0 + 16 * m + 8 * half;
#pragma unroll
      for (int j = 0; j < kColumns / kInner; ++j) {
        const int unit = block * S::kUnits + (kInner * j + lane % 4 * 8) / 4;
        gather(weights[m][half][j], a.weight_hh, unit * H + k, H * H, H,
               k < H ? 4 * (H - unit) : 0);
      }
    }
    __syncwarp();  // or all loads are begun at once, and their addresses spill
  }

  // For the gates: this thread's unit and row.
  const int u = thread / kTile, row = thread % kTile;
  BackwardCell<T> cell(sequence, a, b0 + row, block * S::kUnits + u, true);
  auto receive = [&](int exchange) {
    arrival.wait(exchange);
    if (thread == 0) arrival.expect(exchange % 2, kExchangedBytes);
    float d_h = 0.0f;
#pragma unroll(kPartsAtOnce)
    for (int n = 0; n < S::kBlocks; ++n) d_h += parts[exchange % 2][n][u][row];
    return d_h;
  };
  cluster_barrier();

  for (int step = 0; step < steps; ++step) {
    float dz[4];
    cell.ask();
    if (step > 0) cell.receive(receive(step - 1));
    cell.compute(dz);
    *reinterpret_cast<uint2*>(&gradients[step % 2][row][4 * u]) = {
        bits<T>(dz[0]) | bits<T>(dz[1]) << 16, bits<T>(dz[2]) | bits<T>(dz[3]) << 16};
    __syncthreads();
    cell.store_dz(dz);
    if (step + 1 == steps && a.grad_hx == nullptr) break;

    float sums[kRows][4] = {};
#pragma unroll
    for (int j = 0; j < kColumns / kInner; ++j) {
      const uint4 rows = *reinterpret_cast<const uint4*>(
          &gradients[step % 2][lane / 4][kInner * j + lane % 4 * 8]);
#pragma unroll
      for (int m = 0; m < kRows; ++m)
        multiply_add(sums[m], weights[m][0][j], weights[m][1][j], rows.x, rows.y, T());
#pragma unroll
      for (int m = 0; m < kRows; ++m)
        multiply_add(sums[m], weights[m][0][j] + 2, weights[m][1][j] + 2, rows.z, rows.w, T());
    }
    const uint32_t slot = step % 2;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Eight k, all of one receiver.
        const unsigned eight = threadIdx.x / 32 * (2 * kRows) + 2 * m + half;
        const unsigned their_unit = eight % (S::kUnits / 8) * 8 + lane / 4;
        const uint32_t receiver = distance_to(eight / (S::kUnits / 8), arrival.address);
        const uint32_t to = address_of(&parts[slot][block][their_unit][lane % 4 * 2]);
        const float pair[2] = {sums[m][2 * half], sums[m][2 * half + 1]};
        send(to + receiver, pair, arrival.address + 8 * slot + receiver);
      }
    }
  }
  if (steps > 0 && a.grad_hx != nullptr) {
    cell.receive_of_this(receive(steps - 1));
  }
  cell.store_state();
#endif
}

// ---- launches -----------------------------------------------------------------------------------

template <bool kBackward, class T, int kWidth, class Use>
cudaError_t with_kernel(const Use& use) {
  if constexpr (kBackward)
    return use(Shape<kWidth>(), backward_kernel<T, kWidth>);
  else
    return use(Shape<kWidth>(), forward_kernel<T, kWidth>);
}

template <bool kBackward, class T, class Use>
cudaError_t with_kernel(int64_t hidden, const Use& use) {
  if (hidden <= 128) return with_kernel<kBackward, T, 128>(use);
  if (hidden <= 256) return with_kernel<kBackward, T, 256>(use);
  if (hidden <= 384) return with_kernel<kBackward, T, 384>(use);
  if (hidden <= 512) return with_kernel<kBackward, T, 512>(use);
  return cudaErrorInvalidValue;
}

// Calls `use(shape, kernel)` with the kernel for this storage and hidden size.
template <bool kBackward, class Use>
cudaError_t with_kernel(Storage storage, int64_t hidden, const Use& use) {
  if (storage == Storage::BFloat16) return with_kernel<kBackward, __nv_bfloat16>(hidden, use);
  if (storage == Storage::Half) return with_kernel<kBackward, __half>(hidden, use);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t lstm_forward_cluster_16(Storage storage, const Sequence& sequence,
                                    const ClusterForward& a, cudaStream_t stream) {
  return with_kernel<false>(storage, sequence.hidden, [&](auto shape, auto kernel) {
    return launch_clusters(shape, kernel, kTile, sequence, a, stream);
  });
}

cudaError_t lstm_backward_cluster_16(Storage storage, const Sequence& sequence,
                                     const ClusterBackward& a, cudaStream_t stream) {
  return with_kernel<true>(storage, sequence.hidden, [&](auto shape, auto kernel) {
    return launch_clusters(shape, kernel, kTile, sequence, a, stream);
  });
}

ClusterCount lstm_count_clusters_16(Storage storage, int64_t hidden, bool backward) {
  ClusterCount count;
  auto counted = [&](auto shape, auto kernel) {
    count = count_clusters(shape, kernel, kTile);
    return cudaSuccess;
  };
  if (backward)
    with_kernel<true>(storage, hidden, counted);
  else
    with_kernel<false>(storage, hidden, counted);
  return count;
}

}  // namespace seqmem::cuda
