// The ops of the Differentiable Neural Computer: schemas, the CPU and Meta keys. Arguments are
// described in seqmem_fast/ops/dnc.py.
#include "dnc_check.h"

#include <ATen/ops/cat.h>

#include <algorithm>
#include <vector>

#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/machine_op.h"

namespace seqmem::dnc {
namespace {

using Sizes64 = Sizes<int64_t>;

template <class Pointer>
State<Pointer> state_of(const std::vector<Pointer>& parts) {
  if (parts.empty()) return {};
  return {
      parts[kHidden],     parts[kCell],         parts[kMemory],      parts[kUsage], parts[kLink],
      parts[kPrecedence], parts[kWriteWeights], parts[kReadWeights], parts[kReads], nullptr};
}

// What both directions take, in the kernels' type and contiguous, alive as long as this.
struct Call : machine::Call {
  const std::vector<const void*> norm;
  const State<const void*> state, initial;
  Shape shape;

  Call(const Sizes64& s, const Inputs& in, const Options& options)
      : machine::Call(in),
        norm(in.norm.empty() ? std::vector<const void*>(2) : operands(in.norm)),
        state(state_of(operands(in.state))),
        initial(state_of(operands(in.initial))) {
    const Flags& flags = s.flags;
    shape = {.T = s.T,
             .B = s.B,
             .I = s.I,
             .layers = s.layers,
             .C = s.C,
             .N = s.N,
             .M = s.M,
             .reads = s.reads,
             .writes = s.writes,
             .P = s.P,
             .lstm = flags.lstm,
             .squash = flags.squash,
             .usage_gradient = flags.usage_gradient,
             .masks = flags.masks,
             .deallocate = flags.deallocate,
             .sharpen = flags.sharpen && flags.links,
             .links = flags.links,
             .softplus = flags.softplus,
             .softmax = flags.softmax,
             .norm = !in.norm.empty(),
             .norm_floor = options.norm_floor,
             .eps = options.eps,
             .mask_min = options.mask_min,
             .lengths = length_data(),
             .reset = reset_data(),
             .segment = machine::segment_of(s.T)};
  }
};

constexpr double kFlopsPerSlot = 60;  // of one head, beside the memory's width

int threads_for(const Shape& s, double passes) {
  const double heads = s.reads + s.writes;
  return machine::threads_for(
      s, heads * s.N * (3.0 * s.M + kFlopsPerSlot) + s.linked() * s.N * s.N * (2.0 + 2 * s.reads),
      passes);
}

// ---- forward

// Outputs of `type`; where that is the kernels', `saved` is as wide as these fill it.
template <class Int>
Tensors<15> allocate(const ForwardInputs& in, const Sizes<Int>& s, at::ScalarType type) {
  const auto options = in.input.options().dtype(type);
  const auto saved = options.dtype(at::toOpMathType(in.input.scalar_type()));
  auto make = [&](std::initializer_list<Int> sizes) { return empty_of<Int>(options, sizes); };
  auto part = [&](int i) { return empty_of<Int>(options, s.shape_of(i, true)); };
  auto trace = [&](std::initializer_list<Int> sizes) {
    return in.trace || in.save ? make(sizes) : make({Int(0)});
  };
  auto keep = [&](std::initializer_list<Int> sizes) { return kept_of<Int>(in.save, saved, sizes); };
  return {make({s.T, s.B, s.C + s.R}),
          part(kHidden),
          part(kCell),
          part(kMemory),
          part(kUsage),
          part(kLink),
          part(kPrecedence),
          part(kWriteWeights),
          part(kReadWeights),
          part(kReads),
          trace({s.T, s.B, s.N}),
          trace({s.T, s.B, s.writes, s.N}),
          trace({s.T, s.B, s.reads, s.N}),
          keep({s.T, s.B, type == saved.dtype() ? s.record() : s.saved_width()}),
          keep({s.checkpoints(), s.B, s.checkpoint()})};
}

Tensors<15> forward_cpu(const ForwardInputs& in) {
  const Sizes64 s = check<int64_t>(in);
  const auto type = at::toOpMathType(in.input.scalar_type());
  Tensors<15> out = allocate(in, s, type);
  auto& [features, hidden, cell, memory, usage, link, precedence, write_weights, read_weights,
         reads, usage_trace, write_trace, read_trace, saved, checkpoints] = out;
  Call call(s, in, in);
  const Forward arguments = {
      .input = call.operands(in.input),
      .state = call.state,
      .initial = call.initial,
      .controller = call.controller.data(),
      .head_weight = call.operands(in.interface_weight),
      .head_bias = call.operands(in.interface_bias),
      .norm_weight = call.norm[0],
      .norm_bias = call.norm[1],
      .features = data(features),
      .final = {data(hidden), data(cell), data(memory), data(usage), data(link), data(precedence),
                data(write_weights), data(read_weights), data(reads), nullptr},
      .usage_trace = data(usage_trace),
      .write_trace = data(write_trace),
      .read_trace = data(read_trace),
      .saved = data(saved),
      .checkpoints = data(checkpoints),
      .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads_for(call.shape, 1), arguments, storage_of(features),
         call.shape);
  if (s.is_narrow && in.save)
    saved = at::cat({saved, usage_trace, write_trace.flatten(2), read_trace.flatten(2)}, 2);
  machine::to_type_of(
      in.input, {&features, &hidden, &cell, &memory, &usage, &link, &precedence, &write_weights,
                 &read_weights, &reads, &usage_trace, &write_trace, &read_trace});
  return out;
}

Tensors<15> forward_meta(const ForwardInputs& in) {
  return allocate(in, check<c10::SymInt>(in), in.input.scalar_type());
}

// ---- backward

// In the order input, state (9), controller, interface_weight, interface_bias, norm (2 or none),
// initial (9 or none); what is not asked for stays empty.
std::vector<Tensor> allocate_gradients(const BackwardInputs& in, at::ScalarType type) {
  const auto [of_input, of_state, of_weights, of_initial] = in.output_mask;
  machine::GradientList out(in.input.options().dtype(type));
  out.add(of_input, in.input);
  out.add(of_state, in.state);
  out.add(of_weights, in.controller);
  out.add(of_weights, {in.interface_weight, in.interface_bias});
  out.add(of_weights, in.norm);
  out.add(of_initial, in.initial);
  return out.take();
}

// to [P] = the sum over rows of from [B, 2, P]'s part `which`, rows in their order.
template <class C>
void sum_rows(const Tensor& from, int64_t which, const Tensor& to) {
  const int64_t B = from.size(0), P = to.size(0);
  const C* x = from.const_data_ptr<C>();
  C* y = to.mutable_data_ptr<C>();
  std::fill_n(y, P, C(0));
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < P; ++i) y[i] += x[(2 * b + which) * P + i];
}

std::vector<Tensor> backward_cpu(const BackwardInputs& in) {
  const Sizes64 s = check_backward<int64_t>(in);
  const auto type = at::toOpMathType(in.input.scalar_type());
  std::vector<Tensor> out = allocate_gradients(in, type);
  Call call(s, in, in);
  Operands& operands = call.operands;
  std::vector<void*> pointers = machine::pointers_of(out);
  auto state_at = [&](size_t i) {
    return state_of(std::vector<void*>(pointers.begin() + i, pointers.begin() + i + kParts));
  };
  constexpr size_t controller = 1 + kParts;
  const size_t interface = controller + in.controller.size(), norm = interface + 2;
  // What a narrow type has kept beside `record`.
  Tensor saved = in.saved, usage_trace = in.usage_trace, write_trace = in.write_trace,
         read_trace = in.read_trace;
  if (s.is_narrow) {
    const auto parts = saved.split_with_sizes({s.record(), s.N, s.writes * s.N, s.reads * s.N}, 2);
    saved = parts[0], usage_trace = parts[1], write_trace = parts[2], read_trace = parts[3];
  }
  const bool of_norm = in.output_mask[2] && !in.norm.empty();
  const Tensor grad_norm =
      of_norm ? at::empty({s.B, 2, s.P}, in.input.options().dtype(type)) : Tensor();
  Backward arguments = {
      .grad_features = nullptr,
      .grad_features_strides = {},
      .grad_final = {operands(in.grad_hidden), operands(in.grad_cell), operands(in.grad_memory),
                     operands(in.grad_usage), operands(in.grad_link), operands(in.grad_precedence),
                     operands(in.grad_write_weights), operands(in.grad_read_weights),
                     operands(in.grad_reads), nullptr},
      .grad_usage_trace = operands(in.grad_usage_trace),
      .grad_write_trace = operands(in.grad_write_trace),
      .grad_read_trace = operands(in.grad_read_trace),
      .input = operands(in.input),
      .state = call.state,
      .initial = call.initial,
      .controller = call.controller.data(),
      .head_weight = operands(in.interface_weight),
      .norm_weight = call.norm[0],
      .norm_bias = call.norm[1],
      .features = operands(in.features),
      .usage_trace = operands(usage_trace),
      .write_trace = operands(write_trace),
      .read_trace = operands(read_trace),
      .saved = operands(saved),
      .checkpoints = operands(in.checkpoints),
      .grad_input = pointers[0],
      .grad_state = state_at(1),
      .grad_initial = in.initial.empty() ? State<void*>() : state_at(norm + in.norm.size()),
      .grad_controller = in.output_mask[2] ? &pointers[controller] : nullptr,
      .grad_head_weight = pointers[interface],
      .grad_head_bias = pointers[interface + 1],
      .grad_norm = data(grad_norm),
      .workspace = nullptr};
  const Tensor grad_features = machine::set_grad_features(arguments, in.grad_features, type);
  launch(SEQMEM_CHOOSE(backward_kernel), threads_for(call.shape, 3), arguments, storage_of(out[0]),
         call.shape);
  for (int64_t which = 0; of_norm && which < 2; ++which)
    type == at::kDouble ? sum_rows<double>(grad_norm, which, out[norm + which])
                        : sum_rows<float>(grad_norm, which, out[norm + which]);
  for (Tensor& t : out) machine::to_type_of(in.input, {&t});
  return out;
}

std::vector<Tensor> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return allocate_gradients(in, in.input.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                            \
  "Tensor input, Tensor[] state, Tensor[] controller, Tensor interface_weight, " \
  "Tensor interface_bias, Tensor[] norm, Tensor[] initial, Tensor? lengths, Tensor? reset, "
#define SEQMEM_OPTIONS "str options, float norm_floor, float eps, float mask_min, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS SEQMEM_OPTIONS
         "bool trace, bool save) -> (Tensor features, Tensor hidden, Tensor cell, Tensor memory, "
         "Tensor usage, Tensor link, Tensor precedence, Tensor write_weights, "
         "Tensor read_weights, Tensor reads, Tensor usage_trace, Tensor write_trace, "
         "Tensor read_trace, Tensor saved, Tensor checkpoints)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m,
      "(Tensor? grad_features, Tensor? grad_hidden, Tensor? grad_cell, Tensor? grad_memory, "
      "Tensor? grad_usage, Tensor? grad_link, Tensor? grad_precedence, "
      "Tensor? grad_write_weights, Tensor? grad_read_weights, Tensor? grad_reads, "
      "Tensor? grad_usage_trace, Tensor? grad_write_trace, "
      "Tensor? grad_read_trace, " SEQMEM_INPUTS
      "Tensor features, Tensor usage_trace, Tensor write_trace, Tensor read_trace, Tensor saved, "
      "Tensor checkpoints, " SEQMEM_OPTIONS "bool[4] output_mask) -> Tensor[]");
}

#undef SEQMEM_INPUTS
#undef SEQMEM_OPTIONS

}  // namespace seqmem::dnc
