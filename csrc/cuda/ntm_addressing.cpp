// The NTM functionals at the CUDA key: all of a call from C++, since Python's launch of a kernel
// takes many times longer than the kernel. Formulas: csrc/autograd/ntm_addressing.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../ops/ntm_addressing_check.h"
#include "launcher.h"
#include "ntm_addressing_kernel.h"

namespace seqmem::ntm_addressing {
namespace {

// Undefined where none is needed: even an empty allocation takes the host a microsecond.
Tensor workspace(const Tensor& like, int64_t numbers) {
  if (numbers == 0) return {};
  const auto type = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({numbers}, like.options().dtype(type));
}

// Calls f with the pointers of content addressing, or of all.
template <class F>
void with_pointers(const ContentInputs& in, const F& f) {
  const Operand memory(in.memory), key(in.key), beta(in.beta);
  f(Addressing{memory.data(), key.data(), beta.data(), nullptr, nullptr, nullptr, nullptr});
}
template <class F>
void with_pointers(const AddressingInputs& in, const F& f) {
  const Operand gate(in.gate), shift(in.shift), gamma(in.gamma), prev_weights(in.prev_weights);
  with_pointers(static_cast<const ContentInputs&>(in), [&](Addressing a) {
    a.gate = gate.data();
    a.shift = shift.data();
    a.gamma = gamma.data();
    a.prev_weights = prev_weights.data();
    f(a);
  });
}

// Of content as well.
template <class Inputs>
void run(const Inputs& in, const Shape& s, void* weights) {
  const Storage storage = storage_of(in.memory);
  const Tensor scratch = workspace(in.memory, cuda::ntm_address_workspace(storage, s));
  with_pointers(in, [&](const Addressing& a) {
    C10_CUDA_CHECK(cuda::ntm_address(storage, s, a, weights, data(scratch), stream()));
  });
}

template <class Inputs>
void run_backward(const Inputs& in, const Shape& s, const void* grad, void* memory, void* key,
                  void* beta, void* gate = nullptr, void* shift = nullptr, void* gamma = nullptr,
                  void* prev_weights = nullptr) {
  const Storage storage = storage_of(in.memory);
  const Tensor scratch = workspace(in.memory, cuda::ntm_address_backward_workspace(storage, s));
  const AddressingGradients out = {memory, key, beta, gate, shift, gamma, prev_weights};
  with_pointers(in, [&](const Addressing& a) {
    C10_CUDA_CHECK(cuda::ntm_address_backward(storage, s, a, grad, out, data(scratch), stream()));
  });
}

void run(const ReadInputs& in, const Shape& s, void* reads) {
  const Operand memory(in.memory), weights(in.weights);
  C10_CUDA_CHECK(
      cuda::ntm_read(storage_of(in.memory), s, memory.data(), weights.data(), reads, stream()));
}

void run_backward(const ReadInputs& in, const Shape& s, const void* grad, void* grad_memory,
                  void* grad_weights) {
  const Operand memory(in.memory), weights(in.weights);
  C10_CUDA_CHECK(cuda::ntm_read_backward(storage_of(in.memory), s, memory.data(), weights.data(),
                                         grad, grad_memory, grad_weights, stream()));
}

void run(const WriteInputs& in, const Shape& s, void* new_memory) {
  const Operand memory(in.memory), weights(in.weights), erase(in.erase), add(in.add);
  const Write a = {memory.data(), weights.data(), erase.data(), add.data()};
  C10_CUDA_CHECK(cuda::ntm_write(storage_of(in.memory), s, a, new_memory, stream()));
}

void run_backward(const WriteInputs& in, const Shape& s, const void* grad, void* grad_memory,
                  void* grad_weights, void* grad_erase, void* grad_add) {
  const Operand memory(in.memory), weights(in.weights), erase(in.erase), add(in.add);
  const Write a = {memory.data(), weights.data(), erase.data(), add.data()};
  const WriteGradients out = {grad_memory, grad_weights, grad_erase, grad_add};
  C10_CUDA_CHECK(cuda::ntm_write_backward(storage_of(in.memory), s, a, grad, out, stream()));
}

Shape shape_of(const Checked<int64_t>& c) { return {c.B, c.H, c.N, c.M, c.taps}; }

template <class Ops>
Tensor forward_cuda(const typename Ops::Inputs& in) {
  const auto c = Ops::template check<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.memory.device());
  const Tensor out = at::empty(c.output, in.memory.options());
  run(in, shape_of(c), data(out));
  return out;
}

template <class Ops>
Tensors<Ops::n> backward_cuda(const typename Ops::BackwardInputs& in) {
  const auto c = Ops::template check_backward<int64_t>(in);
  const c10::cuda::CUDAGuard guard(in.memory.device());
  const Tensors<Ops::n> out = gradients(in, in.output_mask);
  const Operand grad(in.grad);
  std::apply(
      [&](const auto&... of) {
        run_backward(static_cast<const typename Ops::Inputs&>(in), shape_of(c), grad.data(),
                     data(of)...);
      },
      out);
  return out;
}

template <class Ops>
void implement(torch::Library& m) {
  Ops::Forward::template implement<forward_cuda<Ops>>(m, c10::DispatchKey::CUDA);
  Ops::Backward::template implement<backward_cuda<Ops>>(m, c10::DispatchKey::CUDA);
}

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  implement<ContentOps>(m);
  implement<AddressingOps>(m);
  implement<ReadOps>(m);
  implement<WriteOps>(m);
}

}  // namespace seqmem::ntm_addressing
