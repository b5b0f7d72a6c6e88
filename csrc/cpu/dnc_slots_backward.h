// The reverse of dnc_slots.h: content, writing and allocation.
#pragma once

#include "dnc_slots.h"

namespace seqmem::dnc {
namespace {

template <class C>
class SlotsBackward {
  static constexpr int L = kLanes<C>;
  using Lookup = typename Slots<C>::Lookup;
  const Slots<C>& slots;
  const Shape& s;
  const int64_t M, N, stride;

 public:
  // Of a lookup: [heads][stride] twice, [heads][M] twice, [heads].
  struct Scratch {
    C *ddots, *part, *along, *keys, *of_sizes;

    void place(Carver& take, const Slots<C>& slots) {
      const int64_t heads = max(slots.s.reads, slots.s.writes);
      ddots = take.array<C>(heads * slots.stride);
      part = take.array<C>(heads * slots.stride);
      along = take.array<C>(heads * slots.M);
      keys = take.array<C>(heads * slots.M);
      of_sizes = take.array<C>(heads);
    }
  };

  explicit SlotsBackward(const Slots<C>& slots)
      : slots(slots), s(slots.s), M(slots.M), N(slots.N), stride(slots.stride) {}

  // ---- content

  // From dw [heads][stride] of a lookup to the gradients of its keys, strengths and masks (null
  // without), and dM += theirs.
  void look_up(const C* memory, const Lookup& x, const C* dw, C* dkeys, C* dstrengths, C* dmasks,
               C* dmemory, const Scratch& t) const {
    const bool masked = x.masks != nullptr;
    for (int64_t h = 0; h < x.heads; ++h) {
      const C size = x.key_norms[h], strength = slots.least + x.strengths[h];
      const C dsize = compare(x, h, size, strength, dw + h * stride, dstrengths + h, t);
      t.of_sizes[h] = size > C(0) ? dsize / size : C(0);
      for (int64_t m = 0; m < M; ++m) {
        const C mask = x.masked[h * M + m];
        t.keys[h * M + m] = x.keys[h * M + m] * mask * mask;
      }
    }
    slots.read_all(memory, t.ddots, x.heads, t.along);
    for (int64_t h = 0; h < x.heads; ++h) {
      const C of_size = t.of_sizes[h];
      for (int64_t m = 0; m < M; ++m) {
        const int64_t k = h * M + m;
        const C mask = x.masked[k], key = x.keys[k];
        dkeys[k] = (t.along[k] + of_size * key) * mask * mask;
        if (!masked) continue;
        const C squares = sum_squares(memory + m * stride, t.part + h * stride);
        const C dmask = mask * (key * (C(2) * t.along[k] + of_size * key) + squares);
        dmasks[k] = (C(1) - C(s.mask_min)) * dmask;
      }
    }
    add_outer(t.ddots, t.keys, x.heads, dmemory);
    const int64_t parts = masked ? x.heads : 1;
    slots.each([&](int64_t i) {
      for (int64_t h = 0; h < parts; ++h) {
        const Vec<C> part = load(t.part + h * stride + i);
        for (int64_t m = 0; m < M; ++m) {
          C* to = dmemory + m * stride + i;
          const C mask = x.masked[h * M + m];
          store(to, load(to) + part * (mask * mask) * load(memory + m * stride + i));
        }
      }
    });
  }

  // dM += sum_h w_h x_h^T, x [heads][M]
  void add_outer(const C* w, const C* x, int64_t heads, C* dmemory) const {
    for (int64_t h = 0; h < heads; h += 4)
      for_count<4>(min<int64_t>(4, heads - h), [&](auto count) {
        constexpr int R = decltype(count)::value;
        slots.in_tiles([&](auto tile, int64_t i) {
          constexpr int K = decltype(tile)::value;
          Vec<C> weight[R][K];
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) weight[r][k] = load(w + (h + r) * stride + i + k * L);
          for (int64_t m = 0; m < M; ++m) SEQMEM_UNROLL
          for (int k = 0; k < K; ++k) {
            C* to = dmemory + m * stride + i + k * L;
            Vec<C> sum = load(to);
            SEQMEM_UNROLL
            for (int r = 0; r < R; ++r) sum += x[(h + r) * M + m] * weight[r][k];
            store(to, sum);
          }
        });
      });
  }

  // dq_r,i += sum_m x_r[m] M_i[m]
  void add_sums(const C* memory, const C* x, int64_t heads, C* to, C* scratch) const {
    slots.dots_of(memory, x, heads, scratch);
    for (int64_t h = 0; h < heads; ++h)
      slots.each([&](int64_t i) {
        store(to + h * stride + i, load(to + h * stride + i) + load(scratch + h * stride + i));
      });
  }

  // ---- writing

  // From dM after a write to that before it, in place; the gradients of erase and vectors [writes,
  // M], and dw and dpsi (null unless memory was deallocated by psi) grow by theirs.
  void write(const C* memory, const C* w, const C* values, const C* psi, C* dmemory, C* derase,
             C* dvectors, C* dw, C* dpsi) const {
    const C *erase = values + slots.at.erase, *vectors = values + slots.at.vectors;
    if (s.writes == 1 && dpsi == nullptr) {
      for (int64_t m = 0; m < M; ++m) {
        Vec<C> of_vector{}, of_erase{};
        const C e = erase[m], x = vectors[m];
        slots.each([&](int64_t i) {
          const Vec<C> d = load(dmemory + m * stride + i), mine = load(w + i);
          const Vec<C> before = load(memory + m * stride + i);
          of_vector += d * mine;
          of_erase += d * before * mine;
          store(dw + i, load(dw + i) + d * (x - e * before));
          store(dmemory + m * stride + i, d * (C(1) - e * mine));
        });
        dvectors[m] = lane_sum<C>(of_vector);
        derase[m] = -lane_sum<C>(of_erase);
      }
      return;
    }
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t h = 0; h < s.writes; ++h) {
        Vec<C> of_vector{}, of_erase{};
        slots.each([&](int64_t i) {
          const Vec<C> d = load(dmemory + m * stride + i), mine = load(w + h * stride + i);
          const Vec<C> rest = d * load(memory + m * stride + i) * keep(psi, dpsi, i) *
                              slots.stays(w, erase, i, m, h);
          of_vector += d * mine;
          of_erase += rest * mine;
          C* to = dw + h * stride + i;
          store(to, load(to) + d * vectors[h * M + m] - erase[h * M + m] * rest);
        });
        dvectors[h * M + m] = lane_sum<C>(of_vector);
        derase[h * M + m] = -lane_sum<C>(of_erase);
      }
      slots.each([&](int64_t i) {
        const Vec<C> d = load(dmemory + m * stride + i);
        const Vec<C> stays = slots.stays(w, erase, i, m);
        if (dpsi != nullptr)
          store(dpsi + i, load(dpsi + i) + d * load(memory + m * stride + i) * stays);
        store(dmemory + m * stride + i, d * keep(psi, dpsi, i) * stays);
      });
    }
  }

  // ---- allocation

  // du += the gradient of allocation, from da and what slots.allocate() left; returns that of the
  // strength.
  C allocate(const C* u, C strength, const C* used, const int64_t* order, const C* a, const C* da,
             C* before, C* du) const {
    if (s.softmax) {
      Vec<C> product{}, of_strength{};
      slots.each([&](int64_t i) { product += load(a + i) * load(da + i); });
      const C inside = lane_sum<C>(product);
      slots.each([&](int64_t i) {
        const Vec<C> dz = load(a + i) * (load(da + i) - inside);
        of_strength += dz * (C(1) - load(u + i));
        store(du + i, load(du + i) - strength * dz);
      });
      return lane_sum<C>(of_strength);
    }
    C product = 1;
    for (int64_t j = 0; j < N; ++j) {
      before[j] = product;
      product *= used[order[j]];
    }
    C later = 0;
    for (int64_t j = N - 1; j >= 0; --j) {
      const int64_t i = order[j];
      du[i] += (C(1) - C(kUsageFloor)) * before[j] * (later - da[i]);
      later = da[i] * (C(1) - used[i]) + used[i] * later;
    }
    return 0;
  }

  // ---- sharpened directions

  // From dS in place to dd, with S and what slots.sharpen() left; returns that of the sharpness.
  C sharpen(const C* direction, const C* sharpened, const C* scaled, const C* logs, C sharpness,
            C* grad) const {
    Vec<C> product{}, of_sharpness{}, of_largest{};
    slots.each([&](int64_t i) { product += load(sharpened + i) * load(grad + i); });
    const C inside = lane_sum<C>(product);
    C top = direction[0];
    for (int64_t i = 1; i < N; ++i) top = direction[i] > top ? direction[i] : top;
    const bool empty = top <= C(0);
    slots.each([&](int64_t i) {
      const Vec<C> dz = load(sharpened + i) * (load(grad + i) - inside), x = load(scaled + i);
      of_sharpness += dz * load(logs + i);
      const Vec<C> positive = x < C(0) ? Vec<C>{} : x;
      Vec<C> d = dz * sharpness / (positive + C(kSharpenFloor));
      d = empty ? Vec<C>{} : x < C(0) ? Vec<C>{} : d / top;
      of_largest += d * x;
      store(grad + i, slots.true_lanes(i, d, Vec<C>{}));
    });
    int64_t ties = 0;
    for (int64_t i = 0; i < N; ++i) ties += direction[i] == top;
    if (!empty && ties > 0) {
      const C each = lane_sum<C>(of_largest) / static_cast<C>(ties);
      for (int64_t i = 0; i < N; ++i)
        if (direction[i] == top) grad[i] -= each;
    }
    return lane_sum<C>(of_sharpness);
  }

 private:
  SEQMEM_INLINE Vec<C> keep(const C* psi, const C* dpsi, int64_t i) const {
    return dpsi == nullptr ? splat(C(1)) : load(psi + i);
  }

  // sum_i part_i M_i[m]^2
  C sum_squares(const C* row, const C* part) const {
    Vec<C> sum{};
    slots.each([&](int64_t i) { sum += load(part + i) * load(row + i) * load(row + i); });
    return lane_sum<C>(sum);
  }

  // Of head h's softmax and cosine: ddots and part (of the slots' norms; without masks that of all
  // heads), the gradient of its strength, and, returned, that of |key|.
  C compare(const Lookup& x, int64_t h, C size, C strength, const C* dw, C* dstrength,
            const Scratch& t) const {
    const C *w = x.weights + h * stride, *dots = x.dots + h * stride;
    const C* norm = slots.norm_of(x, h);
    C* part = t.part + (x.masks == nullptr ? 0 : h * stride);
    const bool first = h == 0 || x.masks != nullptr;
    Vec<C> product{}, of_strength{}, of_size{};
    slots.each([&](int64_t i) { product += load(w + i) * load(dw + i); });
    const C inside = lane_sum<C>(product);
    slots.each([&](int64_t i) {
      const Vec<C> n = load(norm + i), inverse = C(1) / (n * size + C(s.eps));
      const Vec<C> similar = load(dots + i) * inverse;
      const Vec<C> y = load(w + i) * (load(dw + i) - inside);
      const Vec<C> dot = y * strength * inverse, q = -(dot * similar);
      of_strength += y * similar;
      of_size += q * n;
      const Vec<C> own = n > C(0) ? q * size / n : Vec<C>{};
      store(t.ddots + h * stride + i, slots.true_lanes(i, dot, Vec<C>{}));
      store(part + i, slots.true_lanes(i, first ? own : load(part + i) + own, Vec<C>{}));
    });
    *dstrength = lane_sum<C>(of_strength);
    return lane_sum<C>(of_size);
  }
};

}  // namespace
}  // namespace seqmem::dnc
