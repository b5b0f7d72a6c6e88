// The NTM's addressing, forward and backward. For each batch row and head, memory [N, M] in L2 and
// arrays of N slots in L1:
//   pass 1  dots[N] = memory key, and for the first head the slots' norms
//   pass 2  content = softmax(beta dots / (norm |key| + eps)); the result where taps = 0
//   pass 3  ring = gate content + (1 - gate) prev_weights, both ends repeated
//   pass 4  shifted[i] = sum_j shift[j] ring[i + reach - j], around the ring
//   pass 5  weights = shifted^gamma / sum
// The backward recomputes passes 1 to 5, then goes back through them, from the gradient of the
// weights to those of dots and norms, and with these once over the memory (Rows::spread).
#include "ntm_addressing_rows.h"

namespace seqmem::ntm_addressing {
namespace {

constexpr double kEpsilon = 1e-8;  // beside the product of norms, as in the reference
constexpr float kTiny = 0x1p-100f;

// One thread's run over batch rows. Arrays of slots are padded to whole vectors, with zeros beyond
// the last slot.
template <class S>
class Addresser {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Rows<C> rows;
  const int64_t vectors, reach;  // vectors of slots
  IntVec<C> last;                // the true lanes of the last vector of slots
  Staged<S> memory, grad_memory;
  C *key, *norm, *dots;
  // One head's, in the order in which they come about; a ring has both ends repeated.
  C *similar, *inverse, *content, *before, *ring, *shifted, *logs, *weights, *shift;
  // Backward: by a slot's dot product and, over its norm, by that norm; other scratch.
  C *by_dot, *by_norm, *grad, *grad_ring, *sums;

  struct Head {
    C key_norm, beta, gate, gamma;
  };

 public:
  explicit Addresser(const Shape& s) : s(s), rows(s), vectors(ceil_div(s.N, L)), reach(s.taps / 2) {
    for (int i = 0; i < L; ++i) last[i] = (vectors - 1) * L + i < s.N ? -1 : 0;
  }

  int64_t place(char* base) {
    Carver take(base);
    const int64_t slots = vectors * L, width = padded<C>(s.M), ringed = slots + 2 * reach + L;
    memory.place(take, rows);
    grad_memory.place(take, rows);
    for (C** a : {&norm, &dots, &similar, &inverse, &content, &before, &shifted, &logs, &weights,
                  &by_norm, &grad})
      *a = take.template array<C>(slots);
    for (C** a : {&ring, &grad_ring}) *a = take.template array<C>(ringed);
    shift = take.template array<C>(padded<C>(s.taps));
    key = take.template array<C>(width);
    by_dot = take.template array<C>(slots);
    sums = take.template array<C>(width);
    return take.used();
  }

  void forward(const Addressing& a, S* out, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto array = memory.enter(rows, static_cast<const S*>(a.memory) + b * s.N * s.M);
      for (int64_t h = 0; h < s.H; ++h) {
        address(a, array, b, h);
        store_row(out + (b * s.H + h) * s.N, s.taps ? weights : content, s.N);
      }
    }
  }

  void backward(const Addressing& a, const S* grads, const AddressingGradients& out, int64_t begin,
                int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto array = memory.enter(rows, static_cast<const S*>(a.memory) + b * s.N * s.M);
      S* to = nullptr;
      typename Rows<C>::Array grad_array{};
      if (out.memory != nullptr) {
        to = static_cast<S*>(out.memory) + b * s.N * s.M;
        grad_array = grad_memory.target(rows, to);
      }
      for (int64_t h = 0; h < s.H; ++h) {
        const int64_t at = b * s.H + h;
        const Head head = address(a, array, b, h);
        load_row(grads + at * s.N, grad, s.N);
        if (s.taps) back_to_content(head, out, at);
        const C by_key_norm = back_to_dots(head, out, at);
        if (to == nullptr) {
          rows.weighted_sum(array, by_dot, sums);
        } else if (h == 0) {
          rows.template spread<false, true>(array, grad_array, by_dot, key, by_norm, sums);
        } else {
          rows.template spread<true, true>(array, grad_array, by_dot, key, by_norm, sums);
        }
        if (out.key != nullptr) {
          const C slope = head.key_norm > C(0) ? by_key_norm / head.key_norm : C(0);
          for (int64_t m = 0; m < rows.vectors * L; m += L)
            store(sums + m, load(sums + m) + slope * load(key + m));
          store_row(static_cast<S*>(out.key) + at * s.M, sums, s.M);
        }
      }
      if (to != nullptr) grad_memory.leave(rows, grad_array, to);
    }
  }

 private:
  SEQMEM_INLINE Vec<C> only_slots(int64_t v, Vec<C> x) const {
    return v + 1 == vectors ? (Vec<C>)((IntVec<C>)x & last) : x;
  }
  static SEQMEM_INLINE C one(const void* from, int64_t i) {
    return widen_one(static_cast<const S*>(from)[i]);
  }
  static SEQMEM_INLINE void set_one(void* to, int64_t i, C x) {
    if (to != nullptr) store_n(static_cast<S*>(to) + i, splat(x), 1);
  }

  // All stages of one head; norms of the slots stay from its first head.
  SEQMEM_INLINE Head address(const Addressing& a, const typename Rows<C>::Array& array, int64_t b,
                             int64_t h) {
    const int64_t at = b * s.H + h;
    load_row(static_cast<const S*>(a.key) + at * s.M, key, s.M);
    Head head{};
    Vec<C> squares{};
    for (int64_t m = 0; m < rows.vectors * L; m += L) squares += load(key + m) * load(key + m);
    head.key_norm = square_root(lane_sum<C>(squares));
    head.beta = one(a.beta, at);
    if (h == 0) {
      rows.template similarity<true>(array, key, dots, norm);
      for (int64_t i = 0; i < s.N; ++i) norm[i] = square_root(norm[i]);
      for (int64_t i = s.N; i < vectors * L; ++i) norm[i] = dots[i] = 0;
    } else {
      rows.template similarity<false>(array, key, dots, norm);
    }
    address_content(head);
    if (s.taps == 0) return head;
    head.gate = one(a.gate, at);
    head.gamma = one(a.gamma, at);
    load_row(static_cast<const S*>(a.shift) + at * s.taps, shift, s.taps);
    load_row(static_cast<const S*>(a.prev_weights) + at * s.N, before, s.N);
    interpolate(head);
    switch (s.taps) {
      case 1: shift_all<1>(); break;
      case 3: shift_all<3>(); break;
      default: shift_all<0>();
    }
    sharpen(head);
    return head;
  }

  // content = softmax(beta K), K = dots / (norm |key| + eps)
  SEQMEM_INLINE void address_content(const Head& head) {
    const Vec<C> nothing = splat(static_cast<C>(-__builtin_huge_val()));
    Vec<C> most = nothing;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<C> over = C(1) / (load(norm + v * L) * head.key_norm + C(kEpsilon));
      const Vec<C> k = load(dots + v * L) * over;
      const Vec<C> z = k * head.beta, slots = v + 1 == vectors ? (last ? z : nothing) : z;
      store(similar + v * L, k);
      store(inverse + v * L, over);
      store(content + v * L, slots);
      most = slots > most ? slots : most;
    }
    const C top = largest_lane<C>(most);
    Vec<C> whole{};
    for_vectors(vectors, [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> e[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) e[i] = load(content + (v + i) * L) - top;
      exp_of_negative<K, C>(e);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        whole += e[i];
        store(content + (v + i) * L, e[i]);
      }
    });
    const C scale = C(1) / lane_sum<C>(whole);
    for (int64_t v = 0; v < vectors; ++v)
      store(content + v * L, only_slots(v, load(content + v * L) * scale));
  }

  // ring = gate content + (1 - gate) before
  SEQMEM_INLINE void interpolate(const Head& head) {
    const C rest = C(1) - head.gate;
    for (int64_t v = 0; v < vectors; ++v)
      store(ring + reach + v * L, head.gate * load(content + v * L) + rest * load(before + v * L));
    close(ring);
  }

  // Repeats both ends of what is stored at ring + reach: slot N is slot 0. Zeros follow.
  SEQMEM_INLINE void close(C* around) const {
    C* slot = around + reach;
    for (int64_t i = 0; i < reach; ++i) around[i] = slot[s.N - reach + i];
    for (int64_t i = 0; i < reach; ++i) slot[s.N + i] = slot[i];
    for (int64_t i = s.N + reach; i < vectors * L + reach + L; ++i) slot[i] = 0;
  }

  // shifted_i = sum_j shift_j ring_(i + 2 reach - j)
  template <int Taps>
  SEQMEM_INLINE void shift_all() {
    const int64_t n = Taps ? Taps : s.taps;
    for (int64_t v = 0; v < vectors; ++v) {
      const C* from = ring + v * L + n - 1;
      Vec<C> x = shift[0] * load(from);
      for (int64_t j = 1; j < n; ++j) x += shift[j] * load(from - j);
      store(shifted + v * L, only_slots(v, x));
    }
  }

  // weights = shifted^gamma / sum, relative to the slot that gamma makes the largest.
  SEQMEM_INLINE void sharpen(const Head& head) {
    const bool upwards = !(head.gamma < C(0));
    const Vec<C> none = splat(upwards ? C(0) : static_cast<C>(__builtin_huge_val()));
    Vec<C> most = none;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<C> x = load(shifted + v * L);
      const Vec<C> full = x > C(0) ? x : none;
      most = upwards ? (full > most ? full : most) : (full < most ? full : most);
    }
    const C top = upwards ? largest_lane<C>(most) : -largest_lane<C>(-most);
    const bool empty = upwards ? !(top > C(0)) : top == none[0];
    const C unit = empty ? C(1) : top;
    // One division for all; two steps, since the inverse of the smallest numbers is infinite.
    const C lift = unit < kTiny ? 1 / kTiny : C(1), over = C(1) / (unit * lift);
    // Logarithms and powers in two passes: both for one vector are longer than the instructions
    // that a core reorders.
    for_vectors(vectors, [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> y[K], z[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) y[i] = load(shifted + (v + i) * L) * lift * over;
      log_of_positive<K, C>(y, z);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) store(logs + (v + i) * L, z[i]);
    });
    Vec<C> all{};
    for_vectors(vectors, [&](auto count, int64_t v) {
      constexpr int K = decltype(count)::value;
      Vec<C> y[K];
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) y[i] = load(logs + (v + i) * L) * head.gamma;
      exp_of_negative<K, C>(y);
      SEQMEM_UNROLL
      for (int i = 0; i < K; ++i) {
        y[i] = load(shifted + (v + i) * L) <= C(0) ? Vec<C>{} : y[i];
        all += y[i];
        store(weights + (v + i) * L, y[i]);
      }
    });
    const C whole = lane_sum<C>(all);
    const C scale = whole == C(0) ? C(0) : C(1) / whole;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<C> x = load(shifted + v * L), w = load(weights + v * L) * scale;
      store(weights + v * L, x <= C(0) ? Vec<C>{} : w);
    }
  }

  // grad: from by the weights to by the content; gamma, shift, gate and prev_weights on the way.
  SEQMEM_INLINE void back_to_content(const Head& head, const AddressingGradients& out, int64_t at) {
    Vec<C> mean{};
    for (int64_t v = 0; v < vectors; ++v) mean += load(grad + v * L) * load(weights + v * L);
    const C average = lane_sum<C>(mean);
    Vec<C> by_gamma{};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<C> x = load(shifted + v * L);
      const Vec<C> d = load(weights + v * L) * (load(grad + v * L) - average);
      const IntVec<C> empty = x <= C(0);
      by_gamma += empty ? Vec<C>{} : d * load(logs + v * L);
      store(grad_ring + reach + v * L, empty ? Vec<C>{} : head.gamma * d / x);
    }
    close(grad_ring);
    set_one(out.gamma, at, lane_sum<C>(by_gamma));
    if (out.shift != nullptr) back_to_shift(static_cast<S*>(out.shift) + at * s.taps);
    Vec<C> by_gate{};
    const C rest = C(1) - head.gate;
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<C> x = shift[0] * load(grad_ring + v * L);
      for (int64_t j = 1; j < s.taps; ++j) x += shift[j] * load(grad_ring + v * L + j);
      x = only_slots(v, x);
      by_gate += x * (load(content + v * L) - load(before + v * L));
      store(grad + v * L, x * head.gate);
      store(before + v * L, x * rest);
    }
    set_one(out.gate, at, lane_sum<C>(by_gate));
    if (out.prev_weights != nullptr)
      store_row(static_cast<S*>(out.prev_weights) + at * s.N, before, s.N);
  }

  // by shift_j = sum_i by shifted_i ring_(i + 2 reach - j)
  SEQMEM_INLINE void back_to_shift(S* to) const {
    for (int64_t j = 0; j < s.taps; ++j) {
      Vec<C> product{};
      for (int64_t v = 0; v < vectors; ++v)
        product +=
            only_slots(v, load(grad_ring + reach + v * L)) * load(ring + v * L + s.taps - 1 - j);
      store_n(to + j, splat(lane_sum<C>(product)), 1);
    }
  }

  // From grad, by the content, to by_dot and by_norm; returns the gradient by the key's norm.
  SEQMEM_INLINE C back_to_dots(const Head& head, const AddressingGradients& out, int64_t at) {
    Vec<C> mean{};
    for (int64_t v = 0; v < vectors; ++v) mean += load(grad + v * L) * load(content + v * L);
    const C average = lane_sum<C>(mean);
    Vec<C> by_beta{}, by_key_norm{};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<C> d = load(content + v * L) * (load(grad + v * L) - average);
      const Vec<C> k = load(similar + v * L), n = load(norm + v * L);
      const Vec<C> a = d * head.beta * load(inverse + v * L);
      const Vec<C> lost = a * k;
      by_beta += d * k;
      by_key_norm -= lost * n;
      store(by_dot + v * L, a);
      store(by_norm + v * L, n == C(0) ? Vec<C>{} : -lost * head.key_norm / n);
    }
    set_one(out.beta, at, lane_sum<C>(by_beta));
    return lane_sum<C>(by_key_norm);
  }
};

int64_t workspace(Storage storage, const Shape& s) {
  return with_storage(storage,
                      [&](auto tag) { return Addresser<decltype(tag)>(s).place(nullptr); });
}

void forward(Storage storage, const Shape& s, const Addressing& a, void* weights, int64_t begin,
             int64_t end, char* scratch) {
  with_storage(storage, [&](auto tag) {
    using S = decltype(tag);
    Addresser<S> run(s);
    run.place(scratch);
    run.forward(a, static_cast<S*>(weights), begin, end);
    return int64_t(0);
  });
}

void backward(Storage storage, const Shape& s, const Addressing& a, const void* grad,
              const AddressingGradients& out, int64_t begin, int64_t end, char* scratch) {
  with_storage(storage, [&](auto tag) {
    using S = decltype(tag);
    Addresser<S> run(s);
    run.place(scratch);
    run.backward(a, static_cast<const S*>(grad), out, begin, end);
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
const AddressingKernel addressing_kernel = {workspace, forward, backward};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::ntm_addressing
