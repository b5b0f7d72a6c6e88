// The NTM functionals' derivatives and autocast.
//
// With K = d / (|M||k| + eps), d = M k, content c = softmax(beta K), gated u = g c + (1 - g) w',
// shifted v = s * u (circular) and weights w = v^gamma / sum, backwards:
//   dz = w (dw - sum dw w),  dgamma = sum dz log v,  dv = gamma dz / v  (0 where v = 0),
//   du_n = sum_j s_j dv_(n+j-r),  ds_j = sum_i dv_i u_(i-j+r),
//   dg = sum du (c - w'),  dw' = (1 - g) du,  dc = g du,
//   dy = c (dc - sum dc c),  dbeta = sum dy K,  dd = beta dy / (|M||k| + eps),
//   dM = dd k^T - dd K |k| M / |M|,  dk = dd^T M - (sum dd K |M|) k / |k|  (0 where a norm is 0).
// Reading r = w M: dM = w dr^T, dw = M dr. Writing M' = M (1 - w e^T) + w a^T:
//   dM = dM' (1 - w e^T),  dw = sum_m dM' (a - M e),  de = -sum_i w M dM',  da = sum_i w dM'.
#include "../common/autograd.h"
#include "../ops/ntm_addressing_check.h"

namespace seqmem::ntm_addressing {
namespace {

using at::Tensor;

// All four functionals take tensors alone and have one output. Torch spells a Function's whole name
// at every backward, so those below have short ones.
template <class Self, class Forward, class Backward>
struct Derivative;
template <class Self, const char* name, class... Args, class Backward>
struct Derivative<Self, Op<name, Tensor(Args...)>, Backward> : torch::autograd::Function<Self> {
  using Forward = Op<name, Tensor(Args...)>;

  static Tensor forward(AutogradContext* ctx, Args... tensors) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({tensors...});
    return Forward::call(tensors...);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    return backward(ctx, grad, std::index_sequence_for<Args...>());
  }

 private:
  template <size_t... k>
  static variable_list backward(AutogradContext* ctx, const variable_list& grad,
                                std::index_sequence<k...>) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, sizeof...(k)> wanted = {ctx->needs_input_grad(k)...};
    const auto found = run_backward<Backward>(grad[0], saved[k]..., wanted);
    return {wanted[k] ? std::get<k>(found) : Tensor()...};
  }
};

struct Content : Derivative<Content, ContentOps::Forward, ContentOps::Backward> {};
struct Addressing : Derivative<Addressing, AddressingOps::Forward, AddressingOps::Backward> {};
struct Read : Derivative<Read, ReadOps::Forward, ReadOps::Backward> {};
struct Write : Derivative<Write, WriteOps::Forward, WriteOps::Backward> {};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  differentiate<ContentOps::Forward, Content>(m);
  differentiate<AddressingOps::Forward, Addressing>(m);
  differentiate<ReadOps::Forward, Read>(m);
  differentiate<WriteOps::Forward, Write>(m);
}

}  // namespace seqmem::ntm_addressing
