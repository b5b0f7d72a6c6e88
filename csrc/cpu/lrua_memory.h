// What a head's values are, which slots are least used, and the step's passes over one row's
// memory.
#pragma once

#include "../common/lane_sets.h"
#include "../common/machine_layout.h"
#include "../common/machine_slots.h"
#include "../common/machine_values.h"
#include "lrua_kernel.h"

namespace seqmem::lrua {
namespace {

using namespace machine;

// One head's values after their activation, pointing into p; strength is 1 + the value in p.
template <class C>
struct Head {
  const C *key, *add;
  C gate, strength, key_norm;
};

// Offsets of a head's values in its part of p: key M, add M (the key where there is none), gate 1,
// strength 1.
struct HeadLayout {
  int64_t add, gate, strength, size;
  explicit HeadLayout(const Shape& s)
      : add(s.own_add ? s.M : 0), gate(add + s.M), strength(gate + 1), size(s.P / s.heads) {}
};

// Activates whole rows of p in their place: keys and adds by tanh, gates by sigmoid, strengths by
// softplus.
template <class C>
class HeadValues {
  static constexpr int L = kLanes<C>;
  const Shape& s;
  const HeadLayout layout;
  Squash<C> squash;
  C* soft;  // strengths side by side

 public:
  explicit HeadValues(const Shape& s) : s(s), layout(s), squash(s.P) {}

  void place(Carver& take) {
    squash.place(take);
    soft = take.array<C>(padded<C>(s.heads));
  }

  void prepare() const {
    squash.clear();
    for (int64_t h = 0; h < s.heads; ++h) {
      squash.tanh(h * layout.size, layout.gate);
      squash.sigmoid(h * layout.size + layout.gate, 1);
    }
    zero(soft, padded<C>(s.heads));
  }

  void activate(C* p) const {
    squash.run(p);
    strengths(p, p, [](Vec<C> x, Vec<C>) {
      Vec<C> one[1] = {x};
      softplus<1, C>(one);
      return one[0];
    });
  }

  // From gradients of a row's activated values to those of p, in place; padded as above.
  void back(const C* values, C* grad) const {
    squash.back(values, grad);
    strengths(values, grad, [](Vec<C> x, Vec<C> g) { return g * softplus_slope<C>(x); });
  }

  Head<C> head(const C* values, int64_t h) const {
    values += h * layout.size;
    Vec<C> squares{};
    for (int64_t m = 0; m < s.M; m += L) {
      const Vec<C> k = load_n(values + m, static_cast<int>(min<int64_t>(L, s.M - m)));
      squares += k * k;
    }
    return {values, values + layout.add, values[layout.gate],
            s.strength ? C(1) + values[layout.strength] : C(1), square_root(lane_sum<C>(squares))};
  }

 private:
  // to = f(from, to) of all heads' strengths.
  template <class F>
  SEQMEM_INLINE void strengths(const C* from, C* to, F&& f) const {
    if (!s.strength) return;
    for (int64_t first = 0; first < s.heads; first += L) {
      const int64_t n = min<int64_t>(L, s.heads - first);
      const int64_t at = first * layout.size + layout.strength;
      const int lanes = static_cast<int>(n);
      const Vec<C> y = f(load_strided(from + at, layout.size, lanes),
                         load_strided(static_cast<const C*>(to) + at, layout.size, lanes));
      for (int64_t i = 0; i < n; ++i) to[at + i * layout.size] = y[i];
    }
  }
};

// slots = the `count` of n slots with the least usage, equal ones by ascending index; NaN counts as
// infinite. usage: whole vectors.
template <class C>
void least_used(const C* usage, int64_t n, int64_t count, int64_t* slots) {
  constexpr int L = kLanes<C>;
  auto value = [&](int64_t i) {
    return usage[i] == usage[i] ? usage[i] : static_cast<C>(__builtin_huge_val());
  };
  auto insert = [&](int64_t i, int64_t held) {
    int64_t to = held;
    for (; to > 0 && value(i) < value(slots[to - 1]); --to) slots[to] = slots[to - 1];
    slots[to] = i;
  };
  for (int64_t i = 0; i < count; ++i) insert(i, i);
  // Few of the others are among the least so far: vectors without such a one are passed by.
  C most = value(slots[count - 1]);
  for (int64_t v = count / L * L; v < n; v += L) {
    LaneSet less = lanes_set<C>(load(usage + v) < most) & first_lanes_set<C>(n - v) &
                   ~first_lanes_set<C>(count - v);
    for (; less != 0; less &= less - 1) {
      const int64_t i = v + __builtin_ctz(less);
      if (!(usage[i] < most)) continue;
      insert(i, count - 1);
      most = value(slots[count - 1]);
    }
  }
}

// Weightings of R heads are [R][stride].
template <class C>
class Slots : public SlotMatrix<C> {
  using Matrix = SlotMatrix<C>;
  // Vectors of slots at once: with R heads, R factors and as many sums are in registers.
  static constexpr int kMost = 4;
  template <int R>
  static constexpr int kTile =
      (SEQMEM_VEC_BYTES == 64 ? 8 : 4) / R > 1 ? (SEQMEM_VEC_BYTES == 64 ? 8 : 4) / R : 1;

 public:
  using Matrix::L, Matrix::M, Matrix::N, Matrix::stride, Matrix::vectors;
  const int64_t heads, erased;

  explicit Slots(const Shape& s) : Matrix(s.N, s.M), heads(s.heads), erased(s.erased) {}

  // The weightings to write with, from those read with in the step before.
  void write_weights(const Head<C>* head, const int64_t* slots, const C* before, C* w) const {
    for (int64_t h = 0; h < heads; ++h, before += stride, w += stride) {
      for (int64_t v = 0; v < vectors; ++v) store(w + v * L, head[h].gate * load(before + v * L));
      w[slots[h]] += C(1) - head[h].gate;
    }
  }

  // to = from with the erased slots at zero + sum_h w_h add_h^T, its norms and its similarity to
  // the heads' keys [heads][stride]. `kept` [stride] is all ones in every bit before and
  // afterwards. `to` may be `from`.
  void write(const C* from, C* to, const int64_t* slots, const C* w, const Head<C>* head, C* kept,
             C* norm, C* dots) const {
    for (int64_t h = 0; h < erased; ++h) kept[slots[h]] = 0;
    if (heads <= kMost) {
      for_count<kMost>(heads, [&](auto count) {
        constexpr int R = decltype(count)::value;
        in_tiles<kTile<R>>([&](auto tile, int64_t v) {
          write_tile<R, decltype(tile)::value, true>(v, from, to, w, head, kept, norm, dots);
        });
      });
    } else {
      for (int64_t h = 0; h < heads; h += kMost) {
        for_count<kMost>(min<int64_t>(kMost, heads - h), [&](auto count) {
          constexpr int R = decltype(count)::value;
          in_tiles<kTile<R>>([&](auto tile, int64_t v) {
            write_tile<R, decltype(tile)::value, false>(v, h == 0 ? from : to, to, w + h * stride,
                                                        head + h, kept, norm, dots);
          });
        });
        for (int64_t e = 0; e < erased && h == 0; ++e) set_ones(kept + slots[e]);
      }
      this->norms(to, norm);
      for (int64_t h = 0; h < heads; ++h) this->similarity(to, head[h].key, dots + h * stride);
    }
    for (int64_t h = 0; h < erased; ++h) set_ones(kept + slots[h]);
  }

  void keep_all(C* kept) const {
    for (int64_t i = 0; i < stride; ++i) set_ones(kept + i);
  }

  // usage = gamma usage + sum_h (w_h + written_h)
  void use(C gamma, const C* w, const C* written, C* usage) const {
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<C> x = gamma * load(usage + v * L);
      for (int64_t h = 0; h < heads; ++h)
        x += load(w + h * stride + v * L) + load(written + h * stride + v * L);
      store(usage + v * L, x);
    }
  }

  // ---- passes of all heads, some of them at once

  // out_h[m] = sum_i w_h,i M_i[m]; rows of `out` are `step` apart. Four features at once: a vector
  // of a weighting is loaded once for all of them.
  void sum_slots(const C* memory, const C* w, C* out, int64_t step) const {
    each_group<SEQMEM_VEC_BYTES == 64 ? 4 : 2>([&](auto count, int64_t h) {
      constexpr int R = decltype(count)::value;
      int64_t m = 0;
      for (; m + 4 <= M; m += 4) sum_slots<R, 4>(m, memory, w + h * stride, out + h * step, step);
      for (; m < M; ++m) sum_slots<R, 1>(m, memory, w + h * stride, out + h * step, step);
    });
  }

  // out_h,i += sum_m x_h[m] M_i[m]; rows of `x` are `step` apart.
  void add_sums(const C* memory, const C* x, int64_t step, C* out) const {
    each_group([&](auto count, int64_t h) {
      constexpr int R = decltype(count)::value;
      in_tiles<2 * kTile<R>>([&](auto tile, int64_t v) {
        constexpr int K = decltype(tile)::value;
        Vec<C> sums[R][K];
        C* to = out + h * stride + v * L;
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int i = 0; i < K; ++i) sums[r][i] = load(to + r * stride + i * L);
        const C *row = memory + v * L, *factor = x + h * step;
        for (int64_t m = 0; m < M; ++m, row += stride) {
          Vec<C> value[K];
          SEQMEM_UNROLL
          for (int i = 0; i < K; ++i) value[i] = load(row + i * L);
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int i = 0; i < K; ++i) sums[r][i] += factor[r * step + m] * value[i];
        }
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int i = 0; i < K; ++i) store(to + r * stride + i * L, sums[r][i]);
      });
    });
  }

  // to += sum_h w_h x_h^T + z_h key_h^T, and + n M: the gradient of a memory that was read.
  void add_outer(const C* w, const C* x, int64_t step, const C* z, const Head<C>* head, const C* n,
                 const C* memory, C* to) const {
    each_group([&](auto count, int64_t h) {
      constexpr int R = decltype(count)::value;
      const C* factor[2 * R];
      for (int r = 0; r < R; ++r) factor[r] = x + (h + r) * step, factor[R + r] = head[h + r].key;
      for (int64_t v = 0; v < vectors; ++v) {
        Vec<C> weight[2 * R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          weight[r] = load(w + (h + r) * stride + v * L);
          weight[R + r] = load(z + (h + r) * stride + v * L);
        }
        const Vec<C> of_norm = h == 0 ? load(n + v * L) : Vec<C>{};
        const C* row = memory + v * L;
        C* out = to + v * L;
        for (int64_t m = 0; m < M; ++m, row += stride, out += stride) {
          Vec<C> sum = load(out) + of_norm * load(row);
          SEQMEM_UNROLL
          for (int r = 0; r < 2 * R; ++r) sum += weight[r] * factor[r][m];
          store(out, sum);
        }
      }
    });
  }

 private:
  static SEQMEM_INLINE void set_ones(C* to) { __builtin_memset(to, 0xff, sizeof(C)); }

  template <int Most = kMost, class F>
  SEQMEM_INLINE void each_group(F&& f) const {
    for (int64_t h = 0; h < heads; h += Most)
      for_count<Most>(min<int64_t>(Most, heads - h), [&](auto count) { f(count, h); });
  }

  template <int K, class F>
  SEQMEM_INLINE void in_tiles(F&& f) const {
    int64_t v = 0;
    for (; v + K <= vectors; v += K) f(std::integral_constant<int, K>{}, v);
    if constexpr (K > 1)
      for (; v < vectors; ++v) f(std::integral_constant<int, 1>{}, v);
  }

  template <int R, int K, bool compares>
  SEQMEM_INLINE void write_tile(int64_t v, const C* from, C* to, const C* w, const Head<C>* head,
                                const C* kept, C* norm, C* dots) const {
    Vec<C> x[R][K], squares[K], dot[R][K];
    IntVec<C> stays[K];
    const C *adds[R], *keys[R];
    start_sums(squares);
    start_sums(dot);
    SEQMEM_UNROLL
    for (int i = 0; i < K; ++i) stays[i] = (IntVec<C>)load(kept + (v + i) * L);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      adds[r] = head[r].add, keys[r] = head[r].key;
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) x[r][i] = load(w + r * stride + (v + i) * L);
    }
    const C* row = from + v * L;
    C* out = to + v * L;
    for (int64_t m = 0; m < M; ++m, row += stride, out += stride) {
      Vec<C> now[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) now[i] = (Vec<C>)((IntVec<C>)load(row + i * L) & stays[i]);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) now[i] += x[r][i] * adds[r][m];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        store(out + i * L, now[i]);
        if constexpr (compares) squares[i] += now[i] * now[i];
      }
      if constexpr (compares) SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) dot[r][i] += now[i] * keys[r][m];
    }
    if constexpr (compares) {
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        store(norm + (v + i) * L, square_root<C>(squares[i]));
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) store(dots + r * stride + (v + i) * L, dot[r][i]);
      }
    }
  }

  template <int R, int J>
  SEQMEM_INLINE void sum_slots(int64_t m, const C* memory, const C* w, C* out, int64_t step) const {
    Vec<C> sums[R][4];
    start_sums(sums);
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<C> x[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) x[r] = load(w + r * stride + v * L);
      SEQMEM_UNROLL
      for (int j = 0; j < J; ++j) {
        const Vec<C> value = load(memory + (m + j) * stride + v * L);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) sums[r][j] += x[r] * value;
      }
    }
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      C four[4];
      store_sums4<C>(four, sums[r]);
      copy(four, out + r * step + m, J);
    }
  }
};

}  // namespace
}  // namespace seqmem::lrua
