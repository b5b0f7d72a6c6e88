// Functions of rows, and the activations of a head's parameters.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_util.h"
#include "ntm_addressing_math.h"
#include "ntm_kernel.h"

namespace seqmem::ntm {
namespace {

// Calls f(constant K, first vector) for 0..n-1, K vectors at once and the last ones singly: the
// polynomial of a single vector waits for its own results, and those of many do not fit the
// registers beside what the passes here hold (so two, where ntm_addressing::for_vectors takes
// four).
template <class F>
SEQMEM_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t v = 0;
  constexpr int K = SEQMEM_VEC_BYTES == 64 ? 4 : 2;
  for (; v + K <= n; v += K) f(std::integral_constant<int, K>{}, v);
  for (; v < n; ++v) f(std::integral_constant<int, 1>{}, v);
}

using ntm_addressing::largest;
using ntm_addressing::log_of_positive;
using ntm_addressing::square_root;
using ntm_addressing::total;

// A vector's lanes stay in a register only if the loop over them vanishes.
template <class C>
SEQMEM_INLINE Vec<C> square_root(Vec<C> x) {
  Vec<C> y{};
  SEQMEM_UNROLL
  for (int i = 0; i < kLanes<C>; ++i) y[i] = square_root(x[i]);
  return y;
}

// One head's values after their activation, pointing into p; gamma is 1 + the value in p.
template <class C>
struct Head {
  const C *key, *shift, *erase, *add;
  C beta, gate, gamma, key_norm;
};

// Offsets of a head's values in its part of p: key M, beta, gate, shift, gamma, and erase M, add M.
struct HeadLayout {
  int64_t beta, gate, shift, gamma, erase, add;
  SEQMEM_INLINE HeadLayout(int64_t M, int64_t taps)
      : beta(M),
        gate(M + 1),
        shift(M + 2),
        gamma(M + 2 + taps),
        erase(M + 3 + taps),
        add(2 * M + 3 + taps) {}
  SEQMEM_INLINE int64_t size(bool writes, int64_t M) const { return writes ? add + M : erase; }
};

template <class C>
SEQMEM_INLINE Head<C> head_of(const C* values, const HeadLayout& layout, int64_t M) {
  constexpr int L = kLanes<C>;
  Vec<C> squares{};
  for (int64_t m = 0; m < M; m += L) {
    const Vec<C> k = load_n(values + m, static_cast<int>(M - m));
    squares += k * k;
  }
  return {values,
          values + layout.shift,
          values + layout.erase,
          values + layout.add,
          values[layout.beta],
          values[layout.gate],
          C(1) + values[layout.gamma],
          square_root(total<C>(squares))};
}

// Activates whole rows of p in their place. tanh and sigmoid are one function of all lanes,
//   y = e^(scale x),  out = (y - less) / (y + 1):
// (2, 1) makes tanh, (1, 0) sigmoid, and a scale of 0 leaves a lane alone. What remains of each
// head, beta and gamma (softplus) and shift (softmax), is computed side by side for several rows.
template <class C>
class HeadValues {
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kSideBySide = 16;

  const Shape& s;
  const HeadLayout layout;
  const int64_t rows, lanes;  // side by side; lanes for their heads
  C *scale, *less;            // [P_pad]
  C *soft, *taps;             // [2][lanes], [taps][lanes]

 public:
  explicit HeadValues(const Shape& s)
      : s(s),
        layout(s.M, s.taps),
        rows(max<int64_t>(1, kSideBySide / max<int64_t>(s.heads, 1))),
        lanes(ceil_div(rows * s.heads, L) * L) {}

  void place(Carver& take) {
    const int64_t P_pad = padded<C>(s.P);
    scale = take.array<C>(P_pad);
    less = take.array<C>(P_pad);
    soft = take.array<C>(2 * lanes);
    taps = take.array<C>(s.taps * lanes);
  }

  void prepare() {
    for (int64_t i = 0; i < ceil_div(s.P, L) * L; ++i) scale[i] = less[i] = 0;
    for (int64_t i = 0; i < 2 * lanes; ++i) soft[i] = 0;
    for (int64_t i = 0; i < s.taps * lanes; ++i) taps[i] = 0;
    each_head([&](int64_t from, bool writes) {
      auto squashed = [&](int64_t first) {
        for (int64_t m = 0; s.squash && m < s.M; ++m) {
          scale[from + first + m] = 2;
          less[from + first + m] = 1;
        }
      };
      squashed(0);
      scale[from + layout.gate] = 1;
      if (!writes) return;
      for (int64_t m = 0; m < s.M; ++m) scale[from + layout.erase + m] = 1;
      squashed(layout.add);
    });
  }

  // n rows, each padded to whole vectors.
  void activate(int64_t n, C* const* p) const {
    for (int64_t r = 0; r < n; ++r) squash(p[r]);
    for (int64_t r = 0; r < n; r += rows) finish(min(rows, n - r), p + r);
  }

  // From gradients of a row's activated values to those of p, in place; padded as above.
  void back(const C* values, C* grad) const {
    for (int64_t i = 0; i < s.P; i += L) {
      const Vec<C> y = load_n(values + i, static_cast<int>(min<int64_t>(L, s.P - i)));
      const Vec<C> one = load(less + i), slope = one + y * ((C(1) - one) - y);
      const Vec<C> g = load(grad + i);
      store(grad + i, load(scale + i) == C(0) ? g : g * slope);
    }
    each_head([&](int64_t from, bool) {
      // d softplus x / dx = 1 - e^-softplus x
      const C activated[L < 2 ? 2 : L] = {-values[from + layout.beta],
                                          -values[from + layout.gamma]};
      const Vec<C> argument[1] = {clamp<C>(load(activated), ExpConstants<C>::limit)};
      ExpParts<C> e[1];
      exp_parts<1, C>(argument, e);
      const Vec<C> slope = -(e[0].power * e[0].fraction + (e[0].power - C(1)));
      grad[from + layout.beta] *= slope[0];
      grad[from + layout.gamma] *= slope[1];
      const C* share = values + from + layout.shift;
      C *d = grad + from + layout.shift, inside = 0;
      for (int64_t j = 0; j < s.taps; ++j) inside += share[j] * d[j];
      for (int64_t j = 0; j < s.taps; ++j) d[j] = share[j] * (d[j] - inside);
    });
  }

 private:
  template <class F>
  SEQMEM_INLINE void each_head(F&& f) const {
    for (int64_t h = 0, from = 0; h < s.heads; ++h) {
      const bool writes = s.kinds[h] == 'w';
      f(from, writes);
      from += layout.size(writes, s.M);
    }
  }

  SEQMEM_INLINE void squash(C* p) const {
    for_vectors(ceil_div(s.P, L), [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> x[K], argument[K];
      ExpParts<C> e[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        x[i] = load(p + (v + i) * L);
        argument[i] = clamp<C>(x[i] * load(scale + (v + i) * L), ExpConstants<C>::limit);
      }
      exp_parts<K, C>(argument, e);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        const Vec<C> one = load(less + (v + i) * L);
        // A gate that is shut is a true zero.
        const Vec<C> power = argument[i] > -ExpConstants<C>::limit ? e[i].power : Vec<C>{};
        const Vec<C> above = power * e[i].fraction + (power - one);
        const Vec<C> y = above / (above + (one + C(1)));
        store(p + (v + i) * L, load(scale + (v + i) * L) == C(0) ? x[i] : y);
      }
    });
  }

  void finish(int64_t n, C* const* p) const {
    int64_t count = 0;
    for (int64_t r = 0; r < n; ++r) {
      each_head([&](int64_t from, bool) {
        const C* x = p[r] + from;
        soft[count] = x[layout.beta];
        soft[lanes + count] = x[layout.gamma];
        for (int64_t j = 0; j < s.taps; ++j) taps[j * lanes + count] = x[layout.shift + j];
        ++count;
      });
    }
    for (int64_t i = 0; i < count; i += L) {
      softplus(soft + i);
      softmax(taps + i);
    }
    count = 0;
    for (int64_t r = 0; r < n; ++r) {
      each_head([&](int64_t from, bool) {
        C* x = p[r] + from;
        x[layout.beta] = soft[count];
        x[layout.gamma] = soft[lanes + count];
        for (int64_t j = 0; j < s.taps; ++j) x[layout.shift + j] = taps[j * lanes + count];
        ++count;
      });
    }
  }

  // max(x, 0) + log(1 + e^-|x|) of a vector of betas and one of gammas.
  SEQMEM_INLINE void softplus(C* betas) const {
    Vec<C> x[2], e[2], u[2], logs[2];
    SEQMEM_UNROLL
    for (int i = 0; i < 2; ++i) {
      x[i] = load(betas + i * lanes);
      e[i] = x[i] < C(0) ? x[i] : -x[i];
    }
    exp_of_negative<2, C>(e);
    SEQMEM_UNROLL
    for (int i = 0; i < 2; ++i) u[i] = C(1) + e[i];
    log_of_positive<2, C>(u, logs);
    SEQMEM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Vec<C> lost = e[i] - (u[i] - C(1));
      store(betas + i * lanes, (x[i] < C(0) ? Vec<C>{} : x[i]) + (logs[i] + lost / u[i]));
    }
  }

  SEQMEM_INLINE void softmax(C* first) const {
    Vec<C> most = load(first), sum{};
    for (int64_t j = 1; j < s.taps; ++j) {
      const Vec<C> x = load(first + j * lanes);
      most = x > most ? x : most;
    }
    for (int64_t j = 0; j < s.taps; ++j) {
      Vec<C> e[1] = {load(first + j * lanes) - most};
      exp_of_negative<1, C>(e);
      sum += e[0];
      store(first + j * lanes, e[0]);
    }
    for (int64_t j = 0; j < s.taps; ++j) store(first + j * lanes, load(first + j * lanes) / sum);
  }
};

}  // namespace
}  // namespace seqmem::ntm
