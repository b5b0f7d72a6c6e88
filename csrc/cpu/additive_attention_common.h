// What additive attention's forward and backward share: tanh, and the operands of a batch row.
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

SEQMEM_INLINE Factor factor(Vec<float> x) {
  const Vec<float> argument[1] = {x + x};
  ExpParts<float> e[1];
  exp_parts<1, float>(argument, e);
  const Vec<float> high = e[0].power + e[0].power * e[0].fraction;
  return {high, (e[0].power - high) + e[0].power * e[0].fraction};
}

// E - 1 from its factors; E + 1 is two more.
SEQMEM_INLINE Vec<float> product_minus_one(Factor q, Factor k) {
  return q.low * k.high + (q.high * k.low + (q.high * k.high - 1.0f));
}

// Lanes become all ones where x is too large, or NaN.
SEQMEM_INLINE IntVec<float> too_large(Vec<float> x) {
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
            bad |= too_large(x);
            const Factor f = factor(x);
            store(to, f.high);
            store(to + L, f.low);
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

// The operands of one batch row as one thread reads them.
template <class S>
struct Operands {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kBlockRows = 16;  // queries of a block

  const Shape& s;
  const Arguments& a;
  const int64_t A_pad, Dv_pad;
  const int64_t key_panels;  // of L keys each
  const bool factors_pay;
  const int64_t factor_width;  // A, or 0 where there are no factors

  const C *query = nullptr, *key = nullptr;       // a block of queries and all keys, [*, A_pad]
  const C* value = nullptr;                       // [Tk, Dv_pad]
  C* weight = nullptr;                            // [A_pad]
  C *query_high = nullptr, *query_low = nullptr;  // the factors of a block, [kBlockRows, A_pad]
  C* key_factors = nullptr;                       // [key_panels][A][2][L]
  bool has_factors = false;                       // whether key_factors are those of this batch row

  Operands(const Shape& s, const Arguments& a, int64_t key_panels)
      : s(s),
        a(a),
        A_pad(padded<C>(s.A)),
        Dv_pad(padded<C>(s.Dv)),
        key_panels(key_panels),
        factors_pay(kHasFactors<C> && s.Tq >= kMinQueriesForFactors && s.Tk >= kMinKeysForFactors),
        factor_width(factors_pay ? s.A : 0) {}

  void place(Carver& take) {
    weight = take.array<C>(A_pad);
    key_copy = take.array<C>(s.Tk * A_pad);
    value_copy = take.array<C>(s.Tk * Dv_pad);
    query_copy = take.array<C>(kBlockRows * A_pad);
    key_factors = take.array<C>(key_panels * L * factor_width * 2);
    query_high = take.array<C>(factors_pay ? kBlockRows * A_pad : 0);
    query_low = take.array<C>(factors_pay ? kBlockRows * A_pad : 0);
  }

  void read_weight() { load_row(weight, static_cast<const S*>(a.score_weight), s.A); }

  // Begins batch row b. Its keys are read when they are asked for: factors may do without.
  void read_row(int64_t b, [[maybe_unused]] bool with_factors) {
    if (b == batch_row) return;
    batch_row = b;
    key = nullptr;
    value = padded_rows(matrix(a.value, s.value_of[b], s.Tk * s.Dv), s.Tk, s.Dv, value_copy);
    if constexpr (kHasFactors<C>)
      has_factors = with_factors && factors_pay &&
                    pack_key_factors(matrix(a.key, s.key_of[b], s.Tk * s.A), s.Tk, key_panels * L,
                                     s.A, key_factors);
  }

  void read_keys() {
    if (key == nullptr)
      key = padded_rows(matrix(a.key, s.key_of[batch_row], s.Tk * s.A), s.Tk, s.A, key_copy);
  }

  void read_queries(int64_t first, int64_t count) {
    const S* from = matrix(a.query, s.query_of[batch_row], s.Tq * s.A) + first * s.A;
    query = padded_rows(from, count, s.A, query_copy);
  }

  // The factors of the block's queries; false if one is too large, or the keys have none.
  bool read_query_factors([[maybe_unused]] int64_t count) {
    if constexpr (kHasFactors<C>) {
      if (!has_factors) return false;
      IntVec<float> bad{};
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < A_pad; i += L) {
          const Vec<float> x = load(query + r * A_pad + i);
          bad |= too_large(x);
          const Factor f = factor(x);
          store(query_high + r * A_pad + i, f.high);
          store(query_low + r * A_pad + i, f.low);
        }
      }
      return none(bad);
    }
    return false;
  }

  // The mask's row for query i; null without a mask.
  template <class M>
  const M* mask_row(const M* mask, int64_t i) const {
    if (mask == nullptr) return nullptr;
    return mask + (s.mask_of[batch_row] * s.mask_rows + (s.mask_rows == 1 ? 0 : i)) * s.Tk;
  }

 private:
  C *key_copy = nullptr, *value_copy = nullptr, *query_copy = nullptr;
  int64_t batch_row = -1;

  static const S* matrix(const void* all, int64_t index, int64_t size) {
    return static_cast<const S*>(all) + index * size;
  }
};

}  // namespace
}  // namespace seqmem::additive_attention
