// Entmax of one row, for kernel sources compiled once per ISA. For each row of K entries, with x =
// (alpha - 1) (z - highest) <= 0 and k = 1 / (alpha - 1):
//   pass 1  z into L1, and its highest entry
//   pass 2  the entries above tau = -1, packed: no other can be in the support. A NaN is packed as
//           well, and makes all sums NaN
//   Newton  for the norm (sum (x - tau)^k)^(1/k) = 1, which is nearly linear in tau: with P the sum
//           of the powers and Q that of (x - tau)^(k-1), tau += (P - P^(2 - alpha)) / Q. From the
//           left tau only climbs, for a norm is convex. Where powers are logarithms and
//           exponentials, entries that tau has passed are no longer packed
//   pass 3  p = (x - tau)^k where x > tau, else 0
// and for its gradient, with s = p^(2 - alpha) on the support:
//   pass 1  s, into L1 unless it is 1; the sums of s and of s g
//   pass 2  dz = s (g - sum s g / sum s)
// Powers are products for alpha = 2 and 1.5. Below kSteep all is computed in double: k grows
// without bound towards alpha = 1, and k times a rounding error with it.
#pragma once

#include "gemm.h"
#include "kernel_util.h"
#include "lane_sets.h"
#include "machine_math.h"

namespace seqmem::entmax {
namespace {

constexpr double kSteep = 1.1;

using machine::square_root;

enum class Kind { Sparsemax, Entmax15, Any };

template <Kind kind>
using KindConstant = std::integral_constant<Kind, kind>;

// What f returns of the kind of this alpha, as a constant; `alphas`, if any, differ by row.
template <class F>
SEQMEM_INLINE auto with_kind(const double* alphas, double alpha, F&& f) {
  if (alphas == nullptr && alpha == 2) return f(KindConstant<Kind::Sparsemax>());
  if (alphas == nullptr && alpha == 1.5) return f(KindConstant<Kind::Entmax15>());
  return f(KindConstant<Kind::Any>());
}

// The first n lanes, in another type than the storage's own too.
template <class C, class S>
SEQMEM_INLINE Vec<C> load_as(const S* from, int n) {
  if constexpr (std::is_same_v<C, compute_t<S>>) {
    return load_n(from, n);
  } else {
    C lanes[kLanes<C>] = {};
    for (int i = 0; i < min(n, kLanes<C>); ++i) lanes[i] = widen_one(from[i]);
    return load(lanes);
  }
}

template <class C, class S>
SEQMEM_INLINE void store_as(S* to, Vec<C> v, int n) {
  if constexpr (std::is_same_v<C, compute_t<S>>) {
    store_n(to, v, n);
  } else {
    for (int i = 0; i < min(n, kLanes<C>); ++i)
      store_n(to + i, splat(static_cast<compute_t<S>>(v[i])), 1);
  }
}

// x^power for 0 < x <= 1.
template <class C>
SEQMEM_INLINE Vec<C> raised(Vec<C> x, C power) {
  const Vec<C> base[1] = {x};
  Vec<C> log[1];
  log_of_positive<1, C>(base, log);
  Vec<C> result[1] = {log[0] * power};
  exp_of_negative<1, C>(result);
  return result[0];
}

// The larger of a and b, b where one is NaN.
template <class C>
SEQMEM_INLINE Vec<C> larger(Vec<C> a, Vec<C> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>)
    return (Vec<C>)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// The rows of one thread; C is what is computed in.
template <class S, Kind kind, class C = compute_t<S>>
class Rows {
  static constexpr int64_t L = kLanes<C>;
  static constexpr int kSums = 4;  // an addition waits for the one before
  static constexpr C kInfinity = C(__builtin_huge_val());

  const int64_t K;
  C *x, *y;  // a row each, padded

 public:
  Rows(int64_t K, char* buffer, int64_t bytes)
      : K(K), x(reinterpret_cast<C*>(buffer)), y(reinterpret_cast<C*>(buffer + bytes)) {}

  // Returns how many entries have a probability.
  int64_t forward(const S* from, S* to, double alpha) {
    return probabilities(from, alpha,
                         [&](int64_t i, int n, Vec<C> p) { store_as<C>(to + i, p, n); });
  }

  // The same where the scores stand, -inf beyond the row to whole vectors; `top` is the highest of
  // those that are not NaN.
  int64_t in_place(S* row, S top, double alpha) {
    if constexpr (std::is_same_v<S, C>) {
      x = row;
      return weigh(top, alpha, [&](int64_t i, int, Vec<C> p) { store(row + i, p); });
    } else {
      return forward(row, row, alpha);
    }
  }

  // grad_input and grad_alpha may be null. The latter is asked for in double alone, and p as it was
  // stored would not do. With e = alpha - 1, h = -p ln p and s = p + e h + e^2 r it is
  //   (sum p g sum r - sum r g + e (sum h g sum r - sum h sum r g)) / sum s,
  // which divides no small difference by e. It is the same for g less a constant, here its mean.
  void backward(const S* grad, const S* input, const S* output, S* grad_input, double* grad_alpha,
                double alpha) {
    const C rest = C(2 - alpha);
    const bool again = !std::is_same_v<S, C> && grad_alpha != nullptr;
    if (again) probabilities(input, alpha, [&](int64_t i, int, Vec<C> p) { store(y + i, p); });
    auto weights = [&](int64_t i, int n) {
      return again ? load(y + i) : load_as<C>(output + i, n);
    };
    auto gradient = [&](int64_t i, int n, IntVec<C> outside) {
      return outside ? Vec<C>{} : load_as<C>(grad + i, n);
    };
    Vec<C> totals[kSums] = {}, dots[kSums] = {};
    for_vectors<kSums>([&](int sum, int64_t i, int n) {
      const Vec<C> p = weights(i, n), s = slopes(p, rest);
      totals[sum] += s;
      dots[sum] += s * gradient(i, n, p <= C(0));  // false for NaN, which spreads over its row
      if (kind != Kind::Sparsemax) store(x + i, s);
    });
    const C total = sum_of(totals), mean = total == 0 ? C(0) : sum_of(dots) / total;
    if (grad_alpha != nullptr) {
      const C e = C(alpha - 1);
      Vec<C> of_p = {}, of_h = {}, of_r = {}, all_h = {}, all_r = {};
      for_vectors<1>([&](int, int64_t i, int n) {
        const Vec<C> p = weights(i, n);
        const IntVec<C> outside = p <= C(0);
        const Vec<C> g = gradient(i, n, outside) - (outside ? Vec<C>{} : splat<C>(mean));
        const Vec<C> s = kind == Kind::Sparsemax ? slopes(p, rest) : load(x + i);
        const Vec<C> h = entropy(p, outside), r = curvature(p, h, s, e, outside);
        of_p += g * p;
        of_h += g * h;
        of_r += g * r;
        all_h += h;
        all_r += r;
      });
      const C r = lane_sum<C>(all_r), r_g = lane_sum<C>(of_r);
      const C sum =
          lane_sum<C>(of_p) * r - r_g + e * (lane_sum<C>(of_h) * r - lane_sum<C>(all_h) * r_g);
      *grad_alpha = total == 0 ? C(0) : sum / total;
    }
    if (grad_input == nullptr) return;
    for_vectors<1>([&](int, int64_t i, int n) {
      const Vec<C> p = weights(i, n);
      const Vec<C> s = kind == Kind::Sparsemax ? slopes(p, rest) : load(x + i);
      store_as<C>(grad_input + i, s * (gradient(i, n, p <= C(0)) - mean), n);
    });
  }

  // s = p^rest, 0 outside the support; rest is 2 - alpha.
  static SEQMEM_INLINE Vec<C> slopes(Vec<C> p, C rest) {
    return p <= C(0) ? Vec<C>{} : root(p, rest);
  }

 private:
  SEQMEM_INLINE int lanes(int64_t i) const { return static_cast<int>(min(L, K - i)); }

  // f(sum, i, n) for each vector of the row: which of N sums it belongs to, its first entry, and
  // how many it has, a constant if all.
  template <int N, class F>
  SEQMEM_INLINE void for_vectors(F&& f) const {
    int64_t i = 0;
    for (; i + N * L <= K; i += N * L) SEQMEM_UNROLL
    for (int sum = 0; sum < N; ++sum) f(sum, i + sum * L, std::integral_constant<int, L>());
    for (; i < K; i += L) f(0, i, lanes(i));
  }
  static SEQMEM_INLINE C sum_of(const Vec<C> (&sums)[kSums]) {
    return lane_sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // Calls put(i, n, p) for each vector of the row; returns how many are not zero.
  template <class Put>
  SEQMEM_INLINE int64_t probabilities(const S* from, double alpha, Put&& put) {
    return weigh(read(from), alpha, put);
  }

  // Of the row in x; `top` is the highest of its entries that are not NaN.
  template <class Put>
  SEQMEM_INLINE int64_t weigh(C top, double alpha, Put&& put) {
    const C scale = C(alpha - 1), power = C(1) / scale;
    const C tau = threshold(top, scale, power);
    if (tau != tau) {
      LaneSet wrong = 0;
      for_vectors<1>(
          [&](int, int64_t i, int) { wrong |= lanes_set<C>(load(x + i) != load(x + i)); });
      const bool nothing = top == -kInfinity && wrong == 0;
      for_vectors<1>([&](int, int64_t i, int n) { put(i, n, splat<C>(nothing ? C(0) : tau)); });
      return nothing ? 0 : K;
    }
    int64_t count = 0;
    for_vectors<1>([&](int, int64_t i, auto n) {
      const Vec<C> above = (load(x + i) - top) * scale - tau;
      const LaneSet supported = lanes_set<C>(above > C(0));
      put(i, n, kind != Kind::Any || supported != 0 ? values(above, power).p : Vec<C>{});
      count += __builtin_popcount(supported);
    });
    return count;
  }

  // So that comparing differences of entries leaves out none that would pass once scaled.
  static SEQMEM_INLINE C just_below(C negative) { return negative * C(1.0001); }

  // x = the row, -inf beyond it; returns the highest of its entries that are not NaN.
  C read(const S* from) {
    Vec<C> top[kSums];
    for (Vec<C>& each : top) each = splat<C>(-kInfinity);
    for_vectors<kSums>([&](int sum, int64_t i, int n) {
      const Vec<C> z = lane_numbers<C>() < n ? load_as<C>(from + i, n) : splat<C>(-kInfinity);
      store(x + i, z);
      top[sum] = larger<C>(z, top[sum]);
    });
    return largest_lane<C>(larger<C>(larger<C>(top[0], top[1]), larger<C>(top[2], top[3])));
  }

  struct Values {
    Vec<C> p, slope;  // above^power, and its derivative over `power`; 0 outside the support
  };
  static SEQMEM_INLINE Values values(Vec<C> above, C power) {
    const Vec<C> inside = at_least<C>(above, 0);
    if constexpr (kind == Kind::Sparsemax) {
      return {inside, Vec<C>{}};
    } else if constexpr (kind == Kind::Entmax15) {
      return {inside * inside, inside};
    } else {
      const IntVec<C> outside = above <= C(0);
      const Vec<C> slope = raised<C>(outside ? splat<C>(1) : above, power - 1);
      return {inside * slope, outside ? Vec<C>{} : slope};
    }
  }

  // Packs the entries that are not outside at y[n] and after; returns how many are packed then.
  SEQMEM_INLINE int64_t pack(int64_t n, Vec<C> entries, IntVec<C> outside) {
    const LaneSet set = first_lanes_set<C>(L) & ~lanes_set<C>(outside);
    if (set == 0) return n;
    put_lanes<C>(y + n, entries, set);
    return n + __builtin_popcount(set);
  }

  // Vector i of the n packed entries, -inf beyond them.
  SEQMEM_INLINE Vec<C> packed(int64_t i, int64_t n) const {
    const IntVec<C> there = lane_numbers<C>() < static_cast<int>(min(L, n - i));
    return there ? load(y + i) : splat<C>(-kInfinity);
  }

  // tau; NaN where some entry is, where the highest is infinite, and where alpha is NaN.
  C threshold(C top, C scale, C power) {
    if (scale != scale) return scale;
    const C low = just_below(-power);
    int64_t n = 0;
    for (int64_t i = 0; i < K; i += L) {
      const Vec<C> below = load(x + i) - top;
      n = pack(n, below * scale, below <= low);
    }
    C tau = -1;
    while (true) {
      Vec<C> totals = {}, slopes = {};
      int64_t supported = 0;
      for (int64_t i = 0; i < n; i += L) {
        const Vec<C> above = packed(i, n) - tau;
        const Values here = values(above, power);
        totals += here.p;
        slopes += here.slope;
        supported += __builtin_popcount(lanes_set<C>(above > C(0)));
      }
      const C total = lane_sum<C>(totals);
      const C slope = kind == Kind::Sparsemax ? C(supported) : lane_sum<C>(slopes);
      const C step = (total - root(total, scale)) / slope, next = tau + step;
      // The last step may go back: it mends what rounding did while tau was far away.
      if (!(next > tau) || is_last(step, n)) return next;
      tau = next;
      if (kind == Kind::Any) n = pack_again(n, tau);
    }
  }

  // Of the n packed entries, those above tau: for the rest a power is not worth computing.
  int64_t pack_again(int64_t n, C tau) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<C> entries = packed(i, n);
      kept = pack(kept, entries, entries <= tau);
    }
    return kept;
  }

  // Whether the step after this one is lost in rounding: an error e of tau becomes at most n e^2.
  static SEQMEM_INLINE bool is_last(C step, int64_t n) {
    constexpr C kSmall = std::is_same_v<C, float> ? 0x1p-25 : 0x1p-54;
    return kind == Kind::Entmax15 && step * step * n < kSmall;
  }

  static SEQMEM_INLINE Vec<C> root(Vec<C> p, C rest) {
    if constexpr (kind == Kind::Sparsemax) {
      return p - p + C(1);  // NaN where p is
    } else if constexpr (kind == Kind::Entmax15) {
      return square_root<C>(p);
    } else {
      return raised<C>(p, rest);
    }
  }

  // total^(2 - alpha), of one number.
  static SEQMEM_INLINE C root(C total, C scale) {
    if constexpr (kind == Kind::Sparsemax) {
      return 1;
    } else if constexpr (kind == Kind::Entmax15) {
      return machine::square_root(total);
    } else {
      return static_cast<C>(__builtin_pow(total, 1 - double(scale)));
    }
  }

  static SEQMEM_INLINE Vec<C> entropy(Vec<C> p, IntVec<C> outside) {
    const Vec<C> base[1] = {outside ? splat<C>(1) : p};
    Vec<C> log[1];
    log_of_positive<1, C>(base, log);
    return -base[0] * log[0];
  }

  // r in s = p + e h + e^2 r: p l^2 f(e l) with l = -ln p and f(x) = (exp(x) - 1 - x) / x^2, by its
  // series where the difference would lose digits.
  static SEQMEM_INLINE Vec<C> curvature(Vec<C> p, Vec<C> h, Vec<C> s, C e, IntVec<C> outside) {
    constexpr int kTerms = 14;
    const Vec<C> one = splat<C>(1), l = outside ? Vec<C>{} : h / (outside ? one : p), x = e * l;
    Vec<C> series = one;  // times 2: 1 + x / 3 (1 + x / 4 (1 + ...
    for (int k = kTerms; k > 2; --k) series = one + x * series / C(k);
    return x < C(0.5) ? h * l * series / C(2) : (s - p - e * h) / (e * e);
  }
};

}  // namespace
}  // namespace seqmem::entmax
