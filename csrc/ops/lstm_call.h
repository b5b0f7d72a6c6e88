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
              .reset = reset.defined() ? reset.const_data_ptr<bool>() : nullptr} {}
  explicit Call(const Sizes64& s) : Call(s, {{}, {}, {}, {}}, false, false) {}
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

// Makes a forward's results.
template <class Int>
struct Results {
  In input;
  const Sizes<Int>& s;
  bool packed, batch_first;
  bool padded;  // whether some rows end before others: what lies beyond them is zero

  Tensor operator()(std::initializer_list<Int> sizes) const {
    return empty_like_of<Int>(input, sizes);
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
    Tensor t = packed        ? create({s.rows, width})
               : batch_first ? create({s.B, s.T, width})
                             : create({s.T, s.B, width});
    return padded ? t.zero_() : t;
  }
};

inline void* data_if(bool wanted, const Tensor& t) { return wanted ? data(t) : nullptr; }

}  // namespace seqmem::lstm
