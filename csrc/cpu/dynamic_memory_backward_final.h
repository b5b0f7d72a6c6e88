// Dynamic memory, backward, phase 1: the final memory M = M_0 * A + B hands its gradient G on,
//
//   dA = sum_n G * M_0,  dB = sum_n G,  dM_0 = G * A          G, M_0 [N, m]; A, B [m]
//
// With a memory for each row, a row's own thread does this in one pass over G and M_0 before it
// runs the hops; dM_0 waits for phase 3. With a shared memory dM_0 is a sum over rows, so the
// slots are shared out: kParts parts of them, each with its dM_0 in L2 while the rows pass, and
// partial sums of dA and dB that are added in order, whatever the number of threads. Where all
// slots have one gradient (a sum's or a mean's), sum_n M_0 is all that is needed.
#pragma once

#include "dynamic_memory_common.h"

namespace seqmem::dynamic_memory {
namespace {

template <class S>
class FinalGradient {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kParts = 16;

  const Shape& s;
  const Backward& a;
  const int64_t m_pad;
  C* partial;   // [kParts, B, 2, m_pad]: dA and dB of a part's slots
  C* row_sums;  // this thread's: dA and dB, [2, m_pad]

 public:
  C* last_scale;  // [B, m_pad]: A after the last hop
  C* slot_grad;   // [N, m_pad]: dM_0 of a shared memory

  FinalGradient(const Shape& s, const Backward& a) : s(s), a(a), m_pad(padded<C>(s.m)) {}

  void place(Carver& take, int thread, int threads) {
    partial = take.array<C>(s.shared ? kParts * max<int64_t>(1, s.B) * 2 * m_pad : 0);
    last_scale = take.array<C>(s.B * m_pad);
    slot_grad = take.array<C>(s.shared ? s.N * m_pad : 0);
    take.per_thread(thread, threads, [&] { row_sums = take.array<C>(2 * m_pad); });
  }

  void prepare(int64_t b) {
    for (int64_t i = 0; i < m_pad; i += L) {
      Vec<C> product = splat<C>(1);
      for (int64_t k = 0; k < s.hops; ++k) product *= C(1) - saved_of<S>(s, a, k * s.B + b, 0, i);
      store(last_scale + b * m_pad + i, product);
    }
  }

  bool given() const { return a.grad_final != nullptr; }
  bool same_for_all_slots() const { return a.final_strides[1] == 0; }

  // Elements i.. of G in slot n of row b.
  Vec<C> gradient(int64_t b, int64_t n, int64_t i) const {
    const int64_t* stride = a.final_strides;
    const S* from = static_cast<const S*>(a.grad_final) + b * stride[0] + n * stride[1];
    return gather(from + i * stride[2], stride[2], lanes_at<C>(s.m, i));
  }

  // One thread's share of a shared memory.
  void run(int thread, int threads) {
    const Share parts = share(kParts, thread, threads);
    for (int64_t part = parts.begin; part < parts.end; ++part) {
      const Share slots = share(s.N, static_cast<int>(part), kParts);
      if (same_for_all_slots()) {
        sum_slots(slots, partial + part * m_pad);
        continue;
      }
      C* to = slot_grad + slots.begin * m_pad;
      for (int64_t i = 0; i < (slots.end - slots.begin) * m_pad; i += L) store(to + i, Vec<C>{});
      for (int64_t b = 0; b < s.B; ++b) add_row(b, slots, partial_of(part, b), to);
    }
  }

  // dA and dB of row b after the last hop.
  void begin_row(int64_t b, C* grad_scale, C* grad_shift) {
    if (given() && !s.shared) add_row(b, {0, s.N}, row_sums, nullptr);
    for (int64_t i = 0; i < m_pad; i += L) {
      Vec<C> dA = {}, dB = {};
      if (given() && s.shared) {
        for (int64_t p = 0; p < kParts; ++p) {
          const C* part = same_for_all_slots() ? partial + p * m_pad : partial_of(p, b);
          dA += load(part + i);
          if (!same_for_all_slots()) dB += load(part + m_pad + i);
        }
        if (same_for_all_slots()) {
          const Vec<C> g = gradient(b, 0, i);
          dA *= g;
          dB = g * C(s.N);
        }
      } else if (given()) {
        dA = load(row_sums + i), dB = load(row_sums + m_pad + i);
      }
      store(grad_scale + i, dA);
      store(grad_shift + i, dB);
    }
  }

 private:
  C* partial_of(int64_t part, int64_t b) const { return partial + (part * s.B + b) * 2 * m_pad; }

  void sum_slots(Share slots, C* to) {
    for (int64_t i = 0; i < m_pad; i += L) {
      Vec<C> total = {};
      for (int64_t n = slots.begin; n < slots.end; ++n)
        total += load_n(memory_of<S>(s, a, 0) + n * s.m + i, lanes_at<C>(s.m, i));
      store(to + i, total);
    }
  }

  // dA and dB of row b over these slots into `to`; adds dM_0 to the rows of slot_out, if given.
  void add_row(int64_t b, Share slots, C* to, C* slot_out) {
    int64_t i = 0;
    if (a.final_strides[2] == 1)
      for (; i + 4 * L <= s.m; i += 4 * L) add_columns<4>(b, i, slots, to, slot_out);
    for (; i < m_pad; i += L) add_columns<1>(b, i, slots, to, slot_out);
  }

  template <int NV>
  SEQMEM_INLINE void add_columns(int64_t b, int64_t i, Share slots, C* to, C* slot_out) {
    const int64_t* stride = a.final_strides;
    const S* grad = static_cast<const S*>(a.grad_final) + b * stride[0] + i * stride[2];
    const S* from = memory_of<S>(s, a, b) + i;
    Vec<C> A[NV], dA[NV] = {}, dB[NV] = {};
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) A[v] = load(last_scale + b * m_pad + i + v * L);
    for (int64_t n = slots.begin; n < slots.end; ++n) {
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) {
        const int count = NV > 1 ? L : lanes_at<C>(s.m, i);
        const Vec<C> g = NV > 1 ? load(grad + n * stride[1] + v * L)
                                : gather(grad + n * stride[1], stride[2], count);
        dA[v] += g * load_n(from + n * s.m + v * L, count);
        dB[v] += g;
        if (slot_out == nullptr) continue;
        C* slot = slot_out + (n - slots.begin) * m_pad + i + v * L;
        store(slot, load(slot) + A[v] * g);
      }
    }
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      store(to + i + v * L, dA[v]);
      store(to + m_pad + i + v * L, dB[v]);
    }
  }
};

}  // namespace
}  // namespace seqmem::dynamic_memory
