// The LSTM ops' derivatives and autocast.
//
// With z = W_ih x + b_ih + W_hh h' + b_hh and (i, f, g, o) its activated parts,
//   c = f c' + i g,  h = o tanh c   (h = W_hr o tanh c where projected)
// the gradients run backwards in time:
//   dc += dh o (1 - tanh^2 c),  do = dh tanh c,  di = dc g,  df = dc c',  dg = dc i,
//   dz = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o)),
//   dc' = dc f,  dh' = W_hh^T dz,  dx = W_ih^T dz,  dW_ih = dz x^T,  dW_hh = dz h'^T,  db = dz.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "../common/autograd.h"
#include "../common/call_saving.h"
#include "../ops/lstm_check.h"

namespace seqmem::lstm {
namespace {

// Arguments by position; the cell has no weight_hr and what follows.
enum Position { kInput, kHx, kCx, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr };
constexpr int kBatchFirst = kWeightHr + 4, kReverse = kBatchFirst + 1;

// Gradients come in three groups: of the input, of the state, of the weights.
std::array<bool, 3> groups(const Wanted& w) {
  return {w(kInput), w(kHx) || w(kCx),
          w(kWeightIh) || w(kWeightHh) || w(kBiasIh) || w(kBiasHh) || w(kWeightHr)};
}
bool has_bias(const Wanted& w) { return w.has(kBiasIh) || w.has(kBiasHh); }

// Copying these by hand spares microseconds of clone().
bool is_plain(const Tensor& t) {
  return !at::isTensorSubclassLike(t) && t.is_cpu() && t.is_contiguous() && t.numel() > 0;
}
Tensor copy_plain(const Tensor& t) {
  const Tensor copy = at::empty(t.sizes(), t.options());
  std::memcpy(copy.mutable_data_ptr(), t.const_data_ptr(), t.nbytes());
  return copy;
}

// Both biases have the same gradient. Autograd takes over a tensor that nobody else holds and
// copies any other, which costs more microseconds than this copy.
Tensor second_bias(const Wanted& w, const Tensor& bias) {
  if (!w(kBiasHh)) return Tensor();
  const bool shares = w(kBiasIh) && !at::GradMode::is_enabled() && is_plain(bias);
  return shares ? copy_plain(bias) : bias;
}

// A backward op's results, with the bias's for both biases.
template <class Gradients>
auto for_both_biases(const Wanted& w, const Gradients& gradients) {
  auto insert = [&](In input, In hx, In cx, In weight_ih, In weight_hh, In bias,
                    const auto&... rest) {
    return std::tuple(input, hx, cx, weight_ih, weight_hh, bias, second_bias(w, bias), rest...);
  };
  return std::apply(insert, gradients);
}

struct Cell : torch::autograd::Function<Cell> {
  template <class... Args>
  static variable_list forward(AutogradContext* ctx, const Args&... args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const CellInputs in = {args...};
    auto [hy, cy, gates] = call_saving<CellOp>(args...);
    ctx->set_materialize_grads(false);
    // Not the last flag, which would stand where others have weight_hr.
    note_present(ctx, in.input, in.hx, in.cx, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh);
    // On CPU the caller may change cy in place, as with nn.LSTMCell: the backward gets a copy,
    // which is an output too, since second derivatives pass through it.
    const Tensor cell = is_plain(cy) ? copy_plain(cy) : cy.is_cpu() ? cy.clone() : cy;
    ctx->save_for_backward(
        {in.input, tensor(in.hx), tensor(in.cx), in.weight_ih, in.weight_hh, gates, cell});
    if (cell.is_same(cy)) return {hy, cy, gates};
    return {hy, cy, gates, cell};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    Tensor grad_cy = grad[1];
    if (grad.size() > 3 && grad[3].defined())
      grad_cy = grad_cy.defined() ? grad_cy + grad[3] : grad[3];
    const auto found = run_backward<CellBackwardOp>(
        optional(grad[0]), optional(grad_cy), optional(grad[2]), saved[0], optional(saved[1]),
        optional(saved[2]), saved[3], saved[4], saved[5], saved[6], has_bias(wanted),
        groups(wanted));
    return wanted.list<CellOp>(for_both_biases(wanted, found));
  }
};

struct Sequence : torch::autograd::Function<Sequence> {
  template <class... Args>
  static variable_list forward(AutogradContext* ctx, const Args&... args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const SequenceInputs in = {args...};
    auto [output, hy, cy, gates, cells] = call_saving<SequenceOp>(args...);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({in.input, tensor(in.hx), tensor(in.cx), in.weight_ih, in.weight_hh,
                            tensor(in.weight_hr), tensor(in.lengths), tensor(in.reset),
                            tensor(in.batch_sizes), output, gates, cells});
    note_present(ctx, args...);
    return {output, hy, cy, gates, cells};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    const auto found = run_backward<SequenceBackwardOp>(
        optional(grad[0]), optional(grad[1]), optional(grad[2]), optional(grad[3]),
        optional(grad[4]), saved[0], optional(saved[1]), optional(saved[2]), saved[3], saved[4],
        optional(saved[5]), optional(saved[6]), optional(saved[7]), optional(saved[8]), saved[9],
        saved[10], saved[11], has_bias(wanted), wanted.has(kBatchFirst), wanted.has(kReverse),
        groups(wanted));
    return wanted.list<SequenceOp>(for_both_biases(wanted, found));
  }
};

// On CPU torch's cell keeps its state's dtype, so that c is not rounded at every step: it computes
// in what autocast's dtype and that of cx (or of the input, where the state is zeros) promote to.
struct CellType {
  template <class... Rest>
  at::ScalarType operator()(c10::DeviceType device, In input, Maybe, Maybe cx,
                            const Rest&...) const {
    const auto type = at::autocast::get_autocast_dtype(device);
    const auto state = (cx.has_value() ? *cx : input).scalar_type();
    const bool promotes = device == c10::DeviceType::CPU && state != at::kDouble;
    return promotes ? at::promote_types(type, state) : type;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  differentiate<CellOp, Cell, CellType>(m);
  differentiate<SequenceOp, Sequence>(m);
}

}  // namespace seqmem::lstm
