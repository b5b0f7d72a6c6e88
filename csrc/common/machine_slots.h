// One row's memory of N slots as [M][stride]: slots are SIMD lanes, so that no sum is over the
// lanes of a vector. Passes over it and over the weightings of its slots [stride]. Lanes beyond the
// last slot hold zeros in both, and every pass keeps them so.
#pragma once

#include "gemm.h"
#include "machine.h"
#include "machine_math.h"

namespace seqmem::machine {
namespace {

constexpr double kEpsilon = 1e-8;  // beside the product of norms, as in the reference

template <class C>
class SlotMatrix {
 public:
  static constexpr int L = kLanes<C>;
  const int64_t N, M, stride, vectors;

  SlotMatrix(int64_t N, int64_t M) : N(N), M(M), stride(slot_stride(N)), vectors(ceil_div(N, L)) {
    for (int i = 0; i < L; ++i) last[i] = (vectors - 1) * L + i < N ? -1 : 0;
  }

  int64_t size() const { return M * stride; }

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

  // to = factor w
  void scale(const C* w, C factor, C* to) const {
    for (int64_t v = 0; v < vectors; ++v) store(to + v * L, load(w + v * L) * factor);
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

  // norm = sqrt(M_i . M_i + floor)
  void norms(const C* memory, C* norm, C floor = 0) const {
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
      for (int i = 0; i < K; ++i) store(norm + (v + i) * L, square_root<C>(total[i] + floor));
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
      out[m] = lane_sum<C>(total);
    }
  }

  // ---- softmax of the slots' similarity to a key

  // All [stride].
  struct Content {
    C *content, *similar, *inverse;

    void place(Carver& take, const SlotMatrix& slots) {
      content = take.array<C>(slots.stride);
      similar = take.array<C>(slots.stride);
      inverse = take.array<C>(slots.stride);
    }
  };

  // content = e^(beta K), K = dots / (norm |key| + eps); the largest is subtracted first only where
  // it is far from zero. Returns the factor that makes content a softmax. With `keep`, K and 1 /
  // (...) are stored.
  template <bool keep>
  SEQMEM_INLINE C content(const C* dots, const C* norm, C key_norm, C beta, const Content& t,
                          C eps = C(kEpsilon)) const {
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
          const Vec<C> inverse = C(1) / (load(norm + offset) * key_norm + eps);
          const Vec<C> similar = load(dots + offset) * inverse;
          if (keep) {
            store(t.similar + offset, similar);
            store(t.inverse + offset, inverse);
          }
          Vec<C> z = similar * beta;
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
      const C found = largest_lane<C>(most);
      if (top != C(0) || (found >= -kFar && found <= kFar)) return C(1) / lane_sum<C>(sum);
      top = found;
    }
  }

 protected:
  IntVec<C> last;  // the true lanes of the last vector
};

}  // namespace
}  // namespace seqmem::machine
