// Entmax's derivative and autocast.
//
// With s = p^(2 - alpha) on the support and 0 elsewhere, p~ = s / sum s, h = -p log p and the
// gradient g of p:
//   dz = s (g - sum p~ g)
//   dalpha = sum_i g_i [ (p_i - p~_i) / (alpha - 1)^2 + (h_i - p~_i sum h) / (alpha - 1) ]
#include "../common/autograd.h"

namespace seqmem::entmax {
namespace {

constexpr char kName[] = "seqmem::entmax", kBackwardName[] = "seqmem::entmax_backward";
using Forward = Op<kName, at::Tensor(In, Maybe, double, int64_t)>;
using Backward =
    Op<kBackwardName, Tensors<2>(In, In, Maybe, double, int64_t, In, std::array<bool, 2>)>;

struct Entmax : torch::autograd::Function<Entmax> {
  static at::Tensor forward(AutogradContext* ctx, In input, Maybe alpha, double power,
                            int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor output = Forward::call(input, alpha, power, dim);
    ctx->save_for_backward({input, tensor(alpha), output});
    note_present(ctx, input, alpha, power, dim);
    ctx->saved_data["power"] = power;
    ctx->saved_data["dim"] = dim;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    return wanted.list<Forward>(run_backward<Backward>(
        grad[0], saved[0], optional(saved[1]), ctx->saved_data["power"].toDouble(),
        ctx->saved_data["dim"].toInt(), saved[2], wanted.mask<2>()));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<Forward, Entmax, Float32>(m); }

}  // namespace seqmem::entmax
