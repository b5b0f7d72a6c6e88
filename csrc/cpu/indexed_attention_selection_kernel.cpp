// The keys of the highest scores. A task is a few queries of a head; for each 512 keys, packed into
// panels,
//   pass 1  scores = (scale query) key^T
//   pass 2  by query, scores above the bound so far are candidates, as integers in their order. The
//           first keys give a bound at once: of the maxima of small groups of scores, so many times
//           the chosen, one that enough of them reach. When there is no room for more, the bound
//           becomes the last one that would be chosen, which is found by halving an interval, and
//           the candidates below it are dropped
// and in the end
//   pass 3  by query: the chosen sorted, the best first
// Candidates are in the order of their keys: of equal scores the lower key comes first. NaN is
// above all.
#include "indexed_attention_rows.h"

namespace seqmem::indexed_attention {
namespace {

constexpr int64_t kKeys = 512, kWord = 64;  // scores that are compared at once
constexpr int64_t kRoom = 4, kGroups = 2;   // room, and groups, for so many times the chosen

// Bit l is set where lane l is.
template <class C>
SEQMEM_INLINE uint32_t lanes_set(IntVec<C> mask) {
  uint32_t bits = 0;
#if SEQMEM_VEC_BYTES >= 32
  typedef float Floats __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(32)));
  constexpr int kPart = 32 / sizeof(C);
  for (size_t part = 0; part < sizeof mask / 32; ++part) {
    std::conditional_t<sizeof(C) == 4, Floats, Doubles> here;
    __builtin_memcpy(&here, reinterpret_cast<const char*>(&mask) + part * 32, 32);
    if constexpr (sizeof(C) == 4) {
      bits |= uint32_t(__builtin_ia32_movmskps256(here)) << (part * kPart);
    } else {
      bits |= uint32_t(__builtin_ia32_movmskpd256(here)) << (part * kPart);
    }
  }
#else
  for (int l = 0; l < kLanes<C>; ++l) bits |= uint32_t(mask[l] & 1) << l;
#endif
  return bits;
}

template <class S>
class SelectionRun : KernelRun<Selection, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  using Order = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  static constexpr int L = kLanes<C>;
  static constexpr int kSign = sizeof(C) * 8 - 1;
  static constexpr Order kMost = Order(~(uint64_t(1) << kSign)), kLeast = -kMost - 1;
  static_assert(kQueriesOfTask <= kMaxRows);

  const int64_t D_pad = padded<C>(s.D), stride = score_stride<C>(min(kKeys, s.Tk));
  const int64_t room = padded<C>(kRoom * a.count) + kWord + L;

  C *panels, *queries, *scores;
  Order *maxima, *orders;  // of groups of scores; of candidates [kQueriesOfTask, room]
  int64_t* keys;
  int64_t sizes[kQueriesOfTask];
  // What a candidate is not below, or, once the bound's equals would be too many, is above.
  enum class Bounded { No, NotBelow, Above } bounded[kQueriesOfTask];
  C bounds[kQueriesOfTask];

 public:
  using KernelRun<Selection, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      panels = take.array<C>(padded<C>(min(kKeys, s.Tk)) * s.D);
      queries = take.array<C>(kQueriesOfTask * D_pad);
      scores = take.array<C>(kQueriesOfTask * stride);
      maxima = take.array<Order>(kKeys);
      orders = take.array<Order>(kQueriesOfTask * room);
      keys = take.array<int64_t>(kQueriesOfTask * room);
    });
    return take.used();
  }

  void run() {
    Task task;
    while (take_task(s, plan.next[0], s.Hq, s.Tq, task)) run_task(task);
  }

 private:
  void run_task(const Task& task) {
    const int64_t head = task.h / (s.Hq / s.Hk);
    int64_t ends[kQueriesOfTask], last = 0;
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t i = task.first + r, end = bound(a.end, task.b, i, s.Tk, s.Tk);
      ends[r] = a.is_causal ? min(end, i + 1) : end;
      last = max(last, ends[r]);
      sizes[r] = 0;
      bounded[r] = Bounded::No;
      bounds[r] = 0;
      const Rows<S> query = rows_of<S>(a.q, task.b, task.h, i, 1);
      copy_row<S>(queries + r * D_pad, query.row(0), query.columns, s.D, C(s.scale));
    }
    Ranges t;
    t.rows = task.rows;
    for (int64_t j = 0; j < last; j += kKeys) {
      t.columns = min(kKeys, s.Tk - j);
      for (int64_t r = 0; r < t.rows; ++r) {
        t.lo[r] = 0;
        t.hi[r] = max<int64_t>(min(ends[r] - j, t.columns), 0);
      }
      pack_lanes<S>(panels, rows_of<S>(a.k, task.b, head, j, 1), t.columns, s.D);
      multiply_lanes(t, s.D, queries, D_pad, panels, t.columns, scores, stride);
      for (int64_t r = 0; r < t.rows; ++r) collect(r, scores + r * stride, t.hi[r], j);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      if (sizes[r] > a.count) drop(r);
      int64_t* to = a.index + ((task.b * s.Hq + task.h) * s.Tq + task.first + r) * a.count;
      sort(orders + r * room, keys + r * room, sizes[r]);
      for (int64_t n = 0; n < a.count; ++n) to[n] = n < sizes[r] ? keys[r * room + n] : -1;
    }
  }

  static IntVec<C> to_orders(Vec<C> score) {
    const IntVec<C> bits = (IntVec<C>)(score + C(0));  // -0 is 0
    const IntVec<C> order = bits ^ ((bits >> kSign) & kMost);
    return score != score ? (IntVec<C>{} + kMost) : order;
  }

  static Order to_order(C score) {
    Order bits;
    score += C(0);
    __builtin_memcpy(&bits, &score, sizeof bits);
    return score != score ? kMost : bits ^ ((bits >> kSign) & kMost);
  }

  static C to_score(Order order) {
    C score;
    order ^= (order >> kSign) & kMost;
    __builtin_memcpy(&score, &order, sizeof score);
    return score;
  }

  static IntVec<C> load_orders(const Order* from) {
    IntVec<C> here;
    __builtin_memcpy(&here, from, sizeof here);
    return here;
  }

  void collect(int64_t r, const C* row, int64_t n, int64_t first) {
    if (bounded[r] == Bounded::No) bound_by_groups(r, row, n);
    for (int64_t x = 0; x < n; x += kWord) {
      const int64_t count = min(kWord, n - x);
      const Vec<C> bound = splat(bounds[r]);
      uint64_t found = 0;
      for (int64_t y = 0; y < count; y += L) {
        const Vec<C> score = load(row + x + y);
        const IntVec<C> out = bounded[r] == Bounded::Above ? score <= bound : score < bound;
        found |= uint64_t(lanes_set<C>(out)) << y;
      }
      found = ~found;
      if (bounded[r] == Bounded::No) found = ~uint64_t(0);
      if (count < kWord) found &= (uint64_t(1) << count) - 1;
      if (found == 0) continue;
      int64_t size = sizes[r];
      for (; found != 0; found &= found - 1) {
        const int64_t y = x + __builtin_ctzll(found);
        orders[r * room + size] = to_order(row[y]);
        keys[r * room + size++] = first + y;
      }
      sizes[r] = size;
      if (size > room - kWord - L) drop(r);
    }
  }

  // Each group has a score that reaches its maximum.
  void bound_by_groups(int64_t r, const C* row, int64_t n) {
    const int64_t vectors = n / L, group = vectors * L / (kGroups * a.count);
    if (group < 2) return;
    const int64_t groups = vectors / group;
    for (int64_t g = 0; g < groups; ++g) {
      Vec<C> most = load(row + g * group * L);
      for (int64_t x = 1; x < group; ++x) {
        const Vec<C> score = load(row + (g * group + x) * L);
        most = score > most ? score : most;
      }
      const IntVec<C> order = to_orders(most);
      __builtin_memcpy(maxima + g * L, &order, sizeof order);
    }
    bounds[r] = to_score(lowest_of(maxima, groups * L, a.count + a.count / 4));
    bounded[r] = Bounded::NotBelow;
  }

  static int64_t at_least(const Order* from, int64_t n, Order low) {
    IntVec<C> count = {};
    for (int64_t x = 0; x < n; x += L) count -= load_orders(from + x) >= low;
    int64_t total = 0;
    for (int l = 0; l < L; ++l) total += count[l];
    return total;
  }

  // A bound that `count` or more reach: at most `most`, unless equal ones are more.
  Order lowest_of(const Order* from, int64_t n, int64_t most) const {
    Order low = kMost, high = kLeast;
    for (int64_t x = 0; x < n; ++x) {
      low = min(low, from[x]);
      high = max(high, from[x]);
    }
    while (low < high) {
      const Order middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1);
      const int64_t found = at_least(from, n, middle);
      if (found < a.count) {
        high = middle - 1;
      } else {
        low = middle;
        if (found <= most) break;
      }
    }
    return low;
  }

  // Leaves the best `count` candidates of more, and sets the bound.
  void drop(int64_t r) {
    Order* of_row = orders + r * room;
    const int64_t n = sizes[r];
    for (int64_t x = n; x < padded<C>(n); ++x) of_row[x] = kLeast;
    const Order low = lowest_of(of_row, n, a.count);
    int64_t equal = a.count;  // of the bound itself, how many are kept
    if (low < kMost) equal -= at_least(of_row, n, low + 1);
    int64_t kept = 0;
    for (int64_t x = 0; x < n; ++x) {
      const Order order = of_row[x];
      of_row[kept] = order;
      keys[r * room + kept] = keys[r * room + x];
      const bool tied = order == low && equal > 0;
      equal -= tied;
      kept += order > low || tied;
    }
    sizes[r] = kept;
    bounds[r] = to_score(low);
    bounded[r] = Bounded::Above;
  }

  // The highest order first, of equal ones the lower key.
  static void sort(Order* order, int64_t* key, int64_t n) {
    while (n > 1) {
      const Order pivot = order[n / 2];
      const int64_t pivot_key = key[n / 2];
      auto before = [](Order x, int64_t x_key, Order y, int64_t y_key) {
        return x > y || (x == y && x_key < y_key);
      };
      int64_t i = 0, j = n - 1;
      while (i <= j) {
        while (before(order[i], key[i], pivot, pivot_key)) ++i;
        while (before(pivot, pivot_key, order[j], key[j])) --j;
        if (i > j) break;
        const Order other = order[i];
        const int64_t other_key = key[i];
        order[i] = order[j], key[i++] = key[j];
        order[j] = other, key[j--] = other_key;
      }
      // The smaller part in a call of its own: calls are never deep.
      if (j + 1 < n - i) {
        sort(order, key, j + 1);
        order += i, key += i, n -= i;
      } else {
        sort(order + i, key + i, n - i);
        n = j + 1;
      }
    }
  }
};

}  // namespace

const Kernel<Selection, Shape, Plan> SEQMEM_ISA::selection_kernel =
    Entry<SelectionRun, Types::All, Selection, Shape, Plan>::table;

}  // namespace seqmem::indexed_attention
