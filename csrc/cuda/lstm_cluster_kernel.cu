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

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "lstm_cluster_common.h"

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

#if __CUDA_ARCH__ >= 900

// Neighbouring batch rows of a tile, which shared memory holds side by side.
template <int kTile>
struct alignas(kTile < 4 ? sizeof(float) * kTile : 16) Rows {
  static constexpr int kCount = kTile < 4 ? kTile : 4;
  float lane[kCount];
};

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
  const int b0 = blockIdx.x / S::kBlocks * kTile;

  const Arrival arrival = {address_of(barriers)};
  if (thread == 0) arrival.start(kExchangedBytes);

  // For the product: which of its four k this lane ends with, and where it sends them.
  const int lane = thread % kSplit, order = 2 * (lane & 1) + (lane >> 1 & 1);
  const int half = kSplit == 8 && kTile == 8 ? lane >> 2 : 0;  // of the rows
  const bool spare = kSplit == 8 && kTile < 8 && lane >= 4;
  const int k0 = 4 * (thread / kSplit), k_own = k0 + order;
  const uint32_t receiver = distance_to(k_own / S::kUnits, arrival.address);
  const uint32_t parts_address = address_of(&parts[0][block][half][k_own % S::kUnits]);
  float weights[kPerLane][4];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int n = lane + kSplit * j, from = block * S::kUnits + n % S::kUnits;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int k = k0 + (m ^ order);
      weights[j][m] = from < H && k < H
                          ? element<float>(a.weight_hh, (n / S::kUnits * H + from) * H + k)
                          : 0.0f;
    }
  }

  // For the gates: this thread's unit and row.
  const bool owner = thread < S::kUnits * kTile;
  const int u = thread % S::kUnits, row = thread / S::kUnits;
  BackwardCell<float> cell(sequence, a, b0 + row, block * S::kUnits + u, owner);
  auto receive = [&](int exchange) {
    arrival.wait(exchange);
    if (thread == 0) arrival.expect(exchange % 2, kExchangedBytes);
    float d_h = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n)
      d_h += parts[exchange % 2][n][row / kVector][u].lane[row % kVector];
    return d_h;
  };
  cluster_barrier();

  for (int step = 0; step < steps; ++step) {
    float dz[4];
    if (owner) {
      cell.ask();
      if (step > 0) cell.receive(receive(step - 1));
      cell.compute(dz);
#pragma unroll
      for (int g = 0; g < 4; ++g)
        gradients[step % 2][row / kVector][g * S::kUnits + u].lane[row % kVector] = dz[g];
    }
    __syncthreads();
    if (owner) cell.store_dz(dz);
    if (step + 1 == steps && a.grad_hx == nullptr) break;

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
#pragma unroll
      for (int q = 0; q < (kHalves ? 1 : kVectors); ++q) {
        float rows[kVector];
#pragma unroll
        for (int r = 0; r < kVector; ++r) rows[r] = sums[0][q * kVector + r];
        send(to + q * S::kUnits * uint32_t(sizeof(Rows)) + receiver, rows,
             arrival.address + 8 * slot + receiver);
      }
    }
  }
  if (owner) {
    if (steps > 0 && a.grad_hx != nullptr) {
      cell.receive_of_this(receive(steps - 1));
    }
    cell.store_state();
  }
#endif
}

// ---- launches -----------------------------------------------------------------------------------

template <bool kBackward, int kPerLane, int kTile, class Use>
cudaError_t with_kernel(const Use& use) {
  if constexpr (kBackward)
    return use(Shape<kPerLane, kTile>(), backward_kernel<kPerLane, kTile>);
  else
    return use(Shape<kPerLane, kTile>(), forward_kernel<kPerLane, kTile>);
}

template <bool kBackward, int kPerLane, class Use>
cudaError_t with_kernel(int tile, const Use& use) {
  switch (tile) {
    case 1: return with_kernel<kBackward, kPerLane, 1>(use);
    case 4: return with_kernel<kBackward, kPerLane, 4>(use);
    case 8: return with_kernel<kBackward, kPerLane, 8>(use);
  }
  return cudaErrorInvalidValue;
}

// Calls `use(shape, kernel)` with the kernel for this hidden size and tile.
template <bool kBackward, class Use>
cudaError_t with_kernel(int tile, int64_t hidden, const Use& use) {
  if (hidden <= 128) return with_kernel<kBackward, 8>(tile, use);
  if (hidden <= 192) return with_kernel<kBackward, 12>(tile, use);
  if (hidden <= 256) return with_kernel<kBackward, 16>(tile, use);
  if (hidden <= 384) return with_kernel<kBackward, 24>(tile, use);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t lstm_forward_cluster(Storage storage, int tile, const Sequence& sequence,
                                 const ClusterForward& a, cudaStream_t stream) {
  if (sequence.hidden <= kBlockHidden) return lstm_forward_block(storage, sequence, a, stream);
  if (storage != Storage::Float) return lstm_forward_cluster_16(storage, sequence, a, stream);
  return with_kernel<false>(tile, sequence.hidden, [&](auto shape, auto kernel) {
    return launch_clusters(shape, kernel, tile, sequence, a, stream);
  });
}

cudaError_t lstm_backward_cluster(Storage storage, int tile, const Sequence& sequence,
                                  const ClusterBackward& a, cudaStream_t stream) {
  if (sequence.hidden <= kBlockHidden) return lstm_backward_block(storage, sequence, a, stream);
  if (storage != Storage::Float) return lstm_backward_cluster_16(storage, sequence, a, stream);
  return with_kernel<true>(tile, sequence.hidden, [&](auto shape, auto kernel) {
    return launch_clusters(shape, kernel, tile, sequence, a, stream);
  });
}

namespace {

ClusterCount count_of(Storage storage, int tile, int64_t hidden, bool backward) {
  if (storage != Storage::Float) return lstm_count_clusters_16(storage, hidden, backward);
  ClusterCount count;
  auto counted = [&](auto shape, auto kernel) {
    count = count_clusters(shape, kernel, tile);
    return cudaSuccess;
  };
  if (backward)
    with_kernel<true>(tile, hidden, counted);
  else
    with_kernel<false>(tile, hidden, counted);
  return count;
}

// Costs of a step in cycles; what a warp issues was counted in the machine code.
constexpr double kTrip = 800;      // between blocks, with the latencies of a step's arithmetic
constexpr double kByStep = 20000;  // of the host, for a GEMM and a kernel
constexpr double kResident[2] = {4000, 7500};  // other kernels for 16 bits, forward and backward
constexpr int64_t kResidentRows = 2048;

double issued(Storage storage, int64_t hidden, int tile, bool backward) {
  if (storage != Storage::Float) return (backward ? 360 : 280) + hidden / 8.0;
  return (backward ? 350 : 220) + 12 * tile + hidden / 4.0 * tile;
}

}  // namespace

int lstm_cluster_tile(Storage storage, int64_t hidden, int64_t batch, bool backward) {
  const bool single = storage == Storage::Float;
  if (storage == Storage::Double || hidden > (single ? 384 : 512) || batch == 0) return 0;
  // One block a row; tensor cores take many 16-bit rows together.
  if (hidden <= kBlockHidden) return single || batch <= 512 ? 1 : 0;
  int device = 0, major = 0, multiprocessors = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (major < 9) return 0;

  // Counted once for each kernel.
  using Key = std::tuple<int, Storage, int, int64_t, bool>;
  static std::mutex mutex;
  static std::map<Key, ClusterCount> counts;
  const std::lock_guard<std::mutex> lock(mutex);

  auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const double gemm = 4.0 * hidden * hidden * batch / (multiprocessors * (single ? 80 : 640));
  double least = std::max(kByStep, 4000 + gemm);
  if (!single && (hidden <= 128 || hidden % 8 == 0))
    least = std::min(least, kResident[backward] * ceil_div(batch, kResidentRows));
  int best = 0;
  for (const int tile : {1, 4, 8}) {
    if (!single && tile < 8) continue;
    const Key key = {device, storage, tile, (hidden + 63) / 64, backward};
    const auto found = counts.find(key);
    const ClusterCount count =
        found != counts.end()
            ? found->second
            : counts.emplace(key, count_of(storage, tile, hidden, backward)).first->second;
    if (count.active == 0) continue;
    const int64_t clusters = ceil_div(batch, tile), turns = ceil_div(clusters, count.active);
    const double cycles = issued(storage, hidden, tile, backward) * count.threads / 128;
    const int64_t sharing =
        ceil_div(std::min<int64_t>(clusters, count.active) * count.blocks, multiprocessors);
    const double step = turns * std::max(kTrip + cycles, sharing * cycles);
    if (step < least) {
      least = step;
      best = tile;
    }
  }
  return best;
}

}  // namespace seqmem::cuda
