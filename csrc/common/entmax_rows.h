// Entmax of one row, for kernel sources compiled once per ISA. For each row of K entries, with x =
// (alpha - 1) (z - highest) <= 0 and k = 1 / (alpha - 1):
//   pass 1  z into L1, and its highest entry
//   pass 2  the vectors with an entry above tau = -1, packed: nothing else can be in the support;
//           whether there is a NaN
//   Newton  for the norm (sum (x - tau)^k)^(1/k) = 1, which is nearly linear in tau: with P the sum
//           of the powers and Q that of (x - tau)^(k-1), tau += (P - P^(2 - alpha)) / Q. From the
//           left tau only climbs, for a norm is convex; vectors that it leaves behind are dropped
//           from the packed ones
//   pass 3  p = (x - tau)^k where x > tau, else 0
// and for its gradient, with s = p^(2 - alpha) on the support:
//   pass 1  s and g into L1; their sums
//   pass 2  dz = s (g - sum s g / sum s)
// Powers are products for alpha = 2 and 1.5. Below kSteep all is computed in double: k grows
// without bound towards alpha = 1, and k times a rounding error with it.
#pragma once

#include "gemm.h"
#include "kernel_util.h"
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

template <class C>
SEQMEM_INLINE bool any(IntVec<C> mask) {
#if SEQMEM_VEC_BYTES == 32
  typedef long long Words __attribute__((vector_size(32)));
  return !__builtin_ia32_ptestz256((Words)mask, (Words)mask);
#else
  int64_t words[SEQMEM_VEC_BYTES / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (const int64_t word : words) all |= word;
  return all != 0;
#endif
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

// The rows of one thread; C is what is computed in.
template <class S, Kind kind, class C = compute_t<S>>
class Rows {
  static constexpr int64_t L = kLanes<C>;
  static constexpr C kInfinity = C(__builtin_huge_val());

  const int64_t K;
  C *x, *y;  // a row each, padded

 public:
  Rows(int64_t K, char* buffer, int64_t bytes)
      : K(K), x(reinterpret_cast<C*>(buffer)), y(reinterpret_cast<C*>(buffer + bytes)) {}

  // Returns how many entries have a probability.
  int64_t forward(const S* from, S* to, double alpha) {
    return probabilities(from, alpha,
                         [&](int64_t i, Vec<C> p) { store_as<C>(to + i, p, lanes(i)); });
  }

  // The same where the scores stand, -inf beyond the row to whole vectors; `top` is the highest of
  // those that are not NaN.
  int64_t in_place(S* row, S top, double alpha) {
    if constexpr (std::is_same_v<S, C>) {
      x = row;
      return weigh(top, alpha, [&](int64_t i, Vec<C> p) { store(row + i, p); });
    } else {
      return forward(row, row, alpha);
    }
  }

  // grad_input and grad_alpha may be null. The latter is a difference of sums that nearly cancel:
  // it is asked for in double alone, and p as it was stored would not do.
  void backward(const S* grad, const S* input, const S* output, S* grad_input, double* grad_alpha,
                double alpha) {
    const C rest = C(2 - alpha);
    const bool again = !std::is_same_v<S, C> && grad_alpha != nullptr;
    if (again) probabilities(input, alpha, [&](int64_t i, Vec<C> p) { store(y + i, p); });
    Vec<C> totals = {}, dots = {}, of_p = {}, of_h = {}, entropies = {};
    for (int64_t i = 0; i < K; i += L) {
      const Vec<C> p = again ? load(y + i) : load_as<C>(output + i, lanes(i));
      const IntVec<C> outside = p <= C(0);  // false for NaN, which spreads over its row
      const Vec<C> g = outside ? Vec<C>{} : load_as<C>(grad + i, lanes(i));
      const Vec<C> s = slopes(p, rest);
      totals += s;
      dots += s * g;
      if (grad_alpha != nullptr) {
        const Vec<C> h = entropy(p, outside);
        of_p += g * p;
        of_h += g * h;
        entropies += h;
      }
      store(x + i, g);
      store(y + i, s);
    }
    const C total = lane_sum<C>(totals), mean = total == 0 ? C(0) : lane_sum<C>(dots) / total;
    if (grad_alpha != nullptr) {
      const C k = C(1 / (alpha - 1));
      *grad_alpha = k * k * (lane_sum<C>(of_p) - mean) +
                    k * (lane_sum<C>(of_h) - mean * lane_sum<C>(entropies));
    }
    if (grad_input == nullptr) return;
    for (int64_t i = 0; i < K; i += L)
      store_as<C>(grad_input + i, load(y + i) * (load(x + i) - mean), lanes(i));
  }

  // s = p^rest, 0 outside the support; rest is 2 - alpha.
  static SEQMEM_INLINE Vec<C> slopes(Vec<C> p, C rest) {
    return p <= C(0) ? Vec<C>{} : root(p, rest);
  }

 private:
  SEQMEM_INLINE int lanes(int64_t i) const { return static_cast<int>(min(L, K - i)); }

  // Calls put(i, p) for each vector of the row; returns how many are not zero.
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
      IntVec<C> wrong = {};
      for (int64_t i = 0; i < K; i += L) wrong |= load(x + i) != load(x + i);
      const bool nothing = top == -kInfinity && !any<C>(wrong);
      for (int64_t i = 0; i < K; i += L) put(i, splat<C>(nothing ? C(0) : tau));
      return nothing ? 0 : K;
    }
    const C low = just_below(tau * power);
    IntVec<C> minus = {};
    for (int64_t i = 0; i < K; i += L) {
      const Vec<C> below = load(x + i) - top;
      Vec<C> p = {};
      if (any<C>(below > low)) {
        const Vec<C> above = below * scale - tau;
        const IntVec<C> supported = above > C(0);
        p = supported ? values(above, supported, power).p : p;
        minus += supported;
      }
      put(i, p);
    }
    int64_t count = 0;
    for (int l = 0; l < L; ++l) count -= minus[l];
    return count;
  }

  // So that comparing differences of entries leaves out none that would pass once scaled.
  static SEQMEM_INLINE C just_below(C negative) { return negative * C(1.0001); }

  // x = the row, -inf beyond it; returns the highest of its entries that are not NaN.
  C read(const S* from) {
    Vec<C> highest = splat<C>(-kInfinity);
    for (int64_t i = 0; i < K; i += L) {
      const int n = lanes(i);
      Vec<C> v = load_as<C>(from + i, n);
      for (int64_t l = n; l < L; ++l) v[l] = -kInfinity;
      store(x + i, v);
      highest = v > highest ? v : highest;
    }
    return largest_lane<C>(highest);
  }

  struct Values {
    Vec<C> p, slope;  // above^power, and its derivative over `power`; 0 outside the support
  };
  static SEQMEM_INLINE Values values(Vec<C> above, IntVec<C> supported, C power) {
    const Vec<C> inside = supported ? above : Vec<C>{};
    if constexpr (kind == Kind::Sparsemax) {
      return {inside, supported ? splat<C>(1) : Vec<C>{}};
    } else if constexpr (kind == Kind::Entmax15) {
      return {inside * inside, inside};
    } else {
      const Vec<C> slope = raised<C>(supported ? above : splat<C>(1), power - 1);
      return {inside * slope, supported ? slope : Vec<C>{}};
    }
  }

  // tau; NaN where some entry is, where the highest is infinite, and where alpha is NaN.
  C threshold(C top, C scale, C power) {
    const int64_t end = padded<C>(K);
    const C low = just_below(-power);
    IntVec<C> wrong = {};
    C tau = -1;
    Vec<C> totals = {}, slopes = {};
    int64_t kept = 0;
    auto take = [&](Vec<C> v) {
      const IntVec<C> supported = v > tau;
      if (!any<C>(supported)) return;
      const Values here = values(v - tau, supported, power);
      totals += here.p;
      slopes += here.slope;
      store(y + kept, v);
      kept += L;
    };
    for (int64_t i = 0; i < end; i += L) {
      const Vec<C> below = load(x + i) - top;
      wrong |= below != below;
      if (any<C>(below > low)) take(below * scale);
    }
    if (any<C>(wrong) || scale != scale) return C(__builtin_nan(""));
    while (true) {
      const C total = lane_sum<C>(totals);
      const C next = tau + (total - root(total, scale)) / lane_sum<C>(slopes);
      // The last step may go back: it mends what rounding did while tau was far away.
      if (!(next > tau)) return next;
      tau = next;
      const int64_t before = kept;
      totals = slopes = Vec<C>{};
      kept = 0;
      for (int64_t i = 0; i < before; i += L) take(load(y + i));
    }
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
      return static_cast<C>(__builtin_sqrt(total));
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
};

}  // namespace
}  // namespace seqmem::entmax
