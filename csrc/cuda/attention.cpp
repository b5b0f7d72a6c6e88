// Attention at the CUDA key: a small call is launched from here, since Python's launch of a kernel
// takes many times longer than the kernel; any other goes to Triton. Formulas:
// csrc/autograd/attention.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "../common/scores.h"
#include "../ops/attention_check.h"
#include "attention_kernel.h"
#include "launcher.h"

namespace seqmem::attention {
namespace {

constexpr char kTriton[] = "seqmem::attention_triton",
               kBackwardTriton[] = "seqmem::attention_backward_triton";
using TritonOp = Op<kTriton, ForwardOp::Signature>;
using BackwardTritonOp = Op<kBackwardTriton, BackwardOp::Signature>;

// An argument [..., rows, columns] as the kernels find it, alive as long as this.
class Strided {
 public:
  Strided(Maybe t, bool dense_rows) {
    if (!t.has_value()) return;
    tensor_ = dense_rows && t->size(-1) > 1 && t->stride(-1) != 1 ? t->contiguous() : *t;
  }
  cuda::AttentionMatrix view() const {
    return {const_data(tensor_), stride(4), stride(3), stride(2), stride(1)};
  }

 private:
  Tensor tensor_;

  // Of the dimension so far from the end; 0 where there is one of them, or none.
  int64_t stride(int64_t from_end) const {
    if (!tensor_.defined() || tensor_.dim() < from_end) return 0;
    const int64_t d = tensor_.dim() - from_end;
    return tensor_.size(d) == 1 ? 0 : tensor_.stride(d);
  }
};

OptionalTensor kernel_mask(Maybe mask) {
  return mask.has_value() ? OptionalTensor(bool_or_floating(*mask)) : std::nullopt;
}

cuda::AttentionShape shape_of(const AttentionSizes<int64_t>& s, const Operands& in,
                              const Options& options) {
  cuda::AttentionShape shape;
  const auto sizes = s.batch.with(s.Tq, s.Tk);
  shape.N = s.batch.total();
  shape.heads = sizes.size() > 2 ? std::max<int64_t>(sizes[sizes.size() - 3], 1) : 1;
  shape.Tq = s.Tq;
  shape.Tk = s.Tk;
  shape.D = s.width;
  shape.Dv = s.Dv;
  shape.scale = scale_of(options.scale, s.width);
  shape.causal = options.is_causal;
  shape.mask = !in.mask.has_value()           ? MaskKind::None
               : in.mask->is_floating_point() ? MaskKind::Added
                                              : MaskKind::Allowed;
  return shape;
}

// A softmax, no more than two leading dimensions, and something to compute.
bool small(const AttentionSizes<int64_t>& s, const cuda::AttentionShape& shape,
           const Options& options, const Tensor& query) {
  return options.alpha == 1 && s.batch.with(s.Tq, s.Tk).size() <= 4 && shape.N * s.Tq * s.Tk > 0 &&
         cuda::small_attention(storage_of(query), shape);
}

Tensors<2> forward_cuda(const Inputs& in) {
  const auto s = check<int64_t>(in);
  const auto shape = shape_of(s, in, in);
  if (!small(s, shape, in, in.query))
    return TritonOp::call(in.query, in.key, in.value, in.mask, in.scale, in.is_causal, in.alpha);
  const c10::cuda::CUDAGuard guard(in.query.device());
  const Tensor output = at::empty(s.batch.with(s.Tq, s.Dv), in.query.options()),
               weights = at::empty(s.batch.with(s.Tq, s.Tk), in.query.options());
  const Strided query(in.query, true), key(in.key, true), value(in.value, true),
      mask(kernel_mask(in.mask), false);
  C10_CUDA_CHECK(cuda::attention_forward(storage_of(in.query), shape,
                                         {query.view(), key.view(), value.view(), mask.view()},
                                         data(output), data(weights), stream()));
  return {output, weights};
}

Tensors<4> backward_cuda(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  const auto shape = shape_of(s, in, in);
  if (!small(s, shape, in, in.query))
    return BackwardTritonOp::call(in.grad_output, in.grad_weights, in.query, in.key, in.value,
                                  in.mask, in.weights, in.scale, in.is_causal, in.alpha,
                                  in.output_mask);
  const c10::cuda::CUDAGuard guard(in.query.device());
  const auto [of_query, of_key, of_value, of_mask] = in.output_mask;
  const auto options = in.query.options();
  auto gradient = [&](bool wanted, int64_t rows, int64_t columns) {
    return wanted ? at::empty(s.batch.with(rows, columns), options) : Tensor();
  };
  const Tensor query = gradient(of_query, s.Tq, s.width), key = gradient(of_key, s.Tk, s.width),
               value = gradient(of_value, s.Tk, s.Dv),
               mask = gradient(of_mask && shape.mask == MaskKind::Added, s.Tq, s.Tk);
  const auto wide = in.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor by_scores =
      of_key ? at::empty({shape.N, s.Tq, s.Tk}, options.dtype(wide)) : Tensor();
  const bool by_output = in.grad_output.has_value();
  if (value.defined() && !by_output) value.zero_();
  const Strided q(in.query, true), k(in.key, true), v(in.value, true),
      m(kernel_mask(in.mask), false), grad_output(in.grad_output, true),
      grad_weights(in.grad_weights, false);
  const Operand weights(in.weights);
  const cuda::AttentionGradientOperands g = {weights.data(),
                                             grad_output.view(),
                                             grad_weights.view(),
                                             data(by_scores),
                                             data(query),
                                             data(key),
                                             by_output ? data(value) : nullptr,
                                             data(mask)};
  C10_CUDA_CHECK(cuda::attention_backward(storage_of(in.query), shape,
                                          {q.view(), k.view(), v.view(), m.view()}, g, stream()));
  return {summed_gradient(query, in.query, options), summed_gradient(key, in.key, options),
          summed_gradient(value, in.value, options), summed_gradient(mask, in.mask, options)};
}

}  // namespace

// Not public: what is left to Triton, whose launchers have these signatures.
TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def((kTriton + std::string(kSchema)).c_str());
  m.def((kBackwardTriton + std::string(kBackwardSchema)).c_str());
}

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  ForwardOp::implement<forward_cuda>(m, c10::DispatchKey::CUDA);
  BackwardOp::implement<backward_cuda>(m, c10::DispatchKey::CUDA);
}

}  // namespace seqmem::attention
