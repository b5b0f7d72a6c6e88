// Delta memory: schemas, checks, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/delta_memory.py.
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/op.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/delta_memory_kernel.h"

namespace seqmem::delta_memory {
namespace {

using at::Tensor;
using Mask = std::array<bool, 6>;
using Scale = std::optional<double>;

constexpr char kName[] = "seqmem::delta_memory";
constexpr char kBackwardName[] = "seqmem::delta_memory_backward";
using ForwardOp =
    Op<kName, Tensors<3>(In, In, In, In, Maybe, Maybe, Scale, bool, Maybe, Maybe, bool)>;
using BackwardOp = Op<kBackwardName, Tensors<6>(Maybe, Maybe, In, In, In, In, Maybe, Maybe, Scale,
                                                bool, Maybe, Maybe, In, Mask)>;

struct Inputs {
  In q, k, v, beta;
  Maybe log_decay, state;
  Scale scale;
  bool qk_l2norm;
  Maybe lengths, reset;
};

struct ForwardInputs : Inputs {
  bool save;
};

struct Gradients {
  Maybe grad_output, grad_final_state;
};

struct BackwardInputs : Gradients, Inputs {
  In states;
  Mask output_mask;
};

// ---- checks

template <class Int>
struct Sizes {
  Int B, T, Hk, H, K, V;
  int64_t segment;  // steps from one kept memory to the next

  Int segments() const { return (T + segment - 1) / segment; }
};

at::ScalarType wide(const Tensor& q) { return at::toOpMathType(q.scalar_type()); }

// Of q's dtype, or of that of the memory.
template <class Int>
void check_wide(const Check<Int>& check, const char* name, const Tensor& t, const Tensor& q) {
  check.strided(name, t);
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == q.scalar_type() || type == wide(q), check.op(), ": expected ", name,
                   " of q's dtype ", q.scalar_type(), " or of ", wide(q), ", got ", type);
  check.same_device(name, t);
}

constexpr int64_t kLongest = 1024;

// What is kept takes as much as the inputs and outputs that it stands for, or less.
template <class Int>
int64_t segment_of(const Tensor& q, const Int& K, const Int& V) {
  const int64_t narrow = q.element_size() < 4 ? 2 : 1;
  int64_t segment = kChunk;
  while (segment < kLongest && (K + segment) * V * narrow > (K + V) * (2 * segment)) segment *= 2;
  return segment;
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  check.floating_input();
  check.dims("q", in.q, 4);
  check.same_kind("k", in.k);
  check.same_kind("v", in.v);
  check.dims("v", in.v, 4);
  Sizes<Int> s = {check.size(in.q, 0),
                  check.size(in.q, 1),
                  check.size(in.q, 2),
                  check.size(in.v, 2),
                  check.size(in.q, 3),
                  check.size(in.v, 3),
                  0};
  TORCH_CHECK_VALUE(s.Hk > 0 && s.K > 0, check.op(),
                    ": expected q with at least one head and one feature, got shape ",
                    in.q.sym_sizes());
  check.shape("k", in.k, {s.B, s.T, s.Hk, s.K});
  check.shape("v", in.v, {s.B, s.T, s.H, s.V});
  TORCH_CHECK_VALUE(s.H % s.Hk == 0, check.op(), ": expected v with a multiple of q's ", s.Hk,
                    " heads, got ", s.H, " (shape ", in.v.sym_sizes(), ")");
  check_wide(check, "beta", in.beta, in.q);
  check.shape("beta", in.beta, {s.B, s.T, s.H});
  if (in.log_decay.has_value()) {
    const Tensor& decay = *in.log_decay;
    check_wide(check, "log_decay", decay, in.q);
    if (decay.dim() == 4) {
      check.shape("log_decay", decay, {s.B, s.T, s.H, s.K});
    } else {
      check.shape("log_decay", decay, {s.B, s.T, s.H});
    }
  }
  if (in.state.has_value()) {
    check_wide(check, "state", *in.state, in.q);
    check.shape("state", *in.state, {s.B, s.H, s.K, s.V});
  }
  check.lengths(in.lengths, s.B, s.T);
  check.reset(in.reset, s.B, s.T);
  s.segment = segment_of(in.q, s.K, s.V);
  return s;
}

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.q, "q"), in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.q, "q");
  const auto s = check_inputs(check, in);
  check.operand("grad_output", in.grad_output, {s.B, s.T, s.H, s.V});
  if (in.grad_final_state.has_value())
    check.typed("grad_final_state", *in.grad_final_state, wide(in.q), {s.B, s.H, s.K, s.V});
  check.typed("states", in.states, wide(in.q), {s.B, s.H, s.segments(), s.K + s.segment, s.V});
  return s;
}

// ---- how a call is run

constexpr double kProductsPerMicrosecond = 10e3, kCallWorthSharing = 60;

int threads_for(const Shape& s, double passes) {
  const double cost = passes * s.B * s.H * s.K * s.V * (s.T + 1.0) / kProductsPerMicrosecond;
  return static_cast<int>(std::clamp<double>(cost / kCallWorthSharing, 1, available_threads()));
}

// Work for all threads where there are few heads; the same whatever the number of threads.
constexpr int64_t kUnits = 16, kNarrowest = 32;

// Tensors as the kernels read them, alive as long as this.
struct Call {
  std::vector<Tensor> kept;
  Operands operands;
  Shape shape;

  Call(const Inputs& in, const Sizes<int64_t>& s) : operands(wide(in.q)) {
    const int64_t heads = std::max<int64_t>(s.B * s.H, 1);
    const int64_t most = std::max<int64_t>(s.V / kNarrowest, 1);
    shape = {.B = s.B,
             .T = s.T,
             .Hk = s.Hk,
             .H = s.H,
             .K = s.K,
             .V = s.V,
             .segment = s.segment,
             .slices = std::clamp<int64_t>(kUnits / heads, 1, most),
             .decay = !in.log_decay.has_value()  ? Decay::None
                      : in.log_decay->dim() == 3 ? Decay::Head
                                                 : Decay::Feature,
             .l2norm = in.qk_l2norm,
             .scale = in.scale.value_or(1 / std::sqrt(double(s.K))),
             .lengths = nullptr,
             .reset = nullptr};
    if (in.lengths.has_value())
      shape.lengths = keep(in.lengths->to(at::kLong).contiguous()).const_data_ptr<int64_t>();
    if (in.reset.has_value()) shape.reset = keep(in.reset->contiguous()).const_data_ptr<bool>();
  }

  const Tensor& keep(const Tensor& t) {
    kept.push_back(t);
    return kept.back();
  }

  Rows rows(const Tensor& t) {
    const bool as_it_is = t.size(3) <= 1 || t.stride(3) == 1;
    const Tensor& r = keep(as_it_is ? t : t.contiguous());
    return {r.const_data_ptr(), r.stride(0), r.stride(1), r.stride(2)};
  }
};

// ---- forward

template <class Int>
Tensors<3> allocate(const ForwardInputs& in, const Sizes<Int>& s) {
  const auto computed = in.q.options().dtype(wide(in.q));
  return {result_of<Int>(in.v.options(), {s.B, s.T, s.H, s.V}),
          kept_of<Int>(true, computed, {s.B, s.H, s.K, s.V}),
          kept_of<Int>(in.save, computed, {s.B, s.H, s.segments(), s.K + s.segment, s.V})};
}

Tensors<3> forward_cpu(const ForwardInputs& in) {
  const auto s = check<int64_t>(in);
  Tensors<3> out = allocate(in, s);
  const auto& [output, final_state, states] = out;
  Call call(in, s);
  const Forward arguments = {.q = call.rows(in.q),
                             .k = call.rows(in.k),
                             .v = call.rows(in.v),
                             .beta = call.operands(in.beta),
                             .decay = call.operands(in.log_decay),
                             .state = call.operands(in.state),
                             .output = data(output),
                             .final_state = data(final_state),
                             .states = in.save ? data(states) : nullptr,
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads_for(call.shape, 4), arguments, storage_of(in.q),
         call.shape);
  return out;
}

Tensors<3> forward_meta(const ForwardInputs& in) { return allocate(in, check<c10::SymInt>(in)); }

// ---- backward

Tensors<6> backward_cpu(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  Call call(in, s);
  const auto computed = in.q.options().dtype(wide(in.q));
  const bool by_feature = call.shape.decay == Decay::Feature;
  const int64_t slices = call.shape.slices, parts = slices * (s.H / s.Hk);
  const Tensor grad_q = KeptBlocks::result(in.q.sizes(), in.q.options());
  const Tensor grad_k = KeptBlocks::result(in.q.sizes(), in.q.options());
  const Tensor grad_v = KeptBlocks::result(in.v.sizes(), in.q.options());
  const Tensor grad_beta = at::zeros({slices, s.B, s.T, s.H}, computed);
  const Tensor grad_state = at::empty({s.B, s.H, s.K, s.V}, computed);
  Tensor grad_decay, parts_q, parts_k;
  if (in.log_decay.has_value()) {
    grad_decay = by_feature ? KeptBlocks::result({slices, s.B, s.T, s.H, s.K}, computed)
                            : at::empty({slices, s.B, s.T, s.H}, computed);
    if (in.lengths.has_value()) grad_decay.zero_();  // beyond a row's end
  }
  if (parts > 1) {
    parts_q = KeptBlocks::empty({s.B, s.H, slices, s.T, s.K}, computed);
    parts_k = KeptBlocks::empty({s.B, s.H, slices, s.T, s.K}, computed);
  }
  const Backward arguments = {
      .grad_output = in.grad_output.has_value() ? call.rows(*in.grad_output) : Rows{},
      .q = call.rows(in.q),
      .k = call.rows(in.k),
      .v = call.rows(in.v),
      .grad_final = call.operands(in.grad_final_state),
      .beta = call.operands(in.beta),
      .decay = call.operands(in.log_decay),
      .states = call.operands(in.states),
      .grad_q = data(grad_q),
      .grad_k = data(grad_k),
      .grad_v = data(grad_v),
      .grad_beta = data(grad_beta),
      .grad_decay = data(grad_decay),
      .grad_state = data(grad_state),
      .parts_q = data(parts_q),
      .parts_k = data(parts_k),
      .workspace = nullptr};
  launch(SEQMEM_CHOOSE(backward_kernel), threads_for(call.shape, 12), arguments, storage_of(in.q),
         call.shape);
  const auto none = [&] { return at::empty({0}, in.q.options()); };  // each its own
  // Of all slices, one after the other.
  auto summed = [&](const Tensor& each, const Tensor& like) {
    Tensor total = each[0];
    for (int64_t i = 1; i < slices; ++i) total.add_(each[i]);
    return total.to(like.scalar_type());
  };
  const Mask& mask = in.output_mask;
  return {mask[0] ? grad_q : none(),
          mask[1] ? grad_k : none(),
          mask[2] ? grad_v : none(),
          mask[3] ? summed(grad_beta, in.beta) : none(),
          mask[4] && in.log_decay.has_value() ? summed(grad_decay, *in.log_decay) : none(),
          mask[5] && in.state.has_value() ? grad_state.to(in.state->scalar_type()) : none()};
}

Tensors<6> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  const auto none = [&] { return at::empty({0}, in.q.options()); };  // each its own
  size_t k = 0;
  auto make = [&](const Tensor* like) {
    const bool wanted = in.output_mask[k++] && like != nullptr;
    return wanted ? at::empty_symint(like->sym_sizes(), like->options()) : none();
  };
  return {make(&in.q),
          make(&in.k),
          make(&in.v),
          make(&in.beta),
          make(address(in.log_decay)),
          make(address(in.state))};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                           \
  "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? state, float? scale, " \
  "bool qk_l2norm, Tensor? lengths, Tensor? reset, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS "bool save) -> (Tensor output, Tensor final_state, Tensor states)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m, "(Tensor? grad_output, Tensor? grad_final_state, " SEQMEM_INPUTS
         "Tensor states, bool[6] output_mask) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
         "Tensor grad_beta, Tensor grad_log_decay, Tensor grad_state)");
}

#undef SEQMEM_INPUTS

}  // namespace seqmem::delta_memory
