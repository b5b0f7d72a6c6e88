// Dynamic memory, backward, phase 3: sums over rows and hops, as matrix products of what phase 2
// kept.
//
//   dM_0 = G * A + sum of attention du^T + dscores probe^T      by blocks of kSlots slots
//   dW   = sum of dz [read; query]^T, db = sum of dz            by blocks of kUnits units
//
// A block's result stays in L1 while the records stream by, kDepth of them at once. A shared
// memory's slots and the units are shared out to threads; a row's own memory is finished by the
// thread that ran its hops.
#pragma once

#include "dynamic_memory_backward_hops.h"

namespace seqmem::dynamic_memory {
namespace {

template <class S>
class DeferredSums {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kSlots = 64, kUnits = 32, kDepth = 64;

  const Shape& s;
  const Backward& a;
  const FinalGradient<S>& last;
  const HopRecords<C>& records;
  const int64_t m_pad, h_pad;
  // This thread's own.
  C* out;      // [kSlots, m_pad], or [kUnits, m_pad] and [kUnits, h_pad]
  C* columns;  // [kDepth, kSlots]
  C* common;   // [m_pad]

 public:
  DeferredSums(const Shape& s, const Backward& a, const FinalGradient<S>& last,
               const HopRecords<C>& records)
      : s(s), a(a), last(last), records(records), m_pad(padded<C>(s.m)), h_pad(padded<C>(s.h)) {}

  void place(Carver& take, int thread, int threads) {
    take.per_thread(thread, threads, [&] {
      out = take.array<C>(max(kSlots * m_pad, kUnits * (m_pad + h_pad)));
      columns = take.array<C>(kDepth * kSlots);
      common = take.array<C>(m_pad);
    });
  }

  // One thread's slots of a memory that all rows share.
  void shared_memory(int thread, int threads) {
    const bool same = last.given() && last.same_for_all_slots();
    if (same) {
      for (int64_t i = 0; i < m_pad; i += L) {
        Vec<C> total = {};
        for (int64_t b = 0; b < s.B; ++b)
          total += load(last.last_scale + b * m_pad + i) * last.gradient(b, 0, i);
        store(common + i, total);
      }
    }
    const Share blocks = share(ceil_div(s.N, kSlots), thread, threads);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t slot = block * kSlots, n = min(kSlots, s.N - slot);
      outer_products(0, 1, s.hops * s.B, slot, n);
      for (int64_t i = 0; i < m_pad; i += L) {
        const Vec<C> total = same ? load(common + i) : Vec<C>{};
        for (int64_t j = 0; j < n; ++j) {
          Vec<C> g = load(out + j * m_pad + i) + total;
          if (last.given() && !same) g += load(last.slot_grad + (slot + j) * m_pad + i);
          store_n(static_cast<S*>(a.grad_memory) + (slot + j) * s.m + i, g, lanes_at<C>(s.m, i));
        }
      }
    }
  }

  // The memory of row b alone.
  void own_memory(int64_t b) {
    S* to = static_cast<S*>(a.grad_memory) + b * s.N * s.m;
    for (int64_t slot = 0; slot < s.N; slot += kSlots) {
      const int64_t n = min(kSlots, s.N - slot);
      outer_products(b, s.B, s.hops, slot, n);
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m_pad; i += L) {
          Vec<C> g = load(out + j * m_pad + i);
          if (last.given())
            g += load(last.last_scale + b * m_pad + i) * last.gradient(b, slot + j, i);
          store_n(to + (slot + j) * s.m + i, g, lanes_at<C>(s.m, i));
        }
      }
    }
  }

  // One thread's units of both networks.
  void weights(int thread, int threads) {
    const int64_t blocks = ceil_div(s.m, kUnits), z_stride = records.z_stride;
    const Share mine = share(2 * blocks, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      const bool write = block >= blocks;
      const int64_t unit = block % blocks * kUnits, units = min(kUnits, s.m - unit);
      const int64_t column = (write ? s.m : 0) + unit;
      C *by_read = out, *by_query = out + kUnits * m_pad;
      multiply<C>(units, m_pad, s.hops * s.B, records.z_grad + column, 1, z_stride,
                  unpacked<C>(records.read, records.slot_stride), by_read, m_pad, false);
      multiply<C>(units, h_pad, s.B, records.z_sum + column, 1, z_stride,
                  unpacked<C>(records.query, records.query_stride), by_query, h_pad, false);
      S* weights_to = static_cast<S*>(write ? a.grad_write_weight : a.grad_gate_weight);
      S* bias_to = static_cast<S*>(write ? a.grad_write_bias : a.grad_gate_bias);
      for (int64_t u = 0; u < units; ++u) {
        S* row = weights_to + (unit + u) * (s.m + s.h);
        store_row(row, by_read + u * m_pad, s.m);
        store_row(row + s.m, by_query + u * h_pad, s.h);
        C total = 0;
        for (int64_t b = 0; b < s.B; ++b) total += records.z_sum[b * z_stride + column + u];
        store_n(bias_to + unit + u, splat(total), 1);
      }
    }
  }

 private:
  // out[n] = sum over the records first, first + step, .. of attention[n] * du + dscores[n] *
  // probe, for n slots from `slot` on, kSlots at most.
  void outer_products(int64_t first, int64_t step, int64_t count, int64_t slot, int64_t n) {
    for (int64_t k = 0; k < count || k == 0; k += kDepth) {
      const int64_t depth = min(kDepth, count - k), record = first + k * step;
      for (int scores = 0; scores < 2; ++scores) {
        for (int64_t j = 0; j < depth; ++j) {
          const int64_t from = (record + j * step) * s.N + slot;
          if (scores) {
            copy(columns + j * kSlots, records.score_grad + from, n);
          } else {
            copy(columns + j * kSlots, static_cast<const S*>(a.attention) + from, n);
          }
        }
        const C* b = (scores ? records.probe : records.u_grad) + record * records.slot_stride;
        multiply<C>(n, m_pad, depth, columns, 1, kSlots, unpacked(b, step * records.slot_stride),
                    out, m_pad, scores > 0 || k > 0);
      }
    }
  }

  template <class From>
  static void copy(C* to, const From* from, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(to + i, load_n(from + i, lanes_at<C>(n, i)));
  }
};

}  // namespace
}  // namespace seqmem::dynamic_memory
