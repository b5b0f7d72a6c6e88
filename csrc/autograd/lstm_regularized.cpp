// The derivative of the LSTM with zoneout and layer normalisation, and its autocast.
//
// With N(v; a) = a v^, v^ = (v - mean v) / sqrt(var v + 1e-5), and the identity without norms,
//   z = N(W_ih x; a_ih) + N(W_hh h'; a_hh) + b,  (i, f, g, o) its activated parts,
//   c* = f c' + i g,  y = tanh(N(c*; a_c) + s_c),  h* = o y,
//   c = k_c c' + (1 - k_c) c*,  h = k_h h' + (1 - k_h) h*
// the gradients run backwards in time:
//   dh* = dh (1 - k_h),  do = dh* y,  dn = dh* o (1 - y^2),
//   dc* = dc (1 - k_c) + N'(dn),  di = dc* g,  df = dc* c',  dg = dc* i,
//   dz = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o)),  dx = N'(dz; ih),  dv = N'(dz; hh),
//   dc' = dc* f + dc k_c,  dh' = W_hh^T dv + dh k_h,  d input = W_ih^T dx,
//   dW_ih = dx x^T,  dW_hh = dv h'^T,  db = dz,  da = dz v^ (or dn c^),  ds_c = dn
// where, with p = a d,  N'(d) = (p - mean p - v^ mean(p v^)) / sqrt(var v + 1e-5).
#include "../ops/lstm_regularized_check.h"

#include "../common/autograd.h"
#include "../common/call_saving.h"

namespace seqmem::lstm_regularized {
namespace {

// Arguments by position.
enum Position { kInput, kHx, kCx, kFirstWeight, kEndWeight = 11 };

struct Regularized : torch::autograd::Function<Regularized> {
  template <class... Args>
  static variable_list forward(AutogradContext* ctx, const Args&... args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const ForwardInputs in = {args...};
    auto [output, hy, cy, gates, cells, ih, hh, c, scales] = call_saving<ForwardOp>(args...);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({ih, hh, c, scales});
    const bool norms = has_norms(in);
    auto of_norms = [&](const at::Tensor& t) { return norms ? t : at::Tensor(); };
    ctx->save_for_backward({in.input,
                            tensor(in.hx),
                            tensor(in.cx),
                            in.weight_ih,
                            in.weight_hh,
                            tensor(in.bias_ih),
                            tensor(in.bias_hh),
                            tensor(in.gain_ih),
                            tensor(in.gain_hh),
                            tensor(in.gain_c),
                            tensor(in.shift_c),
                            tensor(in.seed),
                            tensor(in.lengths),
                            tensor(in.reset),
                            tensor(in.batch_sizes),
                            output,
                            gates,
                            cells,
                            of_norms(ih),
                            of_norms(hh),
                            of_norms(c),
                            of_norms(scales)});
    note_present(ctx, args...);
    ctx->saved_data["zoneout_h"] = in.zoneout_h;
    ctx->saved_data["zoneout_c"] = in.zoneout_c;
    ctx->saved_data["batch_first"] = in.batch_first;
    ctx->saved_data["reverse"] = in.reverse;
    return {output, hy, cy, gates, cells, ih, hh, c, scales};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx);
    bool weights = false;
    for (int k = kFirstWeight; k < kEndWeight; ++k) weights = weights || wanted(k);
    const Mask mask = {wanted(kInput), wanted(kHx) || wanted(kCx), weights};
    auto some = [&](size_t k) { return optional(saved[k]); };
    return wanted.list<ForwardOp>(run_backward<BackwardOp>(
        optional(grad[0]), optional(grad[1]), optional(grad[2]), optional(grad[3]),
        optional(grad[4]), saved[0], some(1), some(2), saved[3], saved[4], some(5), some(6),
        some(7), some(8), some(9), some(10), some(11), ctx->saved_data["zoneout_h"].toDouble(),
        ctx->saved_data["zoneout_c"].toDouble(), some(12), some(13), some(14),
        ctx->saved_data["batch_first"].toBool(), ctx->saved_data["reverse"].toBool(), saved[15],
        saved[16], saved[17], some(18), some(19), some(20), some(21), mask));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) { differentiate<ForwardOp, Regularized>(m); }

}  // namespace seqmem::lstm_regularized
