// Arguments that are batches of matrices [..., rows, columns], whose leading dimensions broadcast,
// and what attention over queries, keys and values checks of them.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ne.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "check.h"
#include "kept_blocks.h"
#include "op.h"

namespace seqmem {

// The leading dimensions of all arguments, broadcast.
template <class Int>
class Leading {
 public:
  // Takes in those of an argument [..., rows, columns]; a mask may lack these two as well.
  void widen(const Check<Int>& check, const char* name, const at::Tensor& t) {
    const int64_t own = std::max<int64_t>(t.dim() - 2, 0);
    if (own > count()) sizes_.insert(sizes_.begin(), own - count(), Int(1));
    for (int64_t i = 0; i < own; ++i) {
      Int& here = sizes_[count() - own + i];
      const Int size = check.size(t, i);
      if (size == 1) continue;
      TORCH_CHECK_VALUE(here == 1 || here == size, check.op(), ": expected ", name,
                        " with leading dimensions that broadcast to ", sizes_, ", got shape ",
                        t.sym_sizes());
      here = size;
    }
  }

  // All sizes of a result.
  c10::SmallVector<Int, 6> with(const Int& rows, const Int& columns) const {
    c10::SmallVector<Int, 6> sizes(sizes_.begin(), sizes_.end());
    sizes.push_back(rows);
    sizes.push_back(columns);
    return sizes;
  }

  // A result; a large one gets memory that the next call finds again.
  at::Tensor empty(const at::Tensor& like, const Int& rows, const Int& columns) const {
    return result_of<Int>(like.options(), with(rows, columns));
  }

  int64_t total() const {
    int64_t product = 1;
    for (const int64_t size : sizes_) product *= size;
    return product;
  }

  // Where each of the broadcast matrices begins in t, in elements.
  std::vector<int64_t> offsets_in(const at::Tensor& t) const {
    std::vector<int64_t> offsets = {0};
    for (int64_t d = 0; d < count(); ++d) {
      const int64_t own = t.dim() - 2 - count() + d;
      const bool one = own < 0 || t.size(own) == 1 || t.numel() == 0;
      const int64_t step = one ? 0 : t.stride(own);
      std::vector<int64_t> wider;
      wider.reserve(offsets.size() * sizes_[d]);
      for (const int64_t start : offsets)
        for (int64_t i = 0; i < sizes_[d]; ++i) wider.push_back(start + i * step);
      offsets = std::move(wider);
    }
    return offsets;
  }

 private:
  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }
  c10::SmallVector<Int, 4> sizes_;
};

// A mask of scores [..., rows, columns]: bool or integer, or of the scores' dtype and added.
template <class Int>
void check_mask(const Check<Int>& check, const at::Tensor& scores_like, const at::Tensor& mask,
                const Int& rows, const Int& columns) {
  check.strided("mask", mask);
  const auto type = mask.scalar_type();
  TORCH_CHECK_TYPE(c10::isIntegralType(type, true) || type == scores_like.scalar_type(), check.op(),
                   ": expected mask of dtype bool, an integer or ", scores_like.scalar_type(),
                   ", got ", type);
  check.same_device("mask", mask);
  auto fits = [&](int64_t from_end, const Int& wanted) {
    if (mask.dim() < from_end) return true;
    const Int size = check.size(mask, mask.dim() - from_end);
    return size == 1 || size == wanted;
  };
  TORCH_CHECK_VALUE(fits(1, columns) && fits(2, rows), check.op(),
                    ": expected mask that broadcasts to [..., ", rows, ", ", columns, "], got ",
                    mask.sym_sizes());
}

template <class Int>
struct AttentionSizes {
  Leading<Int> batch;
  Int Tq, Tk, width, Dv;  // width: of queries and keys

  // output and weights
  Tensors<2> empty_outputs(const at::Tensor& like) const {
    return {batch.empty(like, Tq, Dv), batch.empty(like, Tq, Tk)};
  }

  // One matrix for each of the batch, where it is wanted.
  at::Tensor gradient(bool wanted, const at::Tensor& like, const Int& rows, const Int& cols) const {
    return wanted ? batch.empty(like, rows, cols) : at::Tensor();
  }
};

// The first arguments of a backward: the gradients of both outputs.
struct AttentionGradients {
  Maybe grad_output, grad_weights;
};

// An argument as kernels find it: element (n, row, column) of the broadcast batch is stored at
// offset[n] + row * rows + column * columns. Alive as long as this.
struct Argument {
  at::Tensor tensor;
  std::vector<int64_t> offset;
  int64_t rows = 0, columns = 0;

  Argument(const AttentionSizes<int64_t>& s, Maybe t) {
    if (!t.has_value()) return;
    tensor = *t;
    auto stride = [&](int64_t from_end) {
      const int64_t d = t->dim() - from_end;
      return d < 0 || t->size(d) == 1 ? 0 : t->stride(d);
    };
    columns = stride(1);
    rows = stride(2);
    offset = s.batch.offsets_in(*t);
  }
};

// query [..., Tq, width], key [..., Tk, width], value [..., Tk, Dv], mask of scores [..., Tq, Tk].
template <class Int>
AttentionSizes<Int> check_attention(const Check<Int>& check, const at::Tensor& query,
                                    const at::Tensor& key, const at::Tensor& value,
                                    const OptionalTensor& mask, bool needs_features) {
  check.floating_input();
  check.same_kind("key", key);
  check.same_kind("value", value);
  auto matrix = [&](const char* name, const at::Tensor& t) {
    TORCH_CHECK_VALUE(t.dim() >= 2, check.op(), ": expected ", name,
                      " with at least 2 dimensions, got ", t.dim(), " (shape ", t.sym_sizes(), ")");
  };
  matrix("query", query);
  matrix("key", key);
  matrix("value", value);
  AttentionSizes<Int> s;
  s.Tq = check.size(query, query.dim() - 2);
  s.width = check.size(query, query.dim() - 1);
  s.Tk = check.size(key, key.dim() - 2);
  s.Dv = check.size(value, value.dim() - 1);
  TORCH_CHECK_VALUE(!needs_features || s.width > 0, check.op(),
                    ": expected query with at least one feature, got shape ", query.sym_sizes());
  TORCH_CHECK_VALUE(check.size(key, key.dim() - 1) == s.width, check.op(),
                    ": expected key of shape [..., ", s.Tk, ", ", s.width, "], got ",
                    key.sym_sizes());
  TORCH_CHECK_VALUE(check.size(value, value.dim() - 2) == s.Tk, check.op(),
                    ": expected value of shape [..., ", s.Tk, ", ", s.Dv, "], got ",
                    value.sym_sizes());
  s.batch.widen(check, "query", query);
  s.batch.widen(check, "key", key);
  s.batch.widen(check, "value", value);
  if (mask.has_value()) {
    check_mask(check, query, *mask, s.Tq, s.Tk);
    s.batch.widen(check, "mask", *mask);
  }
  return s;
}

// What a backward is given besides: the gradients of both outputs, and the weights.
template <class Int>
void check_attention_backward(const Check<Int>& check, const AttentionSizes<Int>& s,
                              const AttentionGradients& in, const at::Tensor& weights) {
  check.operand("grad_output", in.grad_output, s.batch.with(s.Tq, s.Dv));
  check.operand("grad_weights", in.grad_weights, s.batch.with(s.Tq, s.Tk));
  check.operand("weights", weights, s.batch.with(s.Tq, s.Tk));
}

// Kernels know bool masks and floating ones.
inline at::Tensor bool_or_floating(const at::Tensor& mask) {
  return mask.is_floating_point() || mask.scalar_type() == at::kBool ? mask : mask.ne(0);
}

// A mask that has a gradient.
inline OptionalTensor differentiable(const OptionalTensor& mask) {
  return mask.has_value() && mask->is_floating_point() ? mask : std::nullopt;
}

// Of an argument that was broadcast, from its broadcast gradient; empty where that is undefined.
inline at::Tensor summed_gradient(const at::Tensor& grad, const OptionalTensor& argument,
                                  const at::TensorOptions& options) {
  return grad.defined() ? at::sum_to(grad, argument->sizes()) : at::empty({0}, options);
}

}  // namespace seqmem
