// Rows of weights that are mostly zero, as entmax makes them: products over the keys that have a
// weight alone. For kernel sources compiled once per ISA. Letters: n such keys, at[n] where they
// are; matrices have rows of `width` elements, whole vectors.
#pragma once

#include "../common/normalizer_rows.h"
#include "attention_common.h"

namespace seqmem::attention {
namespace {

// From so many keys for each weight on, a block's rows go one by one, over the keys of each.
constexpr int64_t kKeysPerWeight = 8;

// n rounded up to whole vectors and to whole fours of keys, which gather_dots takes at once.
template <class C>
SEQMEM_INLINE int64_t filled(int64_t n) {
  constexpr int64_t step = kLanes<C> > 4 ? kLanes<C> : 4;
  return ceil_div(n, step) * step;
}

template <class S>
int64_t count_weights(const S* row, int64_t keys) {
  using C = compute_t<S>;
  constexpr int L = kLanes<C>;
  IntVec<C> minus = {};
  int64_t x = 0;
  for (; x + L <= keys; x += L) minus += load(row + x) != 0;
  if (x < keys) minus += load_n(row + x, static_cast<int>(keys - x)) != 0;
  int64_t count = 0;
  for (int l = 0; l < L; ++l) count -= minus[l];
  return count;
}

// Where a row of weights is not zero, and the weights there; returns how many there are. Both are
// filled up to filled(n), with the last of these keys and with zero.
template <class S, class C = compute_t<S>>
int64_t find_weights(const S* row, int64_t keys, int64_t* at, C* weights) {
  constexpr int L = kLanes<C>;
  int64_t n = 0;
  for (int64_t x = 0; x < keys; x += L) {
    const int lanes = static_cast<int>(min<int64_t>(L, keys - x));
    const Vec<C> here = load_n(row + x, lanes);
    if (lanes_set<C>(here != 0) == 0) continue;
    for (int l = 0; l < lanes; ++l) {
      at[n] = x + l;
      weights[n] = here[l];
      n += here[l] != 0;
    }
  }
  for (int64_t k = n; k < filled<C>(n); ++k) at[k] = at[n - 1], weights[k] = 0;
  return n;
}

// out = sum_k weights[k] rows[at[k]].
template <class C>
void gather_sum(int64_t n, const int64_t* at, const C* weights, const C* rows, int64_t width,
                C* out) {
  constexpr int L = kLanes<C>;
  int64_t vectors = 0;
  for (int64_t first = 0; first < width; first += vectors * L) {
    vectors = min<int64_t>(8, (width - first) / L);
    for_count<8>(vectors, [&](auto count) {
      constexpr int V = decltype(count)::value;
      Vec<C> acc[V] = {};
      for (int64_t k = 0; k < n; ++k) {
        const C* row = rows + at[k] * width + first;
        SEQMEM_UNROLL
        for (int v = 0; v < V; ++v) acc[v] += weights[k] * load(row + v * L);
      }
      SEQMEM_UNROLL
      for (int v = 0; v < V; ++v) store(out + first + v * L, acc[v]);
    });
  }
}

// rows[at[k]] += weights[k] x.
template <class C>
void scatter_add(int64_t n, const int64_t* at, const C* weights, const C* x, int64_t width,
                 C* rows) {
  constexpr int L = kLanes<C>;
  for (int64_t k = 0; k < n; ++k) {
    C* row = rows + at[k] * width;
    for (int64_t j = 0; j < width; j += L) store(row + j, load(row + j) + weights[k] * load(x + j));
  }
}

// out[k] = x . rows[at[k]], up to filled(n).
template <class C>
void gather_dots(int64_t n, const int64_t* at, const C* x, const C* rows, int64_t width, C* out) {
  for (int64_t k = 0; k < filled<C>(n); k += 4) {
    const C* from[4];
    SEQMEM_UNROLL
    for (int i = 0; i < 4; ++i) from[i] = rows + at[k + i] * width;
    Vec<C> sums[1][4];
    start_sums(sums);
    tile_dot<1, 4, C, C>(width, &x, from, sums);
    store_sums4<C>(out + k, sums[0]);
  }
}

}  // namespace
}  // namespace seqmem::attention
