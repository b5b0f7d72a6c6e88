// The ops of the memory with least recently used access: schemas, the CPU and Meta keys. Arguments
// are described in seqmem_fast/ops/lrua.py.
#include "lrua_check.h"

#include <vector>

#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/machine_op.h"

namespace seqmem::lrua {
namespace {

using Sizes64 = Sizes<int64_t>;

template <class Pointer>
State<Pointer> state_of(const std::vector<Pointer>& parts) {
  if (parts.empty()) return {};
  return {parts[kHidden], parts[kCell],        parts[kMemory],
          parts[kUsage],  parts[kReadWeights], parts[kReads]};
}

// What both directions take, in the kernels' type and contiguous, alive as long as this.
struct Call : machine::Call {
  const State<const void*> state, initial;
  Shape shape;

  Call(const Sizes64& s, const Inputs& in, const Options& options)
      : machine::Call(in),
        state(state_of(operands(in.state))),
        initial(state_of(operands(in.initial))) {
    shape = {.T = s.T,
             .B = s.B,
             .I = s.I,
             .layers = s.layers,
             .C = s.C,
             .N = s.N,
             .M = s.M,
             .heads = s.heads,
             .reads = s.heads,
             .P = s.P,
             .erased = options.erase_all ? s.heads : 1,
             .lstm = options.lstm,
             .own_add = options.own_add,
             .strength = options.strength,
             .gamma = options.gamma,
             .lengths = length_data(),
             .reset = reset_data(),
             .segment = machine::segment_of(s.T)};
  }
};

constexpr double kFlopsPerSlot = 60;  // of one head, beside the memory's width

int threads_for(const Shape& s, double passes) {
  return machine::threads_for(s, s.heads * s.N * (3.0 * s.M + kFlopsPerSlot), passes);
}

// ---- forward

// Outputs of `type`.
template <class Int>
Tensors<13> allocate(const ForwardInputs& in, const Sizes<Int>& s, at::ScalarType type) {
  const auto options = in.input.options().dtype(type);
  const auto saved = options.dtype(at::toOpMathType(in.input.scalar_type()));
  auto make = [&](std::initializer_list<Int> sizes) { return empty_of<Int>(options, sizes); };
  auto when = [&](bool wanted, const at::TensorOptions& like, std::initializer_list<Int> sizes) {
    return wanted ? empty_of<Int>(like, sizes) : empty_of<Int>(like, {Int(0)});
  };
  auto keep = [&](std::initializer_list<Int> sizes) { return kept_of<Int>(in.save, saved, sizes); };
  const Int kept = s.kept, heads = s.heads;
  return {make({s.T, s.B, s.C + s.R}),
          make({kept, s.B, s.C}),
          make({kept, s.B, s.C}),
          make({s.B, s.N, s.M}),
          make({s.B, s.N}),
          make({s.B, heads, s.N}),
          make({s.B, heads, s.M}),
          when(in.trace, options, {s.T, s.B, s.N}),
          when(in.trace, options, {s.T, s.B, heads, s.N}),
          when(in.trace || in.save, options, {s.T, s.B, heads, s.N}),
          when(in.save, options.dtype(at::kLong), {s.T, s.B, heads}),
          keep({s.T, s.B, s.record()}),
          keep({s.checkpoints(), s.B, s.M, slot_stride(s.N)})};
}

Tensors<13> forward_cpu(const ForwardInputs& in) {
  const Sizes64 s = check<int64_t>(in);
  const auto type = at::toOpMathType(in.input.scalar_type());
  Tensors<13> out = allocate(in, s, type);
  auto& [features, hidden, cell, memory, usage, read_weights, reads, usage_trace, write_trace,
         read_trace, slots, saved, checkpoints] = out;
  Call call(s, in, in);
  const Forward arguments = {.input = call.operands(in.input),
                             .state = call.state,
                             .initial = call.initial,
                             .controller = call.controller.data(),
                             .head_weight = call.operands(in.head_weight),
                             .head_bias = call.operands(in.head_bias),
                             .features = data(features),
                             .final = {data(hidden), data(cell), data(memory), data(usage),
                                       data(read_weights), data(reads)},
                             .usage_trace = data(usage_trace),
                             .write_trace = data(write_trace),
                             .trace = data(read_trace),
                             .slots = static_cast<int64_t*>(data(slots)),
                             .saved = data(saved),
                             .checkpoints = data(checkpoints),
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads_for(call.shape, 1), arguments, storage_of(features),
         call.shape);
  machine::to_type_of(in.input, {&features, &hidden, &cell, &memory, &usage, &read_weights, &reads,
                                 &usage_trace, &write_trace, &read_trace});
  return out;
}

Tensors<13> forward_meta(const ForwardInputs& in) {
  return allocate(in, check<c10::SymInt>(in), in.input.scalar_type());
}

// ---- backward

// In the order input, state (6), head_weight, head_bias, initial (6 or none), controller; what is
// not asked for stays empty, and a usage's always.
std::vector<Tensor> allocate_gradients(const BackwardInputs& in, at::ScalarType type) {
  const auto [of_input, of_state, of_weights, of_initial] = in.output_mask;
  machine::GradientList out(in.input.options().dtype(type));
  auto add_state = [&](bool wanted, TensorList state) {
    for (size_t part = 0; part < state.size(); ++part)
      out.add(wanted && part != kUsage, state.slice(part, 1));
  };
  out.add(of_input, in.input);
  add_state(of_state, in.state);
  out.add(of_weights, {in.head_weight, in.head_bias});
  add_state(of_initial, in.initial);
  out.add(of_weights, in.controller);
  return out.take();
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
  constexpr size_t weights = 1 + kParts, initial = weights + 2;
  Backward arguments = {
      .grad_features = nullptr,
      .grad_features_strides = {},
      .grad_final = {operands(in.grad_hidden), operands(in.grad_cell), operands(in.grad_memory),
                     nullptr, operands(in.grad_read_weights), operands(in.grad_reads)},
      .grad_write_trace = operands(in.grad_write_trace),
      .grad_trace = operands(in.grad_read_trace),
      .input = operands(in.input),
      .state = call.state,
      .initial = call.initial,
      .controller = call.controller.data(),
      .head_weight = operands(in.head_weight),
      .features = operands(in.features),
      .trace = operands(in.read_trace),
      .slots = nullptr,
      .saved = operands(in.saved),
      .checkpoints = operands(in.checkpoints),
      .grad_input = pointers[0],
      .grad_state = state_at(1),
      .grad_initial = in.initial.empty() ? State<void*>() : state_at(initial),
      .grad_controller = in.output_mask[2] ? &pointers[initial + in.initial.size()] : nullptr,
      .grad_head_weight = pointers[weights],
      .grad_head_bias = pointers[weights + 1],
      .workspace = nullptr};
  const Tensor slots = in.slots.contiguous().clamp(0, s.N - 1);  // what they hold is not checked
  arguments.slots = slots.const_data_ptr<int64_t>();
  const Tensor grad_features = machine::set_grad_features(arguments, in.grad_features, type);
  launch(SEQMEM_CHOOSE(backward_kernel), threads_for(call.shape, 3), arguments, storage_of(out[0]),
         call.shape);
  for (Tensor& t : out) machine::to_type_of(in.input, {&t});
  return out;
}

std::vector<Tensor> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return allocate_gradients(in, in.input.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                         \
  "Tensor input, Tensor[] state, Tensor[] controller, Tensor head_weight, Tensor head_bias, " \
  "Tensor[] initial, Tensor? lengths, Tensor? reset, "
#define SEQMEM_OPTIONS "bool lstm, bool own_add, bool strength, bool erase_all, float gamma, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS SEQMEM_OPTIONS
         "bool trace, bool save) -> (Tensor features, Tensor hidden, Tensor cell, Tensor memory, "
         "Tensor usage, Tensor read_weights, Tensor reads, Tensor usage_trace, Tensor write_trace, "
         "Tensor read_trace, Tensor slots, Tensor saved, Tensor checkpoints)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m,
      "(Tensor? grad_features, Tensor? grad_hidden, Tensor? grad_cell, Tensor? grad_memory, "
      "Tensor? grad_read_weights, Tensor? grad_reads, Tensor? grad_write_trace, "
      "Tensor? grad_read_trace, " SEQMEM_INPUTS
      "Tensor features, Tensor read_trace, Tensor slots, Tensor saved, "
      "Tensor checkpoints, " SEQMEM_OPTIONS "bool[4] output_mask) -> Tensor[]");
}

#undef SEQMEM_INPUTS
#undef SEQMEM_OPTIONS

}  // namespace seqmem::lrua
