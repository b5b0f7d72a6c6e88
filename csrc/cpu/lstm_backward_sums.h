// The weights' gradients: sums over all rows and steps, added chunk by chunk.
//
//   dW_ih += dz^T x,  dW_hh += dz^T h_{t-1},  db += sum of dz      by vectors of units
//   (with layer normalisation each of the three has a dz of its own)
//   dW_hr += (grad_output + dh)^T (o * tanh c)                     by rows of weight_hr
//
// dz is still in cache when a chunk ends. The operands x and h_{t-1} are copied beside it, their
// rows in dz's order and with strides that spread a column over the cache's sets. A product takes
// kDepth rows at once, so that both operands' slices stay in L1.
#pragma once

#include "lstm_backward_products.h"

namespace seqmem::lstm {
namespace {

template <class S>
class WeightSums {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr int64_t kDepth = 128;
  static constexpr int64_t kFew = 2;  // members of a sum that write_row() takes
  static constexpr bool converts = !std::is_same_v<S, C>;

  const Shape& s;
  const Backward& a;
  const GateGradients<C>&dz, &dz_ih, &dz_hh;  // of the biases and of either product
  const int64_t units;
  C* db;                        // [units][gate][lane]
  C *sum_ih, *sum_hh, *sum_hr;  // the gradients themselves, unless they are stored in 16 bits

 public:
  const int64_t x_stride, h_stride, m_stride;
  C *x, *h;                    // [rows of a chunk][stride]
  C *squashed, *dh_projected;  // where projected: o * tanh c, and grad_output + dh

  WeightSums(const Shape& s, const Backward& a, const GateGradients<C>& dz,
             const GateGradients<C>& dz_ih, const GateGradients<C>& dz_hh)
      : s(s),
        a(a),
        dz(dz),
        dz_ih(dz_ih),
        dz_hh(dz_hh),
        units(ceil_div(s.H, L)),
        x_stride(odd_lines<C>(padded<C>(s.I))),
        h_stride(odd_lines<C>(padded<C>(s.P))),
        m_stride(odd_lines<C>(padded<C>(s.H))) {}

  void place(Carver& take, int64_t chunk_rows) {
    x = take.array<C>(chunk_rows * x_stride);
    h = take.array<C>(chunk_rows * h_stride);
    db = take.array<C>(units * W);
    squashed = take.array<C>(s.projected ? chunk_rows * m_stride : 0);
    dh_projected = take.array<C>(s.projected ? chunk_rows * h_stride : 0);
    if constexpr (converts) {
      sum_ih = take.array<C>(4 * s.H * s.I);
      sum_hh = take.array<C>(4 * s.H * s.P);
      sum_hr = take.array<C>(s.projected ? s.P * s.H : 0);
    } else {
      sum_ih = static_cast<C*>(a.grad_weight_ih);
      sum_hh = static_cast<C*>(a.grad_weight_hh);
      sum_hr = static_cast<C*>(a.grad_weight_hr);
    }
  }

  // For one vector of units.
  void clear(int64_t u) {
    for (int64_t i = u * W; i < (u + 1) * W; ++i) db[i] = 0;
  }

  // x_t and h_{t-1} of row r, as row number `place` of the chunk.
  void copy_row(const Walk& walk, int64_t t, int64_t r, int64_t place) {
    load_row(x + place * x_stride, static_cast<const S*>(a.input) + walk.index(t, r) * s.I, s.I);
    const S* before = is_cut(s, t, r) ? nullptr : walk.previous<S>(a.output, a.hx, t, r, s.P);
    load_row_or_zero(h + place * h_stride, before, s.P);
  }

  // One thread's share of a chunk of n rows.
  void add(int64_t n, bool first_chunk, int thread, int threads) {
    const Share mine = share(units, thread, threads);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      if (a.grad_bias != nullptr) add_bias(n, u);
      if (a.grad_weight_ih == nullptr) continue;
      add_outer(dz_ih, n, u, x, x_stride, sum_ih, s.I, first_chunk);
      add_outer(dz_hh, n, u, h, h_stride, sum_hh, s.P, first_chunk);
    }
    if (a.grad_weight_hr != nullptr) add_projection(n, first_chunk, share(s.P, thread, threads));
  }

  // After the last chunk: what is not stored where it belongs yet.
  void finish(int thread, int threads) {
    const Share mine = share(units, thread, threads);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
      const int64_t lanes = min<int64_t>(L, s.H - u * L);
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g) {
        const int64_t row = g * s.H + u * L;
        if (a.grad_bias != nullptr)
          store_row(static_cast<S*>(a.grad_bias) + row, db + u * W + g * L, lanes);
        if (!converts || a.grad_weight_ih == nullptr) continue;
        store_row(static_cast<S*>(a.grad_weight_ih) + row * s.I, sum_ih + row * s.I, lanes * s.I);
        store_row(static_cast<S*>(a.grad_weight_hh) + row * s.P, sum_hh + row * s.P, lanes * s.P);
      }
    }
    if (converts && a.grad_weight_hr != nullptr) {
      const Share p = share(s.P, thread, threads);
      store_row(static_cast<S*>(a.grad_weight_hr) + p.begin * s.H, sum_hr + p.begin * s.H,
                (p.end - p.begin) * s.H);
    }
  }

 private:
  void add_bias(int64_t n, int64_t u) {
    Vec<C> total[4];
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) total[g] = load(db + u * W + g * L);
    for (int64_t i = 0; i < n; ++i) SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) total[g] += load(dz.of(u, i) + g * L);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) store(db + u * W + g * L, total[g]);
  }

  // total[gate row][column] += dz^T operand, for one vector of units.
  void add_outer(const GateGradients<C>& dz, int64_t n, int64_t u, const C* operand, int64_t stride,
                 C* total, int64_t N, bool first_chunk) {
    const int64_t lanes = min<int64_t>(L, s.H - u * L);
    const C* from[W];
    C* to[W];
    for (int64_t i = 0; i < 4 * lanes; ++i) {
      const int64_t g = i / lanes, l = i % lanes;
      from[i] = dz.of(u, 0) + g * L + l;
      to[i] = total + (g * s.H + u * L + l) * N;
    }
    if (first_chunk && n <= kFew) {
      for (int64_t i = 0; i < 4 * lanes; ++i)
        write_row(from[i], dz.stride, n, operand, stride, to[i], N);
      return;
    }
    for (int64_t k = 0; k == 0 || k < n; k += kDepth) {
      for_panels(0, ceil_div(N, L), [&](auto columns, int64_t v) {
        constexpr int NV = decltype(columns)::value;
        const int width = static_cast<int>(min<int64_t>(NV * L, N - v * L));
        for_row_blocks<C>(4 * lanes, [&](auto block, int64_t start) {
          constexpr int R = decltype(block)::value;
          const C* from_here[R];
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) from_here[r] = from[start + r] + k * dz.stride;
          add_tile<R, NV>(min(kDepth, n - k), from_here, dz.stride, operand + k * stride + v * L,
                          stride, to + start, v * L, width, first_chunk && k == 0);
        });
      });
    }
  }

  // One row of a weight's gradient where a sum has at most kFew members: its time is that of its
  // stores, so it is written once, from left to right.
  SEQMEM_INLINE void write_row(const C* factor, int64_t factor_stride, int64_t n, const C* operand,
                               int64_t stride, C* to, int64_t N) {
    for (int64_t i = 0; i < N; i += L) {
      Vec<C> sum{};
      for (int64_t k = 0; k < n; ++k)
        sum += factor[k * factor_stride] * load(operand + k * stride + i);
      store_n(to + i, sum, static_cast<int>(min<int64_t>(L, N - i)));
    }
  }

  // to[r][column..] = (fresh ? 0 : to[r][column..]) + a^T b, `width` columns.
  template <int R, int NV>
  SEQMEM_INLINE void add_tile(int64_t depth, const C* const* from, int64_t from_stride, const C* b,
                              int64_t b_stride, C* const* to, int64_t column, int width,
                              bool fresh) {
    Vec<C> acc[R][NV];
    start_sums(acc);
    // The sums of many chunks are far away: they are fetched while the product is formed.
    if (!fresh) SEQMEM_UNROLL
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < NV * L; i += 64 / static_cast<int>(sizeof(C)))
        __builtin_prefetch(to[r] + column + i, 1);
    tile_multiply<R, NV, C>(depth, from, from_stride, b, L, b_stride, acc);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int i = 0; i < NV; ++i) {
      C* p = to[r] + column + i * L;
      if (!fresh) acc[r][i] += load_n(p, width - i * L);
      store_n(p, acc[r][i], width - i * L);
    }
  }

  void add_projection(int64_t n, bool first_chunk, Share rows) {
    for_panels(0, units, [&](auto columns, int64_t v) {
      constexpr int NV = decltype(columns)::value;
      for_row_blocks<C>(rows.end - rows.begin, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const int64_t p = rows.begin + start;
        const C* from[R];
        C* to[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          from[r] = dh_projected + p + r;
          to[r] = sum_hr + (p + r) * s.H;
        }
        add_tile<R, NV>(n, from, h_stride, squashed + v * L, m_stride, to, v * L,
                        static_cast<int>(min<int64_t>(NV * L, s.H - v * L)), first_chunk);
      });
    });
  }
};

}  // namespace
}  // namespace seqmem::lstm
