// Hard attention at the CUDA key: all of a call from C++, since Python's launch of a kernel takes
// many times longer than the kernel. Formulas: csrc/autograd/hard_attention.cpp. What `action`
// holds is not checked, which would wait for the GPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../ops/hard_attention_check.h"
#include "hard_attention_kernel.h"
#include "launcher.h"

namespace seqmem::hard_attention {
namespace {

cuda::Policy policy(const Tensor& logits, const Operand& dense) {
  const int64_t K = logits.size(-1);
  return {logits.numel() / K, K, dense.data()};
}

const int64_t* actions(const Operand& action) { return static_cast<const int64_t*>(action.data()); }

Tensors<3> sample_cuda(const SampleInputs& in) {
  check_sample<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.logits.device());
  const Tensors<3> out = allocate_sample(in.logits);
  const auto& [action, log_prob, entropy] = out;
  const Operand logits(in.logits), uniform(in.uniform);
  C10_CUDA_CHECK(cuda::hard_attention_sample(storage_of(in.logits), policy(in.logits, logits),
                                             uniform.data(), static_cast<int64_t*>(data(action)),
                                             data(log_prob), data(entropy), stream()));
  return out;
}

Tensor sample_backward_cuda(const SampleBackwardInputs& in) {
  check_sample_backward<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.logits.device());
  const Tensor out = at::empty(in.logits.sizes(), in.logits.options());
  const Operand logits(in.logits), action(in.action), grad_log_prob(in.grad_log_prob),
      grad_entropy(in.grad_entropy);
  C10_CUDA_CHECK(cuda::hard_attention_sample_backward(
      storage_of(in.logits), policy(in.logits, logits), actions(action), grad_log_prob.data(),
      grad_entropy.data(), data(out), stream()));
  return out;
}

// Calls f with what the kernels take; the operands live as long.
template <class F>
void with_loss(const LossInputs& in, const F& f) {
  const Operand logits(in.logits), action(in.action), returns(in.returns), baseline(in.baseline);
  const cuda::Loss loss = {
      actions(action),      returns.data(),
      baseline.data(),      in.baseline.has_value() && in.baseline->dim() > 0 ? 1 : 0,
      in.entropy_weight,    in.reduction == kMean,
      in.reduction == kNone};
  f(policy(in.logits, logits), loss);
}

Tensor loss_cuda(const LossInputs& in) {
  check_loss<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.logits.device());
  const Tensor out = allocate_loss(in);
  with_loss(in, [&](const cuda::Policy& p, const cuda::Loss& loss) {
    const int64_t numbers = cuda::hard_attention_loss_workspace(p, loss);
    const Tensor workspace =
        numbers > 0 ? at::empty({numbers}, in.logits.options().dtype(at::kDouble)) : Tensor();
    C10_CUDA_CHECK(cuda::hard_attention_loss(storage_of(in.logits), p, loss, data(out),
                                             static_cast<double*>(data(workspace)), stream()));
  });
  return out;
}

Tensor loss_backward_cuda(const LossBackwardInputs& in) {
  check_loss_backward<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.logits.device());
  const Tensor out = at::empty(in.logits.sizes(), in.logits.options());
  const Operand grad(in.grad_loss);
  with_loss(in, [&](const cuda::Policy& p, const cuda::Loss& loss) {
    C10_CUDA_CHECK(cuda::hard_attention_loss_backward(storage_of(in.logits), p, loss, grad.data(),
                                                      data(out), stream()));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  using c10::DispatchKey;
  Sample::implement<sample_cuda>(m, DispatchKey::CUDA);
  SampleBackward::implement<sample_backward_cuda>(m, DispatchKey::CUDA);
  Loss::implement<loss_cuda>(m, DispatchKey::CUDA);
  LossBackward::implement<loss_backward_cuda>(m, DispatchKey::CUDA);
}

}  // namespace seqmem::hard_attention
