// Indexed attention forward, for a few queries at once, so that the short passes over one do not
// wait for each other. For each query, whose list names n keys
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
  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);

  const int64_t line = padded<C>(s.C) + kAtOnce;  // scores of a query
  const int64_t batch = batch_of(s);

  Named<S> named[kMost];
  C *query, *scores, *out;
  char* line_buffer;

 public:
  using KernelRun<Forward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      for (int64_t r = 0; r < batch; ++r) named[r].place(take, s.C);
      query = take.array<C>(D_pad);
      scores = take.array<C>(batch * line);
      out = take.array<C>(Dv_pad);
      line_buffer = take.array<char>(s.alpha == 1 ? 0 : line_bytes(s.C));
    });
    return take.used();
  }

  void run() {
    Task task;
    while (take_task(s, plan.next[0], s.Hq, s.Tq, task))
      for (int64_t r = 0; r < task.rows; r += batch)
        run_batch(task.b, task.h, task.first + r, min(batch, task.rows - r));
  }

 private:
  void run_batch(int64_t b, int64_t h, int64_t first, int64_t rows) {
    const int64_t head = h / (s.Hq / s.Hk), row = (b * s.Hq + h) * s.Tq + first;
    const int64_t* list = a.index + (list_of(s, b, h) * s.Tq + first) * s.C;
    for (int64_t r = 0; r < rows; ++r) {
      named[r].set(s, list + r * s.C, a, b, head);
      if (named[r].count == 0) continue;
      copy_row<S>(query, row_at<S>(a.q, b, h, first + r), 1, s.D, C(s.scale));
      dots<S>(scores + r * line, named[r].count, query, named[r].keys, s.D);
    }
    for (int64_t r = 0; r < rows; ++r) normalise(scores + r * line, named[r].count);
    for (int64_t r = 0; r < rows; ++r) write_row(row + r, named[r], scores + r * line);
  }

  void write_row(int64_t row, const Named<S>& keys, C* weights) {
    const int64_t n = keys.count;
    if (s.dropout.p > 0)
      drop(weights, 0, n, s.dropout, key_of(s.dropout, row),
           [places = keys.places](int64_t x) { return places[x]; });
    if (a.weights != nullptr) {
      S* to = static_cast<S*>(a.weights) + row * s.C;
      if (n < s.C) __builtin_memset(to, 0, s.C * sizeof(S));
      if (n == s.C) {
        store_row(to, weights, n);
      } else {
        for (int64_t x = 0; x < n; ++x) store_n(to + keys.places[x], splat(weights[x]), 1);
      }
    }
    if (s.dropout.p > 0) meet_values(weights, 0, n, s.dropout);
    clear_outside(out, 0, 0, Dv_pad);
    add_rows<S>(out, n, weights, keys.values, s.Dv);
    store_row(static_cast<S*>(a.output) + row * s.Dv, out, s.Dv);
  }

  void normalise(C* scores, int64_t n) {
    if (s.alpha != 1) {
      entmax_row(scores, n, s.alpha, line_buffer, s.C);
    } else if (n > 0) {
      softmax_row(scores, n);
    }
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::indexed_attention
