// The small output layer: products of a few rows, of which none is packed.
#include "ntm_output_kernel.h"

#include "../common/dot.h"

namespace seqmem::ntm {
namespace {

template <class C>
class ForwardRun {
 public:
  ForwardRun(const OutputShape& s, const OutputForward& a, int, int, SpinBarrier&) : s(s), a(a) {}
  int64_t place(char*) { return 0; }

  void run() {
    const C* bias = static_cast<const C*>(a.bias);
    C* to = static_cast<C*>(a.output);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t o = 0; o < s.outputs; ++o) to[r * s.outputs + o] = bias[o];
    dot(s.rows, s.outputs, s.features, static_cast<const C*>(a.input), s.features,
        static_cast<const C*>(a.weight), s.features, to, s.outputs, true);
  }

 private:
  const OutputShape& s;
  const OutputForward& a;
};

template <class C>
class BackwardRun {
 public:
  BackwardRun(const OutputShape& s, const OutputBackward& a, int, int, SpinBarrier&) : s(s), a(a) {}
  int64_t place(char*) { return 0; }

  void run() {
    const C* gradient = static_cast<const C*>(a.grad_output);
    if (a.grad_input != nullptr)
      multiply(s.rows, s.outputs, gradient, s.outputs, 1, a.weight, a.grad_input);
    if (a.grad_weight != nullptr)
      multiply(s.outputs, s.rows, gradient, 1, s.outputs, a.input, a.grad_weight);
    if (a.grad_bias == nullptr) return;
    for (int64_t o = 0; o < s.outputs; ++o) {
      C sum = 0;
      for (int64_t r = 0; r < s.rows; ++r) sum += gradient[r * s.outputs + o];
      static_cast<C*>(a.grad_bias)[o] = sum;
    }
  }

 private:
  const OutputShape& s;
  const OutputBackward& a;

  // to[i] = sum_k a[i * a_row + k * a_step] b[k], rows of all features. The last vector of a row
  // ends where it ends, and overlaps the one before.
  void multiply(int64_t rows, int64_t K, const C* a, int64_t a_row, int64_t a_step, const void* b,
                void* to) const {
    constexpr int L = kLanes<C>;
    for (int64_t next = 0; next < s.features; next += L) {
      const int64_t column = min<int64_t>(next, s.features - L);
      for_row_blocks<C>(rows, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const C* row[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) row[r] = a + (start + r) * a_row;
        Vec<C> sums[R][1];
        start_sums(sums);
        tile_multiply<R, 1, C>(K, row, a_step, static_cast<const C*>(b) + column, 0, s.features,
                               sums);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r)
          store(static_cast<C*>(to) + (start + r) * s.features + column, sums[r][0]);
      });
    }
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<OutputForward, OutputShape> output_forward_kernel =
    Entry<ForwardRun, Types::FloatAndDouble, OutputForward, OutputShape>::table;
const Kernel<OutputBackward, OutputShape> output_backward_kernel =
    Entry<BackwardRun, Types::FloatAndDouble, OutputBackward, OutputShape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::ntm
