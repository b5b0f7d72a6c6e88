// The interface of the Differentiable Neural Computer: its parts, and its activations.
#pragma once

#include "../common/machine_layout.h"
#include "../common/machine_values.h"
#include "dnc_kernel.h"

namespace seqmem::dnc {
namespace {

using namespace machine;

constexpr double kNormEpsilon = 1e-6;  // of the interface's layer norm, as in the reference

// Where each part of p begins; heads of a part stand one after the other.
struct Parts {
  int64_t read_keys, read_strengths, write_keys, write_strengths, erase, vectors, free, allocation,
      write, modes, write_masks, read_masks, forward_sharpness, backward_sharpness,
      allocation_strengths;
  int64_t directions;  // read modes of a head: backward W, content 1, forward W

  explicit Parts(const Shape& s) : directions(s.links ? 1 + 2 * s.writes : 0) {
    int64_t next = 0;
    auto take = [&](int64_t heads, int64_t width) {
      const int64_t begin = next;
      next += heads * width;
      return begin;
    };
    read_keys = take(s.reads, s.M);
    read_strengths = take(s.reads, 1);
    write_keys = take(s.writes, s.M);
    write_strengths = take(s.writes, 1);
    erase = take(s.writes, s.M);
    vectors = take(s.writes, s.M);
    free = take(s.reads, 1);
    allocation = take(s.writes, 1);
    write = take(s.writes, 1);
    modes = take(s.reads, directions);
    write_masks = take(s.masks ? s.writes : 0, s.M);
    read_masks = take(s.masks ? s.reads : 0, s.M);
    forward_sharpness = take(s.sharpen ? s.reads : 0, 1);
    backward_sharpness = take(s.sharpen ? s.reads : 0, 1);
    allocation_strengths = take(s.softmax ? s.writes : 0, 1);
  }
};

// From p to its activated values and back. Strengths and sharpness are softplus alone: whoever uses
// them adds their 1; masks are sigmoid alone.
template <class C>
class Values {
  static constexpr int L = kLanes<C>;
  const Shape& s;
  const C *weight, *bias;  // of the norm
  Squash<C> squash;
  C* normal;  // [P_pad]: p normalised, before weight and bias

 public:
  const Parts at;

  Values(const Shape& s, const void* weight, const void* bias)
      : s(s),
        weight(static_cast<const C*>(weight)),
        bias(static_cast<const C*>(bias)),
        squash(s.P),
        at(s) {}

  // Values of a row, whole vectors.
  int64_t size() const { return padded<C>(s.P); }

  void place(Carver& take) {
    squash.place(take);
    normal = take.array<C>(size());
  }

  void prepare() const {
    squash.clear();
    if (s.squash) {
      squash.tanh(at.read_keys, s.reads * s.M);
      squash.tanh(at.write_keys, s.writes * s.M);
      squash.tanh(at.vectors, s.writes * s.M);
    }
    squash.sigmoid(at.erase, s.writes * s.M);
    squash.sigmoid(at.free, at.modes - at.free);
    squash.sigmoid(at.write_masks, at.forward_sharpness - at.write_masks);
  }

  // values = the activated p
  void run(const C* p, C* values) const {
    if (s.norm) {
      normalise(p);
      for (int64_t i = 0; i < s.P; i += L) {
        const int n = lanes(i);
        store(values + i, load(normal + i) * load_n(weight + i, n) + load_n(bias + i, n));
      }
    } else {
      load_row(values, p, s.P);
    }
    squash.run(values);
    each_soft([&](int64_t i, int n) {
      Vec<C> x[1] = {load_n(values + i, n)};
      softplus<1, C>(x);
      store_n(values + i, x[0], n);
    });
    each_modes([&](int64_t i, int n) {
      C* first = values + i;
      Vec<C> most = load_strided(first, at.directions, n), sum{};
      for (int64_t d = 1; d < at.directions; ++d) {
        const Vec<C> x = load_strided(static_cast<const C*>(first) + d, at.directions, n);
        most = x > most ? x : most;
      }
      for (int64_t d = 0; d < at.directions; ++d) {
        Vec<C> e[1] = {load_strided(static_cast<const C*>(first) + d, at.directions, n) - most};
        exp_of_negative<1, C>(e);
        sum += e[0];
        put_strided(first + d, e[0], n);
      }
      for (int64_t d = 0; d < at.directions; ++d)
        put_strided(first + d,
                    load_strided(static_cast<const C*>(first) + d, at.directions, n) / sum, n);
    });
  }

  // From gradients of the activated values to those of p, in place; of_norm [2, P], if not null,
  // takes the row's part of the norm's gradients.
  void back(const C* p, const C* values, C* grad, C* of_norm) {
    squash.back(values, grad);
    each_soft([&](int64_t i, int n) {
      store_n(grad + i, load_n(grad + i, n) * softplus_slope<C>(load_n(values + i, n)), n);
    });
    for (int64_t r = 0; r < s.reads; ++r) {
      const C* share = values + at.modes + r * at.directions;
      C *d = grad + at.modes + r * at.directions, inside = 0;
      for (int64_t k = 0; k < at.directions; ++k) inside += share[k] * d[k];
      for (int64_t k = 0; k < at.directions; ++k) d[k] = share[k] * (d[k] - inside);
    }
    if (s.norm) back_norm(p, grad, of_norm);
  }

 private:
  int lanes(int64_t i) const { return static_cast<int>(min<int64_t>(L, s.P - i)); }

  // Calls f(first, n) for values that softplus activates, at most a vector at a time.
  template <class F>
  SEQMEM_INLINE void each_soft(F&& f) const {
    auto range = [&](int64_t begin, int64_t count) {
      for (int64_t i = 0; i < count; i += L)
        f(begin + i, static_cast<int>(min<int64_t>(L, count - i)));
    };
    range(at.read_strengths, s.reads);
    range(at.write_strengths, s.writes);
    range(at.forward_sharpness, s.P - at.forward_sharpness);
  }

  // Calls f(first, heads) for the modes of at most a vector of heads at a time.
  template <class F>
  SEQMEM_INLINE void each_modes(F&& f) const {
    for (int64_t r = 0; at.directions > 0 && r < s.reads; r += L)
      f(at.modes + r * at.directions, static_cast<int>(min<int64_t>(L, s.reads - r)));
  }
  void put_strided(C* to, Vec<C> x, int n) const {
    for (int i = 0; i < n; ++i) to[i * at.directions] = x[i];
  }

  // Fills `normal`, zero beyond P; returns 1 / sqrt(variance + epsilon).
  C normalise(const C* p) const {
    Vec<C> sum{}, squares{};
    for (int64_t i = 0; i < s.P; i += L) sum += load_n(p + i, lanes(i));
    const C mean = lane_sum<C>(sum) / static_cast<C>(s.P);
    for (int64_t i = 0; i < s.P; i += L) {
      store(normal + i, load_n(p + i, lanes(i)) - mean);
      for (int64_t k = s.P; k < i + L; ++k) normal[k] = 0;
      squares += load(normal + i) * load(normal + i);
    }
    const C inverse =
        C(1) / square_root(lane_sum<C>(squares) / static_cast<C>(s.P) + C(kNormEpsilon));
    for (int64_t i = 0; i < s.P; i += L) store(normal + i, load(normal + i) * inverse);
    return inverse;
  }

  void back_norm(const C* p, C* grad, C* of_norm) const {
    const C inverse = normalise(p);
    Vec<C> sum{}, along{};
    for (int64_t i = 0; i < s.P; i += L) {
      const int n = lanes(i);
      const Vec<C> g = load_n(grad + i, n), x = load(normal + i);
      if (of_norm != nullptr) {
        store_n(of_norm + i, load_n(of_norm + i, n) + g * x, n);
        store_n(of_norm + s.P + i, load_n(of_norm + s.P + i, n) + g, n);
      }
      const Vec<C> scaled = g * load_n(weight + i, n);
      sum += scaled;
      along += scaled * x;
      store_n(grad + i, scaled, n);
    }
    const C mean = lane_sum<C>(sum) / static_cast<C>(s.P);
    const C slope = lane_sum<C>(along) / static_cast<C>(s.P);
    for (int64_t i = 0; i < s.P; i += L)
      store_n(grad + i, inverse * (load_n(grad + i, lanes(i)) - mean - load(normal + i) * slope),
              lanes(i));
  }
};

}  // namespace
}  // namespace seqmem::dnc
