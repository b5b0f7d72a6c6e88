// The whole-sequence NTM ops: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/ntm.py.
#include <vector>

#include "../common/bf16_in_use.h"
#include "../common/kept_blocks.h"
#include "../common/machine_op.h"
#include "ntm_check.h"

namespace seqmem::ntm {
namespace {

using Sizes64 = Sizes<int64_t>;

template <class Pointer>
State<Pointer> state_of(const std::vector<Pointer>& parts) {
  if (parts.empty()) return {};
  return {parts[0], parts[1], parts[2], parts[3], parts[4]};
}

// What both directions take, in the kernels' type and contiguous, alive as long as this.
struct Call : machine::Call {
  const State<const void*> state, initial;
  const std::string kinds;
  Shape shape;

  Call(const Sizes64& s, const Inputs& in, const Options& options)
      : machine::Call(in),
        state(state_of(operands({in.hidden, in.cell, in.memory, in.weightings, in.reads}))),
        initial(state_of(operands(in.initial))),
        kinds(options.heads) {
    shape = {.T = s.T,
             .B = s.B,
             .I = s.I,
             .layers = s.layers,
             .C = s.C,
             .N = s.N,
             .M = s.M,
             .heads = s.heads,
             .reads = s.reads,
             .P = s.P,
             .taps = 2 * options.shift_range + 1,
             .lstm = options.lstm,
             .squash = options.squash,
             .kinds = kinds.data(),
             .lengths = length_data(),
             .reset = reset_data(),
             .segment = machine::segment_of(s.T)};
  }
};

constexpr double kFlopsPerSlot = 150;  // of one addressing, beside the memory's width

int threads_for(const Shape& s, double passes) {
  return machine::threads_for(s, s.heads * s.N * (3.0 * s.M + kFlopsPerSlot), passes);
}

// Tiles and dot products pay where the controller is wide and rows share its packed weights.
bool runs_in_bf16(const Shape& s, at::ScalarType type) {
  constexpr int64_t kRows = 8, kUnits = 100;
  return type == at::kBFloat16 && s.B >= kRows && s.C >= kUnits && bf16_in_use() != Bf16::Float32;
}

// ---- forward

// Outputs of `type`.
template <class Int>
Tensors<9> allocate(const ForwardInputs& in, const Sizes<Int>& s, at::ScalarType type) {
  const auto options = in.input.options().dtype(type);
  const auto saved = options.dtype(at::toOpMathType(in.input.scalar_type()));
  auto make = [&](std::initializer_list<Int> sizes) { return empty_of<Int>(options, sizes); };
  auto keep = [&](std::initializer_list<Int> sizes) { return kept_of<Int>(in.save, saved, sizes); };
  const Int kept = s.kept, heads = s.heads, reads = s.reads;
  return {make({s.T, s.B, s.C + s.R}),
          make({kept, s.B, s.C}),
          make({kept, s.B, s.C}),
          make({s.B, s.N, s.M}),
          make({s.B, heads, s.N}),
          make({s.B, reads, s.M}),
          in.trace || in.save ? make({s.T, s.B, heads, s.N}) : make({Int(0)}),
          keep({s.T, s.B, s.record()}),
          keep({s.checkpoints(), s.B, s.M, slot_stride(s.N)})};
}

Tensors<9> forward_cpu(const ForwardInputs& in) {
  const Sizes64 s = check<int64_t>(in);
  const auto type = at::toOpMathType(in.input.scalar_type());
  Tensors<9> out = allocate(in, s, type);
  auto& [features, hidden, cell, memory, weightings, reads, trace, saved, checkpoints] = out;
  Call call(s, in, in);
  const Forward arguments = {
      .input = call.operands(in.input),
      .state = call.state,
      .initial = call.initial,
      .controller = call.controller.data(),
      .head_weight = call.operands(in.head_weight),
      .head_bias = call.operands(in.head_bias),
      .features = data(features),
      .final = {data(hidden), data(cell), data(memory), data(weightings), data(reads)},
      .trace = data(trace),
      .saved = data(saved),
      .checkpoints = data(checkpoints),
      .workspace = nullptr};
  const bool in_bf16 = runs_in_bf16(call.shape, in.input.scalar_type());
  launch(in_bf16 ? SEQMEM_CHOOSE_BF16(forward_kernel) : SEQMEM_CHOOSE(forward_kernel),
         threads_for(call.shape, 1), arguments, storage_of(features), call.shape);
  machine::to_type_of(in.input, {&features, &hidden, &cell, &memory, &weightings, &reads, &trace});
  return out;
}

Tensors<9> forward_meta(const ForwardInputs& in) {
  return allocate(in, check<c10::SymInt>(in), in.input.scalar_type());
}

// ---- backward

// In the order input, state (5), head_weight, head_bias, initial (5 or none), controller; what is
// not asked for stays empty.
std::vector<Tensor> allocate_gradients(const BackwardInputs& in, at::ScalarType type) {
  const auto [of_input, of_state, of_weights, of_initial] = in.output_mask;
  machine::GradientList out(in.input.options().dtype(type));
  out.add(of_input, in.input);
  out.add(of_state, {in.hidden, in.cell, in.memory, in.weightings, in.reads});
  out.add(of_weights, {in.head_weight, in.head_bias});
  out.add(of_initial, in.initial);
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
    return state_of(std::vector<void*>(pointers.begin() + i, pointers.begin() + i + 5));
  };
  Backward arguments = {
      .grad_features = nullptr,
      .grad_features_strides = {},
      .grad_final = {operands(in.grad_hidden), operands(in.grad_cell), operands(in.grad_memory),
                     operands(in.grad_weightings), operands(in.grad_reads)},
      .grad_trace = operands(in.grad_trace),
      .input = operands(in.input),
      .state = call.state,
      .initial = call.initial,
      .controller = call.controller.data(),
      .head_weight = operands(in.head_weight),
      .features = operands(in.features),
      .trace = operands(in.trace),
      .saved = operands(in.saved),
      .checkpoints = operands(in.checkpoints),
      .grad_input = pointers[0],
      .grad_state = state_at(1),
      .grad_initial = in.initial.empty() ? State<void*>() : state_at(8),
      .grad_controller = in.output_mask[2] ? &pointers[8 + in.initial.size()] : nullptr,
      .grad_head_weight = pointers[6],
      .grad_head_bias = pointers[7],
      .workspace = nullptr};
  const Tensor grad_features = machine::set_grad_features(arguments, in.grad_features, type);
  const bool in_bf16 = runs_in_bf16(call.shape, in.input.scalar_type());
  launch(in_bf16 ? SEQMEM_CHOOSE_BF16(backward_kernel) : SEQMEM_CHOOSE(backward_kernel),
         threads_for(call.shape, 3), arguments, storage_of(out[0]), call.shape);
  for (Tensor& t : out) machine::to_type_of(in.input, {&t});
  return out;
}

std::vector<Tensor> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return allocate_gradients(in, in.input.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                          \
  "Tensor input, Tensor hidden, Tensor cell, Tensor memory, Tensor weightings, Tensor reads, " \
  "Tensor[] controller, Tensor head_weight, Tensor head_bias, Tensor[] initial, "              \
  "Tensor? lengths, Tensor? reset, "
#define SEQMEM_OPTIONS "str heads, int shift_range, bool lstm, bool squash, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS SEQMEM_OPTIONS
         "bool trace, bool save) -> (Tensor features, Tensor hidden, Tensor cell, Tensor memory, "
         "Tensor weightings, Tensor reads, Tensor trace, Tensor saved, Tensor checkpoints)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m,
      "(Tensor? grad_features, Tensor? grad_hidden, Tensor? grad_cell, Tensor? grad_memory, "
      "Tensor? grad_weightings, Tensor? grad_reads, Tensor? grad_trace, " SEQMEM_INPUTS
      "Tensor features, Tensor trace, Tensor saved, Tensor checkpoints, " SEQMEM_OPTIONS
      "bool[4] output_mask) -> Tensor[]");
}

#undef SEQMEM_INPUTS
#undef SEQMEM_OPTIONS

}  // namespace seqmem::ntm
