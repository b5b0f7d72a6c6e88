// LSTM kernels that loop over time in a thread block cluster; see the header.
//
// A cluster of 8 or 16 blocks takes `kTile` batch rows through all steps. Each block owns some of
// the hidden units: their rows of weight_hh stay in its registers, and c of its units too. What a
// step needs from the other blocks travels through distributed shared memory by st.async, whose
// bytes the receiver's mbarrier counts: a step costs one such trip, no launch, and no barrier of
// the whole cluster.
//
// Forward: each block sends h of its units to all blocks. Backward: each block multiplies dz of its
// own units by its weights and sends every block the part of dh for that block's units; the
// receiver adds the parts in the order of the blocks, so that results are the same every time.
//
// Two buffers suffice. A block's part of step s + 2 leaves after it has received all parts of step
// s + 1, and those leave after their senders have read step s.
//
// Floor of a step at H 256, 8 rows: 1024 cycles of multiply-adds, 250 of sums across lanes, and the
// trip to the other blocks, about 300.
#include "lstm_cluster_kernel.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace seqmem::cuda {
namespace {

constexpr int kLanes = 16;  // that share the sums of a unit

// Padded H is 16 kPerLane: each thread holds 4 kPerLane weights.
template <int kPerLane, int kTile>
struct Shape {
  static constexpr int kWidth = kLanes * kPerLane;  // H, padded
  static constexpr int kBlocks = kWidth <= 128 ? 8 : 16;
  static constexpr int kUnits = kWidth / kBlocks;  // of each block
  static constexpr int kThreads = kLanes * kUnits;
  // So that two clusters share the multiprocessors where the registers allow.
  static constexpr int kBlocksAtOnce = kPerLane <= 12 || (kPerLane == 16 && kTile < 8) ? 2 : 1;
};

// ---- distributed shared memory ------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900

// Neighbouring batch rows of a tile, which shared memory holds side by side.
template <int kTile>
struct alignas(kTile < 4 ? sizeof(float) * kTile : 16) Rows {
  static constexpr int kCount = kTile < 4 ? kTile : 4;
  float lane[kCount];
};

__device__ uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The same place in another block of the cluster.
__device__ uint32_t address_in(uint32_t block, uint32_t address) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(block));
  return mapped;
}

__device__ uint32_t block_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Counts the bytes of one exchange, which st.async reports. Two take turns.
struct Arrival {
  uint32_t address;  // of two mbarriers

  // For thread 0; a barrier of the cluster must follow.
  __device__ void start(uint32_t bytes) const {
    for (uint32_t slot = 0; slot < 2; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address + 8 * slot) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    expect(0, bytes);
    expect(1, bytes);
  }

  __device__ void expect(uint32_t slot, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address + 8 * slot),
                 "r"(bytes)
                 : "memory");
  }

  // Waits for exchange number k into slot k % 2.
  __device__ void wait(uint32_t k) const {
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(address + 8 * (k % 2)), "r"(k / 2 % 2)
          : "memory");
    } while (done == 0);
  }
};

// Stores into another block and reports the bytes to its mbarrier.
__device__ void send(uint32_t to, const float (&v)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}
__device__ void send(uint32_t to, const float (&v)[1], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
      "f"(v[0]), "r"(barrier)
      : "memory");
}

__device__ float across(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }

// ---- gates --------------------------------------------------------------------------------------

__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// tanh(x) from sigmoid(2 x), which cancels near zero: there a polynomial, as in _triton/common.py.
__device__ float tanh_from(float x, float sigmoid_2x) {
  const float s = x * x;
  float p = fmaf(-6.09671416590819757e-3f, s, 2.09971789990747506e-2f);
  p = fmaf(p, s, -5.38509095785135808e-2f);
  p = fmaf(p, s, 1.33327697369763279e-1f);
  p = fmaf(p, s, -3.33333289441342546e-1f);
  return fabsf(x) < 0.625f ? fmaf(x * s, p, x) : fmaf(2.0f, sigmoid_2x, -1.0f);
}
__device__ float tangent(float x) { return tanh_from(x, sigmoid(2.0f * x)); }

// ---- rows ---------------------------------------------------------------------------------------

__device__ int64_t row_of(const Sequence& sequence, int t, int64_t b) {
  return sequence.offsets != nullptr ? sequence.offsets[t] + b
                                     : t * sequence.t_stride + b * sequence.b_stride;
}

// Steps of row b; 0 beyond the batch.
__device__ int length_of(const Sequence& sequence, int64_t b) {
  if (b >= sequence.batch) return 0;
  if (sequence.lengths == nullptr) return int(sequence.steps);
  return int(max(int64_t(0), min(sequence.lengths[b], sequence.steps)));
}

// Whether reset cuts the state between steps seam - 1 and seam of row b.
__device__ bool cut_at(const Sequence& sequence, int seam, int64_t b, int length) {
  return sequence.reset != nullptr && seam < length && sequence.reset[row_of(sequence, seam, b)];
}

__device__ float given(const float* from, int64_t offset) {
  return from != nullptr ? from[offset] : 0.0f;
}

#endif  // __CUDA_ARCH__ >= 900

// ---- forward ------------------------------------------------------------------------------------

// The 16 lanes of a unit split k between them. Their sums of every batch row and gate are then
// added in stages, each of which halves what a lane holds, until it has two gates of one row. Which
// half a lane keeps follows from a bit of its number; lanes with that bit set hold their weights
// (and read the vectors of rows) in the other order, so that it is always the first half.
template <int kPerLane, int kTile>
__global__ void __launch_bounds__(Shape<kPerLane, kTile>::kThreads,
                                  Shape<kPerLane, kTile>::kBlocksAtOnce)
    forward_kernel(const Sequence sequence, const ClusterForward a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kPerLane, kTile>;
  using Rows = Rows<kTile>;
  constexpr int kVector = Rows::kCount, kVectors = kTile / kVector;
  constexpr uint32_t kExchangedBytes = S::kWidth * kTile * sizeof(float);  // to each block
  __shared__ Rows state[2][kVectors][S::kWidth];
  __shared__ alignas(8) uint64_t barriers[2];

  const int thread = threadIdx.x, lane = thread % kLanes, H = int(sequence.hidden);
  const int bit0 = lane & 1, bit1 = lane >> 1 & 1, bit2 = lane >> 2 & 1, bit3 = lane >> 3;
  const int unit = block_in_cluster() * S::kUnits + thread / kLanes;
  const int64_t b0 = int64_t(blockIdx.x / S::kBlocks) * kTile;
  const int steps = int(sequence.steps);
  const bool reverse = sequence.reverse, backed = unit < H;

  const Arrival arrival = {address_of(barriers)};
  if (thread == 0) arrival.start(kExchangedBytes);

  // This lane's row and its first gate: i and f, or g and o.
  const int row =
      (kTile == 8 ? 4 * bit2 : 0) + (kTile >= 4 ? 2 * bit1 : 0) + (kTile > 1 ? bit0 : 0);
  const bool spare = (kTile < 8 && bit2) || (kTile < 4 && bit1) || (kTile < 2 && bit0);
  const int gate = 2 * bit3;
  const int64_t b = b0 + row;
  const int length = backed ? length_of(sequence, b) : 0;
  const bool stored = backed && b < sequence.batch && !spare;

  float weights[kPerLane][4];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int k = lane + kLanes * j;
      weights[j][g] = backed && k < H ? a.weight_hh[(int64_t(g ^ gate) * H + unit) * H + k] : 0.0f;
    }
  }
  float bias[2] = {}, z[2] = {}, h = 0.0f, c = 0.0f;
  const int first = reverse ? steps - 1 : 0;
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const int64_t offset = int64_t(gate + g) * H + unit;
    if (backed) bias[g] = given(a.bias_ih, offset) + given(a.bias_hh, offset);
    if (first < length) z[g] = a.z[row_of(sequence, first, b) * 4 * H + offset];
  }
  if (backed && b < sequence.batch && !(!reverse && cut_at(sequence, 0, b, length))) {
    h = given(a.hx, b * H + unit);
    c = given(a.cx, b * H + unit);
  }
  for (int n = thread; n < S::kWidth * kTile; n += S::kThreads) {
    const int r = n / S::kWidth, k = n % S::kWidth;
    const int64_t from = b0 + r;
    const bool zero = k >= H || from >= sequence.batch ||
                      (!reverse && cut_at(sequence, 0, from, length_of(sequence, from)));
    state[0][r / kVector][k].lane[r % kVector] = zero ? 0.0f : given(a.hx, from * H + k);
  }
  cluster_barrier();

  // Where this lane sends its unit's vector of rows: it is one of kSenders lanes with that vector.
  constexpr int kSenders = kTile == 8 ? 8 : 16, kReceivers = (S::kBlocks - 1) / kSenders + 1;
  const int sender = kTile == 8 ? lane % 4 + 4 * bit3 : lane;
  uint32_t receivers[kReceivers];
#pragma unroll
  for (int n = 0; n < kReceivers; ++n) receivers[n] = (sender + n * kSenders) % S::kBlocks;
  const uint32_t state_address = address_of(&state[0][kTile == 8 ? bit2 : 0][unit]);

  for (int step = 0; step < steps; ++step) {
    // Ask for the next step's pre-activations now: they arrive while this step computes.
    const int t = reverse ? steps - 1 - step : step, next = reverse ? t - 1 : t + 1;
    const bool more = step + 1 < steps, active = t < length;
    const int64_t at = row_of(sequence, t, b);
    float z_next[2] = {};
    if (more && next < length) {
      const float* from = a.z + row_of(sequence, next, b) * 4 * H + int64_t(gate) * H + unit;
      z_next[0] = from[0];
      z_next[1] = from[H];
    }
    const bool cut = more && cut_at(sequence, reverse ? t : next, b, length);
    if (step > 0) {
      arrival.wait(step - 1);
      if (thread == 0) arrival.expect((step - 1) % 2, kExchangedBytes);
    }

    float sums[kTile][4] = {};
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
#pragma unroll
      for (int q = 0; q < kVectors; ++q) {
        const Rows rows = state[step % 2][kTile == 8 ? q ^ bit2 : q][lane + kLanes * j];
#pragma unroll
        for (int r = 0; r < kVector; ++r) {
#pragma unroll
          for (int g = 0; g < 4; ++g) {
            float& sum = sums[q * kVector + r][g];
            sum = fmaf(weights[j][g], rows.lane[r], sum);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int g = 0; g < 2; ++g) sums[r][g] += across(sums[r][g + 2], 8);
    }
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if constexpr (kTile == 8) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[r][g] += across(sums[r + 4][g], 4);
      }
      if constexpr (kTile >= 4) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float kept = bit1 ? sums[r + 2][g] : sums[r][g];
          sums[r][g] = kept + across(bit1 ? sums[r][g] : sums[r + 2][g], 2);
        }
      }
      if constexpr (kTile > 1) {
        const float kept = bit0 ? sums[1][g] : sums[0][g];
        sums[0][g] = kept + across(bit0 ? sums[0][g] : sums[1][g], 1);
      }
      if constexpr (kTile < 8) sums[0][g] += across(sums[0][g], 4);
      if constexpr (kTile < 4) sums[0][g] += across(sums[0][g], 2);
      if constexpr (kTile < 2) sums[0][g] += across(sums[0][g], 1);
    }

    // Both lanes of a row exchange their gates and compute the same state.
    const float z0 = sums[0][0] + z[0] + bias[0], z1 = sums[0][1] + z[1] + bias[1];
    const float s0 = sigmoid(bit3 ? 2.0f * z0 : z0);
    const float own0 = bit3 ? tanh_from(z0, s0) : s0, own1 = sigmoid(z1);
    const float other0 = across(own0, 8), other1 = across(own1, 8);
    const float input = bit3 ? other0 : own0, forget = bit3 ? other1 : own1;
    const float candidate = bit3 ? own0 : other0, output = bit3 ? own1 : other1;
    if (active) {
      c = forget * c + input * candidate;
      h = output * tangent(c);
    }
    const float h_stored = active ? h : 0.0f, c_stored = active ? c : 0.0f;
    if (cut) h = c = 0.0f;

    float rows[kVector];
#pragma unroll
    for (int r = 0; r < kVector; ++r) rows[r] = __shfl_sync(~0u, h, r, kVector);
    if (more && sender < S::kBlocks) {
      const uint32_t slot = step % 2;  // of the exchange; h goes to the other buffer
      const uint32_t to = state_address + (1 - slot) * uint32_t(sizeof(state[0]));
#pragma unroll
      for (int n = 0; n < kReceivers; ++n) {
        send(address_in(receivers[n], to), rows,
             address_in(receivers[n], arrival.address + 8 * slot));
      }
    }
    if (stored && (active || sequence.offsets == nullptr)) {
      if (a.gates != nullptr) {
        float* to = a.gates + at * 4 * H + int64_t(gate) * H + unit;
        to[0] = active ? own0 : 0.0f;
        to[H] = active ? own1 : 0.0f;
      }
      if (bit3 == 0) a.output[at * H + unit] = h_stored;
      if (bit3 == 1 && a.cells != nullptr) a.cells[at * H + unit] = c_stored;
    }
    z[0] = z_next[0];
    z[1] = z_next[1];
  }
  if (stored) (bit3 ? a.cy : a.hy)[b * H + unit] = bit3 ? c : h;
#endif
}

// ---- backward -----------------------------------------------------------------------------------

// Four k belong to the kSplit lanes that split the block's 4 kUnits rows of weight_hh; sums across
// those lanes as in forward_kernel. One thread each computes the gates' gradients of a (unit, row).
template <int kPerLane, int kTile>
__global__ void __launch_bounds__(Shape<kPerLane, kTile>::kThreads,
                                  Shape<kPerLane, kTile>::kBlocksAtOnce)
    backward_kernel(const Sequence sequence, const ClusterBackward a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kPerLane, kTile>;
  using Rows = Rows<kTile>;
  constexpr int kVector = Rows::kCount, kVectors = kTile / kVector;
  constexpr uint32_t kExchangedBytes = S::kWidth * kTile * sizeof(float);  // to each block
  constexpr int kSplit = 4 * S::kUnits / kPerLane;                         // 4 or 8
  __shared__ Rows parts[2][S::kBlocks][kVectors][S::kUnits];
  __shared__ Rows gradients[2][kVectors][4 * S::kUnits];
  __shared__ alignas(8) uint64_t barriers[2];

  const int thread = threadIdx.x, H = int(sequence.hidden), steps = int(sequence.steps);
  const int block = block_in_cluster();
  const int64_t b0 = int64_t(blockIdx.x / S::kBlocks) * kTile;
  const bool reverse = sequence.reverse;

  const Arrival arrival = {address_of(barriers)};
  if (thread == 0) arrival.start(kExchangedBytes);

  // For the product: which of its four k this lane ends with, and where it sends them.
  const int lane = thread % kSplit, order = 2 * (lane & 1) + (lane >> 1 & 1);
  const int half = kSplit == 8 && kTile == 8 ? lane >> 2 : 0;  // of the rows
  const bool spare = kSplit == 8 && kTile < 8 && lane >= 4;
  const int k0 = 4 * (thread / kSplit), k_own = k0 + order;
  const uint32_t receiver = k_own / S::kUnits;
  const uint32_t parts_address = address_of(&parts[0][block][half][k_own % S::kUnits]);
  float weights[kPerLane][4];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int n = lane + kSplit * j, from = block * S::kUnits + n % S::kUnits;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int k = k0 + (m ^ order);
      weights[j][m] =
          from < H && k < H ? a.weight_hh[(int64_t(n / S::kUnits) * H + from) * H + k] : 0.0f;
    }
  }

  // For the gates: this thread's unit and row.
  const bool owner = thread < S::kUnits * kTile;
  const int u = thread % S::kUnits, unit = block * S::kUnits + u, row = thread / S::kUnits;
  const int64_t b = b0 + row;
  const bool stored = owner && unit < H && b < sequence.batch;
  const int length = stored ? length_of(sequence, b) : 0;
  const int first = reverse ? length - 1 : 0;
  const float cx = stored ? given(a.cx, b * H + unit) : 0.0f;
  // Rows shorter than the sequence keep these until their last step comes up.
  float d_h = stored ? given(a.grad_hy, b * H + unit) : 0.0f;
  float d_c = stored ? given(a.grad_cy, b * H + unit) : 0.0f;

  struct Saved {
    float gates[4], c_before, grad_output;
  };
  // What step t needs; c_before is c of the step before it.
  auto load = [&](int t, int before) {
    Saved s = {};
    if (t < length) {
      const int64_t at = row_of(sequence, t, b);
#pragma unroll
      for (int g = 0; g < 4; ++g) s.gates[g] = a.gates[(at * 4 + g) * H + unit];
      s.grad_output = given(a.grad_output, at * H + unit);
    }
    if (before >= 0 && before < length)
      s.c_before = a.cells[row_of(sequence, before, b) * H + unit];
    return s;
  };
  const int last = reverse ? 0 : steps - 1, back = reverse ? 1 : -1;
  Saved saved = load(last, last + back);
  float c = last < length ? a.cells[row_of(sequence, last, b) * H + unit] : 0.0f;
  bool was_active = false, was_cut = false;

  // dh from the parts of exchange number k; rows that were not active keep theirs.
  auto receive = [&](int k) {
    arrival.wait(k);
    if (thread == 0) arrival.expect(k % 2, kExchangedBytes);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n)
      sum += parts[k % 2][n][row / kVector][u].lane[row % kVector];
    if (was_active) d_h = was_cut ? 0.0f : sum;
  };
  cluster_barrier();

  for (int step = 0; step < steps; ++step) {
    const int t = reverse ? step : steps - 1 - step, before = t + back;
    const bool active = t < length, more = step + 1 < steps;
    const int64_t at = row_of(sequence, t, b);
    float values[4] = {};
    if (owner) {
      const Saved next = more ? load(before, before + back) : Saved{};
      const bool cut = cut_at(sequence, reverse ? t + 1 : t, b, length);
      float d_gates[4] = {}, d_cell = 0.0f;
      if (active) {
        d_cell = given(a.grad_cells, at * H + unit);
#pragma unroll
        for (int g = 0; g < 4; ++g) d_gates[g] = given(a.grad_gates, (at * 4 + g) * H + unit);
      }
      const float c_before = cut ? 0.0f : t == first ? cx : saved.c_before;
      const float i = saved.gates[0], f = saved.gates[1], g = saved.gates[2], o = saved.gates[3];
      const float tanh_c = tangent(c), slope_c = o * (1.0f - tanh_c * tanh_c);
      if (step > 0) receive(step - 1);
      const float d_output = d_h + saved.grad_output;
      const float d_state = d_c + d_cell + d_output * slope_c;
      if (active) {
        values[0] = (d_gates[0] + d_state * g) * (i * (1.0f - i));
        values[1] = (d_gates[1] + d_state * c_before) * (f * (1.0f - f));
        values[2] = (d_gates[2] + d_state * i) * (1.0f - g * g);
        values[3] = (d_gates[3] + d_output * tanh_c) * (o * (1.0f - o));
        d_c = cut ? 0.0f : d_state * f;
      }
#pragma unroll
      for (int g4 = 0; g4 < 4; ++g4) {
        Rows& to = gradients[step % 2][row / kVector][g4 * S::kUnits + u];
        to.lane[row % kVector] = values[g4];
      }
      c = saved.c_before;
      saved = next;
      was_active = active;
      was_cut = cut;
    }
    __syncthreads();
    if (stored && (active || sequence.offsets == nullptr)) {
#pragma unroll
      for (int g = 0; g < 4; ++g) a.dz[(at * 4 + g) * H + unit] = values[g];
    }
    if (!more && a.grad_hx == nullptr) break;

    float sums[4][kTile] = {};
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
#pragma unroll
      for (int q = 0; q < kVectors; ++q) {
        const Rows rows = gradients[step % 2][q ^ half][lane + kSplit * j];
#pragma unroll
        for (int r = 0; r < kVector; ++r) {
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            float& sum = sums[m][q * kVector + r];
            sum = fmaf(weights[j][m], rows.lane[r], sum);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int m = 0; m < 2; ++m) sums[m][r] += across(sums[m + 2][r], 1);
      sums[0][r] += across(sums[1][r], 2);
    }
    constexpr bool kHalves = kSplit == 8 && kTile == 8;
    if constexpr (kHalves) {
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[0][r] += across(sums[0][r + 4], 4);
    } else if constexpr (kSplit == 8) {
#pragma unroll
      for (int r = 0; r < kTile; ++r) sums[0][r] += across(sums[0][r], 4);
    }
    if (!spare) {
      const uint32_t slot = step % 2;
      const uint32_t to = parts_address + slot * uint32_t(sizeof(parts[0]));
      const uint32_t barrier = address_in(receiver, arrival.address + 8 * slot);
#pragma unroll
      for (int q = 0; q < (kHalves ? 1 : kVectors); ++q) {
        float rows[kVector];
#pragma unroll
        for (int r = 0; r < kVector; ++r) rows[r] = sums[0][q * kVector + r];
        send(address_in(receiver, to + q * S::kUnits * uint32_t(sizeof(Rows))), rows, barrier);
      }
    }
  }
  if (owner && a.grad_hx != nullptr) {
    if (steps > 0) receive(steps - 1);
    if (stored) a.grad_hx[b * H + unit] = d_h;
  }
  if (stored && a.grad_cx != nullptr) a.grad_cx[b * H + unit] = d_c;
#endif
}

// ---- launches -----------------------------------------------------------------------------------

template <class S>
cudaLaunchConfig_t config_of(int64_t batch, int tile, cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = S::kBlocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((batch + tile - 1) / tile) * S::kBlocks);
  config.blockDim = dim3(S::kThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// Calls `use(kernel, shape)` with the kernel for this hidden size and tile.
template <bool kBackward, int kPerLane, class Use>
cudaError_t with_tile(int tile, const Use& use) {
  auto take = [&](auto shape, auto forward, auto backward) {
    if constexpr (kBackward)
      return use(shape, backward);
    else
      return use(shape, forward);
  };
  switch (tile) {
    case 1:
      return take(Shape<kPerLane, 1>(), forward_kernel<kPerLane, 1>, backward_kernel<kPerLane, 1>);
    case 4:
      return take(Shape<kPerLane, 4>(), forward_kernel<kPerLane, 4>, backward_kernel<kPerLane, 4>);
    case 8:
      return take(Shape<kPerLane, 8>(), forward_kernel<kPerLane, 8>, backward_kernel<kPerLane, 8>);
  }
  return cudaErrorInvalidValue;
}

template <bool kBackward, class Use>
cudaError_t with_kernel(int tile, int64_t hidden, const Use& use) {
  if (hidden <= 128) return with_tile<kBackward, 8>(tile, use);
  if (hidden <= 192) return with_tile<kBackward, 12>(tile, use);
  if (hidden <= 256) return with_tile<kBackward, 16>(tile, use);
  if (hidden <= kClusterHidden) return with_tile<kBackward, 24>(tile, use);
  return cudaErrorInvalidValue;
}

template <bool kBackward, class Arguments>
cudaError_t launch(int tile, const Sequence& sequence, const Arguments& arguments,
                   cudaStream_t stream) {
  if (sequence.batch == 0) return cudaSuccess;
  return with_kernel<kBackward>(tile, sequence.hidden, [&](auto shape, auto kernel) {
    using S = decltype(shape);
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = config_of<S>(sequence.batch, tile, attribute);
    config.stream = stream;
    const auto allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return allowed == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, sequence, arguments)
                                  : allowed;
  });
}

template <bool kBackward>
int active_clusters(int tile, int64_t hidden) {
  int count = 0;
  const cudaError_t found = with_kernel<kBackward>(tile, hidden, [&](auto shape, auto kernel) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of<decltype(shape)>(1, tile, attribute);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  });
  if (found == cudaSuccess) return count;
  cudaGetLastError();  // a size that the device does not take is no error of the caller's
  return 0;
}

}  // namespace

cudaError_t lstm_forward_cluster(int tile, const Sequence& sequence, const ClusterForward& a,
                                 cudaStream_t stream) {
  return launch<false>(tile, sequence, a, stream);
}

cudaError_t lstm_backward_cluster(int tile, const Sequence& sequence, const ClusterBackward& a,
                                  cudaStream_t stream) {
  return launch<true>(tile, sequence, a, stream);
}

int lstm_active_clusters(int tile, int64_t hidden, bool backward) {
  return backward ? active_clusters<true>(tile, hidden) : active_clusters<false>(tile, hidden);
}

}  // namespace seqmem::cuda
