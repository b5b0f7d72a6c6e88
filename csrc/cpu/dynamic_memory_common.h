// What the dynamic memory's forward and backward kernels share: products over many rows (tiles),
// products of one row (streams), packing, and access to the arguments.
//
// Letters: B batch rows, N slots of m elements, h a query's width. `m_pad` and `h_pad` are m and h
// rounded up to whole vectors; what is computed beyond m or h is never read.
#pragma once

#include "../common/dot.h"
#include "../common/gemm.h"
#include "../common/kernel_util.h"
#include "../common/softmax.h"
#include "dynamic_memory_kernel.h"

namespace seqmem::dynamic_memory {
namespace {

template <class C>
inline constexpr int64_t kPanel = 4 * kLanes<C>;  // columns of a panel

// Elements from one row to the next: large powers of two would send all rows to the same cache
// lines.
template <class C>
SEQMEM_INLINE int64_t row_stride(int64_t n) {
  const int64_t n_pad = padded<C>(n);
  return n_pad * int64_t(sizeof(C)) % 512 == 0 ? n_pad + kLanes<C> : n_pad;
}

// A matrix of K rows cut into panels of 4 vectors: element (k, c) is stored at
// data[c / kPanel * panel + k * step + c % kPanel].
template <class C>
struct Panels {
  const C* data;
  int64_t panel, step;
};
template <class C>
SEQMEM_INLINE Panels<C> packed(const C* data, int64_t K) {
  return {data, K * kPanel<C>, kPanel<C>};
}
template <class C>
SEQMEM_INLINE Panels<C> unpacked(const C* data, int64_t stride) {
  return {data, kPanel<C>, stride};
}
template <class C>
SEQMEM_INLINE int64_t packed_size(int64_t K, int64_t columns) {
  return ceil_div(columns, kPanel<C>) * kPanel<C> * K;
}

// One block of columns of `multiply`, NV vectors wide.
template <int NV, class C>
SEQMEM_INLINE void multiply_panel(int64_t rows, int64_t K, const C* a, int64_t a_row,
                                  int64_t a_step, const C* b, int64_t b_step, C* out,
                                  int64_t out_row, int last, bool accumulate) {
  constexpr int L = kLanes<C>;
  for_row_blocks<C>(rows, [&](auto block, int64_t start) {
    constexpr int R = decltype(block)::value;
    Vec<C> acc[R][NV];
    start_sums(acc);
    const C* row[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      row[r] = a + (start + r) * a_row;
      if (!accumulate) continue;
      C* to = out + (start + r) * out_row;
      SEQMEM_UNROLL
      for (int v = 0; v < NV - 1; ++v) acc[r][v] = load(to + v * L);
      acc[r][NV - 1] = load_n(to + (NV - 1) * L, last);
    }
    tile_multiply<R, NV, C>(K, row, a_step, b, L, b_step, acc);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      C* to = out + (start + r) * out_row;
      SEQMEM_UNROLL
      for (int v = 0; v < NV - 1; ++v) store(to + v * L, acc[r][v]);
      store_n(to + (NV - 1) * L, acc[r][NV - 1], last);
    }
  });
}

// out[r][c] (+)= sum_k a[r * a_row + k * a_step] * b(k, c), for k in pieces of b that stay in L1.
template <class C>
__attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t K, const C* a,
                                        int64_t a_row, int64_t a_step, Panels<C> b, C* out,
                                        int64_t out_row, bool accumulate) {
  constexpr int64_t L = kLanes<C>, kDepth = 64;
  for (int64_t k = 0; k < K || (k == 0 && !accumulate); k += kDepth) {
    const int64_t depth = min(kDepth, K - k);
    for (int64_t c = 0; c < columns; c += kPanel<C>) {
      const C* panel = b.data + c / kPanel<C> * b.panel + k * b.step;
      auto run = [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        const int last = static_cast<int>(min(L, columns - c - (NV - 1) * L));
        multiply_panel<NV, C>(rows, depth, a + k * a_step, a_row, a_step, panel, b.step, out + c,
                              out_row, last, accumulate || k > 0);
      };
      for_count<4>(min<int64_t>(4, ceil_div(columns - c, L)), run);
    }
  }
}

// to[panel][k][column] = from[column * stride + k], for these panels of kPanel columns each.
template <class C, class S>
void pack_panels_transposed(C* to, const S* from, int64_t stride, int64_t K, int64_t columns,
                            Share panels) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    C* panel = to + p * K * kPanel<C>;
    for (int64_t v = 0; v < kPanel<C>; v += L) {
      const int64_t first = p * kPanel<C> + v;
      pack_transposed(panel + v, kPanel<C>, from + first * stride, stride,
                      max<int64_t>(0, min(L, columns - first)), K);
    }
  }
}

// to[panel][first + k][column] = from[k * stride + column], in panels of `depth` rows.
template <class C, class S>
void pack_rows(C* to, int64_t depth, int64_t first, const S* from, int64_t stride, int64_t K,
               int64_t columns) {
  constexpr int64_t L = kLanes<C>;
  const int64_t vectors = ceil_div(columns, kPanel<C>) * 4;
  for (int64_t v = 0; v < vectors; ++v) {
    C* panel = to + v / 4 * depth * kPanel<C> + v % 4 * L;
    const int n = static_cast<int>(max<int64_t>(0, min(L, columns - v * L)));
    for (int64_t k = 0; k < K; ++k)
      store(panel + (first + k) * kPanel<C>, load_n(from + k * stride + v * L, n));
  }
}

// out[c] += sum_k a[k] * b[k * b_row + c], NV vectors; the last, at column `last`, has n lanes and
// may overlap the one before.
template <int NV, class C, class S>
SEQMEM_INLINE void weigh_columns(int64_t K, const C* a, const S* b, int64_t b_row, C* out,
                                 int64_t last, int n) {
  constexpr int L = kLanes<C>;
  Vec<C> acc[NV];
  start_sums(acc);
  for (int64_t k = 0; k < K; ++k) {
    const Vec<C> x = splat(a[k]);
    SEQMEM_UNROLL
    for (int v = 0; v < NV - 1; ++v) acc[v] += x * load(b + k * b_row + v * L);
    acc[NV - 1] += x * load_n(b + k * b_row + last, n);
  }
  // The last one first: the vector before it then overwrites the overlap with the same sums.
  const Vec<C> before = load_n(out + last, n);
  Vec<C> sums[NV];
  SEQMEM_UNROLL
  for (int v = 0; v < NV - 1; ++v) sums[v] = load(out + v * L) + acc[v];
  store_n(out + last, before + acc[NV - 1], n);
  SEQMEM_UNROLL
  for (int v = 0; v < NV - 1; ++v) store(out + v * L, sums[v]);
}

// out[c] += sum_k a[k] * b[k][c] for one row of weights.
template <class C, class S>
__attribute__((noinline)) void weigh(int64_t K, int64_t columns, const C* a, const S* b,
                                     int64_t b_row, C* out) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t c = 0; c < columns; c += 8 * L) {
    const int64_t left = min(8 * L, columns - c);
    const int64_t last = max<int64_t>(0, left - L);
    const int n = static_cast<int>(min(L, left));
    auto run = [&](auto vectors) {
      weigh_columns<decltype(vectors)::value, C, S>(K, a, b + c, b_row, out + c, last, n);
    };
    for_count<8>(ceil_div(left, L), run);
  }
}

// Calls f(begin, end) for each run of slots that a row's mask allows; all of them without a mask.
template <class F>
SEQMEM_INLINE void for_runs(const bool* mask, int64_t N, F&& f) {
  if (mask == nullptr) return f(int64_t(0), N);
  for (int64_t n = 0; n < N;) {
    while (n < N && !mask[n]) ++n;
    const int64_t begin = n;
    while (n < N && mask[n]) ++n;
    if (begin < n) f(begin, n);
  }
}

// The sum of a row's attention: one, or zero where its mask allows no slot.
template <class C>
SEQMEM_INLINE C attention_sum(const bool* mask, int64_t N) {
  bool any = false;
  for_runs(mask, N, [&](int64_t, int64_t) { any = true; });
  return any ? C(1) : C(0);
}

// Zero in the slots that the mask forbids.
template <class C>
SEQMEM_INLINE void clear_masked(const bool* mask, int64_t N, C* row) {
  if (mask == nullptr) return;
  for (int64_t n = 0; n < N; ++n) row[n] = mask[n] ? row[n] : C(0);
}

// Rows that go through all hops together: the weights are then read once for all of them, while
// their own memories stay in L2.
template <class S>
SEQMEM_INLINE int64_t rows_per_block(const Shape& s, int threads) {
  constexpr int64_t kCache = 256 << 10, kMost = 48;
  const int64_t most =
      s.shared ? kMost : max<int64_t>(3, min(kMost, kCache / (s.N * s.m * int64_t(sizeof(S)))));
  return min(most, max<int64_t>(1, ceil_div(s.B, threads)));
}

template <class S, class Arguments>
SEQMEM_INLINE const S* memory_of(const Shape& s, const Arguments& a, int64_t b) {
  return static_cast<const S*>(a.memory) + (s.shared ? 0 : b * s.N * s.m);
}
template <class Arguments>
SEQMEM_INLINE const bool* mask_of(const Shape& s, const Arguments& a, int64_t b) {
  return a.mask == nullptr ? nullptr : a.mask + b * s.N;
}
// The gate network's weight, or the write network's.
template <class S, class Arguments>
SEQMEM_INLINE const S* weight_of(const Arguments& a, bool write) {
  return static_cast<const S*>(write ? a.write_weight : a.gate_weight);
}

// How many lanes of the vector at element i hold one of n elements.
template <class C>
SEQMEM_INLINE int lanes_at(int64_t n, int64_t i) {
  return static_cast<int>(min<int64_t>(kLanes<C>, n - i));
}

// n elements, `stride` apart; where the stride is 0, the one element in all lanes.
template <class S>
SEQMEM_INLINE Vec<compute_t<S>> gather(const S* from, int64_t stride, int n) {
  return stride == 0 ? splat(widen_one(*from)) : load_strided(from, stride, n);
}

// Elements i.. of what the forward saved of a record: gate, write or u (0, 1, 2).
template <class S, class Arguments>
SEQMEM_INLINE Vec<compute_t<S>> saved_of(const Shape& s, const Arguments& a, int64_t record,
                                         int which, int64_t i) {
  using C = compute_t<S>;
  const C* from = static_cast<const C*>(a.saved) + (record * 3 + which) * s.m + i;
  return load_n(from, lanes_at<C>(s.m, i));
}

// A memory shared by all rows, as the operand of products with many rows at once (s.tiled).
template <class S>
class SharedMemory {
  using C = compute_t<S>;

  const Shape& s;
  const S* const memory;
  const bool copied;  // else its rows are whole vectors in the type of the products, and near
  C* slots;           // panels of [N, m], where copied
  C* transposed;      // panels of [m, N]

 public:
  SharedMemory(const Shape& s, const void* memory)
      : s(s),
        memory(static_cast<const S*>(memory)),
        copied(!std::is_same_v<S, C> || s.m % kLanes<C> != 0 || s.m * int64_t(sizeof(S)) >= 512) {}

  void place(Carver& take) {
    slots = take.array<C>(s.tiled && copied ? packed_size<C>(s.N, s.m) : 0);
    transposed = take.array<C>(s.tiled ? packed_size<C>(s.m, s.N) : 0);
  }

  // One thread's share.
  void pack(int thread, int threads) {
    if (!s.tiled) return;
    const Share panels = share(ceil_div(s.N, kPanel<C>), thread, threads);
    pack_panels_transposed(transposed, memory, s.m, s.m, s.N, panels);
    if (!copied) return;
    const Share mine = share(s.N, thread, threads);
    pack_rows(slots, s.N, mine.begin, memory + mine.begin * s.m, s.m, mine.end - mine.begin, s.m);
  }

  // out [rows, N] = x [rows, m] M^T
  void dots(int64_t rows, const C* x, int64_t x_stride, C* out) const {
    multiply<C>(rows, s.N, s.m, x, x_stride, 1, packed<C>(transposed, s.m), out, s.N, false);
  }

  // out [rows, m_pad] (+)= weights [rows, N] M
  void weighted_sums(int64_t rows, const C* weights, C* out, bool accumulate) const {
    const int64_t m_pad = padded<C>(s.m);
    const Panels<C> panels =
        copied ? packed<C>(slots, s.N) : unpacked(reinterpret_cast<const C*>(memory), s.m);
    multiply<C>(rows, m_pad, s.N, weights, s.N, 1, panels, out, m_pad, accumulate);
  }
};

}  // namespace
}  // namespace seqmem::dynamic_memory
