// The keys of the highest scores. A task is a few queries of a head; for each 512 keys, packed into
// panels (which are kept for the head's next task where they are small),
//   pass 1  scores = (scale query) key^T
//   pass 2  by query, scores above the bound so far are candidates, as integers in their order, put
//           side by side a vector at a time. The first keys give a bound at once: of the maxima of
//           small groups of scores, so many times the chosen, one that enough of them reach. When
//           there is no room for more, the bound becomes the last one that would be chosen, which
//           is found by halving an interval, and the candidates below it are dropped
// and in the end
//   pass 3  by query: the chosen sorted, the best first
// Candidates are in the order of their keys: of equal scores the lower key comes first. NaN is
// above all.
#include <utility>

#include "../common/lane_sets.h"
#include "indexed_attention_rows.h"

namespace seqmem::indexed_attention {
namespace {

constexpr int64_t kKeys = 512, kWord = 64;  // scores that are compared at once
constexpr int64_t kRoom = 4, kGroups = 2;   // room, and groups, for so many times the chosen
// Packed keys of a head are kept for its next task if they are at most so many bytes.
constexpr int64_t kKeptBytes = 1 << 20;
constexpr int64_t kRanked = 256;  // up to so many are sorted by counting, for each, those before it

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
  const bool keeps_panels = padded<C>(s.Tk) * s.D * int64_t(sizeof(C)) <= kKeptBytes;
  int64_t packed_head = -1, packed = 0;  // whose keys are packed, and how many

  C *panels, *queries, *scores;
  Order* maxima;         // of groups of scores
  Order *orders, *keys;  // of candidates [kQueriesOfTask, room]
  int64_t sizes[kQueriesOfTask];
  C bounds[kQueriesOfTask];    // what a candidate is not below; NaN before the first
  bool above[kQueriesOfTask];  // once the bound's equals would be too many: it is above

 public:
  using KernelRun<Selection, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      panels = take.array<C>(padded<C>(keeps_panels ? s.Tk : min(kKeys, s.Tk)) * s.D);
      queries = take.array<C>(kQueriesOfTask * D_pad);
      scores = take.array<C>(kQueriesOfTask * stride);
      maxima = take.array<Order>(kKeys);
      orders = take.array<Order>(kQueriesOfTask * room);
      keys = take.array<Order>(kQueriesOfTask * room);
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
      bounds[r] = static_cast<C>(__builtin_nan(""));
      above[r] = false;
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
      const C* here = packed_keys(task.b, head, j, t.columns);
      multiply_lanes(t, s.D, queries, D_pad, here, t.columns, scores, stride);
      for (int64_t r = 0; r < t.rows; ++r) collect(r, scores + r * stride, t.hi[r], j);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      if (sizes[r] > a.count) drop(r);
      int64_t* to = a.index + ((task.b * s.Hq + task.h) * s.Tq + task.first + r) * a.count;
      leave_sorted(orders + r * room, keys + r * room, sizes[r], to);
      for (int64_t n = sizes[r]; n < a.count; ++n) to[n] = -1;
    }
  }

  const C* packed_keys(int64_t b, int64_t head, int64_t first, int64_t count) {
    if (packed_head != b * s.Hk + head || !keeps_panels) packed = 0;
    packed_head = b * s.Hk + head;
    C* here = panels + (keeps_panels ? first * s.D : 0);
    if (first + count > packed || !keeps_panels) {
      pack_lanes<S>(here, rows_of<S>(a.k, b, head, first, 1), count, s.D);
      packed = first + count;
    }
    return here;
  }

  static IntVec<C> to_orders(Vec<C> score) {
    const IntVec<C> bits = (IntVec<C>)(score + C(0));  // -0 is 0
    const IntVec<C> order = bits ^ ((bits >> kSign) & kMost);
    return score != score ? (IntVec<C>{} + kMost) : order;
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
    if (bounds[r] != bounds[r]) bound_by_groups(r, row, n);
    int64_t x = 0;
    for (; x + kWord <= n; x += kWord) take_word<true>(r, row + x, kWord, first + x);
    if (x < n) take_word<false>(r, row + x, n - x, first + x);
  }

  // Of n scores, whose keys are `first` and on, those that are not below the bound.
  template <bool whole>
  SEQMEM_INLINE void take_word(int64_t r, const C* row, int64_t n, int64_t first) {
    constexpr int kVectors = kWord / L;
    const Vec<C> bound = splat(bounds[r]);
    const IntVec<C> ties = IntVec<C>{} - static_cast<Order>(above[r]);
    LaneSet found[kVectors], any = 0;
    SEQMEM_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      found[v] = 0;
      if (!whole && v * L >= n) continue;
      const Vec<C> score = load(row + v * L);
      const IntVec<C> out = (score < bound) | ((score == bound) & ties);
      found[v] = first_lanes_set<C>(whole ? L : n - v * L) & ~lanes_set<C>(out);
      any |= found[v];
    }
    if (any == 0) return;
    int64_t size = sizes[r];
    SEQMEM_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!whole && v * L >= n) continue;
      const IntVec<C> key = lane_numbers<C>() + static_cast<Order>(first + v * L);
      put_lanes<C>(orders + r * room + size, to_orders(load(row + v * L)), found[v]);
      put_lanes<C>(keys + r * room + size, key, found[v]);
      size += __builtin_popcount(found[v]);
    }
    sizes[r] = size;
    if (size > room - kWord - L) drop(r);
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
  }

  static int64_t at_least(const Order* from, int64_t n, Order low) {
    int64_t total = 0;
    for (int64_t x = 0; x < n; x += L)
      total += __builtin_popcount(lanes_set<C>(load_orders(from + x) >= low));
    return total;
  }

  // A bound that `count` or more reach: at most `most`, unless equal ones are more. Whole vectors
  // are read; lanes beyond n hold kLeast.
  Order lowest_of(const Order* from, int64_t n, int64_t most) const {
    IntVec<C> least = IntVec<C>{} + kMost, greatest = IntVec<C>{} + kLeast;
    for (int64_t x = 0; x < n; x += L) {
      const IntVec<C> here = load_orders(from + x);
      const IntVec<C> counts = lane_numbers<C>() < static_cast<Order>(n - x);
      least = (counts & (here < least)) ? here : least;
      greatest = here > greatest ? here : greatest;
    }
    Order low = kMost, high = kLeast;
    for (int l = 0; l < L; ++l)
      low = min<Order>(low, least[l]), high = max<Order>(high, greatest[l]);
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
    Order* of_keys = keys + r * room;
    int64_t kept = 0;
    for (int64_t x = 0; x < n; x += L) {
      const IntVec<C> order = load_orders(of_row + x), key = load_orders(of_keys + x);
      LaneSet tied = lanes_set<C>(order == low);
      while (__builtin_popcount(tied) > equal) tied &= ~(LaneSet(1) << (31 - __builtin_clz(tied)));
      equal -= __builtin_popcount(tied);
      const LaneSet stays = lanes_set<C>(order > low) | tied;
      put_lanes<C>(of_row + kept, order, stays);
      put_lanes<C>(of_keys + kept, key, stays);
      kept += __builtin_popcount(stays);
    }
    sizes[r] = kept;
    bounds[r] = to_score(low);
    above[r] = true;
  }

  // The keys, that of the highest order first, of equal ones the lower key.
  void leave_sorted(Order* order, Order* key, int64_t n, int64_t* to) const {
    if (n > kRanked) {
      sort(order, key, n);
      for (int64_t i = 0; i < n; ++i) to[i] = key[i];
      return;
    }
    for (int64_t x = n; x < padded<C>(n); ++x) order[x] = kLeast;
    for (int64_t i = 0; i < n; ++i) {
      int64_t before = 0;  // candidates are in the order of their keys
      for (int64_t x = 0; x < n; x += L) {
        const IntVec<C> other = load_orders(order + x);
        const LaneSet equal = lanes_set<C>(other == order[i]) & first_lanes_set<C>(i - x);
        before += __builtin_popcount(lanes_set<C>(other > order[i]) | equal);
      }
      to[before] = key[i];
    }
  }

  static void sort(Order* order, Order* key, int64_t n) {
    while (n > 1) {
      const Order pivot = order[n / 2];
      const Order pivot_key = key[n / 2];
      auto before = [](Order x, Order x_key, Order y, Order y_key) {
        return x > y || (x == y && x_key < y_key);
      };
      int64_t i = 0, j = n - 1;
      while (i <= j) {
        while (before(order[i], key[i], pivot, pivot_key)) ++i;
        while (before(pivot, pivot_key, order[j], key[j])) --j;
        if (i > j) break;
        std::swap(order[i], order[j]);
        std::swap(key[i++], key[j--]);
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
