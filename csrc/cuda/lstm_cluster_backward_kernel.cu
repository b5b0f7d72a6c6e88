// The LSTM's cluster kernel backward, float32; lstm_cluster_common.h describes the exchanges
// between blocks. A cluster takes kTile batch rows, a block kUnits of its units:
//   registers  of a lane: weight_hh [kPerLane, 4] of some rows of its block and four k; of a thread
//              that owns a unit and row: its dh and dc, and what its next step needs
//   shared     parts of dh [blocks, kTile, kUnits], one from each block, in two buffers that take
//              turns; dz [kTile, 4 kUnits] of this block, likewise
// For each step t, the last first:
//   the threads that own a unit and row (BackwardCell)
//     ask for the step before; wait for all parts of dh, and add them in the order of the blocks
//     dz_t [4] from dh, dc and the saved gates and cells, to shared and to global memory
//   barrier of the block
//   sums [4, kTile] = dz_t . weights over the lane's rows
//   across the lanes that split the block's rows, in stages; the part of dh for k to k's block
// After the last: grad_hx, from one more exchange if wanted, and grad_cx.
#include "lstm_cluster_32.h"

namespace seqmem::cuda {
namespace {

// Four k belong to the kSplit lanes that split the block's 4 kUnits rows of weight_hh; sums across
// those lanes are taken in stages, as forward's. One thread each computes the gates' gradients of a
// (unit, row).
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

template <int kPerLane, int kTile>
auto kernel_of(Shape<kPerLane, kTile>) {
  return backward_kernel<kPerLane, kTile>;
}

}  // namespace

cudaError_t lstm_backward_cluster(Storage storage, int tile, const Sequence& sequence,
                                  const ClusterBackward& a, cudaStream_t stream) {
  if (sequence.hidden <= kBlockHidden) return lstm_backward_block(storage, sequence, a, stream);
  if (storage != Storage::Float) return lstm_backward_cluster_16(storage, sequence, a, stream);
  return with_shape(tile, sequence.hidden, [&](auto shape) {
    return launch_clusters(shape, kernel_of(shape), tile, sequence, a, stream);
  });
}

ClusterCount lstm_count_clusters_backward(int tile, int64_t hidden) {
  ClusterCount count;
  with_shape(tile, hidden, [&](auto shape) {
    count = count_clusters(shape, kernel_of(shape), tile);
    return cudaSuccess;
  });
  return count;
}

}  // namespace seqmem::cuda
