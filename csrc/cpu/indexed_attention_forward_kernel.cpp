// Indexed attention forward. For each query, whose list names n keys
//   pass 1  scores = (scale query) . key, eight keys at once
//   pass 2  scores -> e^(score - highest), their sum; another normaliser takes them to weights
//   pass 3  weights = scores / sum, zero where the list names none
//   pass 4  output = sum of weight value
#include "indexed_attention_rows.h"

namespace seqmem::indexed_attention {
namespace {

template <class S>
class ForwardRun : KernelRun<Forward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);

  Named<S> keys, values;
  C *query, *scores, *out;
  char* line_buffer;

 public:
  using KernelRun<Forward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      keys.place(take, s.C);
      values.place(take, s.C);
      query = take.array<C>(D_pad);
      scores = take.array<C>(padded<C>(s.C) + kAtOnce);
      out = take.array<C>(Dv_pad);
      line_buffer = take.array<char>(s.alpha == 1 ? 0 : line_bytes(s.C));
    });
    return take.used();
  }

  void run() {
    Task task;
    while (take_task(s, plan.next[0], s.Hq, s.Tq, task))
      for (int64_t i = task.first; i < task.first + task.rows; ++i) run_row(task.b, task.h, i);
  }

 private:
  void run_row(int64_t b, int64_t h, int64_t i) {
    const int64_t head = h / (s.Hq / s.Hk), row = (b * s.Hq + h) * s.Tq + i;
    const int64_t* list = a.index + (list_of(s, b, h) * s.Tq + i) * s.C;
    keys.set(s, list, a.k, b, head);
    values.set(s, list, a.v, b, head);
    const int64_t n = keys.count;
    copy_row<S>(query, row_at<S>(a.q, b, h, i), 1, s.D, C(s.scale));
    if (n > 0) dots<S>(scores, n, query, keys.rows, s.D);
    normalise(n);
    if (s.dropout.p > 0)
      drop(scores, 0, n, s.dropout, key_of(s.dropout, row),
           [places = keys.places](int64_t x) { return places[x]; });
    if (a.weights != nullptr) {
      S* to = static_cast<S*>(a.weights) + row * s.C;
      if (n < s.C) __builtin_memset(to, 0, s.C * sizeof(S));
      if (n == s.C) {
        store_row(to, scores, n);
      } else {
        for (int64_t x = 0; x < n; ++x) store_n(to + keys.places[x], splat(scores[x]), 1);
      }
    }
    if (s.dropout.p > 0) meet_values(scores, 0, n, s.dropout);
    __builtin_memset(out, 0, Dv_pad * sizeof(C));
    add_rows<S>(out, n, scores, values.rows, s.Dv);
    store_row(static_cast<S*>(a.output) + row * s.Dv, out, s.Dv);
  }

  void normalise(int64_t n) {
    if (n == 0) return;
    if (s.alpha != 1) {
      entmax_row(scores, n, s.alpha, line_buffer, s.C);
      return;
    }
    const Span all = close_range(scores, 0, n, -kInfinity<C>);
    const C inverse = C(1) / exponentials<C>(scores, all.end, highest(scores, all));
    for (int64_t x = 0; x < n; x += L) store(scores + x, inverse * load(scores + x));
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::indexed_attention
