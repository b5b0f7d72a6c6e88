// Register tiles of matrix products, for kernel sources compiled once per ISA.
#pragma once

#include "vec_math.h"

namespace seqmem {
namespace {

// Rows of a tile that leave room for R x 4 accumulators, the broadcasts and a loaded vector.
template <class C>
inline constexpr int kTileRows = SEQMEM_VEC_BYTES == 64 ? 6 : 3;

// Hides an accumulator's first value from the compiler: if GCC knows that it is zero, it peels the
// first step off a product's loop and then runs out of registers inside it.
template <class V>
SEQMEM_INLINE void opaque([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// Sets vectors to zero one by one: GCC would clear the array with a string instruction, which takes
// as long as fifty multiplications to start.
template <int K, class V>
SEQMEM_INLINE void start_sums(V (&x)[K]) {
  SEQMEM_UNROLL
  for (int i = 0; i < K; ++i) {
    x[i] = V{};
    opaque(x[i]);
  }
}
template <int R, int K, class V>
SEQMEM_INLINE void start_sums(V (&x)[R][K]) {
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) start_sums(x[r]);
}

// acc[r][v] += sum_k a[r][k * a_step] * b[v * b_vec + k * b_step], k = 0..K-1 in this order.
// Tall tiles keep b's vectors in registers, which leaves none for the broadcasts of all rows at
// once.
template <int R, int NV, class C>
SEQMEM_INLINE void tile_multiply(int64_t K, const C* const* a, int64_t a_step, const C* b,
                                 int64_t b_vec, int64_t b_step, Vec<C> (&acc)[R][NV]) {
  const C* row[R];
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) {
    row[r] = a[r];
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) opaque(acc[r][v]);
  }
  constexpr bool tall = R * NV + R + 1 > (SEQMEM_VEC_BYTES == 64 ? 32 : 16);
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; ++k) {
    if constexpr (tall) {
      Vec<C> w[NV];
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) w[v] = load(b + v * b_vec + k * b_step);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<C> x = splat(row[r][k * a_step]);
        SEQMEM_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] += x * w[v];
      }
    } else {
      Vec<C> x[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) x[r] = splat(row[r][k * a_step]);
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) {
        Vec<C> w = load(b + v * b_vec + k * b_step);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) acc[r][v] += x[r] * w;
      }
    }
  }
}

// The same for sums in memory, which begin at zero where `adds` is false.
template <int R, int NV, class C>
SEQMEM_INLINE void tile_multiply_into(bool adds, int64_t K, const C* const* a, int64_t a_step,
                                      const C* b, int64_t b_vec, int64_t b_step, C* out,
                                      int64_t out_stride) {
  Vec<C> acc[R][NV];
  start_sums(acc);
  if (adds) SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int v = 0; v < NV; ++v) acc[r][v] = load(out + r * out_stride + v * kLanes<C>);
  tile_multiply<R, NV, C>(K, a, a_step, b, b_vec, b_step, acc);
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int v = 0; v < NV; ++v) store(out + r * out_stride + v * kLanes<C>, acc[r][v]);
}

// acc[r][p][v] += sum_k a[r][k] * b[p * b_panel + v * lanes + k * b_step]: few rows by P panels,
// because their sums in a single panel would wait for each other.
template <int R, int P, int NV, class C>
SEQMEM_INLINE void panels_multiply(int64_t K, const C* const* a, const C* b, int64_t b_panel,
                                   int64_t b_step, Vec<C> (&acc)[R][P][NV]) {
  const C* row[R];
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) {
    row[r] = a[r];
    SEQMEM_UNROLL
    for (int p = 0; p < P; ++p) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) opaque(acc[r][p][v]);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; ++k) {
    Vec<C> x[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) x[r] = splat(row[r][k]);
    SEQMEM_UNROLL
    for (int p = 0; p < P; ++p) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<C> w = load(b + p * b_panel + v * kLanes<C> + k * b_step);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) acc[r][p][v] += x[r] * w;
    }
  }
}

// acc[r][w] += lanes of sum_k a[r][k] * b[w][k]: both operands are contiguous in k, not packed.
template <int R, int W, class C, class S>
SEQMEM_INLINE void tile_dot(int64_t K, const C* const* a, const S* const* b, Vec<C> (&acc)[R][W]) {
  constexpr int L = kLanes<C>;
  int64_t k = 0;
  for (; k + L <= K; k += L) {
    Vec<C> x[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) x[r] = load(a[r] + k);
    SEQMEM_UNROLL
    for (int w = 0; w < W; ++w) {
      Vec<C> y = load(b[w] + k);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) acc[r][w] += x[r] * y;
    }
  }
  if (k < K) {
    const int n = static_cast<int>(K - k);
    SEQMEM_UNROLL
    for (int w = 0; w < W; ++w) {
      Vec<C> y = load_n(b[w] + k, n);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) acc[r][w] += load_n(a[r] + k, n) * y;
    }
  }
}

// out[0..3] = the lanes' sums of four vectors: pairs are interleaved and added, then pairs of
// pairs, which takes a third of the instructions of four separate sums.
template <class C>
SEQMEM_INLINE void store_sums4(C* out, const Vec<C> (&s)[4]) {
  if constexpr (std::is_same_v<C, float>) {
    constexpr int L = kLanes<float>;
    const auto add_pairs = [](Vec<float> x, Vec<float> y) __attribute__((always_inline)) {
      return shuffle(x, y, [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * L; }) +
             shuffle(x, y, [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * L + 2; });
    };
    const Vec<float> a = add_pairs(s[0], s[1]), b = add_pairs(s[2], s[3]);
    const Vec<float> blocks =
        shuffle(a, b, [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * L; }) +
        shuffle(a, b, [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * L + 2; });
    const auto four = std::make_integer_sequence<int, 4>{};
    auto total = lanes_from<0>(blocks, four);
    // % L: what is left out for want of lanes must be right all the same.
    if constexpr (L >= 8) total += lanes_from<4 % L>(blocks, four);
    if constexpr (L >= 16) {
      total += lanes_from<8 % L>(blocks, four);
      total += lanes_from<12 % L>(blocks, four);
    }
    __builtin_memcpy(out, &total, sizeof total);
  } else {
    for (int j = 0; j < 4; ++j) out[j] = lane_sum<C>(s[j]);
  }
}

// Calls f(constant n) for n of 1..Most.
template <int Most, class F>
SEQMEM_INLINE void for_count(int64_t n, F&& f) {
  if (n == Most) return f(std::integral_constant<int, Most>{});
  if constexpr (Most > 1) for_count<Most - 1>(n, f);
}

// Calls f(constant NV, first) for panels of four vectors and, last, one of the vectors that are
// left.
template <class F>
SEQMEM_INLINE void for_panels(int64_t begin, int64_t end, F&& f) {
  for (; begin + 4 <= end; begin += 4) f(std::integral_constant<int, 4>{}, begin);
  for_count<3>(end - begin, [&](auto count) { f(count, begin); });
}

// Calls f(constant, start) for blocks of at most R rows that cover 0..n-1, as even as possible: 16
// rows by 3 are 3+3+3+3+2+2, because a tile of one row runs at half speed.
template <class C, int R = kTileRows<C>, class F>
SEQMEM_INLINE void for_row_blocks(int64_t n, F&& f) {
  int64_t blocks = (n + R - 1) / R;
  for (int64_t start = 0; start < n; --blocks) {
    const int64_t rows = (n - start + blocks - 1) / blocks;
    for_count<R>(rows, [&](auto count) { f(count, start); });
    start += rows;
  }
}

// out[i] (+)= sum_k a[i][k] b[k], or a[k][i] b[k] where `transposed`, for i = 0..rows-1 and
// k = 0..K-1 in this order. `width` columns, whole vectors, are also the stride of out.
template <bool transposed, class C>
void matrix_multiply(int64_t rows, int64_t K, int64_t width, const C* a, int64_t a_stride,
                     const C* b, int64_t b_stride, C* out, bool adds) {
  constexpr int L = kLanes<C>;
  for_panels(0, width / L, [&](auto columns, int64_t v) {
    constexpr int NV = decltype(columns)::value;
    for_row_blocks<C>(rows, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      const C* from[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) from[r] = a + (start + r) * (transposed ? 1 : a_stride);
      tile_multiply_into<R, NV, C>(adds, K, from, transposed ? a_stride : 1, b + v * L, L, b_stride,
                                   out + start * width + v * L, width);
    });
  });
}

// One thread's part of 0..n-1, split as evenly as possible.
struct Share {
  int64_t begin, end;
};
SEQMEM_INLINE Share share(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

// In-place transpose of a square of vectors: log2(lanes) rounds of perfect shuffles.
template <class C>
SEQMEM_INLINE void transpose(Vec<C> (&x)[kLanes<C>]) {
  constexpr int L = kLanes<C>;
  SEQMEM_UNROLL
  for (int round = 1; round < L; round *= 2) {
    Vec<C> y[L];
    SEQMEM_UNROLL
    for (int i = 0; i < L / 2; ++i) {
      y[2 * i] = shuffle(x[i], x[i + L / 2], [](int j) { return j / 2 + j % 2 * L; });
      y[2 * i + 1] = shuffle(x[i], x[i + L / 2], [](int j) { return L / 2 + j / 2 + j % 2 * L; });
    }
    SEQMEM_UNROLL
    for (int i = 0; i < L; ++i) x[i] = y[i];
  }
}

// Transposes a block of at most lanes x lanes: row(i) gives vector i of `rows`, column(k, vector)
// takes vector k of `columns`, whose lanes beyond `rows` are zero.
template <class C, class Row, class Column>
SEQMEM_INLINE void transpose_block(int rows, int columns, Row&& row, Column&& column) {
  Vec<C> square[kLanes<C>];
  start_sums(square);
  for (int i = 0; i < rows; ++i) square[i] = row(i);
  transpose<C>(square);
  for (int k = 0; k < columns; ++k) column(k, square[k]);
}

// to[k * to_stride + lane] = from[lane * from_stride + k] for k = 0..K-1: at most `lanes` rows,
// side by side; zero in the lanes beyond them.
template <class C, class S>
SEQMEM_INLINE void pack_transposed(C* to, int64_t to_stride, const S* from, int64_t from_stride,
                                   int64_t rows, int64_t K) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t k = 0; k < K; k += L) {
    const int n = static_cast<int>(K - k < L ? K - k : L);
    transpose_block<C>(
        static_cast<int>(rows), n, [&](int i) { return load_n(from + i * from_stride + k, n); },
        [&](int i, Vec<C> v) { store(to + (k + i) * to_stride, v); });
  }
}

}  // namespace
}  // namespace seqmem
