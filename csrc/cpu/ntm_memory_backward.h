// Derivatives of the passes in ntm_memory.h.
//
// Sharpening, with w = softmax(gamma log x): y = w (dw - w.dw), dgamma = y.log x, dx = gamma y / x,
// and nothing where x is zero. Shift: its transpose. Interpolation and softmax as usual. With
// K = D / q and q = n |k| + eps: dD = dK / q, dq = -dK K / q, dn = dq |k|, d|k| = dq.n, and a norm
// passes dn M / n on to its slot, nothing at zero.
#pragma once

#include "ntm_memory.h"

namespace seqmem::ntm {
namespace {

// What address() finds of a head's parameters.
template <class C>
struct HeadGradients {
  C* shift;
  C beta, gate, gamma, key_norm;
};

template <class C>
class SlotsBackward {
  static constexpr int L = kLanes<C>;
  using Scratch = typename Slots<C>::Scratch;
  const Slots<C>& slots;

 public:
  explicit SlotsBackward(const Slots<C>& slots) : slots(slots) {}

  // From dw to the gradient of D (in t.shifted), the gradient of each slot's norm divided by that
  // norm (in t.grad), and the gradients of the weighting before and of the head's parameters.
  // `before_grad` may be `dw`.
  template <int Taps>
  void address(const C* dots, const C* norm, const Head<C>& head, const C* before, const C* w,
               const C* dw, const Scratch& t, C* before_grad, HeadGradients<C>& d) const {
    const C scale = slots.template content<true>(dots, norm, head.key_norm, head.beta, t);
    slots.interpolate(before, head, scale, t);
    sharpen<Taps>(head, w, dw, t, d);
    const C inside = shift<Taps>(head, before, scale, t, before_grad, d), gate = head.gate * scale;
    Vec<C> beta{}, key_norm{};
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> similar = load(t.similar + v * L), inverse = load(t.inverse + v * L);
      const Vec<C> n = load(norm + v * L);
      const Vec<C> z = load(t.content + v * L) * (load(t.grad + v * L) - inside) * gate;
      const Vec<C> dot = z * head.beta * inverse, q = -(dot * similar);
      beta += z * similar;
      key_norm += q * n;
      store(t.shifted + v * L, dot);
      store(t.grad + v * L, n > C(0) ? q * head.key_norm / n : Vec<C>{});
    }
    d.beta = lane_sum<C>(beta);
    d.key_norm = lane_sum<C>(key_norm);
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

  // A write head, and where the gradients of its weighting, erase and add go.
  struct Written {
    const C *memory, *w;
    const Head<C>* head;
    C *dw, *erase, *add;
  };
  // dw += dM (add - erase M); dadd = dM w, derase = -(dM w) M
  void write_weights(const Written& to, const C* dmemory) const {
    int64_t m = 0;
    for (; m + 4 <= slots.M; m += 4) write_weights<4>(m, to, dmemory);
    for (; m < slots.M; ++m) write_weights<1>(m, to, dmemory);
  }

  // What a head passes on to its memory, once address() is done: for a read head
  //   dM += w dread + dD key + norms M,  dkey = dD M + d|k| key / |k|,
  // and for a write head dM (1 - w erase) in place of dM + w dread. `other` is dread or erase.
  struct Passing {
    const C *memory, *w, *other;
    const Head<C>* head;
    C key_norm;  // its gradient
    C* key;
  };
  template <bool writes>
  void pass(const Passing& from, C* dmemory, const Scratch& t) const {
    const Written none{};
    int64_t m = 0;
    for (; m + 4 <= slots.M; m += 4) pass_rows<writes, false, 4>(m, from, none, dmemory, t);
    for (; m < slots.M; ++m) pass_rows<writes, false, 1>(m, from, none, dmemory, t);
    add_key_norm(from);
  }

  // pass() and write_weights() of the head before, in one pass over the memory.
  template <bool writes>
  void pass_to_write(const Passing& from, const Written& to, C* dmemory, const Scratch& t) const {
    int64_t m = 0;
    for (; m + 2 <= slots.M; m += 2) pass_rows<writes, true, 2>(m, from, to, dmemory, t);
    for (; m < slots.M; ++m) pass_rows<writes, true, 1>(m, from, to, dmemory, t);
    add_key_norm(from);
  }

 private:
  template <int Taps>
  SEQMEM_INLINE void sharpen(const Head<C>& head, const C* w, const C* dw, const Scratch& t,
                             HeadGradients<C>& d) const {
    Vec<C> product{}, gamma{};
    for (int64_t v = 0; v < slots.vectors; ++v) product += load(w + v * L) * load(dw + v * L);
    const C inside = lane_sum<C>(product);
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
    d.gamma = lane_sum<C>(gamma);
  }

  // Leaves the gradient of the interpolated weighting in t.grad; returns its product with the
  // content's softmax, scale t.content.
  template <int Taps>
  SEQMEM_INLINE C shift(const Head<C>& head, const C* before, C scale, const Scratch& t,
                        C* before_grad, HeadGradients<C>& d) const {
    const int64_t n = Taps ? Taps : slots.taps;
    const C* back = t.ring_back + slots.reach();
    auto tap = [&](int64_t j, int64_t v) {
      return slots.only_slots(v, load(back + v * L)) * load(t.ring + v * L + n - 1 - j);
    };
    Vec<C> taps[Taps ? Taps : 1], gate{}, inside{};
    start_sums(taps);
    for (int64_t v = 0; v < slots.vectors; ++v) {
      Vec<C> x{};
      for (int64_t j = 0; j < n; ++j) x += head.shift[j] * load(t.ring_back + v * L + j);
      if constexpr (Taps != 0) SEQMEM_UNROLL
      for (int j = 0; j < Taps; ++j) taps[j] += tap(j, v);
      x = slots.only_slots(v, x);
      const Vec<C> content = scale * load(t.content + v * L);
      gate += x * (content - load(before + v * L));
      inside += x * content;
      store(t.grad + v * L, x);
      store(before_grad + v * L, x * (C(1) - head.gate));
    }
    for (int64_t j = 0; j < n; ++j) {
      if constexpr (Taps == 0) {
        taps[0] = Vec<C>{};
        for (int64_t v = 0; v < slots.vectors; ++v) taps[0] += tap(j, v);
      }
      d.shift[j] = lane_sum<C>(taps[Taps ? j : 0]);
    }
    d.gate = lane_sum<C>(gate);
    return lane_sum<C>(inside);
  }

  template <int J>
  SEQMEM_INLINE void put_sums(const Vec<C> (&x)[J], C* to) const {
    if constexpr (J == 4) {
      store_sums4<C>(to, x);
    } else {
      for (int j = 0; j < J; ++j) to[j] = lane_sum<C>(x[j]);
    }
  }

  SEQMEM_INLINE void add_key_norm(const Passing& from) const {
    const Head<C>& head = *from.head;
    const C slope = head.key_norm > C(0) ? from.key_norm / head.key_norm : C(0);
    for (int64_t m = 0; m < slots.M; ++m) from.key[m] += slope * head.key[m];
  }

  template <int J>
  SEQMEM_INLINE void write_weights(int64_t m, const Written& to, const C* dmemory) const {
    Vec<C> add[J], erase[J], a[J], e[J];
    start_sums(add);
    start_sums(erase);
    SEQMEM_UNROLL
    for (int j = 0; j < J; ++j) {
      a[j] = splat(to.head->add[m + j]);
      e[j] = splat(to.head->erase[m + j]);
    }
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> x = load(to.w + v * L);
      Vec<C> sum = load(to.dw + v * L);
      SEQMEM_UNROLL
      for (int j = 0; j < J; ++j) {
        const Vec<C> old = load(to.memory + (m + j) * slots.stride + v * L);
        const Vec<C> back = load(dmemory + (m + j) * slots.stride + v * L);
        const Vec<C> part = back * x;
        add[j] += part;
        erase[j] -= part * old;
        sum += back * (a[j] - e[j] * old);
      }
      store(to.dw + v * L, sum);
    }
    put_sums<J>(add, to.add + m);
    put_sums<J>(erase, to.erase + m);
  }

  template <bool writes, bool to_write, int J>
  SEQMEM_INLINE void pass_rows(int64_t m, const Passing& from, const Written& to, C* dmemory,
                               const Scratch& t) const {
    Vec<C> key[J], add[J], erase[J], o[J], k[J], a[J], e[J];
    start_sums(key);
    start_sums(add);
    start_sums(erase);
    SEQMEM_UNROLL
    for (int j = 0; j < J; ++j) {
      o[j] = splat(from.other[m + j]);
      k[j] = splat(from.head->key[m + j]);
      if (!to_write) continue;
      a[j] = splat(to.head->add[m + j]);
      e[j] = splat(to.head->erase[m + j]);
    }
    const int64_t stride = slots.stride;
    for (int64_t v = 0; v < slots.vectors; ++v) {
      const Vec<C> x = load(from.w + v * L), dot = load(t.shifted + v * L);
      const Vec<C> n = load(t.grad + v * L);
      Vec<C> y{}, sum{};
      if (to_write) y = load(to.w + v * L), sum = load(to.dw + v * L);
      SEQMEM_UNROLL
      for (int j = 0; j < J; ++j) {
        const Vec<C> now = load(from.memory + (m + j) * stride + v * L);
        C* place = dmemory + (m + j) * stride + v * L;
        Vec<C> back = load(place);
        back = writes ? back - back * x * o[j] : back + x * o[j];
        back = back + dot * k[j] + n * now;
        store(place, back);
        key[j] += dot * now;
        if (!to_write) continue;
        const Vec<C> old = load(to.memory + (m + j) * stride + v * L), part = back * y;
        add[j] += part;
        erase[j] -= part * old;
        sum += back * (a[j] - e[j] * old);
      }
      if (to_write) store(to.dw + v * L, sum);
    }
    put_sums<J>(key, from.key + m);
    if (!to_write) return;
    if constexpr (J == 2) {
      const Vec<C> both[4] = {add[0], add[1], erase[0], erase[1]};
      C sums[4];
      store_sums4<C>(sums, both);
      to.add[m] = sums[0], to.add[m + 1] = sums[1];
      to.erase[m] = sums[2], to.erase[m + 1] = sums[3];
    } else {
      put_sums<J>(add, to.add + m);
      put_sums<J>(erase, to.erase + m);
    }
  }
};

}  // namespace
}  // namespace seqmem::ntm
