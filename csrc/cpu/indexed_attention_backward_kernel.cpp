// Indexed attention backward. With P the weights, dP = dO . value + dW, dS = P (dP - sum(dP P))
// (entmax: S = P^(2 - alpha) for P and the mean of dP by S for the sum, in dS alone):
//   dquery = scale sum of dS key,  dkey = scale sum of dS query,  dvalue = sum of P dO.
//   pass 1  by lists: the places of each list in the order of their keys, by counting
//   pass 2  by queries, a few at once: dP, dS, which is kept, dquery
//   pass 3  by keys: dkey and dvalue, in the order of heads, queries and places; so that no sum
//           depends on the threads
#include "indexed_attention_rows.h"

namespace seqmem::indexed_attention {
namespace {

constexpr int64_t kGathered = 64;  // rows of a sum whose addresses are found at once

template <class S>
class BackwardRun : KernelRun<Backward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;

  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  const bool has_output = a.grad_output.data != nullptr;  // whether dO is there

  const int64_t line = padded<C>(s.C) + kAtOnce;  // weights of a query
  const int64_t batch = batch_of(s);

  Named<S> named[kMost];
  C *grad, *weights, *slopes, *out, *dvalue;

 public:
  using KernelRun<Backward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      for (int64_t r = 0; r < batch; ++r) named[r].place(take, s.C);
      grad = take.array<C>(Dv_pad);
      weights = take.array<C>(batch * line);
      slopes = take.array<C>(batch * line);
      out = take.array<C>(D_pad);
      dvalue = take.array<C>(Dv_pad);
    });
    return take.used();
  }

  void run() {
    const bool by_keys = a.grad_k != nullptr || a.grad_v != nullptr;
    if (by_keys) {
      int64_t list;
      while ((list = __atomic_fetch_add(&plan.next[1], 1, __ATOMIC_RELAXED)) < s.lists) sort(list);
    }
    Task task;
    if (a.grad_q != nullptr || a.grad_k != nullptr)
      while (take_task(s, plan.next[0], s.Hq, s.Tq, task))
        for (int64_t r = 0; r < task.rows; r += batch)
          run_batch(task.b, task.h, task.first + r, min(batch, task.rows - r));
    if (!by_keys) return;
    barrier.wait();
    while (take_task(s, plan.next[2], s.Hk, s.Tk, task))
      for (int64_t j = task.first; j < task.first + task.rows; ++j) run_key(task.b, task.h, j);
  }

 private:
  void sort(int64_t list) {
    const int64_t* index = a.index + list * s.Tq * s.C;
    int64_t *places = a.places + list * s.Tq * s.C, *begins = a.begins + list * (s.Tk + 1);
    __builtin_memset(begins, 0, (s.Tk + 1) * sizeof(int64_t));
    for (int64_t n = 0; n < s.Tq * s.C; ++n)
      if (index[n] >= 0) ++begins[index[n] + 1];
    for (int64_t j = 0; j < s.Tk; ++j) begins[j + 1] += begins[j];
    for (int64_t n = 0; n < s.Tq * s.C; ++n)
      if (index[n] >= 0) places[begins[index[n]]++] = n;
    // Each begin is now where the next one was.
    for (int64_t j = s.Tk; j > 0; --j) begins[j] = begins[j - 1];
    begins[0] = 0;
  }

  void run_batch(int64_t b, int64_t h, int64_t first, int64_t rows) {
    const int64_t head = h / (s.Hq / s.Hk), row = (b * s.Hq + h) * s.Tq + first;
    const int64_t* list = a.index + (list_of(s, b, h) * s.Tq + first) * s.C;
    for (int64_t r = 0; r < rows; ++r) {
      named[r].set(s, list + r * s.C, a, b, head);
      const int64_t n = named[r].count;
      read_places(weights + r * line, a.weights, row + r, named[r]);
      if (has_output && n > 0) {
        copy_row<S>(grad, row_at<S>(a.grad_output, b, h, first + r), 1, s.Dv, C(1));
        dots<S>(slopes + r * line, n, grad, named[r].values, s.Dv);
      } else {
        clear_outside(slopes + r * line, 0, 0, n);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      find_slopes(row + r, named[r], slopes + r * line, weights + r * line);
    if (a.grad_q == nullptr) return;
    for (int64_t r = 0; r < rows; ++r) {
      clear_outside(out, 0, 0, D_pad);
      add_rows<S>(out, named[r].count, slopes + r * line, named[r].keys, s.D);
      store_scaled(static_cast<S*>(a.grad_q) + (row + r) * s.D, out, s.D, C(s.scale));
    }
  }

  // Of a row of [.., C], what belongs to its keys.
  void read_places(C* to, const void* from, int64_t row, const Named<S>& keys) {
    const S* all = static_cast<const S*>(from) + row * s.C;
    for (int64_t x = 0; x < keys.count; ++x) to[x] = widen_one(all[keys.places[x]]);
  }

  // slope: dO . value -> dS
  void find_slopes(int64_t row, const Named<S>& keys, C* slope, C* weight) {
    const int64_t n = keys.count;
    const S* given = static_cast<const S*>(a.grad_weights);
    if (s.dropout.p > 0) meet_gradients(slope, weight, 0, n, s.dropout);
    if (given != nullptr)
      for (int64_t x = 0; x < n; ++x) slope[x] += widen_one(given[row * s.C + keys.places[x]]);
    if (s.dropout.p > 0) take_signs(slope, weight, 0, n);
    close_range(slope, 0, n, C(0));
    close_range(weight, 0, n, C(0));
    const C total = s.alpha == 1 ? C(1) : to_slopes(weight, 0, n, s.alpha);
    const C mean = total == 0 ? C(0) : dot_of(slope, weight, 0, n) / total;
    scale_slopes(slope, weight, 0, n, mean, n);
    if (a.grad_k != nullptr)
      for (int64_t x = 0; x < n; ++x)
        static_cast<C*>(a.slopes)[row * s.C + keys.places[x]] = slope[x];
  }

  void run_key(int64_t b, int64_t head, int64_t j) {
    const int64_t group = s.Hq / s.Hk, row = (b * s.Hk + head) * s.Tk + j;
    const double inverse = 1.0 / double(s.C);
    clear_outside(out, 0, 0, D_pad);
    clear_outside(dvalue, 0, 0, Dv_pad);
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
      const int64_t list = list_of(s, b, h), base = (b * s.Hq + h) * s.Tq * s.C;
      const int64_t* begins = a.begins + list * (s.Tk + 1) + j;
      for (int64_t n = begins[0]; n < begins[1]; n += kGathered) {
        const int64_t count = min(kGathered, begins[1] - n);
        const int64_t* places = a.places + list * s.Tq * s.C + n;
        const S *queries[kGathered], *grads[kGathered];
        C of_query[kGathered], of_grad[kGathered];
        for (int64_t x = 0; x < count; ++x) {
          const int64_t i = static_cast<int64_t>((double(places[x]) + 0.5) * inverse);
          queries[x] = row_at<S>(a.q, b, h, i);
          if (a.grad_k != nullptr) of_query[x] = static_cast<const C*>(a.slopes)[base + places[x]];
          if (!has_output) continue;
          grads[x] = row_at<S>(a.grad_output, b, h, i);
          of_grad[x] = widen_one(static_cast<const S*>(a.weights)[base + places[x]]);
        }
        if (a.grad_k != nullptr) add_rows<S>(out, count, of_query, queries, s.D);
        if (s.dropout.p > 0 && has_output) meet_values(of_grad, 0, count, s.dropout);
        if (a.grad_v != nullptr && has_output) add_rows<S>(dvalue, count, of_grad, grads, s.Dv);
      }
    }
    if (a.grad_k != nullptr) {
      store_scaled(static_cast<S*>(a.grad_k) + row * s.D, out, s.D, C(s.scale));
    }
    if (a.grad_v != nullptr) store_row(static_cast<S*>(a.grad_v) + row * s.Dv, dvalue, s.Dv);
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::indexed_attention
