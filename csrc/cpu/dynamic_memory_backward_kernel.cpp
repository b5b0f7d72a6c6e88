// Dynamic memory, backward. Formulas: csrc/autograd/dynamic_memory.cpp.
//
//   pack     panels of the weights and of a shared memory; A after the last hop
//   phase 1  the final memory's gradient, by slots: only where rows share the memory
//   phase 2  the hops in reverse, by blocks of rows; own memories' gradients of phase 1 and 3
//   phase 3  sums over rows and hops, by slots of a shared memory and by units of the networks
//
// With a barrier after each, since what is shared out changes. One header for each phase.
#include "dynamic_memory_backward_sums.h"

namespace seqmem::dynamic_memory {
namespace {

template <class S>
class BackwardRun {
  using C = compute_t<S>;

  const Shape& s;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;
  FinalGradient<S> last;
  HopRecords<C> records;
  HopGradients<S> hops;
  DeferredSums<S> sums;

 public:
  BackwardRun(const Shape& s, const Backward& a, int thread, int threads, SpinBarrier& barrier)
      : s(s),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        last(s, a),
        records(s),
        hops(s, a, last, records, threads),
        sums(s, a, last, records) {}

  int64_t place(char* base) {
    Carver take(base);
    records.place(take, s);
    last.place(take, thread, threads);
    hops.place(take, thread, threads);
    sums.place(take, thread, threads);
    return take.used();
  }

  void run() {
    hops.pack(thread, threads);
    const Share mine = share(s.B, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      load_row(records.query + b * records.query_stride, static_cast<const S*>(a.query) + b * s.h,
               s.h);
      last.prepare(b);
    }
    barrier.wait();
    if (s.shared && last.given()) {
      last.run(thread, threads);
      barrier.wait();
    }
    for (int64_t first = mine.begin; first < mine.end; first += hops.block) {
      const int64_t rows = min(hops.block, mine.end - first);
      hops.run(first, rows);
      if (s.shared || a.grad_memory == nullptr) continue;
      for (int64_t r = 0; r < rows; ++r) sums.own_memory(first + r);
    }
    barrier.wait();
    if (s.shared && a.grad_memory != nullptr) sums.shared_memory(thread, threads);
    if (a.grad_gate_weight != nullptr) sums.weights(thread, threads);
  }
};

}  // namespace

const Kernel<Backward, Shape> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape>::table;

}  // namespace seqmem::dynamic_memory
