// The persistent LSTM's steps forward, in one launch; lstm_persistent_common.h says how its blocks
// exchange h. A block takes 8 units and kTiles x 16 batch rows, its warps a share of H each:
//   registers  weight_hh of its units [4, 8, H], over the lanes of all warps; c and h of its cells,
//              a thread for each unit and row; their z [4] of the step
//   shared     sums of each warp [tiles, 8 warps, 4, 16, 8], in two buffers that take turns
//   L2         output [rows, H], which is h for all blocks
// For each step t:
//   for each tile, every warp
//     rows = h_(t-1) [16, its share of H], loaded until none is kNotYet; hx at the first step,
//     zeros where the state is cut
//     sum [4, 16, 8] = rows weight_hh^T on tensor cores, to shared memory
//   barrier of the block: the only one, since the next step writes the other buffer
//   for each of its cells, every thread
//     i, f, g, o = sigmoid or tanh(z_t + biases + the sums of all warps)
//     c = f c + i g; h = o tanh(c)
//     h to output, for those who wait; gates and cells if wanted
//
// Floor of a step at H 768, 16 rows: 24 kB of h to each of 96 blocks through L2 0.45 us, the trip
// through L2 0.7 us, products and sums 0.2 us.
#include "lstm_persistent_common.h"

namespace seqmem::cuda {
namespace {

template <class T, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const PersistentLayout layout, const PersistentForward a) {
  extern __shared__ float partial[];  // [2][kTiles][kWarps][4][kCells]
  constexpr int kAtOnce = kBlocks <= (kTiles == 4 ? 4 : 6) ? kBlocks : kBlocks / 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int H = int(layout.hidden), steps = int(layout.steps), unit0 = blockIdx.x * kUnits;
  const int64_t b0 = int64_t(blockIdx.y) * kTiles * kTile;
  const bool reverse = layout.reverse;

  // Of unit lane / 4 and gate g.
  Words weights[4][kBlocks];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      const int at = (warp + k * kWarps) * kInner<T> + lane % 4 * kVector<T>;
      const T* from =
          static_cast<const T*>(a.weight_hh) + (int64_t(g) * H + unit0 + lane / 4) * H + at;
      weights[g][k] = at < H ? *reinterpret_cast<const Words*>(from) : Words{};
    }
  }

  // The two rows of each tile whose products this lane feeds.
  int lengths[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      lengths[m][r] = length_of(layout, b0 + m * kTile + lane / 4 + 8 * r);
  }

  // The cells that this thread computes: of every tile, or of every second one.
  constexpr int kOwn = (kTiles + 1) / 2;
  const int half = thread / kCells, cell = thread % kCells, unit = unit0 + cell % kUnits;
  const bool owner = half < kTiles;
  float bias[4], c[kOwn], h[kOwn];
  int own_length[kOwn];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int64_t at = int64_t(g) * H + unit;
    bias[g] = element<T>(a.bias_ih, at) + element<T>(a.bias_hh, at);
  }
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    const bool there = owner && b < layout.batch;
    own_length[m] = there ? length_of(layout, b) : 0;
    c[m] = there ? a.c[b * H + unit] : 0.0f;
    h[m] = there ? element<T>(a.hx, b * H + unit) : 0.0f;
  }

  // What a step needs besides h: asked for a step before where registers allow, or before waiting.
  constexpr bool kAhead = kTiles == 1;
  float asked_z[kOwn][4] = {};
  bool asked_cut[kOwn] = {};
  auto ask = [&](int step) {
    const int t = reverse ? steps - 1 - step : step, seam = reverse ? t + 1 : t;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
      if (step >= steps || t >= own_length[m]) continue;
#pragma unroll
      for (int g = 0; g < 4; ++g)
        asked_z[m][g] = element<T>(a.z, (row_of(layout, t, b) * 4 + g) * H + unit);
      asked_cut[m] = cut_at(layout, seam, b, own_length[m]);
    }
  };
  if constexpr (kAhead) ask(0);

  for (int step = 0; step < steps; ++step) {
    const int t = reverse ? steps - 1 - step : step, before = reverse ? t + 1 : t - 1;
    const int seam = reverse ? t + 1 : t;

    if constexpr (!kAhead) ask(step);
    float z[kOwn][4];
    bool cut[kOwn];
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      cut[m] = asked_cut[m];
#pragma unroll
      for (int g = 0; g < 4; ++g) z[m][g] = asked_z[m][g];
    }
    if constexpr (kAhead) ask(step + 1);

    float* const sums = partial + step % 2 * (kTiles * kWarps * 4 * kCells);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Source source[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t b = b0 + m * kTile + lane / 4 + 8 * r;
        const int length = lengths[m][r];
        const bool zeros = t >= length || cut_at(layout, seam, b, length);
        const bool awaited = !zeros && before >= 0 && before < length;
        const T* given = static_cast<const T*>(awaited ? a.output : a.hx);
        const int64_t row = awaited ? row_of(layout, before, b) : b;
        source[r] = {zeros || given == nullptr ? nullptr : given + row * H, awaited};
      }
      float sum[4][4] = {};
#pragma unroll
      for (int k = 0; k < kBlocks; k += kAtOnce) {
        Words low[kAtOnce], high[kAtOnce];
        await<T, kTiles == 1>(low, high, source[0], source[1], warp + k * kWarps, kWarps, H);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n)
            multiply_add<T>(sum[g], low[n], high[n], weights[g][k + n]);
        }
      }
      float* const to = sums + (m * kWarps + warp) * 4 * kCells + lane / 4 * kUnits + lane % 4 * 2;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        *reinterpret_cast<float2*>(to + g * kCells) = {sum[g][0], sum[g][1]};
        *reinterpret_cast<float2*>(to + g * kCells + 8 * kUnits) = {sum[g][2], sum[g][3]};
      }
    }
    __syncthreads();

    if (!owner) continue;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int tile = 2 * m + half;
      if (tile >= kTiles) break;
      const int64_t b = b0 + tile * kTile + cell / kUnits, at = row_of(layout, t, b);
      float gates[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        gates[g] = z[m][g] + bias[g];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          gates[g] += sums[((tile * kWarps + w) * 4 + g) * kCells + cell];
        }
        gates[g] = g == 2 ? tanh_of<T>(gates[g]) : sigmoid_of<T>(gates[g]);
      }
      const bool active = t < own_length[m];
      if (active) {
        c[m] = (cut[m] ? 0.0f : gates[1] * c[m]) + gates[0] * gates[2];
        h[m] = gates[3] * tanh_of<T>(c[m]);
      }
      publish(static_cast<T*>(a.output) + at * H + unit, active ? h[m] : 0.0f, b < layout.batch);
      if (b >= layout.batch) continue;
      if (a.gates != nullptr) {
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          static_cast<T*>(a.gates)[(at * 4 + g) * H + unit] = narrow<T>(active ? gates[g] : 0.0f);
        }
      }
      if (a.cells != nullptr) {
        static_cast<T*>(a.cells)[at * H + unit] = narrow<T>(active ? c[m] : 0.0f);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    if (!owner || 2 * m + half >= kTiles || b >= layout.batch) continue;
    static_cast<T*>(a.hy)[b * H + unit] = narrow<T>(h[m]);
    a.c[b * H + unit] = c[m];
  }
}

}  // namespace

int64_t lstm_persistent_rows(Storage storage, int64_t batch, int64_t hidden) {
  if (storage == Storage::Double || hidden % kUnits != 0 || hidden > kMaxHidden || hidden == 0 ||
      batch == 0)
    return 0;
  return choose(batch, hidden).rows();
}

cudaError_t lstm_forward_persistent(Storage storage, const PersistentLayout& layout,
                                    const PersistentForward& a, cudaStream_t stream) {
  const Grid grid = choose(layout.batch, layout.hidden);
  return with_size(storage, layout.hidden, [&](auto tag, auto blocks) {
    using T = decltype(tag);
    constexpr int kBlocks = blocks.value;
    const auto kernel = grid.tiles == 1   ? forward_kernel<T, kBlocks, 1>
                        : grid.tiles == 2 ? forward_kernel<T, kBlocks, 2>
                                          : forward_kernel<T, kBlocks, 4>;
    return launch(kernel, grid, 4, layout, a, stream);
  });
}

}  // namespace seqmem::cuda
