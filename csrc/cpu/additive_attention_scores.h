// Additive attention's scores, and the operands of a batch row as a thread reads them.
//
// tanh(q + k) is computed in one of two ways:
//   - features in lanes: one rational function for each pair, in float or double (`rational_tanh`);
//   - keys in lanes, from factors: with E = e^2q e^2k, tanh(q + k) = (E - 1) / (E + 1). The
//     exponentials are taken once for each query and each key, which leaves a product and a
//     division for each pair. A factor is a sum of two floats, high + low, so that E - 1 loses
//     nothing near zero. Only for float, and only with a fused multiply-add.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"
#include "additive_attention_kernel.h"

namespace seqmem::additive_attention {
namespace {

// tanh x = x P(x^2) / Q(x^2) on |x| <= 9, beyond which a float's tanh is 1. Both polynomials were
// fitted for the least largest relative error, 2e-8; all their coefficients are positive, so
// nothing cancels and rounding leaves it below 4e-7, near zero too. A third of the instructions of
// tanh by way of exp. NaN passes through.
SEQMEM_INLINE Vec<float> rational_tanh(Vec<float> x) {
  x = clamp<float>(x, 9.0f);
  const Vec<float> y = x * x;
  const Vec<float> p =
      (((0x1.cae49cp-27f * y + 0x1.59c668p-16f) * y + 0x1.ca2e0ep-9f) * y + 0x1.120b54p-3f) * y +
      1.0f;
  const Vec<float> q =
      (((0x1.a1857ap-21f * y + 0x1.588816p-12f) * y + 0x1.a7f8b2p-6f) * y + 0x1.de5af4p-2f) * y +
      1.0f;
  return x * p / q;
}
SEQMEM_INLINE Vec<double> rational_tanh(Vec<double> x) { return tanh<double>(x); }

// The exponentials of larger projections, or products of their small parts, might leave the range.
inline constexpr float kLargestFactor = 15;
// Below these the exponentials cost more than they save.
inline constexpr int64_t kMinQueriesForFactors = 8, kMinKeysForFactors = 16;

template <class C>
inline constexpr bool kHasFactors = std::is_same_v<C, float> && SEQMEM_VEC_BYTES >= 32;

struct Factor {
  Vec<float> high, low;
};

// Stored as [high, low][L].
SEQMEM_INLINE Factor load_factor(const float* from) {
  return {load(from), load(from + kLanes<float>)};
}

// E - 1 from its factors; E + 1 is two more.
SEQMEM_INLINE Vec<float> product_minus_one(Factor q, Factor k) {
  return q.low * k.high + (q.high * k.low + (q.high * k.high - 1.0f));
}

// Stores the factor of x. Returns lanes of all ones where x is too large, or NaN.
SEQMEM_INLINE IntVec<float> store_factor(Vec<float> x, float* high, float* low) {
  const Vec<float> argument[1] = {x + x};
  ExpParts<float> e[1];
  exp_parts<1, float>(argument, e);
  const Vec<float> nearest = e[0].power + e[0].power * e[0].fraction;
  store(high, nearest);
  store(low, (e[0].power - nearest) + e[0].power * e[0].fraction);
  return ~((x >= -kLargestFactor) & (x <= kLargestFactor));
}

SEQMEM_INLINE bool none(IntVec<float> lanes) {
  int32_t any = 0;
  for (int l = 0; l < kLanes<float>; ++l) any |= lanes[l];
  return any == 0;
}

// The factors of L keys are a panel [A][high, low][L]; beyond the last of `rows` keys, up to
// `padded_rows`, they are those of zero. False if a key is too large.
template <class S>
bool pack_key_factors(const S* keys, int64_t rows, int64_t padded_rows, int64_t A, float* panels) {
  constexpr int L = kLanes<float>;
  IntVec<float> bad{};
  for (int64_t j = 0; j < padded_rows; j += L) {
    const int lanes = static_cast<int>(max<int64_t>(0, min<int64_t>(L, rows - j)));
    for (int64_t i = 0; i < A; i += L) {
      const int n = static_cast<int>(min<int64_t>(L, A - i));
      transpose_block<float>(
          lanes, n, [&](int l) { return load_n(keys + (j + l) * A + i, n); },
          [&](int l, Vec<float> x) {
            float* to = panels + (j * A + (i + l) * L) * 2;
            bad |= store_factor(x, to, to + L);
          });
    }
  }
  return none(bad);
}

// The given rows themselves where these are whole vectors of the compute type, else a padded copy.
template <class S, class C>
const C* padded_rows(const S* from, int64_t rows, int64_t width, C* copy) {
  const int64_t stride = padded<C>(width);
  if constexpr (std::is_same_v<S, C>)
    if (width == stride) return from;
  for (int64_t r = 0; r < rows; ++r) load_row(copy + r * stride, from + r * width, width);
  return copy;
}

template <class C>
SEQMEM_INLINE void fill(C* to, int64_t n, C x) {
  for (int64_t i = 0; i < n; ++i) to[i] = x;
}

// One thread's operands of one batch row, and a block of queries' scores.
template <class S>
class Operands {
 protected:
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kBlockRows = 16;  // queries of a block
  static constexpr int kTile = 2;            // queries, and panels of keys, of a tile of factors

  const Shape& s;
  const int thread, threads;
  const int64_t A_pad, Dv_pad, Tk_pad;
  const int64_t key_panels;  // of L keys each
  const bool factors_pay;
  const int64_t factor_width;  // A, or 0 where there are no factors

  const C *query = nullptr, *key = nullptr;       // a block of queries and all keys, [*, A_pad]
  const C* value = nullptr;                       // [Tk, Dv_pad]
  C* weight = nullptr;                            // [A_pad]
  C *query_high = nullptr, *query_low = nullptr;  // the factors of a block, [kBlockRows, A_pad]
  C* key_factors = nullptr;                       // [key_panels][A][2][L]
  bool has_factors = false;                       // whether key_factors are those of this batch row

  // Tk is padded to whole vectors, `vectors` at a time.
  Operands(const Shape& s, const Arguments& a, int vectors, int thread, int threads)
      : s(s),
        thread(thread),
        threads(threads),
        A_pad(padded<C>(s.A)),
        Dv_pad(padded<C>(s.Dv)),
        Tk_pad(ceil_div(s.Tk, vectors * L) * vectors * L),
        key_panels(Tk_pad / L),
        factors_pay(kHasFactors<C> && s.Tq >= kMinQueriesForFactors && s.Tk >= kMinKeysForFactors),
        factor_width(factors_pay ? s.A : 0),
        a(a) {}

  void place(Carver& take) {
    weight = take.array<C>(A_pad);
    key_copy = take.array<C>(s.Tk * A_pad);
    value_copy = take.array<C>(s.Tk * Dv_pad);
    query_copy = take.array<C>(kBlockRows * A_pad);
    key_factors = take.array<C>(Tk_pad * factor_width * 2);
    query_high = take.array<C>(factors_pay ? kBlockRows * A_pad : 0);
    query_low = take.array<C>(factors_pay ? kBlockRows * A_pad : 0);
  }

  void read_weight() { load_row(weight, static_cast<const S*>(a.score_weight), s.A); }

  // Begins batch row b. Its keys are read when they are asked for: factors may do without.
  void read_row(int64_t b, [[maybe_unused]] bool with_factors) {
    if (b == batch_row) return;
    batch_row = b;
    key = nullptr;
    value = padded_rows(static_cast<const S*>(a.value) + s.value_offset[b], s.Tk, s.Dv, value_copy);
    if constexpr (kHasFactors<C>)
      has_factors =
          with_factors && factors_pay && pack_key_factors(keys(), s.Tk, Tk_pad, s.A, key_factors);
  }

  // Reads a block of queries. Whether their factors and the keys' are there; if not, the keys are.
  bool read_queries(int64_t first, int64_t count) {
    const S* from = static_cast<const S*>(a.query) + s.query_offset[batch_row] + first * s.A;
    query = padded_rows(from, count, s.A, query_copy);
    if constexpr (kHasFactors<C>)
      if (has_factors && factor_queries(count)) return true;
    if (key == nullptr) key = padded_rows(keys(), s.Tk, s.A, key_copy);
    return false;
  }

  // The mask's row for query i; null without a mask.
  template <class M>
  const M* mask_row(const M* mask, int64_t i) const {
    return mask == nullptr ? nullptr : mask + s.mask_offset[batch_row] + i * s.mask_stride;
  }

  // scores[i] = weight . tanh(query_i + key_j) of a block, rows of Tk_pad; what is masked may be
  // left out.
  void score_block(int64_t first, int64_t count, C* scores) {
    if (read_queries(first, count)) {
      if constexpr (kHasFactors<C>) score_by_factors(first, count, scores);
    } else {
      for (int64_t i = 0; i < count; ++i)
        score_row(query + i * A_pad, mask_row(a.keep, first + i), scores + i * Tk_pad);
    }
  }

 private:
  const Arguments& a;
  C *key_copy = nullptr, *value_copy = nullptr, *query_copy = nullptr;
  int64_t batch_row = -1;

  const S* keys() const { return static_cast<const S*>(a.key) + s.key_offset[batch_row]; }

  // False if a query is too large.
  bool factor_queries(int64_t count) {
    IntVec<float> bad{};
    for (int64_t i = 0; i < count * A_pad; i += L)
      bad |= store_factor(load(query + i), query_high + i, query_low + i);
    return none(bad);
  }

  static bool any(const bool* keep, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= keep[i];
    return found;
  }

  // Keys in lanes; tiles that are masked as a whole are left out.
  void score_by_factors(int64_t first, int64_t count, C* scores) {
    for (int64_t panel = 0; panel < key_panels; panel += kTile) {
      const int64_t j = panel * L, n = min<int64_t>(kTile * L, s.Tk - j);
      for (int64_t i = 0; i < count; i += kTile) {
        for_count<kTile>(min<int64_t>(kTile, count - i), [&](auto rows) {
          bool kept = a.keep == nullptr;
          for (int64_t r = 0; r < rows.value && !kept; ++r)
            kept = any(mask_row(a.keep, first + i + r) + j, n);
          if (kept) score_tile<rows.value>(i, panel, scores);
        });
      }
    }
  }

  template <int R>
  SEQMEM_INLINE void score_tile(int64_t i, int64_t panel, C* scores) {
    Vec<float> acc[R][kTile];
    start_sums(acc);
    const int64_t panel_size = L * s.A * 2;
    const float* keys = key_factors + panel * panel_size;
    for (int64_t f = 0; f < s.A; ++f) {
      const Vec<float> w = splat(weight[f]);
      Factor k[kTile];
      SEQMEM_UNROLL
      for (int p = 0; p < kTile; ++p) k[p] = load_factor(keys + p * panel_size + f * 2 * L);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t offset = (i + r) * A_pad + f;
        const Factor q = {splat(query_high[offset]), splat(query_low[offset])};
        SEQMEM_UNROLL
        for (int p = 0; p < kTile; ++p) {
          const Vec<float> m = product_minus_one(q, k[p]);
          acc[r][p] += w * (m / (m + 2.0f));
        }
      }
    }
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int p = 0; p < kTile; ++p) store(scores + (i + r) * Tk_pad + (panel + p) * L, acc[r][p]);
  }

  // row[j] = weight . tanh(q + key_j), four keys at a time; fours that are all masked are left out.
  SEQMEM_INLINE void score_row(const C* q, const bool* keep, C* row) {
    for (int64_t j = 0; j < s.Tk; j += 4) {
      const int64_t n = min<int64_t>(4, s.Tk - j);
      if (keep != nullptr && !any(keep + j, n)) continue;
      const C* k[4];
      for (int64_t i = 0; i < 4; ++i) k[i] = key + (j + min(i, n - 1)) * A_pad;
      Vec<C> acc[4];
      start_sums(acc);
      for (int64_t v = 0; v < A_pad; v += L) {
        const Vec<C> x = load(q + v), w = load(weight + v);
        SEQMEM_UNROLL
        for (int i = 0; i < 4; ++i) acc[i] += w * rational_tanh(x + load(k[i] + v));
      }
      C sums[4];
      store_sums4<C>(sums, acc);
      for (int64_t i = 0; i < n; ++i) row[j + i] = sums[i];
    }
  }
};

}  // namespace
}  // namespace seqmem::additive_attention
