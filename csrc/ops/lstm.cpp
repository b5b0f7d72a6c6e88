// LSTM ops: schemas, the CPU and Meta keys. Arguments are described in seqmem_fast/ops/lstm.py.
#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/lstm_kernel.h"
#include "lstm_check.h"

namespace seqmem::lstm {

void check_lengths(const Tensor& lengths, int64_t T) {
  const Tensor values = lengths.cpu().to(at::kLong).contiguous();
  const int64_t* length = values.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < values.numel(); ++b)
    TORCH_CHECK_VALUE(0 <= length[b] && length[b] <= T, "seqmem::lstm: expected lengths in 0..", T,
                      ", got ", length[b], " for batch row ", b);
}

void check_batch_sizes(const Tensor& batch_sizes, int64_t rows) {
  TORCH_CHECK_TYPE(batch_sizes.is_cpu(), "seqmem::lstm: expected batch_sizes on the cpu, got ",
                   batch_sizes.device());
  const Tensor values = batch_sizes.contiguous();
  const int64_t* size = values.const_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t t = 0; t < batch_sizes.numel(); ++t) {
    TORCH_CHECK_VALUE(size[t] > 0 && (t == 0 || size[t] <= size[t - 1]),
                      "seqmem::lstm: expected batch_sizes that are positive and never grow, got ",
                      size[t], " at step ", t);
    TORCH_CHECK_VALUE(size[t] <= rows - total, "seqmem::lstm: expected batch_sizes with sum ", rows,
                      " (the rows of input), got more");
    total += size[t];
  }
  TORCH_CHECK_VALUE(total == rows, "seqmem::lstm: expected batch_sizes with sum ", rows,
                    " (the rows of input), got ", total);
}

namespace {

using Sizes64 = Sizes<int64_t>;

constexpr char kName[] = "seqmem::lstm", kCellName[] = "seqmem::lstm_cell";

// Where the rows lie and which are alive when: see Shape.
struct Rows {
  c10::SmallVector<int64_t, 8> step_row, order, active;
  int64_t row_stride = 1;

  Rows(const Sizes64& s, const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
       bool batch_first)
      : step_row(s.T), order(s.B), active(s.T + 1, s.B) {
    active[s.T] = 0;
    std::iota(order.begin(), order.end(), 0);
    row_stride = batch_first ? s.T : 1;
    for (int64_t t = 0; t < s.T; ++t) step_row[t] = batch_first ? t : t * s.B;
    if (batch_sizes.has_value()) {
      const Tensor values = batch_sizes->contiguous();
      const int64_t* size = values.const_data_ptr<int64_t>();
      std::copy_n(size, s.T, active.begin());
      std::partial_sum(size, size + s.T - 1, step_row.begin() + 1);
    }
    if (lengths.has_value()) {
      const Tensor values = lengths->to(at::kLong).contiguous();
      const int64_t* length = values.const_data_ptr<int64_t>();
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return length[a] > length[b]; });
      int64_t alive = s.B;
      for (int64_t t = 0; t < s.T; ++t) {
        while (alive > 0 && length[order[alive - 1]] <= t) --alive;
        active[t] = alive;
      }
    }
  }
};

struct Call {
  Rows rows;
  Shape shape;
  Tensor reset;  // keeps a contiguous copy alive

  Call(const Sizes64& s, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
       const OptionalTensor& batch_sizes, bool batch_first, bool projected, bool reverse)
      : rows(s, lengths, batch_sizes, batch_first) {
    if (reset_mask.has_value()) reset = reset_mask->contiguous();
    shape = {s.T,
             s.B,
             s.I,
             s.H,
             s.P,
             projected,
             reverse,
             rows.row_stride,
             rows.step_row.data(),
             rows.order.data(),
             rows.active.data(),
             reset.defined() ? reset.const_data_ptr<bool>() : nullptr};
  }
};

struct Schedule {
  Plan plan;
  int threads;
};

// Estimates in microseconds of one core; they only steer the choices below. A barrier costs little,
// but where another program holds the other core each one may wait for a time slice, so short steps
// stay on one thread; shorter ones of a single row do not, for it has no rows to share.
constexpr double kFlopsPerMicrosecond = 60e3, kBytesPerMicrosecond = 40e3;
constexpr double kStepWorthSharing = 3, kLoneStepWorthSharing = 0.7;
constexpr double kCallWorthSharing = 50;
constexpr int64_t kSecondCache = 256 << 10;
constexpr int64_t kRowsPerWeight = 12;  // that make up for reading a weight from the third cache

// Threads share rows where each gets several, and many if the weights do not stay in its cache;
// else they share hidden units, which halves the weights each thread reads but needs a barrier per
// step.
Schedule share_out(const Sizes64& s, int64_t element, bool projected, int64_t recurrent_width) {
  const int available = available_threads();
  const double flops = 8.0 * s.H * s.B * recurrent_width;
  const double bytes = 4.0 * s.H * recurrent_width * element;
  const double step = std::max(flops / kFlopsPerMicrosecond, bytes / kBytesPerMicrosecond);
  const double call = step * s.T * (1 + double(s.I) / recurrent_width);
  auto limit = [&](double threads) { return int(std::clamp(threads, 1.0, double(available))); };
  const int by_rows = std::min<int64_t>(limit(call / kCallWorthSharing), std::max<int64_t>(s.B, 1));
  const double step_worth = s.B == 1 ? kLoneStepWorthSharing : kStepWorthSharing;
  const int by_units = std::min<int64_t>(
      limit(std::min(step / step_worth, call / kCallWorthSharing)), std::max<int64_t>(s.H / 16, 1));
  const int64_t enough = bytes <= kSecondCache ? 6 : kRowsPerWeight;
  const bool rows = projected || s.B >= enough * by_rows || by_units == 1;
  return {{rows, true, 1}, rows ? by_rows : by_units};
}

// Packing pays once a few steps read the weights, for packed ones stream best, or one step many
// times; measured, the widths matter little.
bool worth_packing(const Sizes64& s) { return s.T > 1 ? s.T * (s.B + 8) > 60 : s.B >= 100; }

// In the backward packing is a plain copy, but the products run slower without it.
constexpr int64_t kRowsWorthPacking = 48;

// A gradient [..., width]. Rows that are all one and the same, as those of a sum's gradient are,
// are not copied out: one stands for all.
class RowsGradient {
 public:
  RowsGradient(const OptionalTensor& t, int64_t width)
      : step_(t.has_value() && repeats(*t) ? 0 : width), tensor_(t) {
    if (step_ > 0) {
      if (t.has_value()) tensor_ = t->contiguous();
    } else if (t->stride(-1) != 1) {
      tensor_ = at::empty({width}, t->options());
      const size_t bytes = t->element_size();
      const char* from = static_cast<const char*>(t->const_data_ptr());
      for (char* to = static_cast<char*>(tensor_->mutable_data_ptr()); width > 0; --width) {
        std::memcpy(to, from, bytes);
        to += bytes, from += t->stride(-1) * bytes;
      }
    }
  }
  const void* data() const { return tensor_.has_value() ? tensor_->const_data_ptr() : nullptr; }
  int64_t step() const { return step_; }

 private:
  static bool repeats(const Tensor& t) {
    if (t.numel() == 0) return false;
    for (int64_t d = 0; d + 1 < t.dim(); ++d)
      if (t.size(d) != 1 && t.stride(d) != 0) return false;
    return true;
  }

  int64_t step_;
  OptionalTensor tensor_;
};

template <class Kernel, class Arguments>
void launch(const Kernel& kernel, Storage storage, const Shape& shape, const Schedule& schedule,
            Arguments& arguments) {
  run_team(
      schedule.threads,
      [&](int threads) {
        arguments.workspace =
            Workspace::get(kernel.workspace(storage, shape, schedule.plan, arguments, threads));
      },
      [&](int thread, int threads, SpinBarrier& barrier) {
        kernel.run(storage, shape, schedule.plan, arguments, thread, threads, barrier);
      });
}

void run_forward(const Call& call, const Sizes64& s, const Tensor& like, Forward& arguments) {
  Schedule schedule = share_out(s, like.element_size(), call.shape.projected, s.P);
  schedule.plan.pack = worth_packing(s);
  schedule.plan.chunk = std::max<int64_t>(1, 128 / std::max<int64_t>(s.B, 1));
  launch(SEQMEM_CHOOSE(forward_kernel), storage_of(like), call.shape, schedule, arguments);
}

void run_backward(const Call& call, const Sizes64& s, const Tensor& like, Backward& arguments) {
  Schedule schedule = share_out(s, like.element_size(), call.shape.projected, s.P);
  schedule.plan.pack = s.T * s.B > kRowsWorthPacking;
  schedule.plan.chunk = std::max<int64_t>(1, 256 / std::max<int64_t>(s.B, 1));
  launch(SEQMEM_CHOOSE(backward_kernel), storage_of(like), call.shape, schedule, arguments);
}

// ---- one cell
// ---------------------------------------------------------------------------------------

using CellOutputs = std::tuple<Tensor, Tensor, Tensor>;

template <class Int>
CellOutputs allocate_cell(const Tensor& input, const Sizes<Int>& s, bool return_gates) {
  return {empty_like_of<Int>(input, {s.B, s.H}), empty_like_of<Int>(input, {s.B, s.H}),
          return_gates ? empty_like_of<Int>(input, {s.B, s.H * 4})
                       : empty_like_of<Int>(input, {Int(0)})};
}

CellOutputs lstm_cell_cpu(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                          const Tensor& weight_ih, const Tensor& weight_hh,
                          const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                          bool return_gates) {
  const Sizes64 s = check_lstm_cell<int64_t>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  CellOutputs out = allocate_cell(input, s, return_gates);
  auto& [hy, cy, gates] = out;
  const Call call(s, {}, {}, {}, false, false, false);
  const Operand x(input), h0(hx), c0(cx), w_ih(weight_ih), w_hh(weight_hh), b_ih(bias_ih),
      b_hh(bias_hh);
  Forward arguments = {x.data(),    h0.data(),   c0.data(),   w_ih.data(),
                       w_hh.data(), b_ih.data(), b_hh.data(), nullptr,
                       data(hy),    nullptr,     nullptr,     return_gates ? data(gates) : nullptr,
                       data(cy),    nullptr};
  run_forward(call, s, input, arguments);
  return out;
}

CellOutputs lstm_cell_meta(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                           const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                           bool return_gates) {
  return allocate_cell(
      input, check_lstm_cell<c10::SymInt>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh),
      return_gates);
}

void check_lstm_cell_op(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                        const Tensor& weight_ih, const Tensor& weight_hh,
                        const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool) {
  check_lstm_cell<c10::SymInt>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

using CellGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Int>
Sizes<Int> cell_sizes(const Tensor& input, const Tensor& weight_hh) {
  const Int H = Check<Int>::size(weight_hh, 1);
  return {1, Check<Int>::size(input, 0), Check<Int>::size(input, 1), H, H, 0};
}

// Gradients for: input; hx and cx; weights and bias. What is not asked for stays empty.
template <class Int>
CellGradients allocate_cell_gradients(const Tensor& input, const Sizes<Int>& s, bool has_bias,
                                      std::array<bool, 3> mask) {
  auto make = [&](bool wanted, std::initializer_list<Int> sizes) {
    return wanted ? empty_like_of<Int>(input, sizes) : empty_like_of<Int>(input, {Int(0)});
  };
  return {make(mask[0], {s.B, s.I}),     make(mask[1], {s.B, s.H}),
          make(mask[1], {s.B, s.H}),     make(mask[2], {s.H * 4, s.I}),
          make(mask[2], {s.H * 4, s.H}), make(mask[2] && has_bias, {s.H * 4})};
}

CellGradients lstm_cell_backward_cpu(const OptionalTensor& grad_hy, const OptionalTensor& grad_cy,
                                     const OptionalTensor& grad_gates, const Tensor& input,
                                     const OptionalTensor& hx, const OptionalTensor& cx,
                                     const Tensor& weight_ih, const Tensor& weight_hh,
                                     const Tensor& gates, const Tensor& cy, bool has_bias,
                                     std::array<bool, 3> output_mask) {
  const Sizes64 s = cell_sizes<int64_t>(input, weight_hh);
  CellGradients out = allocate_cell_gradients(input, s, has_bias, output_mask);
  auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias] = out;
  const Call call(s, {}, {}, {}, false, false, false);
  const RowsGradient g_hy(grad_hy, s.H);
  const Operand g_cy(grad_cy), g_gates(grad_gates), x(input), h0(hx), c0(cx), w_ih(weight_ih),
      w_hh(weight_hh), saved_gates(gates), saved_cy(cy);
  auto wanted = [&](bool is, const Tensor& t) { return is ? data(t) : nullptr; };
  Backward arguments = {g_hy.data(),
                        g_hy.step(),
                        nullptr,
                        g_cy.data(),
                        g_gates.data(),
                        nullptr,
                        x.data(),
                        h0.data(),
                        c0.data(),
                        w_ih.data(),
                        w_hh.data(),
                        nullptr,
                        nullptr,
                        saved_gates.data(),
                        saved_cy.data(),
                        wanted(output_mask[0], grad_input),
                        wanted(output_mask[1], grad_hx),
                        wanted(output_mask[1], grad_cx),
                        wanted(output_mask[2], grad_weight_ih),
                        wanted(output_mask[2], grad_weight_hh),
                        wanted(output_mask[2] && has_bias, grad_bias),
                        nullptr,
                        nullptr};
  run_backward(call, s, input, arguments);
  return out;
}

CellGradients lstm_cell_backward_meta(const OptionalTensor&, const OptionalTensor&,
                                      const OptionalTensor&, const Tensor& input,
                                      const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                      const Tensor& weight_hh, const Tensor&, const Tensor&,
                                      bool has_bias, std::array<bool, 3> output_mask) {
  return allocate_cell_gradients(input, cell_sizes<c10::SymInt>(input, weight_hh), has_bias,
                                 output_mask);
}

// ---- a whole sequence
// -------------------------------------------------------------------------------

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Int>
Outputs allocate(const Tensor& input, const Sizes<Int>& s, bool packed, bool batch_first,
                 bool padded, bool return_gates) {
  auto make = [&](std::initializer_list<Int> sizes) { return empty_like_of<Int>(input, sizes); };
  // The gates are by far the largest of what a forward leaves to its backward.
  auto make_gates = [&](std::initializer_list<Int> sizes) {
    if constexpr (std::is_same_v<Int, int64_t>) {
      return KeptBlocks::empty(sizes, input.options());
    } else {
      return make(sizes);
    }
  };
  auto sequence = [&](const Int& width, const auto& create) {
    Tensor t = packed        ? create({s.rows, width})
               : batch_first ? create({s.B, s.T, width})
                             : create({s.T, s.B, width});
    return padded ? t.zero_() : t;
  };
  return {sequence(s.P, make), make({s.B, s.P}), make({s.B, s.H}),
          return_gates ? sequence(s.H * 4, make_gates) : make({Int(0)}),
          return_gates ? sequence(s.H, make) : make({Int(0)})};
}

Outputs lstm_cpu(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                 const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                 const OptionalTensor& lengths, const OptionalTensor& reset,
                 const OptionalTensor& batch_sizes, bool batch_first, bool reverse,
                 bool return_gates) {
  const Sizes64 s = check_lstm<int64_t>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
                                        weight_hr, lengths, reset, batch_sizes, batch_first, true);
  Outputs out =
      allocate(input, s, batch_sizes.has_value(), batch_first, lengths.has_value(), return_gates);
  auto& [output, hy, cy, gates, cells] = out;
  const Call call(s, lengths, reset, batch_sizes, batch_first, weight_hr.has_value(), reverse);
  const Operand x(input), h0(hx), c0(cx), w_ih(weight_ih), w_hh(weight_hh), b_ih(bias_ih),
      b_hh(bias_hh), w_hr(weight_hr);
  Forward arguments = {x.data(),
                       h0.data(),
                       c0.data(),
                       w_ih.data(),
                       w_hh.data(),
                       b_ih.data(),
                       b_hh.data(),
                       w_hr.data(),
                       data(output),
                       data(hy),
                       data(cy),
                       return_gates ? data(gates) : nullptr,
                       return_gates ? data(cells) : nullptr,
                       nullptr};
  run_forward(call, s, input, arguments);
  return out;
}

Outputs lstm_meta(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                  const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                  const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                  const OptionalTensor& lengths, const OptionalTensor& reset,
                  const OptionalTensor& batch_sizes, bool batch_first, bool, bool return_gates) {
  const auto s =
      check_lstm<c10::SymInt>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
                              lengths, reset, batch_sizes, batch_first, false);
  return allocate(input, s, batch_sizes.has_value(), batch_first, false, return_gates);
}

void check_lstm_op(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                   const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                   const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                   const OptionalTensor& lengths, const OptionalTensor& reset,
                   const OptionalTensor& batch_sizes, bool batch_first, bool, bool) {
  check_lstm<c10::SymInt>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths,
                          reset, batch_sizes, batch_first, true);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Int>
Sizes<Int> sequence_sizes(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                          const Tensor& cells, const OptionalTensor& hx,
                          const OptionalTensor& batch_sizes, bool batch_first) {
  using C = Check<Int>;
  const Int I = C::size(weight_ih, 1), P = C::size(weight_hh, 1), H = C::size(weight_ih, 0) / 4;
  if (!batch_sizes.has_value())
    return {C::size(input, batch_first ? 1 : 0), C::size(input, batch_first ? 0 : 1), I, H, P, 0};
  const Int T = C::size(*batch_sizes, 0);
  const Int B =
      hx.has_value() ? C::size(*hx, 0) : Int(batch_sizes->template const_data_ptr<int64_t>()[0]);
  return {T, B, I, H, P, C::size(cells, 0)};
}

template <class Int>
Gradients allocate_gradients(const Tensor& input, const Sizes<Int>& s, bool projected,
                             bool has_bias, bool padded, std::array<bool, 3> mask) {
  auto make = [&](bool wanted, std::initializer_list<Int> sizes) {
    return wanted ? empty_like_of<Int>(input, sizes) : empty_like_of<Int>(input, {Int(0)});
  };
  Tensor grad_input = mask[0] ? at::empty_symint(input.sym_sizes(), input.options())
                              : empty_like_of<Int>(input, {Int(0)});
  return {padded ? grad_input.zero_() : grad_input,
          make(mask[1], {s.B, s.P}),
          make(mask[1], {s.B, s.H}),
          make(mask[2], {s.H * 4, s.I}),
          make(mask[2], {s.H * 4, s.P}),
          make(mask[2] && has_bias, {s.H * 4}),
          make(mask[2] && projected, {s.P, s.H})};
}

Gradients lstm_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_hy,
                            const OptionalTensor& grad_cy, const OptionalTensor& grad_gates,
                            const OptionalTensor& grad_cells, const Tensor& input,
                            const OptionalTensor& hx, const OptionalTensor& cx,
                            const Tensor& weight_ih, const Tensor& weight_hh,
                            const OptionalTensor& weight_hr, const OptionalTensor& lengths,
                            const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                            const Tensor& output, const Tensor& gates, const Tensor& cells,
                            bool has_bias, bool batch_first, bool reverse,
                            std::array<bool, 3> output_mask) {
  const Sizes64 s =
      sequence_sizes<int64_t>(input, weight_ih, weight_hh, cells, hx, batch_sizes, batch_first);
  const bool projected = weight_hr.has_value();
  Gradients out =
      allocate_gradients(input, s, projected, has_bias, lengths.has_value(), output_mask);
  auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias, grad_weight_hr] =
      out;
  const Call call(s, lengths, reset, batch_sizes, batch_first, projected, reverse);
  const RowsGradient g_output(grad_output, s.P);
  const Operand g_hy(grad_hy), g_cy(grad_cy), g_gates(grad_gates), g_cells(grad_cells), x(input),
      h0(hx), c0(cx), w_ih(weight_ih), w_hh(weight_hh), w_hr(weight_hr), saved_output(output),
      saved_gates(gates), saved_cells(cells);
  auto wanted = [&](bool is, const Tensor& t) { return is ? data(t) : nullptr; };
  Backward arguments = {g_output.data(),
                        g_output.step(),
                        g_hy.data(),
                        g_cy.data(),
                        g_gates.data(),
                        g_cells.data(),
                        x.data(),
                        h0.data(),
                        c0.data(),
                        w_ih.data(),
                        w_hh.data(),
                        w_hr.data(),
                        saved_output.data(),
                        saved_gates.data(),
                        saved_cells.data(),
                        wanted(output_mask[0], grad_input),
                        wanted(output_mask[1], grad_hx),
                        wanted(output_mask[1], grad_cx),
                        wanted(output_mask[2], grad_weight_ih),
                        wanted(output_mask[2], grad_weight_hh),
                        wanted(output_mask[2] && has_bias, grad_bias),
                        wanted(output_mask[2] && projected, grad_weight_hr),
                        nullptr};
  run_backward(call, s, input, arguments);
  return out;
}

Gradients lstm_backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const Tensor& input,
                             const OptionalTensor& hx, const OptionalTensor&,
                             const Tensor& weight_ih, const Tensor& weight_hh,
                             const OptionalTensor& weight_hr, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor& batch_sizes,
                             const Tensor&, const Tensor&, const Tensor& cells, bool has_bias,
                             bool batch_first, bool, std::array<bool, 3> output_mask) {
  const auto s =
      sequence_sizes<c10::SymInt>(input, weight_ih, weight_hh, cells, hx, batch_sizes, batch_first);
  return allocate_gradients(input, s, weight_hr.has_value(), has_bias, false, output_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_CELL_ARGUMENTS                                                                    \
  "(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, " \
  "Tensor? bias_hh, bool return_gates)"
#define SEQMEM_SEQUENCE_ARGUMENTS                                                                \
  "(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, " \
  "Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, Tensor? reset, Tensor? batch_sizes, "    \
  "bool batch_first, bool reverse, bool return_gates)"
  m.def("lstm_cell" SEQMEM_CELL_ARGUMENTS " -> (Tensor hy, Tensor cy, Tensor gates)", tags);
  m.def("check_lstm_cell" SEQMEM_CELL_ARGUMENTS " -> ()", tags);
  m.def("lstm" SEQMEM_SEQUENCE_ARGUMENTS
        " -> (Tensor output, Tensor hy, Tensor cy, Tensor gates, Tensor cells)",
        tags);
  m.def("check_lstm" SEQMEM_SEQUENCE_ARGUMENTS " -> ()", tags);
  m.def(
      "lstm_cell_backward(Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_gates, Tensor input, "
      "Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor gates, Tensor cy, "
      "bool has_bias, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, "
      "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)",
      tags);
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_gates, "
      "Tensor? grad_cells, Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, "
      "Tensor weight_hh, Tensor? weight_hr, Tensor? lengths, Tensor? reset, Tensor? batch_sizes, "
      "Tensor output, Tensor gates, Tensor cells, bool has_bias, bool batch_first, bool reverse, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, "
      "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias, Tensor grad_weight_hr)",
      tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("lstm_cell", lstm_cell_cpu);
  m.impl("lstm_cell_backward", lstm_cell_backward_cpu);
  m.impl("lstm", lstm_cpu);
  m.impl("lstm_backward", lstm_backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("lstm_cell", lstm_cell_meta);
  m.impl("lstm_cell_backward", lstm_cell_backward_meta);
  m.impl("lstm", lstm_meta);
  m.impl("lstm_backward", lstm_backward_meta);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_lstm_cell", check_lstm_cell_op);
  m.impl("check_lstm", check_lstm_op);
  m.impl("lstm_cell", Unsupported<kCellName, &check_lstm_cell_op, CellOutputs>::call);
  m.impl("lstm", Unsupported<kName, &check_lstm_op, Outputs>::call);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) {
  m.impl("lstm_cell", Unsupported<kCellName, &check_lstm_cell_op, CellOutputs>::call);
  m.impl("lstm", Unsupported<kName, &check_lstm_op, Outputs>::call);
}

}  // namespace seqmem::lstm
