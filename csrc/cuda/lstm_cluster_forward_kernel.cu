// The LSTM's cluster kernel forward, float32; lstm_cluster_common.h describes the exchanges between
// blocks. A cluster takes kTile batch rows, a block kUnits of its units with 16 lanes each:
//   registers  of a lane: weight_hh [4, kPerLane] of its unit, for every 16th k; h and c of that
//              unit and one row, z and biases of two gates
//   shared     h [kTile, H] of all units, in two buffers that take turns
// For each step t:
//   ask for z_(t+1), then wait for h_(t-1) of all blocks (hx is there at the first step)
//   sums [kTile, 4] = h_(t-1) . weights over the lane's k
//   across the 16 lanes, in stages, until each has two gates of one row
//   i, f, g, o = sigmoid or tanh(z_t + biases + sums); the lanes of a row exchange them
//   c = f c + i g; h = o tanh(c); h [kTile] of the unit to all blocks
//   output, gates and cells to global memory
//
// Floor of a step at H 256, 8 rows: 1024 cycles of multiply-adds, 250 of sums across lanes, and the
// trip to the other blocks, about 300.
#include "lstm_cluster_32.h"

namespace seqmem::cuda {
namespace {

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
  const int b0 = blockIdx.x / S::kBlocks * kTile;
  const int steps = int(sequence.steps);
  const bool reverse = sequence.reverse, backed = unit < H;

  const Arrival arrival = {address_of(barriers)};
  if (thread == 0) arrival.start(kExchangedBytes);

  // This lane's row and its first gate: i and f, or g and o.
  const int row =
      (kTile == 8 ? 4 * bit2 : 0) + (kTile >= 4 ? 2 * bit1 : 0) + (kTile > 1 ? bit0 : 0);
  const bool spare = (kTile < 8 && bit2) || (kTile < 4 && bit1) || (kTile < 2 && bit0);
  const int gate = 2 * bit3;
  const int b = b0 + row;
  const int length = backed ? length_of(sequence, b) : 0;
  const bool stored = backed && b < sequence.batch && !spare;

  float weights[kPerLane][4];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int k = lane + kLanes * j;
      weights[j][g] =
          backed && k < H ? element<float>(a.weight_hh, ((g ^ gate) * H + unit) * H + k) : 0.0f;
    }
  }
  float bias[2] = {}, z[2] = {}, h = 0.0f, c = 0.0f;
  const int first = reverse ? steps - 1 : 0;
  int at = row_of(sequence, first, b);  // of this step
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const int offset = (gate + g) * H + unit;
    if (backed) bias[g] = element<float>(a.bias_ih, offset) + element<float>(a.bias_hh, offset);
    if (first < length) z[g] = element<float>(a.z, int64_t(at) * (4 * H) + offset);
  }
  if (backed && b < sequence.batch && !cut_at_start(sequence, b, length)) {
    h = element<float>(a.hx, int64_t(b) * H + unit);
    c = element<float>(a.cx, int64_t(b) * H + unit);
  }
  for (int n = thread; n < S::kWidth * kTile; n += S::kThreads) {
    const int r = n / S::kWidth, k = n % S::kWidth;
    const int from = b0 + r;
    const bool zero =
        k >= H || from >= sequence.batch || cut_at_start(sequence, from, length_of(sequence, from));
    state[0][r / kVector][k].lane[r % kVector] =
        zero ? 0.0f : element<float>(a.hx, int64_t(from) * H + k);
  }
  cluster_barrier();

  // Where this lane sends its unit's vector of rows: it is one of kSenders lanes with that vector.
  constexpr int kSenders = kTile == 8 ? 8 : 16, kReceivers = (S::kBlocks - 1) / kSenders + 1;
  const int sender = kTile == 8 ? lane % 4 + 4 * bit3 : lane;
  uint32_t receivers[kReceivers];
#pragma unroll
  for (int n = 0; n < kReceivers; ++n)
    receivers[n] = distance_to((sender + n * kSenders) % S::kBlocks, arrival.address);
  const uint32_t state_address = address_of(&state[0][kTile == 8 ? bit2 : 0][unit]);

  for (int step = 0; step < steps; ++step) {
    // Ask for the next step's pre-activations now: they arrive while this step computes.
    const int t = reverse ? steps - 1 - step : step, next = reverse ? t - 1 : t + 1;
    const bool more = step + 1 < steps, active = t < length;
    const int at_next = row_of(sequence, next, b);
    float z_next[2] = {};
    if (more && next < length) {
      const int64_t from = int64_t(at_next) * (4 * H) + (gate * H + unit);
      z_next[0] = element<float>(a.z, from);
      z_next[1] = element<float>(a.z, from + H);
    }
    const bool cut = more && (reverse ? cut_at(sequence, t, at, length)
                                      : cut_at(sequence, next, at_next, length));
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
    const float s0 = gate_sigmoid(bit3 ? 2.0f * z0 : z0);
    const float tanh_z0 = gate_tanh_from(z0, s0);
    const float own0 = bit3 ? tanh_z0 : s0, own1 = gate_sigmoid(z1);
    const float other0 = across(own0, 8), other1 = across(own1, 8);
    const float input = bit3 ? other0 : own0, forget = bit3 ? other1 : own1;
    const float candidate = bit3 ? own0 : other0, output = bit3 ? own1 : other1;
    const float c_new = forget * c + input * candidate;
    c = active ? c_new : c;
    h = active ? output * gate_tanh(c_new) : h;
    const float h_stored = active ? h : 0.0f, c_stored = active ? c : 0.0f;
    if (cut) h = c = 0.0f;

    float rows[kVector];
#pragma unroll
    for (int r = 0; r < kVector; ++r) rows[r] = __shfl_sync(~0u, h, r, kVector);
    if (more && sender < S::kBlocks) {
      const uint32_t slot = step % 2;  // of the exchange; h goes to the other buffer
      const uint32_t to = state_address + (1 - slot) * uint32_t(sizeof(state[0]));
#pragma unroll
      for (int n = 0; n < kReceivers; ++n)
        send(to + receivers[n], rows, arrival.address + 8 * slot + receivers[n]);
    }
    if (stored && (active || sequence.offsets == nullptr)) {
      if (a.gates != nullptr) {
        const int64_t to = int64_t(at) * (4 * H) + (gate * H + unit);
        store<float>(a.gates, to, active ? own0 : 0.0f);
        store<float>(a.gates, to + H, active ? own1 : 0.0f);
      }
      void* const to = bit3 == 0 ? a.output : a.cells;
      if (to != nullptr) store<float>(to, int64_t(at) * H + unit, bit3 == 0 ? h_stored : c_stored);
    }
    z[0] = z_next[0];
    z[1] = z_next[1];
    at = at_next;
  }
  if (stored) store<float>(bit3 ? a.cy : a.hy, int64_t(b) * H + unit, bit3 ? c : h);
#endif
}

template <int kPerLane, int kTile>
auto kernel_of(Shape<kPerLane, kTile>) {
  return forward_kernel<kPerLane, kTile>;
}

}  // namespace

cudaError_t lstm_forward_cluster(Storage storage, int tile, const Sequence& sequence,
                                 const ClusterForward& a, cudaStream_t stream) {
  if (sequence.hidden <= kBlockHidden) return lstm_forward_block(storage, sequence, a, stream);
  if (storage != Storage::Float) return lstm_forward_cluster_16(storage, sequence, a, stream);
  return with_shape(tile, sequence.hidden, [&](auto shape) {
    return launch_clusters(shape, kernel_of(shape), tile, sequence, a, stream);
  });
}

ClusterCount lstm_count_clusters_forward(int tile, int64_t hidden) {
  ClusterCount count;
  with_shape(tile, hidden, [&](auto shape) {
    count = count_clusters(shape, kernel_of(shape), tile);
    return cudaSuccess;
  });
  return count;
}

}  // namespace seqmem::cuda
