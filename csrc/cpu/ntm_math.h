// Functions of rows, and the activations of a head's parameters.
#pragma once

#include "../common/machine_layout.h"
#include "../common/machine_slots.h"
#include "../common/machine_values.h"
#include "ntm_kernel.h"

namespace seqmem::ntm {
namespace {

using namespace machine;

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
          square_root(lane_sum<C>(squares))};
}

// Activates whole rows of p in their place: tanh and sigmoid by Squash; what remains of each head,
// beta and gamma (softplus) and shift (softmax), is computed side by side for several rows.
template <class C>
class HeadValues {
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kSideBySide = 16;

  const Shape& s;
  const HeadLayout layout;
  const int64_t rows, lanes;  // side by side; lanes for their heads
  Squash<C> squash;
  C *soft, *taps;  // [2][lanes], [taps][lanes]

 public:
  explicit HeadValues(const Shape& s)
      : s(s),
        layout(s.M, s.taps),
        rows(max<int64_t>(1, kSideBySide / max<int64_t>(s.heads, 1))),
        lanes(ceil_div(rows * s.heads, L) * L),
        squash(s.P) {}

  void place(Carver& take) {
    squash.place(take);
    soft = take.array<C>(2 * lanes);
    taps = take.array<C>(s.taps * lanes);
  }

  void prepare() {
    squash.clear();
    for (int64_t i = 0; i < 2 * lanes; ++i) soft[i] = 0;
    for (int64_t i = 0; i < s.taps * lanes; ++i) taps[i] = 0;
    each_head([&](int64_t from, bool writes) {
      if (s.squash) squash.tanh(from, s.M);
      squash.sigmoid(from + layout.gate, 1);
      if (!writes) return;
      squash.sigmoid(from + layout.erase, s.M);
      if (s.squash) squash.tanh(from + layout.add, s.M);
    });
  }

  // n rows, each padded to whole vectors.
  void activate(int64_t n, C* const* p) const {
    for (int64_t r = 0; r < n; ++r) squash.run(p[r]);
    for (int64_t r = 0; r < n; r += rows) finish(min(rows, n - r), p + r);
  }

  // From gradients of a row's activated values to those of p, in place; padded as above.
  void back(const C* values, C* grad) const {
    squash.back(values, grad);
    each_head([&](int64_t from, bool) {
      const C activated[L < 2 ? 2 : L] = {values[from + layout.beta], values[from + layout.gamma]};
      const Vec<C> slope = softplus_slope<C>(load(activated));
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
      soften(soft + i);
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

  // Of a vector of betas and one of gammas.
  SEQMEM_INLINE void soften(C* betas) const {
    Vec<C> x[2] = {load(betas), load(betas + lanes)};
    softplus<2, C>(x);
    store(betas, x[0]);
    store(betas + lanes, x[1]);
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
