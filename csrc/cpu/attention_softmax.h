// From a row of scores to weights that still have to be divided by their sum:
//   pass 1  mask_row: scores masked, and their maximum
//   pass 2  exponentials: e^(score - maximum), and their sum
#pragma once

#include "../common/exponentials.h"
#include "attention_common.h"

namespace seqmem::attention {
namespace {

constexpr double kMaskedScore = -1e9;

// Masks a row of scores in place, minus infinity from `last` on; returns its maximum. Multiplies
// the scores by `scale` before, if wanted.
template <class C, MaskKind kind, bool scales = false>
C mask_row(C* row, int64_t keys, int64_t last, const uint8_t* allowed, const C* added,
           [[maybe_unused]] C scale = 1) {
  constexpr int L = kLanes<C>;
  Vec<C> highest[4];
  for (int v = 0; v < 4; ++v) highest[v] = splat(-kInfinity<C>);
  auto step = [&](int64_t j, int v, int n) {
    Vec<C> x = load(row + j);
    if constexpr (scales) x *= scale;
    if constexpr (kind == MaskKind::Allowed) {
      x = allowed_lanes<C>(allowed + j, n, j > 0) ? x : splat(C(kMaskedScore));
    } else if constexpr (kind == MaskKind::Added) {
      x += load_n(added + j, n);
    }
    if (n < L) x = lane_numbers<C>() < n ? x : splat(-kInfinity<C>);
    if (scales || kind != MaskKind::None || n < L) store(row + j, x);
    highest[v] = x > highest[v] ? x : highest[v];
  };
  int64_t j = 0;
  for (; j + 4 * L <= last; j += 4 * L) SEQMEM_UNROLL
  for (int v = 0; v < 4; ++v) step(j + v * L, v, L);
  for (; j < last; j += L) step(j, 0, static_cast<int>(min<int64_t>(L, last - j)));
  for (; j < keys; j += L) store(row + j, splat(-kInfinity<C>));
  for (int v = 1; v < 4; ++v) highest[0] = highest[v] > highest[0] ? highest[v] : highest[0];
  return largest_lane<C>(highest[0]);
}

}  // namespace
}  // namespace seqmem::attention
