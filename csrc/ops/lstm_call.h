// An LSTM call over a sequence, between tensors and kernels: where its rows are, gradients that
// need no copy, and results laid out as the input.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../common/kept_blocks.h"
#include "../common/operand.h"
#include "../cpu/lstm_kernel.h"
#include "lstm_check.h"
#include "lstm_schedule.h"

namespace seqmem::lstm {

// Where the rows are stored and which are active when: see Shape.
struct Rows {
  c10::SmallVector<int64_t, 8> step_row, order, active;
  int64_t row_stride = 1;

  Rows(const Sizes64& s, Maybe lengths, Maybe batch_sizes, bool batch_first)
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
      int64_t rows = s.B;
      for (int64_t t = 0; t < s.T; ++t) {
        while (rows > 0 && length[order[rows - 1]] <= t) --rows;
        active[t] = rows;
      }
    }
  }
};

struct Call {
  Rows rows;
  Tensor reset;  // keeps a contiguous copy alive
  Shape shape;
  bool padded;  // whether some sequences end before others

  Call(const Sizes64& s, const Layout& layout, bool batch_first, bool reverse)
      : rows(s, layout.lengths, layout.batch_sizes, batch_first),
        reset(layout.reset.has_value() ? layout.reset->contiguous() : Tensor()),
        shape{.T = s.T,
              .B = s.B,
              .I = s.I,
              .H = s.H,
              .P = s.P,
              .projected = layout.weight_hr.has_value(),
              .reverse = reverse,
              .row_stride = rows.row_stride,
              .step_row = rows.step_row.data(),
              .order = rows.order.data(),
              .active = rows.active.data(),
              .reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr},
        padded(layout.lengths.has_value()) {}
  explicit Call(const Sizes64& s) : Call(s, {{}, {}, {}, {}}, false, false) {}

  // Stores zeros beyond the sequences' ends, in results laid out as the input or empty. On this
  // thread alone: torch's zero_ opens a team for it, which waits long on a busy machine.
  void clear_padding(std::initializer_list<const Tensor*> results) const {
    for (const Tensor* result : results) {
      if (!padded || result->numel() == 0) continue;
      char* const base = static_cast<char*>(result->mutable_data_ptr());
      const size_t bytes = result->size(-1) * result->element_size();
      for (int64_t t = 0; t < shape.T; ++t)
        for (int64_t j = shape.active[t]; j < shape.B; ++j)
          std::memset(base + (shape.step_row[t] + shape.order[j] * shape.row_stride) * bytes, 0,
                      bytes);
    }
  }
};

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

// The arguments of a layer, contiguous and alive as long as this, for either direction's kernel.
struct StepOperands {
  const Operand input, hx, cx, weight_ih, weight_hh, weight_hr;

  StepOperands(const Step& in, Maybe weight_hr)
      : input(in.input),
        hx(in.hx),
        cx(in.cx),
        weight_ih(in.weight_ih),
        weight_hh(in.weight_hh),
        weight_hr(weight_hr) {}
};

class ForwardOperands : StepOperands {
  const Operand bias_ih, bias_hh;

 public:
  ForwardOperands(const Step& in, const Biases& biases, Maybe weight_hr)
      : StepOperands(in, weight_hr), bias_ih(biases.bias_ih), bias_hh(biases.bias_hh) {}

  // Of results, null where there are none.
  Forward arguments(void* output, void* hy, void* cy, void* gates, void* cells) const {
    return {.input = input.data(),
            .hx = hx.data(),
            .cx = cx.data(),
            .weight_ih = weight_ih.data(),
            .weight_hh = weight_hh.data(),
            .bias_ih = bias_ih.data(),
            .bias_hh = bias_hh.data(),
            .weight_hr = weight_hr.data(),
            .output = output,
            .hy = hy,
            .cy = cy,
            .gates = gates,
            .cells = cells,
            .workspace = nullptr};
  }
};

inline void* data_if(bool wanted, const Tensor& t) { return wanted ? data(t) : nullptr; }

class BackwardOperands : StepOperands {
  const RowsGradient grad_output;
  const Operand grad_hy, grad_cy, grad_gates, grad_cells, output, gates, cells;

 public:
  BackwardOperands(const SequenceGradients& in, const Step& step, Maybe weight_hr, Maybe output,
                   In gates, In cells, int64_t P)
      : StepOperands(step, weight_hr),
        grad_output(in.grad_output, P),
        grad_hy(in.grad_hy),
        grad_cy(in.grad_cy),
        grad_gates(in.grad_gates),
        grad_cells(in.grad_cells),
        output(output),
        gates(gates),
        cells(cells) {}

  // Results begin with the gradients of the input, of hx, cx and of both weights.
  template <class Gradients>
  Backward arguments(std::array<bool, 3> wanted, const Gradients& out, void* grad_bias,
                     void* grad_weight_hr) const {
    const auto [of_input, of_state, of_weights] = wanted;
    return {.grad_output = grad_output.data(),
            .grad_output_step = grad_output.step(),
            .grad_hy = grad_hy.data(),
            .grad_cy = grad_cy.data(),
            .grad_gates = grad_gates.data(),
            .grad_cells = grad_cells.data(),
            .input = input.data(),
            .hx = hx.data(),
            .cx = cx.data(),
            .weight_ih = weight_ih.data(),
            .weight_hh = weight_hh.data(),
            .weight_hr = weight_hr.data(),
            .output = output.data(),
            .gates = gates.data(),
            .cells = cells.data(),
            .grad_input = data_if(of_input, std::get<0>(out)),
            .grad_hx = data_if(of_state, std::get<1>(out)),
            .grad_cx = data_if(of_state, std::get<2>(out)),
            .grad_weight_ih = data_if(of_weights, std::get<3>(out)),
            .grad_weight_hh = data_if(of_weights, std::get<4>(out)),
            .grad_bias = grad_bias,
            .grad_weight_hr = grad_weight_hr,
            .workspace = nullptr};
  }
};

template <class Int>
Tensor empty_if(bool wanted, const Tensor& like, std::initializer_list<Int> sizes) {
  return wanted ? empty_like_of<Int>(like, sizes) : empty_like_of<Int>(like, {Int(0)});
}

// The gradients of the input, of hx, cx and of both weights; what is not wanted stays empty.
template <class Int>
Tensors<5> allocate_gradients(In input, const Sizes<Int>& s, std::array<bool, 3> wanted) {
  const auto [of_input, of_state, of_weights] = wanted;
  return {of_input ? result_like<Int>(input, input.options()) : empty_if<Int>(false, input, {}),
          empty_if<Int>(of_state, input, {s.B, s.P}), empty_if<Int>(of_state, input, {s.B, s.H}),
          kept_of<Int>(of_weights, input.options(), {s.H * 4, s.I}),
          kept_of<Int>(of_weights, input.options(), {s.H * 4, s.P})};
}

// Makes a forward's results.
template <class Int>
struct Results {
  In input;
  const Sizes<Int>& s;
  bool packed, batch_first;

  Tensor operator()(std::initializer_list<Int> sizes) const {
    return result_of<Int>(input.options(), sizes);
  }
  // [rows, width], laid out as the input; empty where not wanted.
  Tensor sequence(const Int& width, bool wanted = true) const {
    return laid_out(width, wanted, *this);
  }
  // The same for the largest of what a forward saves for its backward.
  Tensor saved_sequence(const Int& width, bool wanted) const {
    if constexpr (std::is_same_v<Int, int64_t>) {
      return laid_out(width, wanted, [&](std::initializer_list<Int> sizes) {
        return KeptBlocks::empty(sizes, input.options());
      });
    } else {
      return sequence(width, wanted);
    }
  }

  template <class Create>
  Tensor laid_out(const Int& width, bool wanted, const Create& create) const {
    if (!wanted) return (*this)({Int(0)});
    return packed        ? create({s.rows, width})
           : batch_first ? create({s.B, s.T, width})
                         : create({s.T, s.B, width});
  }
};

}  // namespace seqmem::lstm
