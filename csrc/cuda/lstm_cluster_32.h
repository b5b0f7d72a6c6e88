// The shape of the cluster kernels for float32, which forward and backward share. The inner
// dimension H is padded to 16 kPerLane, so that few kernels serve all sizes: 16 lanes a unit, 4
// kPerLane weights each in registers.
#pragma once

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

// Calls `use` with the shape for this hidden size and tile.
template <int kPerLane, class Use>
cudaError_t with_shape(int tile, const Use& use) {
  switch (tile) {
    case 1: return use(Shape<kPerLane, 1>());
    case 4: return use(Shape<kPerLane, 4>());
    case 8: return use(Shape<kPerLane, 8>());
  }
  return cudaErrorInvalidValue;
}

template <class Use>
cudaError_t with_shape(int tile, int64_t hidden, const Use& use) {
  if (hidden <= 128) return with_shape<8>(tile, use);
  if (hidden <= 192) return with_shape<12>(tile, use);
  if (hidden <= 256) return with_shape<16>(tile, use);
  if (hidden <= 384) return with_shape<24>(tile, use);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace seqmem::cuda
