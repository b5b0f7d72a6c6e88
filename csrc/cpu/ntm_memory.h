// Writing to one row's memory and addressing its slots.
#pragma once

#include "ntm_math.h"

namespace seqmem::ntm {
namespace {

constexpr float kTiny = 0x1p-100f;

template <class C>
class Slots : public SlotMatrix<C> {
  using Matrix = SlotMatrix<C>;
  using Matrix::last;

 public:
  using Matrix::L, Matrix::M, Matrix::N, Matrix::only_slots, Matrix::stride, Matrix::vectors;
  const int64_t taps;

  explicit Slots(const Shape& s) : Matrix(s.N, s.M), taps(s.taps) {}

  int64_t reach() const { return taps / 2; }
  // Values of a weighting with both ends repeated.
  int64_t ring_size() const { return stride + 2 * reach() + L; }

  // to = from (1 - w erase^T) + w add^T with its norms and, given a key, its similarity to that.
  // `to` may be `from`.
  void write(const C* from, C* to, const C* w, const Head<C>& head, C* norm, const C* key,
             C* dots) const {
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) write_tile<4>(v, from, to, w, head, norm, key, dots);
    for (; v < vectors; ++v) write_tile<1>(v, from, to, w, head, norm, key, dots);
  }

  // ---- addressing

  // Scratch of one addressing; all [stride], rings have their own size.
  struct Scratch : Matrix::Content {
    C *ring, *ring_back, *shifted, *grad;

    void place(Carver& take, const Slots& slots) {
      Matrix::Content::place(take, slots);
      ring = take.array<C>(slots.ring_size());
      ring_back = take.array<C>(slots.ring_size());
      shifted = take.array<C>(slots.stride);
      grad = take.array<C>(slots.stride);
    }
  };

  // ring = gate softmax + (1 - gate) before
  SEQMEM_INLINE void interpolate(const C* before, const Head<C>& head, C scale,
                                 const Scratch& t) const {
    C* ring = t.ring + reach();
    const C gate = head.gate * scale, rest = C(1) - head.gate;
    for (int64_t v = 0; v < vectors; ++v)
      store(ring + v * L, gate * load(t.content + v * L) + rest * load(before + v * L));
    close(t.ring);
  }

  // Repeats both ends of what is stored at ring + reach(): slot N is slot 0. Zeros follow, for the
  // lanes beyond the last slot, whose factors are zero but must not be multiplied by NaN.
  SEQMEM_INLINE void close(C* ring) const {
    const int64_t r = reach();
    for (int64_t i = 0; i < r; ++i) ring[i] = ring[N + i];
    for (int64_t i = 0; i < r; ++i) ring[r + N + i] = ring[r + i];
    for (int64_t i = N + 2 * r; i < vectors * L + 2 * r; ++i) ring[i] = 0;
  }

  // The vector v of sum_j shift[j] ring[. + 2 r - j]
  template <int Taps>
  SEQMEM_INLINE Vec<C> shift(const C* ring, const C* shift, int64_t v) const {
    const int64_t n = Taps ? Taps : taps;
    Vec<C> x = shift[0] * load(ring + v * L + n - 1);
    for (int64_t j = 1; j < n; ++j) x += shift[j] * load(ring + v * L + n - 1 - j);
    return only_slots(v, x);
  }

  // From the ring to w; `w` may be what was interpolated from.
  template <int Taps>
  SEQMEM_INLINE void sharpen(const Head<C>& head, const Scratch& t, C* w) const {
    Vec<C> most{};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<C> x = shift<Taps>(t.ring, head.shift, v);
      store(t.shifted + v * L, x);
      most = x > most ? x : most;
    }
    // Relative to the largest, which may be too small to be divided by at once.
    const C top = largest_lane<C>(most), unit = top > C(0) ? top : C(1);
    const C lift = unit < kTiny ? 1 / kTiny : C(1), inverse = C(1) / (unit * lift);
    const Vec<C> nothing = splat(static_cast<C>(-__builtin_huge_val()));
    // Logarithms and powers in two passes: both for one vector are longer than the instructions
    // that a core reorders.
    for_vectors(vectors, [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> x[K], y[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) x[i] = load(t.shifted + (v + i) * L) * lift * inverse;
      log_of_positive<K, C>(x, y);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i)
        store(t.shifted + (v + i) * L, x[i] <= C(0) ? nothing : y[i] * head.gamma);
    });
    Vec<C> sum{};
    for_vectors(vectors, [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> y[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) y[i] = load(t.shifted + (v + i) * L);
      exp_of_negative<K, C>(y);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        sum += y[i];
        store(w + (v + i) * L, y[i]);
      }
    });
    const C whole = lane_sum<C>(sum);
    const C scale = whole == C(0) ? C(0) : C(1) / whole;
    for (int64_t v = 0; v < vectors; ++v) store(w + v * L, load(w + v * L) * scale);
  }

  // w = the head's weighting; `before` may be `w`.
  void address(const C* dots, const C* norm, const Head<C>& head, const C* before, const Scratch& t,
               C* w) const {
    interpolate(before, head,
                this->template content<false>(dots, norm, head.key_norm, head.beta, t), t);
    if (taps == 3) {
      sharpen<3>(head, t, w);
    } else {
      sharpen<0>(head, t, w);
    }
  }

 private:
  template <int K>
  SEQMEM_INLINE void write_tile(int64_t v, const C* from, C* to, const C* w, const Head<C>& head,
                                C* norm, const C* key, C* dots) const {
    Vec<C> x[K], squares[K], dot[K];
    start_sums(squares);
    start_sums(dot);
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i) x[i] = load(w + (v + i) * L);
    const C *other = key == nullptr ? head.key : key, *erases = head.erase, *adds = head.add;
    const C* row = from + v * L;
    C* out = to + v * L;
    const int64_t step = stride, width = M;
    for (int64_t m = 0; m < width; ++m, row += step, out += step) {
      const Vec<C> erase = splat(erases[m]), add = splat(adds[m]), k = splat(other[m]);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        const Vec<C> old = load(row + i * L);
        const Vec<C> now = old + x[i] * (add - erase * old);
        store(out + i * L, now);
        squares[i] += now * now;
        dot[i] += now * k;
      }
    }
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i) {
      store(norm + (v + i) * L, square_root<C>(squares[i]));
      if (key != nullptr) store(dots + (v + i) * L, dot[i]);
    }
  }
};

}  // namespace
}  // namespace seqmem::ntm
