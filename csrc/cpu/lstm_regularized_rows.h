// What the regularised LSTM's forward and backward kernels share: zoneout, and sums along rows
// whose units several threads compute.
//
// A row's mean and variance, and the two sums of a norm's derivative, are put together of one part
// for each vector of units, in the units' order: the same bits however units and rows are shared
// out. Threads that share units meet at a barrier between the parts and their total.
#pragma once

#include "../common/dropout.h"
#include "lstm_common.h"
#include "lstm_regularized_kernel.h"

namespace seqmem::lstm_regularized {

using namespace lstm;

namespace {

// Which units a row keeps at one step.
template <class C>
class ZoneoutRows {
  static constexpr int L = kLanes<C>;
  const Zoneout& z;
  uint32_t* key;  // of each row of the step

 public:
  explicit ZoneoutRows(const Zoneout& z) : z(z) {}

  void place(Carver& take, int64_t rows) { key = take.array<uint32_t>(rows); }
  // Row j is number `row` of [T, B].
  void enter(int64_t j, int64_t row) {
    if (z.drawn) key[j] = key_of(z, row);
  }
  bool any() const { return z.p > 0; }

  // The share of vector u's old values that row j keeps.
  SEQMEM_INLINE Vec<C> kept(int64_t j, int64_t u) const {
    if (!z.drawn) return splat<C>(z.p);
    const auto below = static_cast<int32_t>(z.p * (1 << 24) + 0.5);
    C lanes[L];
    for (int l = 0; l < L; ++l) {
      const uint32_t number = mixed(key[j] ^ static_cast<uint32_t>(u * L + l) * 0x9E3779B9u);
      lanes[l] = static_cast<int32_t>(number >> 8) < below ? C(1) : C(0);
    }
    return load(lanes);
  }

  SEQMEM_INLINE Vec<C> mix(int64_t j, int64_t u, Vec<C> before, Vec<C> fresh) const {
    if (!any()) return fresh;
    const Vec<C> share = kept(j, u);
    return z.drawn ? (share != C(0) ? before : fresh) : fresh + share * (before - fresh);
  }
};

// 1 in the lanes that are units, 0 in those beyond the last one.
template <class C>
class Valid {
  static constexpr int L = kLanes<C>;
  int64_t last;
  Vec<C> lanes[2];

 public:
  explicit Valid(int64_t H) : last((H - 1) / L) {
    for (int l = 0; l < L; ++l) lanes[0][l] = 1, lanes[1][l] = last * L + l < H ? 1 : 0;
  }
  SEQMEM_INLINE Vec<C> operator()(int64_t u) const { return lanes[u == last]; }
};

SEQMEM_INLINE float root(float x) { return __builtin_sqrtf(x); }
SEQMEM_INLINE double root(double x) { return __builtin_sqrt(x); }

// Parts of two sums along each row, one for each of `parts` groups of units.
template <class C>
class RowParts {
 protected:
  static constexpr int L = kLanes<C>;
  const int64_t parts;
  int64_t stride = 0;
  C *first, *second;  // [parts][stride], shared by threads that share units

  explicit RowParts(int64_t parts) : parts(parts) {}

 public:
  C *a, *b;  // [rows], this thread's own: what they come to

  void place_parts(Carver& take, int64_t rows) {
    stride = padded<C>(rows);
    first = take.array<C>(parts * stride);
    second = take.array<C>(parts * stride);
  }
  void place_totals(Carver& take, int64_t rows) {
    a = take.array<C>(rows + L);
    b = take.array<C>(rows + L);
  }
};

// a: mean, b: 1 / deviation of `width` values of each unit. A part is a vector of units: its sum,
// and its squared distance to its own mean, so that no digits cancel.
template <class C>
class RowMoments : public RowParts<C> {
  using RowParts<C>::L, RowParts<C>::parts, RowParts<C>::stride, RowParts<C>::first,
      RowParts<C>::second;
  const int64_t H, width;

 public:
  RowMoments(int64_t H, int64_t width) : RowParts<C>(ceil_div(H, L)), H(H), width(width) {}

  template <int G>
  SEQMEM_INLINE void put(int64_t u, int64_t j, const Vec<C> (&x)[G], Vec<C> valid) {
    Vec<C> total = x[0];
    SEQMEM_UNROLL
    for (int g = 1; g < G; ++g) total += x[g];
    const C sum = lane_sum<C>(total), mean = sum / count(u);
    Vec<C> squares{};
    SEQMEM_UNROLL
    for (int g = 0; g < G; ++g) squares += (x[g] - mean) * (x[g] - mean);
    first[u * stride + j] = sum;
    second[u * stride + j] = lane_sum<C>(squares * valid);
  }

  void finish(int64_t rows) {
    const C total = static_cast<C>(H * width);
    for (int64_t j = 0; j < rows; j += L) {
      Vec<C> sum{}, squares{};
      for (int64_t u = 0; u < parts; ++u) sum += load(first + u * stride + j);
      const Vec<C> mean = sum / total;
      for (int64_t u = 0; u < parts; ++u) {
        const Vec<C> distance = load(first + u * stride + j) / count(u) - mean;
        squares += load(second + u * stride + j) + count(u) * distance * distance;
      }
      store(this->a + j, mean);
      for (int l = 0; l < L; ++l)
        this->b[j + l] = C(1) / root(squares[l] / total + static_cast<C>(kNormEpsilon));
    }
  }

 private:
  SEQMEM_INLINE C count(int64_t u) const {
    return static_cast<C>(min<int64_t>(L, H - u * L) * width);
  }
};

// a, b: the means of two values of each unit, or of each unit's gates. A part is kGroup vectors of
// units.
template <class C>
class RowMeans : public RowParts<C> {
  using RowParts<C>::L, RowParts<C>::parts, RowParts<C>::stride, RowParts<C>::first,
      RowParts<C>::second;
  const C total;

 public:
  static constexpr int64_t kGroup = 4;

  RowMeans(int64_t H, int64_t width)
      : RowParts<C>(ceil_div(ceil_div(H, L), kGroup)), total(static_cast<C>(H * width)) {}

  SEQMEM_INLINE void put(int64_t u, int64_t j, Vec<C> p, Vec<C> q) {
    first[u / kGroup * stride + j] = lane_sum<C>(p);
    second[u / kGroup * stride + j] = lane_sum<C>(q);
  }

  // Of rows from `begin` on.
  void finish(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += L) {
      Vec<C> p{}, q{};
      for (int64_t part = 0; part < parts; ++part) {
        p += load(first + part * stride + j);
        q += load(second + part * stride + j);
      }
      store(this->a + j, p / total);
      store(this->b + j, q / total);
    }
  }
};

// Asks for a row of memory that is read soon: on its page the processor would have to find out anew
// that memory is read along.
template <class S>
SEQMEM_INLINE void fetch_row(const void* base, int64_t index, int64_t width) {
  const char* from = reinterpret_cast<const char*>(static_cast<const S*>(base) + index * width);
  for (int64_t i = 0; i < width * int64_t(sizeof(S)); i += 64) __builtin_prefetch(from + i);
}

// Vector u of a parameter of [gates * H], gate by gate, as [gates][lanes]; zero beyond the last
// unit.
template <class S, class C = compute_t<S>>
SEQMEM_INLINE void load_gates(C* to, const void* from, int gates, int64_t u, int64_t H) {
  constexpr int L = kLanes<C>;
  for (int g = 0; g < gates; ++g)
    store(to + g * L,
          load_n(static_cast<const S*>(from) + g * H + u * L, static_cast<int>(H - u * L)));
}

}  // namespace
}  // namespace seqmem::lstm_regularized
