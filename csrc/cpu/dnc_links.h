// The pass over a write head's links L [N][stride]: what is written moves them on, and both
// directions of reading come with it,
//   L[i, j] = (1 - w[i] - w[j]) L[i, j] + w[i] p[j], nothing on the diagonal
//   forward = L q, backward = L^T q   for read weightings q [R][stride]
// in blocks of rows i that stay in the L1 cache:
//   by rows     L is read and written once, a few rows at once; a register of sums for each of
//               them and each read head gives `forward`
//   by columns  over the block once more; registers of sums of a few vectors of columns give
//               `backward`
// One pass for both would load and store `backward` at each vector, and its factors would not fit
// into registers beside the sums.
#pragma once

#include "../common/machine_slots.h"

namespace seqmem::dnc {
namespace {

using namespace machine;

constexpr int kMostReads = 4;       // in one pass
constexpr int64_t kLinkBlock = 32;  // rows

// Rows at once for R read heads.
template <class C, int R>
constexpr int link_rows() {
  constexpr int registers = SEQMEM_VEC_BYTES == 64 ? 16 : 8;
  constexpr int rows = registers / (R > 0 ? R : 4);
  constexpr int most = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  return most < kLanes<C> ? most : kLanes<C>;
}

// Calls f(constant rows, first) for blocks of slots begin..end - 1 that never reach over a vector's
// end; `begin` is a multiple of kLinkBlock.
template <int I, class F>
SEQMEM_INLINE void for_link_rows(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + I <= end; i += I) f(std::integral_constant<int, I>{}, i);
  for (; i < end; ++i) f(std::integral_constant<int, 1>{}, i);
}

// Calls f(vector, whether it holds the diagonal of rows from i on).
template <class C, class F>
SEQMEM_INLINE void for_link_columns(int64_t i, int64_t vectors, F&& f) {
  const int64_t diagonal = i / kLanes<C>;
  for (int64_t v = 0; v < diagonal; ++v) f(v, std::false_type{});
  f(diagonal, std::true_type{});
  for (int64_t v = diagonal + 1; v < vectors; ++v) f(v, std::false_type{});
}

// out[r][first + i] = the sum of sums[i][r]
template <int I, int R, class C>
SEQMEM_INLINE void put_link_sums(const Vec<C> (&sums)[I][R], int64_t stride, int64_t first,
                                 C* out) {
  SEQMEM_UNROLL
  for (int i = 0; i < I; ++i) {
    if constexpr (R == 4) {
      C four[4];
      store_sums4<C>(four, sums[i]);
      for (int r = 0; r < R; ++r) out[r * stride + first + i] = four[r];
    } else {
      for (int r = 0; r < R; ++r) out[r * stride + first + i] = lane_sum<C>(sums[i][r]);
    }
  }
}

// With `moves` the links of these rows are moved on, from -> to; else `from` is only read.
template <int R, bool moves, class C>
SEQMEM_INLINE void links_by_rows(int64_t begin, int64_t end, int64_t stride, int64_t vectors,
                                 const C* from, C* to, const C* w, const C* p, const C* q,
                                 C* forward) {
  constexpr int L = kLanes<C>;
  for_link_rows<link_rows<C, R>()>(begin, end, [&](auto count, int64_t first) {
    constexpr int I = decltype(count)::value;
    Vec<C> sums[I][R > 0 ? R : 1], mine[I], rest[I];
    start_sums(sums);
    SEQMEM_UNROLL
    for (int i = 0; i < I; ++i) {
      mine[i] = splat(w[first + i]);
      rest[i] = C(1) - mine[i];
    }
    for_link_columns<C>(first, vectors, [&](int64_t v, auto diagonal) {
      Vec<C> x[I];
      SEQMEM_UNROLL
      for (int i = 0; i < I; ++i) {
        x[i] = load(from + (first + i) * stride + v * L);
        if constexpr (moves) {
          x[i] = x[i] * (rest[i] - load(w + v * L)) + mine[i] * load(p + v * L);
          if constexpr (decltype(diagonal)::value) x[i][(first + i) % L] = 0;
          store(to + (first + i) * stride + v * L, x[i]);
        }
      }
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<C> along = load(q + r * stride + v * L);
        SEQMEM_UNROLL
        for (int i = 0; i < I; ++i) sums[i][r] += x[i] * along;
      }
    });
    if constexpr (R > 0) put_link_sums<I, R, C>(sums, stride, first, forward);
  });
}

// K vectors of columns from v on: backward += L^T q over these rows.
template <int R, int K, class C>
SEQMEM_INLINE void links_by_columns(int64_t begin, int64_t end, int64_t stride, int64_t v,
                                    const C* links, const C* q, C* backward) {
  constexpr int L = kLanes<C>;
  Vec<C> down[R][K];
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int k = 0; k < K; ++k) down[r][k] = load(backward + r * stride + (v + k) * L);
  for (int64_t i = begin; i < end; ++i) {
    SEQMEM_UNROLL
    for (int k = 0; k < K; ++k) {
      const Vec<C> x = load(links + i * stride + (v + k) * L);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) down[r][k] += x * splat(q[r * stride + i]);
    }
  }
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int k = 0; k < K; ++k) store(backward + r * stride + (v + k) * L, down[r][k]);
}

template <int R, bool moves, class C>
__attribute__((noinline)) void link_pass(int64_t N, int64_t stride, const C* from, C* to,
                                         const C* w, const C* p, const C* q, C* forward,
                                         C* backward) {
  const int64_t vectors = ceil_div(N, kLanes<C>);
  for (int64_t begin = 0; begin < N; begin += kLinkBlock) {
    const int64_t end = min(N, begin + kLinkBlock);
    links_by_rows<R, moves>(begin, end, stride, vectors, from, to, w, p, q, forward);
    if constexpr (R > 0) {
      constexpr int K = R > 2 ? 1 : 4 / R;
      const C* links = moves ? to : from;
      int64_t v = 0;
      for (; v + K <= vectors; v += K)
        links_by_columns<R, K>(begin, end, stride, v, links, q, backward);
      for (; v < vectors; ++v) links_by_columns<R, 1>(begin, end, stride, v, links, q, backward);
    }
  }
}

// For any number of read heads; forward and backward [reads][stride].
template <class C>
void move_links(int64_t N, int64_t stride, const C* from, C* to, const C* w, const C* p,
                int64_t reads, const C* q, C* forward, C* backward) {
  if (reads == 0) return link_pass<0, true, C>(N, stride, from, to, w, p, q, forward, backward);
  for (int64_t i = 0; i < reads * stride; ++i) forward[i] = backward[i] = 0;
  for (int64_t r = 0; r < reads; r += kMostReads) {
    for_count<kMostReads>(min<int64_t>(kMostReads, reads - r), [&](auto count) {
      constexpr int R = decltype(count)::value;
      const int64_t at = r * stride;
      if (r == 0) {
        link_pass<R, true, C>(N, stride, from, to, w, p, q, forward, backward);
      } else {
        link_pass<R, false, C>(N, stride, to, to, w, p, q + at, forward + at, backward + at);
      }
    });
  }
}

}  // namespace
}  // namespace seqmem::dnc
