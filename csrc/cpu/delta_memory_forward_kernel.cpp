// The delta memory over its steps. A thread takes slices of V of a head's memory, which stay in the
// L1 cache; for each run of at most 16 steps
//   q, k, decay and their products are read once for all slices; then, for each slice S [K][lanes],
//   r = S^T (decay_0 k_0)
//   for each step t:  u = beta_t (v_t - r);  r = 0;  o_t = 0
//     for each feature i:                             S is read and written once a step
//       S[i] = decay_t S[i] + k_t[i] u;  o_t += q_t[i] S[i];  r += decay_t+1 k_t+1[i] S[i]
// A decay of a whole head is kept as a factor of S, and multiplied in at the end of a run or where
// the factor becomes small: u is divided by it, r and o_t are multiplied.
// Floor: B H T K V 3 multiply-adds, and a product where features decay; bytes: q, k, v, output,
// and two memories. A call of one step reads and writes each memory once.
#include "delta_memory_steps.h"

namespace seqmem::delta_memory {
namespace {

template <class S>
class ForwardRun {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>;
  static constexpr int kVectors = 4;  // of a slice
  static constexpr C kLeastFactor = C(1) / 256;

  const Shape& s;
  const Forward& a;
  const int thread, threads;
  Steps<S> steps;
  C* ahead;   // [kChunk, Kp]: decay * k
  C* memory;  // slices of [K, kVectors * L]

  int64_t slices() const { return ceil_div(s.V, kVectors * L); }

 public:
  ForwardRun(const Shape& shape, const Forward& arguments, int thread_, int threads_, SpinBarrier&)
      : s(shape), a(arguments), thread(thread_), threads(threads_), steps(shape) {}

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      steps.place(take);
      ahead = take.array<C>(kChunk * steps.Kp);
      const int64_t slice = s.K * kVectors * L;
      memory = take.array<C>(min(s.H * slices(), together<C>(slice)) * slice);
    });
    return take.used();
  }

  void run() {
    const Share mine = share(s.B * s.H * slices(), thread, threads);
    for (int64_t u = mine.begin; u < mine.end;) {
      const int64_t b = u / slices() / s.H, row_ends = (b + 1) * s.H * slices();
      const int64_t count = min(together<C>(s.K * kVectors * L), min(mine.end, row_ends) - u);
      run_units(b, u, count);
      u += count;
    }
  }

 private:
  // Slices of heads of one batch row.
  void run_units(int64_t b, int64_t first, int64_t count) {
    const int64_t end = steps_of(s, b);
    auto for_units = [&](auto&& f) {
      for (int64_t u = first; u < first + count; ++u) {
        const int64_t j = u % slices();
        for_slice(j, [&](auto vectors) { f(vectors, u / slices() % s.H, j, u - first); });
      }
    };
    for (int64_t t = 0; t < end;) {
      const Run run = run_from(s, b, t, end);
      for_units([&](auto vectors, int64_t h, int64_t j, int64_t place) {
        if (place == 0 || j == 0) read(b, h, run);
        run_slice<decltype(vectors)::value>(b, h, j, place, run, end);
      });
      t += run.steps;
    }
    for_units([&](auto vectors, int64_t h, int64_t j, int64_t) {
      if (end == 0) hand_on<decltype(vectors)::value>(b * s.H + h, j);
      for (int64_t t = end; t < s.T; ++t)
        for (int64_t c = j * kVectors * L; c < min(s.V, (j + 1) * kVectors * L); ++c)
          output(b, t, h)[c] = S{};
    });
  }

  template <class F>
  void for_slice(int64_t j, F&& f) {
    for_count<kVectors>(min<int64_t>(kVectors, ceil_div(s.V, L) - j * kVectors), f);
  }

  S* output(int64_t b, int64_t t, int64_t h) const {
    return static_cast<S*>(a.output) + ((b * s.T + t) * s.H + h) * s.V;
  }

  void read(int64_t b, int64_t h, const Run& run) {
    steps.read(a, b, h, run);
    for (int64_t i = 0; i < run.steps; ++i)
      for (int64_t c = 0; c < steps.Kp; c += L) {
        Vec<C> x = load(steps.k + i * steps.Kp + c);
        if (s.decay == Decay::Head) x *= steps.decay_head[i];
        if (s.decay == Decay::Feature) x *= load(steps.decay + i * steps.Kp + c);
        store(ahead + i * steps.Kp + c, x);
      }
  }

  // A matrix [K, ..] as it lies in memory: `stride` from one feature to the next.
  struct Place {
    C* data;
    int64_t stride;
  };

  template <int NV>
  void copy(Place to, Place from, int64_t columns) {
    for (int64_t i = 0; i < s.K; ++i) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int n = static_cast<int>(columns - v * L);
      const Vec<C> x =
          from.data == nullptr ? Vec<C>{} : load_n(from.data + i * from.stride + v * L, n);
      store_n(to.data + i * to.stride + v * L, x, n);
    }
  }

  Place in_tensor(const void* data, int64_t matrix, int64_t column) const {
    C* first = static_cast<C*>(const_cast<void*>(data));
    return {first == nullptr ? first : first + matrix * s.K * s.V + column, s.V};
  }

  // Of a row without steps.
  template <int NV>
  void hand_on(int64_t head, int64_t j) {
    const int64_t c = j * kVectors * L;
    copy<NV>(in_tensor(a.final_state, head, c), in_tensor(a.state, head, c), s.V - c);
  }

  template <int NV>
  void run_slice(int64_t b, int64_t h, int64_t j, int64_t place, const Run& run, int64_t end) {
    const int64_t head = b * s.H + h, c = j * kVectors * L, left = s.V - c;
    const bool whole = left >= NV * L, last = run.begin + run.steps == end;
    const Place mine = {memory + place * s.K * kVectors * L, NV * L};
    const Place result = in_tensor(a.final_state, head, c);
    Place from = mine;
    if (run.anew) {
      copy<NV>(mine, {nullptr, 0}, NV * L);
    } else if (run.begin == 0) {
      from = in_tensor(a.state, head, c);
      if (from.data == nullptr || !whole) {
        copy<NV>(mine, {nullptr, 0}, NV * L);
        if (from.data != nullptr) copy<NV>(mine, from, left);
        from = mine;
      }
    }
    if (a.states != nullptr && run.begin % s.segment == 0) {
      const int64_t kept = head * s.segments() + run.begin / s.segment;
      copy<NV>(in_tensor(a.states, kept, c), from, left);
    }
    const Place to = last && whole ? result : mine;
    switch (s.decay) {
      case Decay::None: take<NV, Decay::None>(b, h, c, run, from, mine, to); break;
      case Decay::Head: take<NV, Decay::Head>(b, h, c, run, from, mine, to); break;
      case Decay::Feature: take<NV, Decay::Feature>(b, h, c, run, from, mine, to); break;
    }
    if (last && !whole) copy<NV>(result, mine, left);
  }

  template <int NV, Decay decay>
  void take(int64_t b, int64_t h, int64_t c, const Run& run, Place from, Place mine, Place to) {
    Vec<C> r[NV];
    start_sums(r);
    for (int64_t i = 0; i < s.K; ++i) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) r[v] += ahead[i] * load(from.data + i * from.stride + v * L);
    C factor = 1;  // the memory is `factor` times what stands there
    for (int64_t t = 0; t < run.steps; ++t) {
      const S* value = Steps<S>::row(a.v, b, run.begin + t, h) + c;
      const bool last = t == run.steps - 1;
      const C before = factor;
      bool plain = true;
      if constexpr (decay == Decay::Head) {
        factor *= steps.decay_head[t];
        plain = factor >= kLeastFactor && !last;
      }
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<C> given = load_n(value + v * L, static_cast<int>(s.V - c - v * L));
        r[v] = steps.beta[t] * (given - before * r[v]);
        if (plain) r[v] *= 1 / factor;
      }
      const Place source = t == 0 ? from : mine, target = last ? to : mine;
      const int64_t next = last ? t : t + 1;
      Vec<C> o[NV];
      if constexpr (decay == Decay::Feature) {
        step<NV, Decay::Feature>(t, next, C(1), source, target, r, o);
      } else if (plain) {
        step<NV, Decay::None>(t, next, C(1), source, target, r, o);
      } else {
        step<NV, Decay::Head>(t, next, factor, source, target, r, o);
        factor = 1;
      }
      S* out = output(b, run.begin + t, h) + c;
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v)
        store_n(out + v * L, factor * o[v], static_cast<int>(s.V - c - v * L));
    }
  }

  // One step: `u` is what is written, and what the next key finds afterwards.
  template <int NV, Decay decay>
  __attribute__((noinline)) void step(int64_t t, int64_t next, C factor, Place from, Place to,
                                      Vec<C>* u_r, Vec<C>* output) {
    const C *q = steps.q + t * steps.Kp, *k = steps.k + t * steps.Kp;
    const C* following = ahead + next * steps.Kp;
    const C* decays = steps.decay + t * steps.Kp;
    const Vec<C> whole = splat(factor);
    Vec<C> u[NV], r[NV], o[NV];
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) u[v] = u_r[v];
    start_sums(r);
    start_sums(o);
    for (int64_t i = 0; i < s.K; ++i) {
      const Vec<C> ki = splat(k[i]), qi = splat(q[i]), next_ki = splat(following[i]);
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) {
        Vec<C> x = load(from.data + i * from.stride + v * L);
        if constexpr (decay == Decay::Head) x *= whole;
        if constexpr (decay == Decay::Feature) x *= decays[i];
        x += ki * u[v];
        store(to.data + i * to.stride + v * L, x);
        o[v] += qi * x;
        r[v] += next_ki * x;
      }
    }
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      u_r[v] = r[v];
      output[v] = o[v];
    }
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = Entry<ForwardRun, Types::All, Forward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::delta_memory
