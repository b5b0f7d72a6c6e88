// Passes over one row's memory [M][stride] and over the weightings of its slots [stride].
// Lanes beyond the last slot hold zeros in both, and every pass keeps them so.
#pragma once

#include "ntm_math.h"

namespace seqmem::ntm {
namespace {

constexpr double kEpsilon = 1e-8;  // beside the product of norms, as in the reference
constexpr float kTiny = 0x1p-100f;

template <class C>
class Slots {
 public:
  static constexpr int L = kLanes<C>;
  const int64_t N, M, taps, stride, vectors;
  IntVec<C> last;  // the true lanes of the last vector

  explicit Slots(const Shape& s)
      : N(s.N), M(s.M), taps(s.taps), stride(s.stride()), vectors(ceil_div(s.N, L)) {
    for (int i = 0; i < L; ++i) last[i] = (vectors - 1) * L + i < N ? -1 : 0;
  }

  int64_t reach() const { return taps / 2; }
  // Values of a weighting with both ends repeated.
  int64_t ring_size() const { return stride + 2 * reach() + L; }

  SEQMEM_INLINE Vec<C> only_slots(int64_t v, Vec<C> x) const {
    return v + 1 == vectors ? (Vec<C>)((IntVec<C>)x & last) : x;
  }

  // ---- between [N, M] and [M][stride], squares of vectors at a time

  void load_memory(const C* from, C* to) const {
    for (int64_t v = 0; v < vectors; ++v) {
      const int rows = static_cast<int>(min<int64_t>(L, N - v * L));
      for (int64_t m = 0; m < M; m += L) {
        Vec<C> square[L] = {};
        const int n = static_cast<int>(min<int64_t>(L, M - m));
        for (int i = 0; i < rows; ++i) square[i] = load_n(from + (v * L + i) * M + m, n);
        transpose<C>(square);
        for (int i = 0; i < n; ++i) store(to + (m + i) * stride + v * L, square[i]);
      }
    }
  }

  void store_memory(const C* from, C* to) const {
    for (int64_t v = 0; v < vectors; ++v) {
      const int rows = static_cast<int>(min<int64_t>(L, N - v * L));
      for (int64_t m = 0; m < M; m += L) {
        Vec<C> square[L] = {};
        const int n = static_cast<int>(min<int64_t>(L, M - m));
        for (int i = 0; i < n; ++i) square[i] = load(from + (m + i) * stride + v * L);
        transpose<C>(square);
        for (int i = 0; i < rows; ++i) store_n(to + (v * L + i) * M + m, square[i], n);
      }
    }
  }

  // A weighting [N] to a padded one.
  void load_weights(const C* from, C* to) const {
    for (int64_t v = 0; v < vectors; ++v)
      store(to + v * L, load_n(from + v * L, static_cast<int>(min<int64_t>(L, N - v * L))));
  }

  // ---- passes over the memory

  // Calls f(constant K, first vector), eight vectors of slots at once: that many sums in flight
  // hide the latency of the multiplications.
  template <class F>
  SEQMEM_INLINE void for_tiles(F&& f) const {
    int64_t v = 0;
    for (; v + 8 <= vectors; v += 8) f(std::integral_constant<int, 8>{}, v);
    for (; v + 2 <= vectors; v += 2) f(std::integral_constant<int, 2>{}, v);
    for (; v < vectors; ++v) f(std::integral_constant<int, 1>{}, v);
  }

  void norms(const C* memory, C* norm) const {
    for_tiles([&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> total[K];
      start_sums(total);
      for (int64_t m = 0; m < M; ++m) SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        const Vec<C> x = load(memory + m * stride + (v + i) * L);
        total[i] += x * x;
      }
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) store(norm + (v + i) * L, square_root<C>(total[i]));
    });
  }

  // dots_i = sum_m M_i[m] key[m]
  void similarity(const C* memory, const C* key, C* dots) const {
    for_tiles([&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> total[K];
      start_sums(total);
      for (int64_t m = 0; m < M; ++m) {
        const Vec<C> k = splat(key[m]);
        SEQMEM_UNROLL
        for (int i = 0; i < K; ++i) total[i] += k * load(memory + m * stride + (v + i) * L);
      }
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) store(dots + (v + i) * L, total[i]);
    });
  }

  // to = from (1 - w erase^T) + w add^T with its norms and, given a key, its similarity to that.
  // `to` may be `from`.
  void write(const C* from, C* to, const C* w, const Head<C>& head, C* norm, const C* key,
             C* dots) const {
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) write_tile<4>(v, from, to, w, head, norm, key, dots);
    for (; v < vectors; ++v) write_tile<1>(v, from, to, w, head, norm, key, dots);
  }

  // out[m] = sum_i w_i M_i[m]
  void read(const C* memory, const C* w, C* out) const {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) {
      Vec<C> total[4];
      start_sums(total);
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<C> x = load(w + v * L);
        SEQMEM_UNROLL
        for (int j = 0; j < 4; ++j) total[j] += x * load(memory + (m + j) * stride + v * L);
      }
      store_sums4<C>(out + m, total);
    }
    for (; m < M; ++m) {
      Vec<C> total{};
      for (int64_t v = 0; v < vectors; ++v)
        total += load(w + v * L) * load(memory + m * stride + v * L);
      out[m] = sum<C>(total);
    }
  }

  // ---- addressing

  // Scratch of one addressing; all [stride], rings have their own size.
  struct Scratch {
    C *content, *ring, *ring_back, *shifted, *similar, *inverse, *grad;

    void place(Carver& take, const Slots& slots) {
      content = take.array<C>(slots.stride);
      ring = take.array<C>(slots.ring_size());
      ring_back = take.array<C>(slots.ring_size());
      shifted = take.array<C>(slots.stride);
      similar = take.array<C>(slots.stride);
      inverse = take.array<C>(slots.stride);
      grad = take.array<C>(slots.stride);
    }
  };

  // content = e^(beta K), K = dots / (norm |key| + eps); the largest is subtracted first only where
  // it is far from zero. Returns the factor that makes content a softmax. With `keep`, K and 1 /
  // (...) are stored.
  template <bool keep>
  SEQMEM_INLINE C content(const C* dots, const C* norm, const Head<C>& head,
                          const Scratch& t) const {
    constexpr C kFar = 40;  // from here on sums could overflow or vanish
    const Vec<C> nothing = splat(static_cast<C>(-__builtin_huge_val()));
    for (C top = 0;;) {
      Vec<C> sum{}, most = nothing;
      for_vectors(vectors, [&](auto count, int64_t v) {
        constexpr int K = decltype(count)::value;
        Vec<C> e[K];
        SEQMEM_UNROLL
        for (int i = 0; i < K; ++i) {
          const int64_t offset = (v + i) * L;
          const Vec<C> inverse = C(1) / (load(norm + offset) * head.key_norm + C(kEpsilon));
          const Vec<C> similar = load(dots + offset) * inverse;
          if (keep) {
            store(t.similar + offset, similar);
            store(t.inverse + offset, inverse);
          }
          Vec<C> z = similar * head.beta;
          if (v + i + 1 == vectors) z = last ? z : nothing;
          most = z > most ? z : most;
          e[i] = z - top;
        }
        exp_of_negative<K, C>(e);
        SEQMEM_UNROLL
        for (int i = 0; i < K; ++i) {
          sum += e[i];
          store(t.content + (v + i) * L, e[i]);
        }
      });
      const C found = largest<C>(most);
      if (top != C(0) || (found >= -kFar && found <= kFar)) return C(1) / total<C>(sum);
      top = found;
    }
  }

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
    const C top = largest<C>(most), unit = top > C(0) ? top : C(1);
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
    const C whole = total<C>(sum);
    const C scale = whole == C(0) ? C(0) : C(1) / whole;
    for (int64_t v = 0; v < vectors; ++v) store(w + v * L, load(w + v * L) * scale);
  }

  // w = the head's weighting; `before` may be `w`.
  void address(const C* dots, const C* norm, const Head<C>& head, const C* before, const Scratch& t,
               C* w) const {
    interpolate(before, head, content<false>(dots, norm, head, t), t);
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
