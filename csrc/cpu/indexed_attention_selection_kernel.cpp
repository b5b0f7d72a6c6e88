// The keys of the highest scores. A task is a few queries of a head; for each 512 keys, packed into
// panels,
//   pass 1  scores = (scale query) key^T
//   pass 2  scores -> integers in their order; by query, those above the bound so far are
//           candidates. When there is no room for more, the bound becomes the last one that would
//           be chosen, which is found by halving an interval, and the candidates below it are
//           dropped; the first keys give a bound at once
// and in the end
//   pass 3  by query: the chosen sorted, the best first
// Candidates are in the order of their keys: of equal scores the lower key comes first. NaN is
// above all.
#include "indexed_attention_rows.h"

namespace seqmem::indexed_attention {
namespace {

constexpr int64_t kKeys = 512, kRoom = 4;  // room for so many times the chosen

template <class S>
class SelectionRun {
  using C = compute_t<S>;
  using Order = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  static constexpr int L = kLanes<C>;
  static constexpr int kSign = sizeof(C) * 8 - 1;
  static constexpr Order kMost = Order(~(uint64_t(1) << kSign)), kLeast = -kMost - 1;
  static_assert(kQueriesOfTask <= kMaxRows);

  const Shape& s;
  const Plan& plan;
  const Selection& a;
  const int thread, threads;
  const int64_t D_pad, stride, room;

  C *panels, *queries, *scores;
  Order *line, *orders;  // of a row of scores; of candidates [kQueriesOfTask, room]
  int64_t* keys;
  int64_t sizes[kQueriesOfTask];
  Order bounds[kQueriesOfTask];

 public:
  SelectionRun(const Shape& s, const Plan& plan, const Selection& a, int thread, int threads,
               SpinBarrier&)
      : s(s),
        plan(plan),
        a(a),
        thread(thread),
        threads(threads),
        D_pad(padded<C>(s.D)),
        stride(score_stride<C>(min(kKeys, s.Tk))),
        room(padded<C>(kRoom * a.count) + 2 * L) {}

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      panels = take.array<C>(padded<C>(min(kKeys, s.Tk)) * s.D);
      queries = take.array<C>(kQueriesOfTask * D_pad);
      scores = take.array<C>(kQueriesOfTask * stride);
      line = take.array<Order>(kKeys);
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
      bounds[r] = kLeast;
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

  // line = the row's scores as integers in their order; below all beyond n.
  void to_orders(const C* row, int64_t n) {
    for (int64_t x = 0; x < n; x += L) {
      const Vec<C> score = load(row + x) + C(0);  // -0 is 0
      const IntVec<C> bits = (IntVec<C>)score;
      IntVec<C> order = bits ^ ((bits >> kSign) & kMost);
      order = score != score ? (IntVec<C>{} + kMost) : order;
      __builtin_memcpy(line + x, &order, sizeof order);
    }
    for (int64_t x = n; x < padded<C>(n); ++x) line[x] = kLeast;
  }

  static IntVec<C> load_orders(const Order* from) {
    IntVec<C> here;
    __builtin_memcpy(&here, from, sizeof here);
    return here;
  }

  void collect(int64_t r, const C* row, int64_t n, int64_t first) {
    to_orders(row, n);
    if (bounds[r] == kLeast && n >= 2 * kRoom * a.count)
      bounds[r] = lowest_of(line, n, 2 * a.count) - 1;
    Order* of_row = orders + r * room;
    for (int64_t x = 0; x < n; x += L) {
      if (!entmax::any<C>(load_orders(line + x) > bounds[r])) continue;
      int64_t size = sizes[r];
      for (int64_t y = x; y < x + L; ++y) {
        of_row[size] = line[y];
        keys[r * room + size] = first + y;
        size += line[y] > bounds[r];
      }
      sizes[r] = size;
      if (size > room - 2 * L) drop(r);
    }
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
    bounds[r] = low;
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
