// The parameters' gradients of a machine. For a chunk of steps, the gradients of
// pre-activations dz and the operands are kept, [steps B, width]; then
//   dW[outputs, K] += dz^T operands
// by all threads at once, each its own rows of every weight (OuterProducts). A one behind each
// operand gives the bias' gradient.
#pragma once

#include "machine_layout.h"

namespace seqmem::machine {
namespace {

template <class C, class Shape, class Backward, class Outer>
class WeightGradients {
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kChunkBytes = 8 << 20;

  const Shape& s;
  const Backward& a;
  const Layout<C, Shape>& layout;
  const int thread, threads;
  Outer outer;

 public:
  const int64_t chunk;  // steps
  const bool wanted;

  WeightGradients(const Shape& s, const Backward& a, const Layout<C, Shape>& layout, int thread,
                  int threads)
      : s(s),
        a(a),
        layout(layout),
        thread(thread),
        threads(threads),
        outer(max(s.C, max(layout.K(0), layout.K(1))) + 1),
        chunk(steps_at_once()),
        wanted(a.grad_controller != nullptr) {}

  void place_shared(Carver& take) {
    sums = take.array<C>(sums_offset(s.layers));
    sums_head = take.array<C>(s.P * layout.C_pad);
    dz = take.array<C>(s.layers * chunk * s.B * layout.gates_stride());
    operands = take.array<C>(operands_offset(s.layers));
    dp = take.array<C>(chunk * s.B * layout.P_pad);
    tops = take.array<C>(chunk * s.B * layout.C_pad);
  }
  void place_own(Carver& take) { outer.place(take); }

  // Rows of a chunk's buffers: what step t of row b leaves there.
  C* dz_of(int64_t l, int64_t t, int64_t b) const {
    return dz + (l * chunk * s.B + row_index(t, b)) * layout.gates_stride();
  }
  C* dp_of(int64_t t, int64_t b) const { return dp + row_index(t, b) * layout.P_pad; }

  // A row's operand of layer l; `hidden` and what is read only where there are such.
  void keep_operand(int64_t l, int64_t t, int64_t b, const C* hidden, const C* below,
                    const C* reads) const {
    C* to = operand_of(l, t, b);
    if (l > 0) {
      copy(hidden, to, layout.recurrent());
      copy(below, to + layout.recurrent(), s.C);
    } else {
      copy(below, to, s.I);
      copy(reads, to + s.I, layout.R);
      copy(hidden, to + layout.below(0), layout.recurrent());
    }
    close(to, layout.K(l));
  }
  void keep_top(int64_t t, int64_t b, const C* from) const {
    C* to = tops + row_index(t, b) * layout.C_pad;
    copy(from, to, s.C);
    close(to, s.C);
  }
  // A row that has ended has no gradients in this step.
  void keep_nothing(int64_t t, int64_t b) const {
    for (int64_t l = 0; l < s.layers; ++l) {
      zero(dz_of(l, t, b), layout.gates());
      zero(operand_of(l, t, b), layout.operand(l));
    }
    zero(dp_of(t, b), s.P);
    zero(tops + row_index(t, b) * layout.C_pad, layout.C_pad);
  }

  void clear() const {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(layout.gates(), thread, threads);
      zero(sums + sums_offset(l) + mine.begin * layout.operand(l),
           (mine.end - mine.begin) * layout.operand(l));
    }
    const Share mine = share(s.P, thread, threads);
    zero(sums_head + mine.begin * layout.C_pad, (mine.end - mine.begin) * layout.C_pad);
  }

  // The first n rows of the chunk's buffers.
  void add(int64_t n) const {
    const Share gates = share(layout.gates(), thread, threads);
    for (int64_t l = 0; l < s.layers; ++l)
      outer.add(n, dz + l * chunk * s.B * layout.gates_stride(), layout.gates_stride(), gates,
                operands + operands_offset(l), layout.operand(l), ceil_div(layout.K(l) + 1, L),
                sums + sums_offset(l));
    outer.add(n, dp, layout.P_pad, share(s.P, thread, threads), tops, layout.C_pad,
              ceil_div(s.C + 1, L), sums_head);
  }

  void store() const {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(layout.gates(), thread, threads);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        const C* from = sums + sums_offset(l) + j * layout.operand(l);
        copy(from + layout.below_offset(l), out(layout.weight_ih(l)) + j * layout.below(l),
             layout.below(l));
        out(layout.bias(l))[j] = from[layout.K(l)];
        if (!s.lstm) continue;
        copy(from + layout.hidden_offset(l), out(layout.weight_hh(l)) + j * s.C, s.C);
        out(layout.bias(l) + 1)[j] = from[layout.K(l)];
      }
    }
    const Share mine = share(s.P, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      copy<C>(sums_head + j * layout.C_pad, static_cast<C*>(a.grad_head_weight) + j * s.C, s.C);
      static_cast<C*>(a.grad_head_bias)[j] = sums_head[j * layout.C_pad + s.C];
    }
  }

 private:
  C *sums, *sums_head;           // [gates or P][operand], the bias behind each row
  C *dz, *operands, *dp, *tops;  // of a chunk

  // Whole segments, so many that a chunk's buffers stay in the last-level cache.
  int64_t steps_at_once() const {
    int64_t step =
        layout.P_pad + layout.C_pad + layout.operand(0) + (s.layers - 1) * layout.operand(1);
    step = (step + s.layers * layout.gates_stride()) * max<int64_t>(s.B, 1) * sizeof(C);
    const int64_t segments = max<int64_t>(1, kChunkBytes / step / s.segment);
    return min(segments, max<int64_t>(1, ceil_div(s.T, s.segment))) * s.segment;
  }
  int64_t row_index(int64_t t, int64_t b) const { return t % chunk * s.B + b; }
  int64_t sums_offset(int64_t l) const {
    return layout.layer(l, layout.gates() * layout.operand(0), layout.gates() * layout.operand(1));
  }
  int64_t operands_offset(int64_t l) const {
    return layout.layer(l, chunk * s.B * layout.operand(0), chunk * s.B * layout.operand(1));
  }
  C* operand_of(int64_t l, int64_t t, int64_t b) const {
    return operands + operands_offset(l) + row_index(t, b) * layout.operand(l);
  }
  C* out(int64_t i) const { return static_cast<C*>(a.grad_controller[i]); }

  // A one behind an operand, whose gradient is the bias', and zeros up to a whole vector.
  static void close(C* operand, int64_t n) {
    operand[n] = 1;
    for (int64_t i = n + 1; i % L != 0; ++i) operand[i] = 0;
  }
};

}  // namespace
}  // namespace seqmem::machine
