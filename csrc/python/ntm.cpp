// A call of the module NTM as one plain Python function and, where it learns, as one autograd node:
// for a row alone, what stands around the op (the initial state, the output layer and their
// gradients, all small) took half as long as the sequence itself.
//
// Backwards: through the output layer, y = f(W q + b) of the features q, then ntm_backward. What
// all rows start from receives the sum of their gradients; dz = w (dw - w . dw) through a softmax.
#include <ATen/Dispatch.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/autograd.h"
#include "../ops/ntm_check.h"
#include "../ops/ntm_output.h"

namespace seqmem::ntm {
namespace {

// All differentiable arguments in one list.
enum Position {
  kInput,
  kState,
  kWeightings = kState + 3,
  kHeadWeight = kState + 5,
  kHeadBias,
  kOutputWeight,
  kOutputBias,
  kController
};

enum class Activation : int64_t { None, Sigmoid, Tanh, Relu };

Activation activation_of(const std::optional<std::string>& name) {
  if (name == "sigmoid") return Activation::Sigmoid;
  if (name == "tanh") return Activation::Tanh;
  return name == "relu" ? Activation::Relu : Activation::None;
}

struct Network {
  std::string heads;
  int64_t shift_range;
  bool lstm, squash;
  bool shared;  // all rows start from one state, which has no batch dimension
  bool logits;  // of which weightings are the softmax
  Activation activation;
  bool trace;

  std::vector<int64_t> numbers() const {
    return {shift_range, lstm, squash, shared, logits, int64_t(activation), trace};
  }
  static Network of(const std::string& heads, const std::vector<int64_t>& n) {
    return {heads, n[0], n[1] != 0, n[2] != 0, n[3] != 0, n[4] != 0, Activation(n[5]), n[6] != 0};
  }
};

// ---- softmax over the last dimension; torch's wakes a team of threads even for two rows. Sums are
// in double: where one slot has most of the weight, its gradient is the small rest of a difference.

constexpr int64_t kSmall = 1 << 14;

bool is_small(const Tensor& t) {
  return t.numel() <= kSmall && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

Tensor softmax(const Tensor& logits) {
  if (!is_small(logits)) return at::softmax(logits, -1);
  const Tensor in = logits.contiguous(), out = at::empty_like(in);
  const int64_t n = in.size(-1);
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "softmax", [&] {
    const auto* x = in.const_data_ptr<scalar_t>();
    auto* w = out.mutable_data_ptr<scalar_t>();
    for (const auto* end = x + in.numel(); x < end; x += n, w += n) {
      const scalar_t most = *std::max_element(x, x + n);
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += w[i] = std::exp(x[i] - most);
      for (int64_t i = 0; i < n; ++i) w[i] = static_cast<scalar_t>(w[i] / sum);
    }
  });
  return out;
}

Tensor softmax_backward(const Tensor& gradient, const Tensor& weightings) {
  if (!is_small(weightings))
    return at::_softmax_backward_data(gradient, weightings, -1, weightings.scalar_type());
  const Tensor g = gradient.contiguous(), out = at::empty_like(weightings);
  const int64_t n = g.size(-1);
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "softmax_backward", [&] {
    const auto *dw = g.const_data_ptr<scalar_t>(), *w = weightings.const_data_ptr<scalar_t>();
    auto* dz = out.mutable_data_ptr<scalar_t>();
    for (const auto* end = dw + g.numel(); dw < end; dw += n, w += n, dz += n) {
      double dot = 0, sum = 0;  // the weights sum to one but for their rounding
      for (int64_t i = 0; i < n; ++i) {
        dot += double(w[i]) * dw[i];
        sum += w[i];
      }
      for (int64_t i = 0; i < n; ++i) dz[i] = static_cast<scalar_t>(w[i] * (dw[i] - dot / sum));
    }
  });
  return out;
}

// ---- the output's activation

Tensor activate(Activation activation, const Tensor& t) {
  switch (activation) {
    case Activation::Sigmoid: return at::sigmoid(t);
    case Activation::Tanh: return at::tanh(t);
    case Activation::Relu: return at::relu(t);
    case Activation::None: break;
  }
  return t;
}

Tensor activate_backward(Activation activation, const Tensor& gradient, const Tensor& output) {
  switch (activation) {
    case Activation::Sigmoid: return at::sigmoid_backward(gradient, output);
    case Activation::Tanh: return at::tanh_backward(gradient, output);
    case Activation::Relu: return at::threshold_backward(gradient, output, 0);
    case Activation::None: break;
  }
  return gradient;
}

// ---- the whole

// Of a part of the state; hidden and cell begin with the layers.
int64_t batch_dimension(int64_t part) { return part < 2 ? 1 : 0; }

// The state before the first step as the op takes it; `all` with weightings after their softmax.
variable_list first_state(TensorList all, bool shared) {
  variable_list state = all.slice(kState, kHeadWeight - kState).vec();
  if (!shared) return state;
  const int64_t B = all[kInput].size(1);
  for (int64_t k = 0; k < kHeadWeight - kState; ++k) {
    Tensor& t = state[k];
    t = t.unsqueeze(batch_dimension(k));
    if (B == 1) continue;
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes[batch_dimension(k)] = B;
    t = t.expand(sizes);
  }
  return state;
}

struct Results {
  variable_list outputs;  // but for the first, the output layer's
  Tensor features, saved, checkpoints;
};

Results run(TensorList all, const Network& net, bool save) {
  const variable_list state = first_state(all, net.shared);
  auto [features, hidden, cell, memory, weightings, reads, trace, saved, checkpoints] =
      ForwardOp::call(all[kInput], state[0], state[1], state[2], state[3], state[4],
                      all.slice(kController), all[kHeadWeight], all[kHeadBias], {}, {}, {},
                      net.heads, net.shift_range, net.lstm, net.squash, net.trace || save, save);
  return {{Tensor(), hidden, cell, memory, weightings, reads, trace}, features, saved, checkpoints};
}

// The network's output, not differentiable.
Tensor answer(const Tensor& features, TensorList all, const Network& net) {
  return activate(net.activation, output_layer(features, all[kOutputWeight], all[kOutputBias]));
}

bool belongs_to_output(size_t k) { return k == kOutputWeight || k == kOutputBias; }

// Whether a gradient is asked for of anything before the output layer.
bool sequence_learns(TensorList all) {
  for (size_t k = 0; k < all.size(); ++k)
    if (all[k].requires_grad() && !belongs_to_output(k)) return true;
  return false;
}

// Gradients that have a derivative themselves: the same once more, of ops that autograd knows.
variable_list differentiable_backward(AutogradContext* ctx, TensorList all, const Network& net,
                                      const variable_list& grad) {
  variable_list own;  // as views, for one argument may have been computed from another
  for (const Tensor& t : all) own.push_back(t.view_as(t));
  variable_list used = own;
  if (net.logits) used[kWeightings] = at::softmax(own[kWeightings], -1);
  auto [results, features, saved, checkpoints] = run(used, net, false);
  results[0] = activate(net.activation, at::linear(features, own[kOutputWeight], own[kOutputBias]));
  variable_list outputs, seeds, inputs;
  for (size_t k = 0; k < grad.size(); ++k) {
    if (!grad[k].defined() || !results[k].requires_grad()) continue;
    outputs.push_back(results[k]);
    seeds.push_back(grad[k]);
  }
  variable_list gradients(own.size());
  if (outputs.empty()) return gradients;
  for (size_t k = 0; k < own.size(); ++k)
    if (ctx->needs_input_grad(k)) inputs.push_back(own[k]);
  const variable_list found =
      torch::autograd::grad(outputs, inputs, seeds, std::nullopt, true, true);
  for (size_t k = 0, next = 0; k < own.size(); ++k)
    if (ctx->needs_input_grad(k)) gradients[k] = found[next++];
  return gradients;
}

class NetworkFunction : public torch::autograd::Function<NetworkFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, TensorList all, const Network& net) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list used = all.vec();
    if (net.logits) used[kWeightings] = softmax(all[kWeightings]);
    const bool learns = sequence_learns(all);
    auto [outputs, features, saved, checkpoints] = run(used, net, learns);
    outputs[0] = answer(features, all, net);
    if (!learns) ctx->mark_non_differentiable({outputs.begin() + 1, outputs.end()});
    ctx->set_materialize_grads(false);
    variable_list kept = all.vec();
    const Tensor output = net.activation == Activation::None ? Tensor() : outputs[0];
    for (const Tensor& t : {used[kWeightings], output, features, outputs[6], saved, checkpoints})
      kept.push_back(t);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["heads"] = net.heads;
    ctx->saved_data["numbers"] = net.numbers();
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list kept = ctx->get_saved_variables();
    const auto all = TensorList(kept).slice(0, kept.size() - 6);
    const auto rest = TensorList(kept).slice(all.size());
    const Network net = Network::of(ctx->saved_data["heads"].toStringRef(),
                                    ctx->saved_data["numbers"].toIntVector());
    if (at::GradMode::is_enabled())
      return only_wanted(ctx, differentiable_backward(ctx, all, net, grad), 1);
    at::AutoDispatchBelowADInplaceOrView guard;
    return only_wanted(ctx, fast_backward(ctx, all, rest, net, grad), 1);
  }

 private:
  // In the order of `all`.
  static variable_list fast_backward(AutogradContext* ctx, TensorList all, TensorList rest,
                                     const Network& net, const variable_list& grad) {
    const Mask mask = {
        any_wanted(ctx, kInput, kState), any_wanted(ctx, kState, kHeadWeight),
        any_wanted(ctx, kHeadWeight, kOutputWeight) || any_wanted(ctx, kController, all.size()),
        false};
    std::array<Tensor, 3> of_output;  // features, weight, bias
    if (grad[0].defined())
      of_output = output_layer_backward(activate_backward(net.activation, grad[0], rest[1]),
                                        rest[2], all[kOutputWeight], all[kOutputBias],
                                        {mask != Mask(), ctx->needs_input_grad(kOutputWeight),
                                         ctx->needs_input_grad(kOutputBias)});
    variable_list found(all.size() - 2);
    if (mask != Mask())
      found = sequence_backward(all, rest, net, grad, optional(of_output[0]), mask);
    found.insert(found.begin() + kOutputWeight, {of_output[1], of_output[2]});
    return found;
  }

  // In the order of `all`, without the output layer's.
  static variable_list sequence_backward(TensorList all, TensorList rest, const Network& net,
                                         const variable_list& grad, Maybe grad_features,
                                         const Mask& mask) {
    variable_list used = all.vec();
    used[kWeightings] = rest[0];
    const variable_list state = first_state(used, net.shared);
    variable_list found = BackwardOp::call(
        grad_features, optional(grad[1]), optional(grad[2]), optional(grad[3]), optional(grad[4]),
        optional(grad[5]), optional(grad[6]), all[kInput], state[0], state[1], state[2], state[3],
        state[4], all.slice(kController), all[kHeadWeight], all[kHeadBias], {}, {}, {}, rest[2],
        rest[3], rest[4], rest[5], net.heads, net.shift_range, net.lstm, net.squash, mask);
    if (net.shared && mask[1]) {
      for (int k = kState; k < kHeadWeight; ++k) {
        const int64_t batch = batch_dimension(k - kState);
        found[k] = found[k].size(batch) == 1 ? found[k].squeeze(batch) : found[k].sum(batch);
      }
      if (net.logits) found[kWeightings] = softmax_backward(found[kWeightings], rest[0]);
    }
    return found;
  }
};

// Whether kernels and backward autograd alone see a call: no transform, tracer, mode or autocast,
// and no tensors but plain ones of the CPU.
bool nobody_else_listens(TensorList all) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const DispatchKeySet usual({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  if (local.included_ - usual != DispatchKeySet()) return false;
  if (!local.excluded_.has(DispatchKey::AutocastCPU)) return false;
  const DispatchKeySet plain({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                              DispatchKey::ADInplaceOrView});
  return std::all_of(all.begin(), all.end(), [&](const Tensor& t) {
    return (t.key_set() | plain) == plain && !t._fw_grad(0).defined();
  });
}

// output, state (5), trace; nothing where the call must go the long way.
std::optional<variable_list> module(In input, const variable_list& state,
                                    const variable_list& controller, const variable_list& rest,
                                    const std::string& heads, int64_t shift_range, bool lstm,
                                    bool squash, bool shared, bool logits,
                                    const std::optional<std::string>& activation, bool trace) {
  variable_list all = {input};
  all.insert(all.end(), state.begin(), state.end());
  all.insert(all.end(), rest.begin(), rest.end());
  all.insert(all.end(), controller.begin(), controller.end());
  if (!nobody_else_listens(all)) return std::nullopt;
  const bool learns = any_requires_grad(all);
  const Network net = {heads, shift_range, lstm, squash, shared, logits, activation_of(activation),
                       trace};
  if (learns) return NetworkFunction::apply(TensorList(all), net);
  at::AutoDispatchBelowADInplaceOrView guard;
  if (logits) all[kWeightings] = softmax(all[kWeightings]);
  auto [outputs, features, saved, checkpoints] = run(all, net, false);
  outputs[0] = answer(features, all, net);
  return outputs;
}

}  // namespace

void bind(pybind11::module_& m) { m.def("ntm_module", torch::wrap_pybind_function_no_gil(module)); }

}  // namespace seqmem::ntm
