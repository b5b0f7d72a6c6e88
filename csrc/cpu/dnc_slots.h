// What the heads of one row do with its slots: usage, allocation, content, writing and mixing.
// Weightings of several heads are [heads][stride], with zeros beyond the last slot.
#pragma once

#include "dnc_sort.h"
#include "dnc_values.h"

namespace seqmem::dnc {
namespace {

constexpr double kUsageFloor = 1e-6, kSharpenFloor = 1e-6;  // as in the reference

template <class C>
class Slots : public SlotMatrix<C> {
  using Matrix = SlotMatrix<C>;

 public:
  using Matrix::L, Matrix::M, Matrix::N, Matrix::stride, Matrix::vectors;
  const Shape& s;
  const Parts at;
  const C least;  // strength beside softplus

  explicit Slots(const Shape& s) : Matrix(s.N, s.M), s(s), at(s), least(s.softplus ? C(0) : C(1)) {}

  // Calls f(offset) for all vectors of slots.
  template <class F>
  SEQMEM_INLINE void each(F&& f) const {
    for (int64_t i = 0; i < vectors * L; i += L) f(i);
  }

  // ---- usage

  // psi = prod_r (1 - f_r q_r), without head `but`
  SEQMEM_INLINE Vec<C> kept(const C* free, const C* q, int64_t i, int64_t but = -1) const {
    Vec<C> x = splat(C(1));
    for (int64_t r = 0; r < s.reads; ++r)
      if (r != but) x *= C(1) - free[r] * load(q + r * stride + i);
    return x;
  }
  // prod_h (1 - w_h), without head `but`
  SEQMEM_INLINE Vec<C> unwritten(const C* w, int64_t i, int64_t but = -1) const {
    Vec<C> x = splat(C(1));
    for (int64_t h = 0; h < s.writes; ++h)
      if (h != but) x *= C(1) - load(w + h * stride + i);
    return x;
  }

  // usage = (usage + (1 - usage) what) psi and psi, from the weightings of the step before.
  void use(const C* free, const C* q, const C* w, C* usage, C* psi) const {
    each([&](int64_t i) {
      const Vec<C> u = load(usage + i), keep = kept(free, q, i);
      store(psi + i, keep);
      store(usage + i, (u + (C(1) - u) * (C(1) - unwritten(w, i))) * keep);
    });
  }

  // ---- allocation

  // a = (1 - v) prod of the v before, v = floor + (1 - floor) u, in the order of v; or a softmax of
  // strength (1 - u). `used` [stride] is left as v.
  void allocate(const C* u, C strength, C* used, Sorter<C>& sorter, C* a) const {
    if (s.softmax) {
      softmax(strength, [&](int64_t i) { return C(1) - load(u + i); }, a);
      return;
    }
    each([&](int64_t i) {
      store(used + i, C(kUsageFloor) + (C(1) - C(kUsageFloor)) * load(u + i));
    });
    sorter.run(used, N);
    each([&](int64_t i) { store(a + i, Vec<C>{}); });
    C before = 1;
    for (int64_t j = 0; j < N; ++j) {
      const int64_t i = sorter.order[j];
      a[i] = (C(1) - used[i]) * before;
      before *= used[i];
    }
  }

  // out = softmax(strength value(i))
  template <class F>
  SEQMEM_INLINE void softmax(C strength, F&& value, C* out) const {
    constexpr C infinity = static_cast<C>(__builtin_huge_val());
    Vec<C> most = splat(-infinity), sum{};
    each([&](int64_t i) {
      const Vec<C> x = true_lanes(i, strength * value(i), splat(-infinity));
      store(out + i, x);
      most = x > most ? x : most;
    });
    const C top = largest_lane<C>(most);
    each([&](int64_t i) {
      Vec<C> e[1] = {load(out + i) - top};
      exp_of_negative<1, C>(e);
      e[0] = true_lanes(i, e[0], Vec<C>{});
      sum += e[0];
      store(out + i, e[0]);
    });
    const C scale = C(1) / lane_sum<C>(sum);
    each([&](int64_t i) { store(out + i, load(out + i) * scale); });
  }

  SEQMEM_INLINE Vec<C> true_lanes(int64_t i, Vec<C> x, Vec<C> other) const {
    return i + L < vectors * L ? x : this->last ? x : other;
  }

  // ---- content

  // Keys of some heads, and what their comparison leaves.
  struct Lookup {
    int64_t heads;
    const C *keys, *strengths, *masks;  // masks null without
    C *dots, *weights;                  // [heads][stride]; dots of key m^2 and M
    C* norm;                            // of the slots: [stride], or [heads][stride] with masks
    C *masked, *key_norms;              // [heads][M]: m, [heads]
  };

  SEQMEM_INLINE const C* norm_of(const Lookup& x, int64_t h) const {
    return x.norm + (x.masks == nullptr ? 0 : h * stride);
  }
  // dots = M keys, norms and weightings; without masks the slots' norms are there already.
  void look_up(const C* memory, const Lookup& x, const typename Matrix::Content& t) const {
    for (int64_t h = 0; h < x.heads; ++h) {
      const C* key = x.keys + h * M;
      C square = 0, *mask = x.masked + h * M;
      for (int64_t m = 0; m < M; ++m) {
        mask[m] = x.masks == nullptr ? C(1) : mask_of(x.masks[h * M + m]);
        square += key[m] * mask[m] * (key[m] * mask[m]);
      }
      x.key_norms[h] = square_root(square + C(s.norm_floor));
    }
    if (x.masks == nullptr) {
      dots_of(memory, x.keys, x.heads, x.dots);
    } else {
      for (int64_t h = 0; h < x.heads; ++h) masked_dots(memory, x, h);
    }
    for (int64_t h = 0; h < x.heads; ++h) {
      const C scale = this->template content<false>(
          x.dots + h * stride, norm_of(x, h), x.key_norms[h], least + x.strengths[h], t, C(s.eps));
      this->scale(t.content, scale, x.weights + h * stride);
    }
  }

  SEQMEM_INLINE C mask_of(C sigmoid) const {
    return C(s.mask_min) + (C(1) - C(s.mask_min)) * sigmoid;
  }

  // dots_h,i = sum_m keys_h[m] M_i[m]
  void dots_of(const C* memory, const C* keys, int64_t heads, C* dots) const {
    for (int64_t h = 0; h < heads; h += 4)
      for_count<4>(min<int64_t>(4, heads - h), [&](auto count) {
        constexpr int R = decltype(count)::value;
        in_tiles([&](auto tile, int64_t i) {
          constexpr int K = decltype(tile)::value;
          Vec<C> sums[R][K];
          start_sums(sums);
          for (int64_t m = 0; m < M; ++m) {
            Vec<C> x[K];
            SEQMEM_UNROLL
            for (int k = 0; k < K; ++k) x[k] = load(memory + m * stride + i + k * L);
            SEQMEM_UNROLL
            for (int r = 0; r < R; ++r) SEQMEM_UNROLL
            for (int k = 0; k < K; ++k) sums[r][k] += keys[(h + r) * M + m] * x[k];
          }
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) store(dots + (h + r) * stride + i + k * L, sums[r][k]);
        });
      });
  }

  // ---- writing

  // prod_h (1 - w_h e_h[m]), without head `but`
  SEQMEM_INLINE Vec<C> stays(const C* w, const C* erase, int64_t i, int64_t m,
                             int64_t but = -1) const {
    Vec<C> x = splat(C(1));
    for (int64_t h = 0; h < s.writes; ++h)
      if (h != but) x *= C(1) - erase[h * M + m] * load(w + h * stride + i);
    return x;
  }

  // to = from psi prod_h (1 - w_h e_h^T) + sum_h w_h v_h^T, psi where deallocated, and its norms.
  void write(const C* from, C* to, const C* w, const C* values, const C* psi, C* norm) const {
    const C *erase = values + at.erase, *vectors_of = values + at.vectors;
    if (s.writes == 1 && !s.deallocate) {
      in_tiles([&](auto tile, int64_t i) {
        constexpr int K = decltype(tile)::value;
        Vec<C> squares[K], x[K];
        start_sums(squares);
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) x[k] = load(w + i + k * L);
        for (int64_t m = 0; m < M; ++m) SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) {
          const Vec<C> now =
              load(from + m * stride + i + k * L) * (C(1) - erase[m] * x[k]) + vectors_of[m] * x[k];
          store(to + m * stride + i + k * L, now);
          squares[k] += now * now;
        }
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k)
          store(norm + i + k * L, square_root<C>(squares[k] + C(s.norm_floor)));
      });
      return;
    }
    each([&](int64_t i) {
      Vec<C> squares{};
      const Vec<C> keep = s.deallocate ? load(psi + i) : splat(C(1));
      for (int64_t m = 0; m < M; ++m) {
        Vec<C> now = load(from + m * stride + i) * (keep * stays(w, erase, i, m));
        for (int64_t h = 0; h < s.writes; ++h)
          now += vectors_of[h * M + m] * load(w + h * stride + i);
        store(to + m * stride + i, now);
        squares += now * now;
      }
      store(norm + i, square_root<C>(squares + C(s.norm_floor)));
    });
  }

  // p_t = (1 - sum w) p + w, per write head
  void precede(const C* w, const C* p, C* to) const {
    for (int64_t h = 0; h < s.writes; ++h) {
      const C *weights = w + h * stride, *from = p + h * stride;
      Vec<C> sum{};
      each([&](int64_t i) { sum += load(weights + i); });
      const C rest = C(1) - lane_sum<C>(sum);
      each([&](int64_t i) {
        store(to + h * stride + i, rest * load(from + i) + load(weights + i));
      });
    }
  }

  // ---- reading

  // out_r[m] = sum_i q_r,i M_i[m], rows of `out` one after the other
  void read_all(const C* memory, const C* q, int64_t heads, C* out) const {
    for (int64_t h = 0; h < heads; h += 4)
      for_count<4>(min<int64_t>(4, heads - h), [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (int64_t m = 0; m < M; ++m) {
          Vec<C> sums[4];
          start_sums(sums);
          each([&](int64_t i) {
            const Vec<C> x = load(memory + m * stride + i);
            SEQMEM_UNROLL
            for (int r = 0; r < R; ++r) sums[r] += x * load(q + (h + r) * stride + i);
          });
          C four[4];
          store_sums4<C>(four, sums);
          for (int r = 0; r < R; ++r) out[(h + r) * M + m] = four[r];
        }
      });
  }

  // ---- sharpened directions

  // d in its place becomes S(d, sharpness); the logarithms, beside d / max d, are left in `logs`.
  void sharpen(C* d, C sharpness, C* scaled, C* logs) const {
    Vec<C> most = load(d);
    most = true_lanes(0, most, splat(-static_cast<C>(__builtin_huge_val())));
    bool nan = false;
    each([&](int64_t i) {
      const Vec<C> x = true_lanes(i, load(d + i), splat(-static_cast<C>(__builtin_huge_val())));
      most = x > most ? x : most;
    });
    for (int64_t i = 0; i < N; ++i) nan |= d[i] != d[i];
    const C top = nan ? static_cast<C>(__builtin_nan("")) : largest_lane<C>(most);
    each([&](int64_t i) {
      const Vec<C> x = top <= C(0) ? Vec<C>{} : load(d + i) / top;
      Vec<C> positive[1] = {(x < C(0) ? Vec<C>{} : x) + C(kSharpenFloor)}, log[1];
      log_of_positive<1, C>(positive, log);
      store(scaled + i, x);
      store(logs + i, log[0]);
    });
    softmax(sharpness, [&](int64_t i) { return load(logs + i); }, d);
  }

  // Calls f(constant K, offset) for tiles of K vectors of slots.
  template <class F>
  SEQMEM_INLINE void in_tiles(F&& f) const {
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) f(std::integral_constant<int, 2>{}, v * L);
    for (; v < vectors; ++v) f(std::integral_constant<int, 1>{}, v * L);
  }

 private:
  // With m: dots = M key m^2, norm = sqrt(sum (M m)^2 + floor).
  void masked_dots(const C* memory, const Lookup& x, int64_t h) const {
    const C *key = x.keys + h * M, *mask = x.masked + h * M;
    each([&](int64_t i) {
      Vec<C> dot{}, squares{};
      for (int64_t m = 0; m < M; ++m) {
        const Vec<C> now = mask[m] * load(memory + m * stride + i);
        dot += key[m] * mask[m] * now;
        squares += now * now;
      }
      store(x.dots + h * stride + i, dot);
      store(x.norm + h * stride + i, square_root<C>(squares + C(s.norm_floor)));
    });
  }
};

}  // namespace
}  // namespace seqmem::dnc
