// Entmax: rows shared out to the threads; what is done for each: common/entmax_rows.h.
#include "entmax_kernel.h"

#include "../common/entmax_rows.h"

namespace seqmem::entmax {
namespace {

template <class S, class Arguments>
class Run {
 public:
  Run(const Shape& s, const Arguments& a, int thread, int threads, SpinBarrier&)
      : s(s), a(a), thread(thread), threads(threads) {}

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] { buffer = take.array<char>(2 * bytes()); });
    return take.used();
  }

  void run() {
    with_kind(a.alpha, s.alpha, [&](auto kind) { rows<kind>(); });
  }

 private:
  const Shape& s;
  const Arguments& a;
  const int thread, threads;
  char* buffer = nullptr;

  // Of one padded row, in the widest type that it may be computed in.
  int64_t bytes() const { return ceil_div(s.K, 64) * 64 * int64_t(sizeof(double)); }

  template <Kind kind>
  void rows() {
    Rows<S, kind> work(s.K, buffer, bytes());
    Rows<S, Kind::Any, double> steep(s.K, buffer, bytes());
    const Share mine = share(s.rows, thread, threads);
    bool of_alpha = false;
    if constexpr (std::is_same_v<Arguments, Backward>) of_alpha = a.grad_alpha != nullptr;
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const double alpha = a.alpha != nullptr ? a.alpha[row] : s.alpha;
      auto at = [&](auto* all) { return all == nullptr ? nullptr : all + row * s.K; };
      auto run_on = [&](auto& rows) {
        if constexpr (std::is_same_v<Arguments, Forward>) {
          rows.forward(at(static_cast<const S*>(a.input)), at(static_cast<S*>(a.output)), alpha);
        } else {
          rows.backward(at(static_cast<const S*>(a.grad_output)),
                        at(static_cast<const S*>(a.input)), at(static_cast<const S*>(a.output)),
                        at(static_cast<S*>(a.grad_input)),
                        a.grad_alpha == nullptr ? nullptr : a.grad_alpha + row, alpha);
        }
      };
      if (kind == Kind::Any && (alpha < kSteep || of_alpha)) {
        run_on(steep);
      } else {
        run_on(work);
      }
    }
  }
};

template <class S>
using ForwardRun = Run<S, Forward>;
template <class S>
using BackwardRun = Run<S, Backward>;

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = Entry<ForwardRun, Types::All, Forward, Shape>::table;
const Kernel<Backward, Shape> backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::entmax
