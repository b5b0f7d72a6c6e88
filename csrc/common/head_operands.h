// Tensors of heads as kernels take them (heads.h), and results that the next call finds again.
#pragma once

#include <ATen/core/Tensor.h>

#include "heads.h"
#include "heads_check.h"
#include "kept_blocks.h"
#include "operand.h"
#include "scores.h"

namespace seqmem {

inline Heads heads_of(const OptionalTensor& t) {
  if (!t.has_value() || t->numel() == 0) return {};
  auto stride = [&](int64_t d) { return t->size(d) == 1 ? 0 : t->stride(d); };
  // A single feature is contiguous whatever its stride.
  return {t->const_data_ptr(), stride(0), stride(1), stride(2), t->size(3) == 1 ? 1 : t->stride(3)};
}

// [B] or [B, Tq] of integers, alive as long as this.
class BoundOperand {
 public:
  explicit BoundOperand(const OptionalTensor& t)
      : tensor_(t.has_value() ? t->to(at::kLong).contiguous() : at::Tensor()) {}
  Bounds bounds() const {
    if (!tensor_.defined()) return {};
    const bool each = tensor_.dim() == 2;
    return {tensor_.const_data_ptr<int64_t>(), each ? tensor_.size(1) : 1, each ? 1 : 0};
  }

 private:
  at::Tensor tensor_;
};

// The output, and weights where they are needed.
template <class Int, class Inputs>
Tensors<2> large_results(const Inputs& in, const HeadSizes<Int>& s,
                         std::initializer_list<Int> weights) {
  return {
      result_of<Int>(in.q.options(), {s.B, s.Hq, s.Tq, s.Dv}),
      in.need_weights ? result_of<Int>(in.q.options(), weights) : at::empty({0}, in.q.options())};
}

// Gradients of q, k and v; empty where not wanted, zero those of keys that no query sees.
template <class Inputs>
Tensors<3> large_gradients(const Inputs& in, bool unseen) {
  auto make = [&](int n, In like) {
    return in.output_mask[n] ? KeptBlocks::result(like.sizes(), in.q.options())
                             : at::empty({0}, in.q.options());
  };
  Tensors<3> out = {make(0, in.q), make(1, in.k), make(2, in.v)};
  if (unseen) std::get<1>(out).zero_(), std::get<2>(out).zero_();
  return out;
}

// Null where there is nothing to write.
inline void* some_data(const at::Tensor& t) { return t.numel() > 0 ? data(t) : nullptr; }

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  return {p, p > 0 ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0};
}

inline HeadShape head_shape(const HeadSizes<int64_t>& s, const WeightInputs& in) {
  return {.B = s.B,
          .Hq = s.Hq,
          .Hk = s.Hk,
          .Tq = s.Tq,
          .Tk = s.Tk,
          .D = s.D,
          .Dv = s.Dv,
          .scale = scale_of(in.scale, s.D),
          .alpha = in.alpha,
          .dropout = dropout_of(in.dropout, in.seed)};
}

}  // namespace seqmem
