// Passes over one batch row's memory [N, M], whose slots need not be whole vectors.
//
// A slot's last vector reaches into the next slot. Those lanes are masked where a sum over the slot
// would include them, and stored as they were. The last slots, whose last vector would go beyond
// the array, are copied to a padded array.
#pragma once

#include <initializer_list>

#include "../common/gemm.h"
#include "ntm_addressing_kernel.h"
#include "ntm_addressing_math.h"

namespace seqmem::ntm_addressing {
namespace {

// Whole vectors that hold n values.
template <class C>
SEQMEM_INLINE int64_t padded(int64_t n) {
  return ceil_div(n, kLanes<C>) * kLanes<C>;
}

// from [n] to `to` [padded], zeros behind it.
template <class S>
SEQMEM_INLINE void load_row(const S* from, compute_t<S>* to, int64_t n) {
  constexpr int L = kLanes<compute_t<S>>;
  for (int64_t i = 0; i < n; i += L) store(to + i, load_n(from + i, static_cast<int>(n - i)));
}

// Slots of one or two arrays of the same layout: `at` is read, `out` written.
template <class C>
struct Slots {
  int64_t first, count;
  const C* at;
  C* out;
};

template <class C>
class Rows {
 public:
  static constexpr int L = kLanes<C>;
  const int64_t N, M;
  const int64_t vectors;  // of a slot
  const int64_t near;     // slots before this one may be loaded and stored by whole vectors

  Rows(const Shape& s)
      : N(s.N),
        M(s.M),
        vectors(ceil_div(M, L)),
        near(vectors * L > N * M ? 0 : (N * M - vectors * L) / M + 1) {
    for (int i = 0; i < L; ++i) last_[i] = (vectors - 1) * L + i < M ? -1 : 0;
  }

  // Values of a padded copy of the last slots, or of all of them.
  int64_t far_size() const { return (N - near) * M + L; }
  int64_t whole_size() const { return N * M + L; }

  // The slots, and those from `near` on: in a copy, or behind the others if the array is padded.
  struct Array {
    C* at;
    C* far;
  };
  SEQMEM_INLINE Array with_room(C* at) const { return {at, at + near * M}; }

  // dots[i] = at_i . key and, where wanted, squares[i] = |at_i|^2; key [padded]
  template <bool with_squares>
  void similarity(const Array& memory, const C* key, C* dots, C* squares) const {
    segments(memory, {}, [&](const Slots<C>& s) {
      int64_t i = 0;
      for (; i + 4 <= s.count; i += 4)
        dot<4, with_squares>(s.at + i * M, key, dots + s.first + i, squares + s.first + i);
      for (; i < s.count; ++i)
        dot<1, with_squares>(s.at + i * M, key, dots + s.first + i, squares + s.first + i);
    });
  }

  // sums = sum_i w_i at_i, [padded]
  void weighted_sum(const Array& memory, const C* w, C* sums) const {
    for (int64_t m = 0; m < vectors * L; ++m) sums[m] = 0;
    segments(memory, {}, [&](const Slots<C>& s) {
      tiles<4>([&](auto count, auto, int64_t v) {
        constexpr int K = decltype(count)::value;
        Vec<C> even[K], odd[K];
        start_sums(odd);
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) even[k] = load(sums + (v + k) * L);
        const C* row = s.at + v * L;
        int64_t i = 0;
        for (; i + 2 <= s.count; i += 2, row += 2 * M) {
          const C a = w[s.first + i], b = w[s.first + i + 1];
          SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) {
            even[k] += a * load(row + k * L);
            odd[k] += b * load(row + M + k * L);
          }
        }
        if (i < s.count) SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) even[k] += w[s.first + i] * load(row + k * L);
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) store(sums + (v + k) * L, even[k] + odd[k]);
      });
    });
  }

  // out_i (+)= a_i key; where it also reads: + slope_i at_i, and sums = sum_i a_i at_i, [padded].
  template <bool adds, bool reads>
  void spread(const Array& memory, const Array& out, const C* a, const C* key, const C* slope,
              C* sums) const {
    if (reads)
      for (int64_t m = 0; m < vectors * L; ++m) sums[m] = 0;
    segments(memory, out, [&](const Slots<C>& s) {
      tiles<4>([&](auto count, auto tail, int64_t v) {
        constexpr int K = decltype(count)::value;
        Vec<C> k_[K], sum_[K];
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) {
          k_[k] = load(key + (v + k) * L);
          if (reads) sum_[k] = load(sums + (v + k) * L);
        }
        for (int64_t i = 0; i < s.count; ++i) {
          const C* row = s.at + i * M + v * L;
          C* to = s.out + i * M + v * L;
          const Vec<C> w = splat(a[s.first + i]);
          SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) {
            Vec<C> y = w * k_[k];
            if (reads) {
              const Vec<C> x = load(row + k * L);
              sum_[k] += w * x;
              y += slope[s.first + i] * x;
            }
            if (adds) y += load(to + k * L);
            put<tail.value, K>(to, k, y);
          }
        }
        if (reads) SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) store(sums + (v + k) * L, sum_[k]);
      });
    });
  }

  // out_i = at_i (1 - w_i erase) + w_i add
  void write(const Array& memory, const Array& out, const C* w, const C* erase,
             const C* add) const {
    segments(memory, out, [&](const Slots<C>& s) {
      tiles<4>([&](auto count, auto tail, int64_t v) {
        constexpr int K = decltype(count)::value;
        Vec<C> e[K], a[K];
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) {
          e[k] = load(erase + (v + k) * L);
          a[k] = load(add + (v + k) * L);
        }
        for (int64_t i = 0; i < s.count; ++i) {
          const Vec<C> x = splat(w[s.first + i]);
          SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) {
            const Vec<C> old = load(s.at + i * M + (v + k) * L);
            put<tail.value, K>(s.out + i * M + v * L, k, old * (C(1) - x * e[k]) + x * a[k]);
          }
        }
      });
    });
  }

  // From the gradient that `grad` holds of what write() made: that of memory, in its place, and
  // of w, erase and add.
  void write_backward(const Array& memory, const Array& grad, const C* w, const C* erase,
                      const C* add, C* grad_w, C* grad_erase, C* grad_add) const {
    for (int64_t i = 0; i < N; ++i) grad_w[i] = 0;
    for (int64_t m = 0; m < vectors * L; ++m) grad_erase[m] = grad_add[m] = 0;
    segments(memory, grad, [&](const Slots<C>& s) {
      tiles<2>([&](auto count, auto tail, int64_t v) {
        constexpr int K = decltype(count)::value;
        Vec<C> e[K], a[K], sum_e[K], sum_a[K];
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) {
          e[k] = load(erase + (v + k) * L);
          a[k] = load(add + (v + k) * L);
          sum_e[k] = load(grad_erase + (v + k) * L);
          sum_a[k] = load(grad_add + (v + k) * L);
        }
        auto one = [&](int64_t i) {
          const Vec<C> x = splat(w[s.first + i]);
          Vec<C> total{};
          SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) {
            const Vec<C> old = load(s.at + i * M + (v + k) * L);
            C* to = s.out + i * M + v * L;
            const Vec<C> g = load(to + k * L), weighted = x * g;
            sum_a[k] += weighted;
            sum_e[k] -= weighted * old;
            total += within<tail.value, K>(k, g * (a[k] - old * e[k]));
            put<tail.value, K>(to, k, g - weighted * e[k]);
          }
          return total;
        };
        int64_t i = 0;
        for (; i + 4 <= s.count; i += 4) {
          const Vec<C> totals[4] = {one(i), one(i + 1), one(i + 2), one(i + 3)};
          C sums[4];
          store_sums4<C>(sums, totals);
          for (int j = 0; j < 4; ++j) grad_w[s.first + i + j] += sums[j];
        }
        for (; i < s.count; ++i) grad_w[s.first + i] += lane_sum<C>(one(i));
        SEQMEM_UNROLL
        for (int k = 0; k < K; ++k) {
          store(grad_erase + (v + k) * L, sum_e[k]);
          store(grad_add + (v + k) * L, sum_a[k]);
        }
      });
    });
  }

  // Fills the padded copy, before reading; copies it back, after writing.
  SEQMEM_INLINE void begin(const Array& array) const {
    __builtin_memcpy(array.far, array.at + near * M, (N - near) * M * sizeof(C));
  }
  SEQMEM_INLINE void finish(const Array& array) const {
    __builtin_memcpy(array.at + near * M, array.far, (N - near) * M * sizeof(C));
  }

 private:
  IntVec<C> last_;  // the lanes of a slot's last vector that belong to it

  template <class F>
  SEQMEM_INLINE void segments(const Array& in, const Array& out, F&& f) const {
    f(Slots<C>{0, near, in.at, out.at});
    f(Slots<C>{near, N - near, in.far, out.far});
  }

  // Calls f(constant K <= most, constant tail, first vector) over a slot's vectors.
  template <int most, class F>
  SEQMEM_INLINE void tiles(F&& f) const {
    const bool whole = vectors * L == M;
    int64_t v = 0;
    for (; v + most < vectors; v += most) f(std::integral_constant<int, most>{}, no{}, v);
    auto end = [&](auto count) { whole ? f(count, no{}, v) : f(count, yes{}, v); };
    switch (vectors - v) {
      case 1: end(std::integral_constant<int, 1>{}); break;
      case 2: end(std::integral_constant<int, 2>{}); break;
      case 3:
        if constexpr (most >= 3) end(std::integral_constant<int, 3>{});
        break;
      case 4:
        if constexpr (most >= 4) end(std::integral_constant<int, 4>{});
        break;
    }
  }
  using yes = std::true_type;
  using no = std::false_type;

  // Vector k of a tile of K, without the lanes of the next slot.
  template <bool tail, int K>
  SEQMEM_INLINE Vec<C> within(int k, Vec<C> x) const {
    return tail && k == K - 1 ? (Vec<C>)((IntVec<C>)x & last_) : x;
  }
  template <bool tail, int K>
  SEQMEM_INLINE void put(C* to, int k, Vec<C> x) const {
    if (tail && k == K - 1) x = last_ ? x : load(to + k * L);
    store(to + k * L, x);
  }

  template <int R, bool with_squares>
  SEQMEM_INLINE void dot(const C* row, const C* key, C* dots, C* squares) const {
    Vec<C> d[R], q[R];
    start_sums(d);
    start_sums(q);
    auto add = [&](const Vec<C>& k, int r, Vec<C> x) {
      d[r] += k * x;
      if (with_squares) q[r] += x * x;
    };
    for (int64_t v = 0; v + 1 < vectors; ++v) {
      const Vec<C> k = load(key + v * L);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) add(k, r, load(row + r * M + v * L));
    }
    const int64_t v = vectors - 1;
    const Vec<C> k = load(key + v * L);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) add(k, r, (Vec<C>)((IntVec<C>)load(row + r * M + v * L) & last_));
    if constexpr (R == 4) {
      store_sums4<C>(dots, d);
      if (with_squares) store_sums4<C>(squares, q);
    } else {
      dots[0] = lane_sum<C>(d[0]);
      if (with_squares) squares[0] = lane_sum<C>(q[0]);
    }
  }
};

// Memory as the passes read it: float and double in place, with a copy of the last slots; 16-bit
// values as a copy of all, in the arithmetic's type.
template <class S>
class Staged {
 public:
  using C = compute_t<S>;
  using Array = typename Rows<C>::Array;
  static constexpr bool in_place = std::is_same_v<S, C>;

  void place(Carver& take, const Rows<C>& rows) {
    copy_ = take.array<C>(in_place ? rows.far_size() : rows.whole_size());
  }
  // For reading.
  SEQMEM_INLINE Array enter(const Rows<C>& rows, const S* from) const {
    Array array = target(rows, const_cast<S*>(from));
    if constexpr (in_place) {
      rows.begin(array);
    } else {
      load_row(from, copy_, rows.N * rows.M);
    }
    return array;
  }
  // For writing, until leave().
  SEQMEM_INLINE Array target(const Rows<C>& rows, S* to) const {
    if constexpr (in_place) {
      return {to, copy_};
    } else {
      return rows.with_room(copy_);
    }
  }
  SEQMEM_INLINE void leave(const Rows<C>& rows, const Array& array, S* to) const {
    if constexpr (in_place) {
      rows.finish(array);
    } else {
      store_row(to, copy_, rows.N * rows.M);
    }
  }

 private:
  C* copy_ = nullptr;
};

}  // namespace
}  // namespace seqmem::ntm_addressing
