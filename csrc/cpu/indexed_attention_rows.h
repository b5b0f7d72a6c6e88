// What indexed attention's forward and backward share: products of one row with the rows that a
// list names, which are read where they lie.
#pragma once

#include "../common/dropout.h"
#include "../common/kernel_run.h"
#include "../common/normalizer_rows.h"
#include "indexed_attention_kernel.h"

namespace seqmem::indexed_attention {
namespace {

constexpr int64_t kQueriesOfTask = 64;
constexpr int kAtOnce = 4;        // rows whose products with one row are summed side by side
constexpr int kMost = 16;         // queries of a batch
constexpr int64_t kPlaces = 512;  // of their lists: scores and addresses of 14 KB stay in L1

SEQMEM_INLINE int64_t batch_of(const Shape& s) {
  return max<int64_t>(1, min<int64_t>(kMost, kPlaces / max<int64_t>(s.C, 1)));
}

template <class S>
const S* row_at(const Heads& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<const S*>(t.data) + b * t.row + h * t.head + i * t.step;
}

// out[n] = a . rows[n] for n = 0..count-1, rounded up to kAtOnce, as are both arrays.
template <class S, class C = compute_t<S>>
void dots(C* out, int64_t count, const C* a, const S** rows, int64_t width) {
  for (int64_t n = count; n % kAtOnce != 0; ++n) rows[n] = rows[count - 1];
  auto next = [&](int64_t n, auto groups) {
    constexpr int G = decltype(groups)::value;
    Vec<C> sums[1][G * kAtOnce];
    start_sums(sums);
    tile_dot<1, G * kAtOnce, C>(width, &a, rows + n, sums);
    for (int g = 0; g < G; ++g)
      store_sums4<C>(out + n + g * kAtOnce, reinterpret_cast<const Vec<C>(&)[G][kAtOnce]>(sums)[g]);
  };
  int64_t n = 0;
  for (; n + kAtOnce < count; n += 2 * kAtOnce) next(n, std::integral_constant<int, 2>{});
  if (n < count) next(n, std::integral_constant<int, 1>{});
}

// out[0..padded(width)-1] += sum_n factors[n] rows[n], n in this order.
template <class S, class C = compute_t<S>>
void add_rows(C* out, int64_t count, const C* factors, const S* const* rows, int64_t width) {
  constexpr int L = kLanes<C>;
  const int64_t whole = width / L;
  for (int64_t v = 0; v < whole;) {
    const int64_t vectors = min<int64_t>(whole - v, 8);
    for_count<8>(vectors, [&](auto number) {
      constexpr int V = decltype(number)::value;
      Vec<C> total[V];
      for (int x = 0; x < V; ++x) total[x] = load(out + (v + x) * L);
      for (int64_t n = 0; n < count; ++n) {
        const Vec<C> factor = splat(factors[n]);
        SEQMEM_UNROLL
        for (int x = 0; x < V; ++x) total[x] += factor * load(rows[n] + (v + x) * L);
      }
      for (int x = 0; x < V; ++x) store(out + (v + x) * L, total[x]);
    });
    v += vectors;
  }
  if (const int rest = static_cast<int>(width - whole * L)) {
    Vec<C> total = load(out + whole * L);
    for (int64_t n = 0; n < count; ++n)
      total += splat(factors[n]) * load_n(rows[n] + whole * L, rest);
    store(out + whole * L, total);
  }
}

// Rows first..first+rows-1 of row b and head h.
struct Task {
  int64_t b, h, first, rows;
};

// Tasks of a pass over `heads` heads a row of `length` rows each.
SEQMEM_INLINE bool take_task(const Shape& s, int64_t& next, int64_t heads, int64_t length,
                             Task& task) {
  const int64_t parts = ceil_div(length, kQueriesOfTask);
  const int64_t k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
  if (k >= s.B * heads * parts) return false;
  const int64_t first = k % parts * kQueriesOfTask;
  task = {k / parts / heads, k / parts % heads, first, min(kQueriesOfTask, length - first)};
  return true;
}

// The keys that a list names, their values, and their places in it.
template <class S>
struct Named {
  int64_t count;
  const S **keys, **values;
  int64_t* places;

  void place(Carver& take, int64_t C) {
    keys = take.array<const S*>(C + kAtOnce);
    values = take.array<const S*>(C + kAtOnce);
    places = take.array<int64_t>(C);
  }
  // Of row b and head h of keys.
  template <class Arguments>
  void set(const Shape& s, const int64_t* list, const Arguments& a, int64_t b, int64_t h) {
    count = 0;
    for (int64_t c = 0; c < s.C; ++c)
      if (list[c] >= 0) {
        keys[count] = row_at<S>(a.k, b, h, list[c]);
        values[count] = row_at<S>(a.v, b, h, list[c]);
        places[count++] = c;
      }
  }
};

SEQMEM_INLINE int64_t list_of(const Shape& s, int64_t b, int64_t h) {
  return b * s.row + h * s.head;
}

}  // namespace
}  // namespace seqmem::indexed_attention
