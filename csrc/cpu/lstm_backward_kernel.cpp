// LSTM backward over a whole sequence. Formulas: csrc/autograd/lstm.cpp.
//
//   prepare      dh, dc [B, ..] from grad_hy, grad_cy; packed weights, shared out by units
//   for each chunk of steps, from the last one:
//     for each step, from the last one:
//       1  dm = weight_hr^T (grad_output + dh)                       if projected
//       2  cell: dz (the gradient of the gates' pre-activations) and dc of the step before,
//          elementwise from the saved gates and cells               [row][vector of units][gate]
//       3  copies of x_t and h_{t-1} for the weights' sums
//       4  dh of the step before = dz W_hh, after a barrier if threads share units
//     sums       the weights' gradients += dz^T [x, h] of the chunk  lstm_backward_sums.h
//     input      grad_input = dz W_ih of the chunk                   lstm_backward_products.h
//   finish       dh, dc are the gradients of hx, cx
//
// The loop: lstm_backward_rows.h. A chunk's dz stays in L2 until both products of it are formed.
#include "lstm_backward_rows.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

template <class S>
class BackwardRun : KernelRun<Backward, Walk> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  BackwardRows<S> rows{*this, a, false};
  const int64_t units = rows.units, H_pad = rows.H_pad, P_pad = rows.P_pad;
  WeightSums<S>& sums = rows.sums;
  C *dm, *panel_hr;  // shared where projected: [B, H_pad], [units][P][lane]
  const C** dh_row;  // this thread's own

 public:
  using KernelRun<Backward, Walk>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    rows.place(take);
    dm = take.array<C>(s.projected ? s.B * H_pad : 0);
    panel_hr = take.array<C>(s.projected ? s.P * H_pad : 0);
    take.per_thread(thread, threads, [&] {
      rows.place_own(take);
      dh_row = take.array<const C*>(s.B);
    });
    return take.used();
  }

  void run() { rows.run(*this); }

  void prepare(int64_t u) {
    if (s.projected) pack_projection(u);
  }

  void differentiate(int64_t t, int64_t n, int64_t count) {
    if (s.projected) unproject(count, n);
    for (int64_t j = 0; j < count; ++j)  // along a row, as memory is fetched ahead
      for (int64_t u = rows.mine.begin; u < rows.mine.end; ++u) differentiate_cell(t, j, u, n);
  }

  void finish_chunk(int64_t, bool) {}

 private:
  void pack_projection(int64_t u) {
    const S* weight = static_cast<const S*>(a.weight_hr) + u * L;
    for (int64_t p = 0; p < s.P; ++p)
      store(panel_hr + (u * s.P + p) * L, load_n(weight + p * s.H, static_cast<int>(s.H - u * L)));
  }

  // dm = (grad_output + dh) weight_hr; the left factor is kept for weight_hr's gradient.
  void unproject(int64_t count, int64_t n) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = row(j);
      C* total = sums.dh_projected + (n + r) * sums.h_stride;
      for (int64_t i = 0; i < P_pad; i += L) store(total + i, rows.hidden_gradient(j, i / L));
      dh_row[j] = total;
    }
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      for (int64_t u = 0; u < units; ++u) {
        Vec<C> acc[R][1];
        start_sums(acc);
        tile_multiply<R, 1, C>(s.P, dh_row + start, 1, panel_hr + u * s.P * L, L, L, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) store(dm + row(start + r) * H_pad + u * L, acc[r][0]);
      }
    });
  }

  SEQMEM_INLINE void differentiate_cell(int64_t t, int64_t j, int64_t u, int64_t n) {
    const int64_t r = row(j), unit = u * L;
    const auto x = rows.gates_of(t, j, u);
    const Vec<C> squashed_cell = tanh<C>(
        load_n(static_cast<const S*>(a.cells) + rows.row_index[j] * s.H + unit, rows.lanes_of(u)));
    const Vec<C> d_hidden = s.projected ? load(dm + r * H_pad + unit) : rows.hidden_gradient(j, u);
    const Vec<C> d_cell =
        rows.cell_gradient(j, u) + d_hidden * x.o * (C(1) - squashed_cell * squashed_cell);
    Vec<C> z[4];
    rows.differentiate_gates(j, u, x, d_cell, d_hidden * squashed_cell, z);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) store(rows.dz.of(u, n + r) + g * L, z[g]);
    store(rows.dc + r * H_pad + unit, x.cut ? Vec<C>{} : d_cell * x.f);
    if (s.projected) store(sums.squashed + (n + r) * sums.m_stride + unit, x.o * squashed_cell);
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::lstm
