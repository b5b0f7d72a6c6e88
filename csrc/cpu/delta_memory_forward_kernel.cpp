// The delta memory over its steps. A thread takes slices of V of a head's memory, which stay in the
// L1 cache; for each run of at most 16 steps
//   q, k, decay and their products are read once for all slices; then, for each slice S [K][lanes],
//   r_0 = S^T (decay_0 k_0),  r_1 = S^T (decay_1 decay_0 k_1)
//   for two steps at a time, t and t + 1 (or one, where registers are few), S is read and written
//   once:
//     u_0 = beta_t (v_t - r_0);  u_1 = beta_t+1 (v_t+1 - r_1 - (decay_t+1 k_t+1 . k_t) u_0)
//     for each feature i:
//       S[i] = decay_t S[i] + k_t[i] u_0;  o_t += q_t[i] S[i];  then the same for t + 1
//       r_0 and r_1 of the steps t + 2 and t + 3 get their part of S[i]
// A decay of a whole head is kept as a factor of S, and multiplied in at the end of a run or where
// the factor becomes small: u is divided by it, r and o_t are multiplied.
// Floor: B H T K V 3 multiply-adds, and a product where features decay; bytes: q, k, v, output,
// and two memories. A call of one step goes its own way: delta_memory_one_step.h.
#include "delta_memory_one_step.h"

namespace seqmem::delta_memory {
namespace {

template <class S>
class ForwardRun {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>;
  static constexpr int kVectors = 4;  // of a slice
  // Steps in one pass: twos need more registers than 16.
  static constexpr int kSteps = SEQMEM_VEC_BYTES == 64 ? 2 : 1;
  static constexpr C kLeastFactor = C(1) / 256;

  const Shape& s;
  const Forward& a;
  const int thread, threads;
  Steps<S> steps;
  // Of the steps of a pass, seen from before the first: the decays until then * k, and how the
  // second key meets what the first step writes.
  C* ahead;   // [kChunk, Kp]
  C* meets;   // [kChunk]
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
      meets = take.array<C>(kChunk);
      const int64_t slice = s.K * kVectors * L;
      memory = take.array<C>(min(s.H * slices(), together<C>(slice)) * slice);
    });
    return take.used();
  }

  void run() {
    if (OneStep<S>::suits(s, a)) return OneStep<S>(s, a, steps, ahead).run(thread, threads);
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
  void run_units(int64_t b, int64_t begin, int64_t count) {
    const int64_t end = steps_of(s, b);
    auto for_units = [&](auto&& f) {
      for (int64_t u = begin; u < begin + count; ++u) {
        const int64_t j = u % slices();
        for_slice(j, [&](auto vectors) { f(vectors, u / slices() % s.H, j, u - begin); });
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
      const int64_t first = j * kVectors * L, width = min(s.V - first, kVectors * L);
      for (int64_t t = end; t < s.T; ++t)
        for (int64_t c = 0; c < width; ++c) output(b, t, h)[first + c] = S{};
      if (a.states == nullptr) return;
      for (int64_t t = end; t < s.segments() * s.segment; ++t)
        for (int64_t c = 0; c < width; ++c) kept_row(b, h, t, first)[c] = 0;
    });
  }

  template <class F>
  void for_slice(int64_t j, F&& f) {
    for_count<kVectors>(min<int64_t>(kVectors, ceil_div(s.V, L) - j * kVectors), f);
  }

  S* output(int64_t b, int64_t t, int64_t h) const {
    return static_cast<S*>(a.output) + ((b * s.T + t) * s.H + h) * s.V;
  }

  // Where x of a step is kept, from column c on; or null.
  C* kept_row(int64_t b, int64_t h, int64_t t, int64_t c) const {
    if (a.states == nullptr) return nullptr;
    const int64_t segment = (b * s.H + h) * s.segments() + t / s.segment;
    return static_cast<C*>(a.states) + (segment * s.kept_rows() + s.K + t % s.segment) * s.V + c;
  }

  void read(int64_t b, int64_t h, const Run& run) {
    steps.read(a, b, h, run);
    for (int64_t i = 0; i < run.steps; ++i) {
      Vec<C> sums = {};
      for (int64_t c = 0; c < steps.Kp; c += L) {
        const int64_t at = i * steps.Kp + c, before = at - steps.Kp;
        Vec<C> x = decayed(i, c, load(steps.k + at));
        if (i % kSteps == 1) {
          sums += x * load(steps.k + before);
          x = decayed(i - 1, c, x);
        }
        store(ahead + at, x);
      }
      if (i % kSteps == 1) meets[i] = lane_sum<C>(sums);
    }
  }

  // x of features c and on, after the decay of step i.
  SEQMEM_INLINE Vec<C> decayed(int64_t i, int64_t c, Vec<C> x) const {
    if (s.decay == Decay::Head) return x * steps.decay_head[i];
    return s.decay == Decay::Feature ? x * load(steps.decay + i * steps.Kp + c) : x;
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
      copy<NV>({static_cast<C*>(a.states) + kept * s.kept_rows() * s.V + c, s.V}, from, left);
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
    Vec<C> r[kSteps * NV];
    find<NV>(min<int64_t>(run.steps, kSteps), from, r);
    C factor = 1;  // the memory is `factor` times what stands there
    for (int64_t t = 0; t < run.steps; t += kSteps) {
      const Place source = t == 0 ? from : mine, target = t + kSteps < run.steps ? mine : to;
      if (t + kSteps <= run.steps) {
        take_steps<NV, kSteps, decay>(b, h, c, run, t, source, target, r, factor);
      } else {
        take_steps<NV, 1, decay>(b, h, c, run, t, source, target, r, factor);
      }
    }
  }

  // What the first keys of a run find.
  template <int NV>
  void find(int64_t keys, Place from, Vec<C>* r) const {
    for (int64_t m = 0; m < keys; ++m) {
      Vec<C> sums[NV];
      start_sums(sums);
      const C* key = ahead + m * steps.Kp;
      for (int64_t i = 0; i < s.K; ++i) SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) sums[v] += key[i] * load(from.data + i * from.stride + v * L);
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) r[m * NV + v] = sums[v];
    }
  }

  // Steps t..t+count-1, of which the keys find r [kSteps, NV]; afterwards r is what the next ones
  // find.
  template <int NV, int count, Decay decay>
  SEQMEM_INLINE void take_steps(int64_t b, int64_t h, int64_t c, const Run& run, int64_t t,
                                Place from, Place to, Vec<C>* r, C& factor) {
    const bool last = t + count == run.steps;
    C factors[count];  // until after each step
    bool plain = true;
    SEQMEM_UNROLL
    for (int m = 0; m < count; ++m) {
      factors[m] = m == 0 ? factor : factors[m - 1];
      if constexpr (decay == Decay::Head) factors[m] *= steps.decay_head[t + m];
    }
    if constexpr (decay == Decay::Head) plain = factors[count - 1] >= kLeastFactor && !last;
    SEQMEM_UNROLL
    for (int m = 0; m < count; ++m) {
      const S* value = Steps<S>::row(a.v, b, run.begin + t + m, h) + c;
      C* kept = kept_row(b, h, run.begin + t + m, c);
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<C> given = load_n(value + v * L, static_cast<int>(s.V - c - v * L));
        Vec<C> rest = given - factor * r[m * NV + v];
        if (m == 1) rest -= meets[t + 1] * r[v];
        if (kept != nullptr) store_n(kept + v * L, rest, static_cast<int>(s.V - c - v * L));
        r[m * NV + v] = steps.beta[t + m] * rest;
      }
    }
    if (plain) {
      SEQMEM_UNROLL
      for (int m = 0; m < count; ++m) SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) r[m * NV + v] *= 1 / factors[m];
    }
    Vec<C> o[count * NV];
    if constexpr (decay == Decay::Feature) {
      pass<NV, count, Decay::Feature>(t, run, nullptr, from, to, r, o);
    } else if (plain) {
      pass<NV, count, Decay::None>(t, run, nullptr, from, to, r, o);
    } else {
      const C scales[2] = {factors[0], steps.decay_head[t + count - 1]};
      pass<NV, count, Decay::Head>(t, run, scales, from, to, r, o);
      for (C& each : factors) each = 1;
    }
    factor = factors[count - 1];
    SEQMEM_UNROLL
    for (int m = 0; m < count; ++m) {
      S* out = output(b, run.begin + t + m, h) + c;
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v)
        store_n(out + v * L, factors[m] * o[m * NV + v], static_cast<int>(s.V - c - v * L));
    }
  }

  template <int NV, int count, Decay decay>
  SEQMEM_INLINE void pass(int64_t t, const Run& run, const C* scales, Place from, Place to,
                          Vec<C>* r, Vec<C>* output) {
    if (t + count == run.steps) {
      pass<NV, count, decay, false>(t, t, scales, from, to, r, output);
    } else {
      const int64_t second = min(t + count + 1, run.steps - 1);
      pass<NV, count, decay, true>(t, second, scales, from, to, r, output);
    }
  }

  // The memory through `count` steps: `u_r` is what they write, and then what the next keys find,
  // of which a second one is that of step `second`.
  template <int NV, int count, Decay decay, bool looks>
  __attribute__((noinline)) void pass(int64_t t, int64_t second, const C* scales, Place from,
                                      Place to, Vec<C>* u_r, Vec<C>* output) {
    const int64_t Kp = steps.Kp;
    const C *q = steps.q + t * Kp, *k = steps.k + t * Kp, *decays = steps.decay + t * Kp;
    const C* following[2] = {ahead + (looks ? t + count : t) * Kp, ahead + second * Kp};
    Vec<C> u[count][NV], o[count][NV], r[kSteps][NV];
    SEQMEM_UNROLL
    for (int m = 0; m < count; ++m) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) u[m][v] = u_r[m * NV + v];
    start_sums(o);
    start_sums(r);
    for (int64_t i = 0; i < s.K; ++i) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      Vec<C> x = load(from.data + i * from.stride + v * L);
      SEQMEM_UNROLL
      for (int m = 0; m < count; ++m) {
        if constexpr (decay == Decay::Head) x *= scales[m];
        if constexpr (decay == Decay::Feature) x *= decays[m * Kp + i];
        x += k[m * Kp + i] * u[m][v];
        o[m][v] += q[m * Kp + i] * x;
      }
      store(to.data + i * to.stride + v * L, x);
      if constexpr (looks) SEQMEM_UNROLL
      for (int m = 0; m < kSteps; ++m) r[m][v] += following[m][i] * x;
    }
    SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      SEQMEM_UNROLL
      for (int m = 0; m < count; ++m) output[m * NV + v] = o[m][v];
      SEQMEM_UNROLL
      for (int m = 0; m < kSteps; ++m) u_r[m * NV + v] = r[m][v];
    }
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = Entry<ForwardRun, Types::All, Forward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::delta_memory
