// The persistent LSTM's steps backward, in one launch; lstm_persistent_common.h says how its blocks
// exchange dz. A block takes 8 units and kTiles x 16 batch rows, its warps a share of 4H each:
//   registers  weight_hh of its units, transposed [8, 4H], over the lanes of all warps; d_c of its
//              cells, a thread for each unit and row
//   shared     sums of each warp [tiles, 8 warps, 16, 8], in two buffers that take turns
//   L2         dz [rows, 4H]
// For each step t, the last first:
//   every thread asks for gates, cells and incoming gradients of its cells, before it waits
//   for each tile, every warp
//     rows = dz_(t+1) [16, its share of 4H], loaded until none is kNotYet; zeros at the last step
//     and where the state is cut
//     sum [16, 8] = rows weight_hh on tensor cores, to shared memory
//   barrier of the block: the only one, since the next step writes the other buffer
//   for each of its cells, every thread
//     dh = grad_output_t + the sums of all warps, and grad_hy at the last step
//     d_c += grad_cells_t + dh o (1 - tanh(c)^2)
//     dz_t of the four gates from dh, d_c and grad_gates_t, for those who wait; d_c = d_c f
// The gradients of weights and of what h and x were come from dz, in products of the launcher's.
//
// A step exchanges four times as much as one forward.
#include "lstm_persistent_common.h"

namespace seqmem::cuda {
namespace {

// A vector of elements that are `stride` apart.
template <class T>
__device__ Words gathered(const T* from, int stride) {
  union {
    Words words;
    T elements[kVector<T>];
  } vector;
#pragma unroll
  for (int n = 0; n < kVector<T>; ++n) vector.elements[n] = from[int64_t(n) * stride];
  return vector.words;
}

// The inner dimension is that of dz: kBlocks of kInner<T> for each warp, as many at a time as
// registers hold.
template <class T, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const PersistentLayout layout, const PersistentBackward a) {
  extern __shared__ float partial[];  // [2][kTiles][kWarps][kCells]
  constexpr int kAtOnce = kTiles == 4 || kBlocks == 32 ? 4 : kBlocks <= 12 ? kBlocks : 8;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int H = int(layout.hidden), steps = int(layout.steps), unit0 = blockIdx.x * kUnits;
  const int64_t b0 = int64_t(blockIdx.y) * kTiles * kTile;
  const bool reverse = layout.reverse;

  // Of unit lane / 4: eight rows of weight_hh.
  Words weights[kBlocks];
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    const int at = (warp + k * kWarps) * kInner<T> + lane % 4 * kVector<T>;
    const T* const column = static_cast<const T*>(a.weight_hh) + int64_t(at) * H + unit0 + lane / 4;
    weights[k] = at < 4 * H ? gathered(column, H) : Words{};
  }
  int lengths[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      lengths[m][r] = length_of(layout, b0 + m * kTile + lane / 4 + 8 * r);
  }

  constexpr int kOwn = (kTiles + 1) / 2;
  const int half = thread / kCells, cell = thread % kCells, unit = unit0 + cell % kUnits;
  const bool owner = half < kTiles;
  float d_c[kOwn];
  int own_length[kOwn];
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    const bool there = owner && b < layout.batch;
    own_length[m] = there ? length_of(layout, b) : 0;
    d_c[m] = there ? a.d_c[b * H + unit] : 0.0f;
  }

  for (int step = 0; step < steps; ++step) {
    const int t = reverse ? step : steps - 1 - step;
    const int after = reverse ? t - 1 : t + 1, before = reverse ? t + 1 : t - 1;
    const int seam_after = reverse ? t : t + 1, seam_before = reverse ? t + 1 : t;

    // Asked for before waiting.
    float gates[kOwn][4] = {}, d_gates[kOwn][4] = {}, cells[kOwn] = {}, c_before[kOwn] = {};
    float d_h[kOwn] = {}, d_cell[kOwn] = {};
    bool cut[kOwn] = {};
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits, at = row_of(layout, t, b);
      const int length = own_length[m];
      if (t >= length) continue;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        gates[m][g] = element<T>(a.gates, (at * 4 + g) * H + unit);
        d_gates[m][g] = element<T>(a.grad_gates, (at * 4 + g) * H + unit);
      }
      cells[m] = element<T>(a.cells, at * H + unit);
      cut[m] = cut_at(layout, seam_before, b, length);
      if (!cut[m]) {
        const bool inside = before >= 0 && before < length;
        c_before[m] = inside ? element<T>(a.cells, row_of(layout, before, b) * H + unit)
                             : element<T>(a.cx, b * H + unit);
      }
      d_h[m] = element<T>(a.grad_output, at * H + unit);
      if (after < 0 || after >= length) d_h[m] += element<T>(a.grad_hy, b * H + unit);
      d_cell[m] = element<T>(a.grad_cells, at * H + unit);
    }

    float* const sums = partial + step % 2 * (kTiles * kWarps * kCells);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Source source[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t b = b0 + m * kTile + lane / 4 + 8 * r;
        const int length = lengths[m][r];
        const bool awaited =
            t < length && after >= 0 && after < length && !cut_at(layout, seam_after, b, length);
        const T* dz = static_cast<const T*>(a.dz);
        source[r] = {awaited ? dz + row_of(layout, after, b) * 4 * H : nullptr, awaited};
      }
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < kBlocks; k += kAtOnce) {
        Words low[kAtOnce], high[kAtOnce];
        await<T, false>(low, high, source[0], source[1], warp + k * kWarps, kWarps, 4 * H);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) multiply_add<T>(sum, low[n], high[n], weights[k + n]);
      }
      float* const to = sums + (m * kWarps + warp) * kCells + lane / 4 * kUnits + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
      *reinterpret_cast<float2*>(to + 8 * kUnits) = {sum[2], sum[3]};
    }
    __syncthreads();

    if (!owner) continue;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int tile = 2 * m + half;
      if (tile >= kTiles) break;
      const int64_t b = b0 + tile * kTile + cell / kUnits, at = row_of(layout, t, b);
      float d_output = d_h[m];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) d_output += sums[(tile * kWarps + w) * kCells + cell];
      const float i = gates[m][0], f = gates[m][1], g = gates[m][2], o = gates[m][3];
      const float tanh_c = tanh_of<T>(cells[m]);
      const float d_state = d_c[m] + d_cell[m] + d_output * o * (1.0f - tanh_c * tanh_c);
      float dz[4] = {(d_gates[m][0] + d_state * g) * i * (1.0f - i),
                     (d_gates[m][1] + d_state * c_before[m]) * f * (1.0f - f),
                     (d_gates[m][2] + d_state * i) * (1.0f - g * g),
                     (d_gates[m][3] + d_output * tanh_c) * o * (1.0f - o)};
      const bool active = t < own_length[m];
      if (active) d_c[m] = cut[m] ? 0.0f : d_state * f;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        publish(static_cast<T*>(a.dz) + (at * 4 + q) * H + unit, active ? dz[q] : 0.0f,
                b < layout.batch);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t b = b0 + (2 * m + half) * kTile + cell / kUnits;
    if (owner && 2 * m + half < kTiles && b < layout.batch) a.d_c[b * H + unit] = d_c[m];
  }
}

}  // namespace

cudaError_t lstm_backward_persistent(Storage storage, const PersistentLayout& layout,
                                     const PersistentBackward& a, cudaStream_t stream) {
  const Grid grid = choose(layout.batch, layout.hidden);
  return with_size(storage, layout.hidden, [&](auto tag, auto blocks) {
    using T = decltype(tag);
    constexpr int kBlocks = 4 * blocks.value;
    const auto kernel = grid.tiles == 1   ? backward_kernel<T, kBlocks, 1>
                        : grid.tiles == 2 ? backward_kernel<T, kBlocks, 2>
                                          : backward_kernel<T, kBlocks, 4>;
    return launch(kernel, grid, 1, layout, a, stream);
  });
}

}  // namespace seqmem::cuda
