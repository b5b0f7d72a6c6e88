// Derivatives of the passes in ntm_sequence_memory.h.
//
// Sharpening, with w = softmax(gamma log x): y = w (dw - w.dw), dgamma = y.log x, dx = gamma y / x,
// and nothing where x is zero. Shift: its transpose. Interpolation and softmax as usual. With
// K = D / q and q = n |k| + eps: dD = dK / q, dq = -dK K / q, dn = dq |k|, d|k| = dq.n, and a norm
// passes dn M / n on to its slot, nothing at zero.
#pragma once

#include "ntm_sequence_memory.h"

namespace seqmem::ntm_sequence {
namespace {

// Gradients of a head's parameters, as in Head.
template <class C>
struct HeadGradients {
  C *key, *erase, *add, *shift;
  C beta, gate, gamma, key_norm;
};

template <class C>
class SlotsBackward {
  static constexpr int L = kLanes<C>;
  using Scratch = typename Slots<C>::Scratch;
  const Slots<C>& slots;

 public:
  explicit SlotsBackward(const Slots<C>& slots) : slots(slots) {}

  // From dw to the gradients of D (left in t.shifted), of the norms over the norms (in t.grad), of
  // the weighting before, and of the head's parameters. `before_grad` may be `dw`.
  template <int Taps>
  void address(const C* dots, const C* norm, const Head<C>& head, const C* before, const C* w,
               const C* dw, const Scratch& t, C* before_grad, HeadGradients<C>& d) const {
    slots.template content<true>(dots, norm, head, t);
    slots.interpolate(before, head, t);
    sharpen<Taps>(head, w, dw, t, d);
    const C inside = shift<Taps>(head, before, t, before_grad, d);
    Vec<C> beta{}, key_norm{};
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> similar = load(t.similar + v * L), inverse = load(t.inverse + v * L);
      const Vec<C> n = load(norm + v * L);
      const Vec<C> z = load(t.content + v * L) * (load(t.grad + v * L) - inside) * head.gate;
      const Vec<C> dot = z * head.beta * inverse, q = -(dot * similar);
      beta += z * similar;
      key_norm += q * n;
      store(t.shifted + v * L, dot);
      store(t.grad + v * L, n > C(0) ? q * head.key_norm / n : Vec<C>{});
    }
    d.beta = sum<C>(beta);
    d.key_norm = sum<C>(key_norm);
  }

  // dw += dread M
  void read_weights(const C* memory, const C* dread, C* dw) const {
    slots.for_tiles([&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> total[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) total[i] = load(dw + (v + i) * L);
      for (int64_t m = 0; m < slots.M; ++m) {
        const Vec<C> x = splat(dread[m]);
        SEQMEM_UNROLL
        for (int i = 0; i < K; ++i) total[i] += x * load(memory + m * slots.stride + (v + i) * L);
      }
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) store(dw + (v + i) * L, total[i]);
    });
  }

  // dw += dM (add - erase M); dadd = dM w, derase = -(dM w) M
  void write_weights(const C* memory, const C* dmemory, const C* w, const Head<C>& head, C* dw,
                     HeadGradients<C>& d) const {
    int64_t m = 0;
    for (; m + 4 <= slots.M; m += 4) write_weights<4>(m, memory, dmemory, w, head, dw, d);
    for (; m < slots.M; ++m) write_weights<1>(m, memory, dmemory, w, head, dw, d);
  }

  // dM += w dread + dD key + norms M, and dkey = dD M
  void read_memory(const C* memory, C* dmemory, const C* w, const C* dread, const Head<C>& head,
                   const Scratch& t, HeadGradients<C>& d) const {
    finish<false>(memory, dmemory, w, dread, head, t, d);
  }

  // dM = dM (1 - w erase) + dD key + norms M, and dkey = dD M
  void write_memory(const C* memory, C* dmemory, const C* w, const Head<C>& head, const Scratch& t,
                    HeadGradients<C>& d) const {
    finish<true>(memory, dmemory, w, head.erase, head, t, d);
  }

 private:
  template <int Taps>
  SEQMEM_INLINE void sharpen(const Head<C>& head, const C* w, const C* dw, const Scratch& t,
                             HeadGradients<C>& d) const {
    Vec<C> product{}, gamma{};
    for (int64_t v = 0; v < slots.vectors; ++v) product += load(w + v * L) * load(dw + v * L);
    const C inside = sum<C>(product);
    C* back = t.ring_back + slots.reach();
    for_vectors(slots.vectors, [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> x[K], logs[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) x[i] = slots.template shift<Taps>(t.ring, head.shift, v + i);
      log_of_positive<K, C>(x, logs);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        const Vec<C> y = load(w + (v + i) * L) * (load(dw + (v + i) * L) - inside);
        const auto empty = x[i] <= C(0);
        gamma += empty ? Vec<C>{} : y * logs[i];
        store(back + (v + i) * L, empty ? Vec<C>{} : y * head.gamma / x[i]);
      }
    });
    slots.close(t.ring_back);
    d.gamma = sum<C>(gamma);
  }

  // Leaves the gradient of the interpolated weighting in t.grad; returns its product with content.
  template <int Taps>
  SEQMEM_INLINE C shift(const Head<C>& head, const C* before, const Scratch& t, C* before_grad,
                        HeadGradients<C>& d) const {
    const int64_t n = Taps ? Taps : slots.taps;
    const C* back = t.ring_back + slots.reach();
    for (int64_t j = 0; j < n; ++j) {
      Vec<C> tap{};
      for (int64_t v = 0; v < slots.vectors; ++v)
        tap += slots.only_slots(v, load(back + v * L) * load(t.ring + v * L + n - 1 - j));
      d.shift[j] = sum<C>(tap);
    }
    Vec<C> gate{}, inside{};
    for (int64_t v = 0; v < slots.vectors; ++v) {
      Vec<C> x{};
      for (int64_t j = 0; j < n; ++j) x += head.shift[j] * load(t.ring_back + v * L + j);
      x = slots.only_slots(v, x);
      const Vec<C> content = load(t.content + v * L);
      gate += x * (content - load(before + v * L));
      inside += x * content;
      store(t.grad + v * L, x);
      store(before_grad + v * L, x * (C(1) - head.gate));
    }
    d.gate = sum<C>(gate);
    return sum<C>(inside);
  }

  template <int J>
  SEQMEM_INLINE void put_sums(const Vec<C> (&x)[J], C* to) const {
    if constexpr (J == 4) {
      store_sums4<C>(to, x);
    } else {
      for (int j = 0; j < J; ++j) to[j] = sum<C>(x[j]);
    }
  }

  template <int J>
  SEQMEM_INLINE void write_weights(int64_t m, const C* memory, const C* dmemory, const C* w,
                                   const Head<C>& head, C* dw, HeadGradients<C>& d) const {
    Vec<C> add[J], erase[J], a[J], e[J];
    start_sums(add);
    start_sums(erase);
    SEQMEM_UNROLL
    for (int j = 0; j < J; ++j) {
      a[j] = splat(head.add[m + j]);
      e[j] = splat(head.erase[m + j]);
    }
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> x = load(w + v * L);
      Vec<C> total = load(dw + v * L);
      SEQMEM_UNROLL
      for (int j = 0; j < J; ++j) {
        const Vec<C> old = load(memory + (m + j) * slots.stride + v * L);
        const Vec<C> back = load(dmemory + (m + j) * slots.stride + v * L);
        const Vec<C> part = back * x;
        add[j] += part;
        erase[j] -= part * old;
        total += back * (a[j] - e[j] * old);
      }
      store(dw + v * L, total);
    }
    put_sums<J>(add, d.add + m);
    put_sums<J>(erase, d.erase + m);
  }

  // `other` is what w multiplies: the erase vector, or the gradient of what was read.
  template <bool writes>
  SEQMEM_INLINE void finish(const C* memory, C* dmemory, const C* w, const C* other,
                            const Head<C>& head, const Scratch& t, HeadGradients<C>& d) const {
    int64_t m = 0;
    for (; m + 4 <= slots.M; m += 4)
      finish_rows<writes, 4>(m, memory, dmemory, w, other, head, t, d);
    for (; m < slots.M; ++m) finish_rows<writes, 1>(m, memory, dmemory, w, other, head, t, d);
  }

  template <bool writes, int J>
  SEQMEM_INLINE void finish_rows(int64_t m, const C* memory, C* dmemory, const C* w, const C* other,
                                 const Head<C>& head, const Scratch& t, HeadGradients<C>& d) const {
    Vec<C> key[J], o[J], k[J];
    start_sums(key);
    SEQMEM_UNROLL
    for (int j = 0; j < J; ++j) {
      o[j] = splat(other[m + j]);
      k[j] = splat(head.key[m + j]);
    }
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> x = load(w + v * L), dot = load(t.shifted + v * L), n = load(t.grad + v * L);
      SEQMEM_UNROLL
      for (int j = 0; j < J; ++j) {
        const Vec<C> now = load(memory + (m + j) * slots.stride + v * L);
        C* back = dmemory + (m + j) * slots.stride + v * L;
        const Vec<C> through = writes ? load(back) - load(back) * x * o[j] : load(back) + x * o[j];
        store(back, through + dot * k[j] + n * now);
        key[j] += dot * now;
      }
    }
    put_sums<J>(key, d.key + m);
  }
};

}  // namespace
}  // namespace seqmem::ntm_sequence
