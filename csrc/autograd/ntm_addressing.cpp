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
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../common/autograd.h"

namespace seqmem::ntm_addressing {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What Args tensors are called with, and what their backward is.
template <class Sequence>
struct Signature;
template <size_t... I>
struct Signature<std::index_sequence<I...>> {
  template <size_t>
  using Argument = const Tensor&;
  template <size_t>
  using Gradient = Tensor;
  using Forward = Tensor(Argument<I>...);
  using Gradients = std::tuple<Gradient<I>...>;
  using Backward = Gradients(const Tensor&, Argument<I>..., std::array<bool, sizeof...(I)>);
};

// An op of n tensors with one output, and its backward op: all four functionals are of this kind.
template <const char* name, const char* backward_name, class Sequence>
struct Op;
template <const char* name, const char* backward_name, size_t... I>
struct Op<name, backward_name, std::index_sequence<I...>> {
  using Types = Signature<std::index_sequence<I...>>;
  template <size_t>
  using Argument = const Tensor&;
  static constexpr size_t n = sizeof...(I);

  static const auto& op() {
    static const auto found = find_op<typename Types::Forward>(name);
    return found;
  }
  static const auto& backward_op() {
    static const auto found = find_op<typename Types::Backward>(backward_name);
    return found;
  }

  class Function : public torch::autograd::Function<Function> {
   public:
    static Tensor forward(AutogradContext* ctx, Argument<I>... tensors) {
      at::AutoDispatchBelowADInplaceOrView guard;
      ctx->save_for_backward({tensors...});
      return op().call(tensors...);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
      const auto saved = ctx->get_saved_variables();
      const std::array<bool, n> wanted = {ctx->needs_input_grad(I)...};
      const auto found = run_backward(backward_op(), grad[0], saved[I]..., wanted);
      return {wanted[I] ? std::get<I>(found) : Tensor()...};
    }
  };

  static Tensor autograd(Argument<I>... tensors) {
    if (any_requires_grad(tensors...)) return Function::apply(tensors...);
    at::AutoDispatchBelowADInplaceOrView guard;
    return op().call(tensors...);
  }

  template <c10::DeviceType device, c10::DispatchKey key>
  static Tensor autocast(Argument<I>... tensors) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    const Cast<device> cast;
    return op().call(cast(tensors)...);
  }
};

constexpr char kContent[] = "seqmem::ntm_content_addressing",
               kContentBackward[] = "seqmem::ntm_content_addressing_backward",
               kAddressing[] = "seqmem::ntm_addressing",
               kAddressingBackward[] = "seqmem::ntm_addressing_backward",
               kRead[] = "seqmem::ntm_read", kReadBackward[] = "seqmem::ntm_read_backward",
               kWrite[] = "seqmem::ntm_write", kWriteBackward[] = "seqmem::ntm_write_backward";

using Content = Op<kContent, kContentBackward, std::make_index_sequence<3>>;
using Addressing = Op<kAddressing, kAddressingBackward, std::make_index_sequence<7>>;
using Read = Op<kRead, kReadBackward, std::make_index_sequence<2>>;
using Write = Op<kWrite, kWriteBackward, std::make_index_sequence<4>>;

}  // namespace

TORCH_LIBRARY_IMPL(seqmem, Autograd, m) {
  m.impl("ntm_content_addressing", Content::autograd);
  m.impl("ntm_addressing", Addressing::autograd);
  m.impl("ntm_read", Read::autograd);
  m.impl("ntm_write", Write::autograd);
}

template <c10::DeviceType device, c10::DispatchKey key>
void cast_under(torch::Library& m) {
  m.impl("ntm_content_addressing", Content::autocast<device, key>);
  m.impl("ntm_addressing", Addressing::autocast<device, key>);
  m.impl("ntm_read", Read::autocast<device, key>);
  m.impl("ntm_write", Write::autocast<device, key>);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCPU, m) {
  cast_under<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCH_LIBRARY_IMPL(seqmem, AutocastCUDA, m) {
  cast_under<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>(m);
}

}  // namespace seqmem::ntm_addressing
