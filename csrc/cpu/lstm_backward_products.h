// dz times a weight: [rows, 4H] by [4H, N] gives the gradient of h or of x.
//
//   pack      panel[4 vectors of columns][vector of units][gate][lane][column]; the last panel may
//             be narrower. In the order in which a row of dz is stored: the sum over the gates of
//             all units is then one run.
//   multiply  one panel, row blocks by tiles, the sum in slices of kSlice gates whose weights stay
//             in L2 while the rows pass; between slices it waits in the result
//
// Weights whose type is that of the products are multiplied where they lie if only few rows would
// use a packed copy.
#pragma once

#include "../common/gemm.h"
#include "lstm_common.h"

namespace seqmem::lstm {
namespace {

// An odd number of cache lines in a row spreads a column over all the cache's sets.
template <class C>
SEQMEM_INLINE int64_t odd_lines(int64_t width) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(C));
  return (ceil_div(width, line) | 1) * line;
}

// dz of a chunk's rows: [row][vector of units][gate][lane].
template <class C>
struct GateGradients {
  const int64_t stride;  // of a row
  C* data = nullptr;

  explicit GateGradients(int64_t units) : stride(odd_lines<C>(units * 4 * kLanes<C>)) {}
  SEQMEM_INLINE C* of(int64_t u, int64_t row) const {
    return data + row * stride + u * 4 * kLanes<C>;
  }
};

template <class S>
class WeightProduct {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr int64_t kSlice = 512;

  const S* const weight;  // [4H, N]
  const int64_t H, N, units;
  const bool packs;
  C* panels;

 public:
  WeightProduct(const void* weight, int64_t H, int64_t N, bool packs)
      : weight(static_cast<const S*>(weight)), H(H), N(N), units(ceil_div(H, L)), packs(packs) {}

  void place(Carver& take) { panels = take.array<C>(packs ? units * W * padded<C>(N) : 0); }

  // The gates of one vector of units.
  void pack(int64_t u) {
    if (!packs) return;
    const int64_t N_pad = padded<C>(N);
    for (int64_t i = 0; i < N_pad; i += W) {
      const int64_t width = min<int64_t>(W, N_pad - i);
      C* to = panels + i * units * W + u * W * width;
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g)
        for (int64_t l = 0; l < L; ++l, to += width) {
          const int64_t unit = u * L + l;
          const S* from = weight + (g * H + unit) * N + i;
          for (int64_t j = 0; j < width; j += L)
            store(to + j, unit < H ? load_n(from + j, static_cast<int>(N - i - j)) : Vec<C>{});
        }
    }
  }

  // result[j] = dz[row_of(j)] times the NV vectors of columns from vector v on, for `count` rows.
  template <int NV, class RowOf>
  SEQMEM_INLINE void multiply(const GateGradients<C>& dz, int64_t count, RowOf row_of, int64_t v,
                              C* result, int64_t result_stride) const {
    const C* columns = panels + v * L * units * W;
    for (int64_t slice = 0; slice < units; slice += kSlice / W) {
      const int64_t end = min<int64_t>(slice + kSlice / W, units);
      for_row_blocks<C>(count, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        Vec<C> acc[R][NV];
        start_sums(acc);
        const C* from[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          from[r] = dz.of(slice, row_of(start + r));
          if (slice == 0) continue;
          SEQMEM_UNROLL
          for (int i = 0; i < NV; ++i)
            acc[r][i] = load(result + (start + r) * result_stride + i * L);
        }
        if (packs) {
          tile_multiply<R, NV, C>((end - slice) * W, from, 1, columns + slice * W * NV * L, L,
                                  NV * L, acc);
        } else {
          for (int64_t u = slice; u < end; ++u) multiply_unpacked<R, NV>(from, u, v, acc);
        }
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int i = 0; i < NV; ++i) store(result + (start + r) * result_stride + i * L, acc[r][i]);
      });
    }
  }

  // The rows of one thread, all columns, to where `index` says that they belong; `scratch` holds
  // them by a panel's width.
  void multiply_rows(const GateGradients<C>& dz, Share rows, const int64_t* index, S* to,
                     C* scratch) const {
    for_panels(0, ceil_div(N, L), [&](auto columns, int64_t v) {
      constexpr int NV = decltype(columns)::value;
      multiply<NV>(
          dz, rows.end - rows.begin, [&](int64_t j) { return rows.begin + j; }, v, scratch, W);
      const int width = static_cast<int>(min<int64_t>(NV * L, N - v * L));
      for (int64_t j = rows.begin; j < rows.end; ++j)
        store_row(to + index[j] * N + v * L, scratch + (j - rows.begin) * W, width);
    });
  }

 private:
  // The gates of one vector of units; moves `from` to the next.
  template <int R, int NV>
  SEQMEM_INLINE void multiply_unpacked(const C* (&from)[R], int64_t u, int64_t v,
                                       Vec<C> (&acc)[R][NV]) const {
    const int64_t lanes = min<int64_t>(L, H - u * L);
    const int width = static_cast<int>(min<int64_t>(NV * L, N - v * L));
    for (int g = 0; g < 4; ++g) {
      const C* b = reinterpret_cast<const C*>(weight) + (g * H + u * L) * N + v * L;
      if (width == NV * L) {
        tile_multiply<R, NV, C>(lanes, from, 1, b, L, N, acc);
      } else {
        for (int64_t k = 0; k < lanes; ++k) SEQMEM_UNROLL
        for (int i = 0; i < NV; ++i) {
          const Vec<C> w = load_n(b + k * N + i * L, width - i * L);
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) acc[r][i] += from[r][k] * w;
        }
      }
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) from[r] += L;
    }
  }
};

}  // namespace
}  // namespace seqmem::lstm
