// What the norms' backward forms of a chunk's rows, when all its dz are there.
//
//   rows   for each row, its values of all units:
//            dx = N'(dz), the gradient of W_ih x, in whose place v^ was until now
//            dgain_ih += dz x^,  dgain_hh += dz v^,  dgain_c += dn c^,  dshift_c += dn
//          in blocks of kBlock rows, each with sums of its own, which stay in L1
//   add    the blocks' sums, in their order, to those of all chunks, by vectors of units
//
// x^, v^, c^ are W_ih x, W_hh h and c, normalised. The blocks do not depend on how rows are shared
// out among threads, and so neither do the bits.
#pragma once

#include "lstm_backward_products.h"
#include "lstm_regularized_rows.h"

namespace seqmem::lstm_regularized {
namespace {

// The norms' parameters, or sums of their gradients, by vectors of units.
template <class C>
struct NormVectors {
  static constexpr int L = kLanes<C>, W = 4 * L;
  C *gain_ih, *gain_hh, *gain_c, *shift_c;  // [units][gate][lane], [units][lane]

  static int64_t size(int64_t units) { return units * (2 * W + 2 * L); }
  NormVectors() = default;
  NormVectors(C* all, int64_t units)
      : gain_ih(all),
        gain_hh(gain_ih + units * W),
        gain_c(gain_hh + units * W),
        shift_c(gain_c + units * L) {}

  void place(Carver& take, int64_t units) {
    gain_ih = take.array<C>(units * W);
    gain_hh = take.array<C>(units * W);
    gain_c = take.array<C>(units * L);
    shift_c = take.array<C>(units * L);
  }
};

template <class S>
class NormSums {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr int64_t kBlock = 16;

  const Shape& s;
  const Backward& a;
  const NormVectors<C>& norms;
  const GateGradients<C>&dz, &dx;
  const int64_t units;
  const Valid<C> valid;
  C *sums, *of_blocks;  // [size], [blocks of a chunk][size]

 public:
  const int64_t stride;
  C* dn;  // [rows of a chunk][stride]: the gradient of N(c)

  NormSums(const Shape& s, const Backward& a, const NormVectors<C>& norms,
           const GateGradients<C>& dz, const GateGradients<C>& dx)
      : s(s),
        a(a),
        norms(norms),
        dz(dz),
        dx(dx),
        units(ceil_div(s.H, L)),
        valid(s.H),
        stride(odd_lines<C>(units * L)) {}

  void place(Carver& take, int64_t chunk_rows) {
    const int64_t size = NormVectors<C>::size(units);
    sums = take.array<C>(size);
    of_blocks = take.array<C>(ceil_div(chunk_rows, kBlock) * size);
    dn = take.array<C>(chunk_rows * stride);
  }

  // Vector u, of the gates' gate g, as the forward saved it.
  SEQMEM_INLINE Vec<C> x_hat(int64_t index, int64_t u, int g) const {
    return saved(a.saved.x, index * 4 + g, u);
  }
  SEQMEM_INLINE Vec<C> v_hat(int64_t index, int64_t u, int g) const {
    return saved(a.saved.v, index * 4 + g, u);
  }
  SEQMEM_INLINE Vec<C> c_hat(int64_t index, int64_t u) const { return saved(a.saved.c, index, u); }
  // 1 / deviation of W_ih x, W_hh h or c.
  SEQMEM_INLINE C scale(int64_t index, int place) const {
    return static_cast<const C*>(a.saved.scales)[index * 3 + place];
  }

  // One thread's share of a chunk of n rows, whose places among all rows are given.
  void rows(int64_t n, const int64_t* index, int thread, int threads) {
    const Share blocks = share(ceil_div(n, kBlock), thread, threads);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      C* of_block = of_blocks + block * NormVectors<C>::size(units);
      for (int64_t i = 0; i < NormVectors<C>::size(units); i += L) store(of_block + i, Vec<C>{});
      const int64_t end = min((block + 1) * kBlock, n);
      for (int64_t i = block * kBlock; i < end; ++i) {
        if (i + 1 < n) fetch_row<S>(a.saved.x, index[i + 1], 4 * s.H);
        run_row(i, index[i], NormVectors<C>(of_block, units));
      }
    }
  }

  // After a barrier.
  void add(int64_t n, bool first_chunk, int thread, int threads) {
    const int64_t size = NormVectors<C>::size(units);
    const Share mine = share(size / L, thread, threads);
    for (int64_t i = mine.begin * L; i < mine.end * L; i += L) {
      Vec<C> total = first_chunk ? Vec<C>{} : load(sums + i);
      for (int64_t block = 0; block < ceil_div(n, kBlock); ++block)
        total += load(of_blocks + block * size + i);
      store(sums + i, total);
    }
  }

  void finish(int thread, int threads) {
    const Share mine = share(units, thread, threads);
    const NormVectors<C> from(sums, units);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const int64_t lanes = min<int64_t>(L, s.H - u * L);
      for (int g = 0; g < 4; ++g) {
        const int64_t unit = g * s.H + u * L, place = u * W + g * L;
        store_row(static_cast<S*>(a.grad_gain_ih) + unit, from.gain_ih + place, lanes);
        store_row(static_cast<S*>(a.grad_gain_hh) + unit, from.gain_hh + place, lanes);
      }
      store_row(static_cast<S*>(a.grad_gain_c) + u * L, from.gain_c + u * L, lanes);
      store_row(static_cast<S*>(a.grad_shift_c) + u * L, from.shift_c + u * L, lanes);
    }
  }

 private:
  SEQMEM_INLINE Vec<C> saved(const void* from, int64_t row, int64_t u) const {
    return load_n(static_cast<const S*>(from) + row * s.H + u * L,
                  static_cast<int>(min<int64_t>(L, s.H - u * L)));
  }

  static SEQMEM_INLINE void increase(C* to, Vec<C> by) { store(to, load(to) + by); }

  void run_row(int64_t i, int64_t index, const NormVectors<C>& total) {
    Vec<C> p{}, q{};
    for (int64_t u = 0; u < units; ++u) {
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) {
        const int64_t place = u * W + g * L;
        const Vec<C> z = load(dz.of(u, i) + g * L), x = x_hat(index, u, g);
        const Vec<C> d = z * load(norms.gain_ih + place);
        p += d;
        q += d * x;
        increase(total.gain_ih + place, z * x);
        increase(total.gain_hh + place, z * load(dx.of(u, i) + g * L));
      }
      const Vec<C> d = load(dn + i * stride + u * L);
      increase(total.gain_c + u * L, d * c_hat(index, u));
      increase(total.shift_c + u * L, d);
    }
    const C number = static_cast<C>(4 * s.H);
    const C mean = lane_sum<C>(p) / number, slope = lane_sum<C>(q) / number;
    for (int64_t u = 0; u < units; ++u) {
      const Vec<C> x_scale = valid(u) * scale(index, 0);
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) {
        const Vec<C> d = load(dz.of(u, i) + g * L) * load(norms.gain_ih + u * W + g * L);
        store(dx.of(u, i) + g * L, x_scale * (d - mean - x_hat(index, u, g) * slope));
      }
    }
  }
};

}  // namespace
}  // namespace seqmem::lstm_regularized
