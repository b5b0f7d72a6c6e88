// Which tile of batch rows the LSTM's cluster kernels take, or that another way is quicker; no
// kernels here. The cycles of a step, estimated for each tile:
//   cycles = what a warp issues, times a block's warps, over the four that issue at once
//   turns  = clusters over those that run at once
//   step   = turns max(trip + cycles, sharing cycles); sharing: blocks on a multiprocessor
// Beside them stand a GEMM and a kernel for each step and, for 16 bits, the other kernels that loop
// over time.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "lstm_cluster_common.h"

namespace seqmem::cuda {
namespace {

ClusterCount count_of(Storage storage, int tile, int64_t hidden, bool backward) {
  if (storage != Storage::Float) return lstm_count_clusters_16(storage, hidden, backward);
  return backward ? lstm_count_clusters_backward(tile, hidden)
                  : lstm_count_clusters_forward(tile, hidden);
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
