// The whole-sequence NTM ops: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/ntm.py.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/ntm_kernel.h"
#include "ntm_check.h"

namespace seqmem::ntm {
namespace {

using Sizes64 = Sizes<int64_t>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr char kName[] = "seqmem::ntm";

// 16-bit tensors are computed with in float.
at::ScalarType compute_type(const Tensor& like) {
  return like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Tensors in the kernels' type and contiguous, alive as long as this.
class Operands {
 public:
  explicit Operands(at::ScalarType type) : type_(type) {}
  const void* operator()(const Tensor& t) {
    kept_.push_back(t.to(type_).contiguous());
    return kept_.back().const_data_ptr();
  }
  const void* operator()(const OptionalTensor& t) {
    return t.has_value() && t->defined() ? (*this)(*t) : nullptr;
  }
  std::vector<const void*> operator()(at::TensorList tensors) {
    std::vector<const void*> pointers;
    for (const Tensor& t : tensors) pointers.push_back((*this)(t));
    return pointers;
  }

 private:
  at::ScalarType type_;
  std::vector<Tensor> kept_;
};

// A call's shape with what it points to.
struct Call {
  std::string kinds;
  Tensor lengths, reset;
  Shape shape;

  Call(const Sizes64& s, const OptionalTensor& row_lengths, const OptionalTensor& reset_mask,
       std::string_view heads, int64_t shift_range, bool lstm, bool squash)
      : kinds(heads) {
    if (row_lengths.has_value()) lengths = row_lengths->to(at::kLong).contiguous();
    if (reset_mask.has_value()) reset = reset_mask->contiguous();
    const auto root = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(s.T))));
    shape = {s.T,
             s.B,
             s.I,
             s.layers,
             s.C,
             s.N,
             s.M,
             s.heads,
             s.reads,
             s.P,
             2 * shift_range + 1,
             lstm,
             squash,
             kinds.data(),
             lengths.defined() ? lengths.const_data_ptr<int64_t>() : nullptr,
             reset.defined() ? reset.const_data_ptr<bool>() : nullptr,
             std::max(kShortestSegment, root)};
  }
};

// Estimates for one core; they only decide how many threads are worth waking.
constexpr double kFlopsPerMicrosecond = 40e3, kCallWorthSharing = 120;
constexpr double kFlopsPerSlot = 150;  // of one addressing, beside the memory's width

int threads_for(const Shape& s, double passes) {
  double row = s.P * s.C + s.heads * s.N * (3.0 * s.M + kFlopsPerSlot);
  row += (s.lstm ? 4.0 : 1.0) * s.C * (s.I + s.reads * s.M + s.C * (2.0 * s.layers - 1));
  const double call = passes * 2 * row * s.T * s.B / kFlopsPerMicrosecond;
  const double most = std::min<double>(available_threads(), std::max<int64_t>(s.B, 1));
  return static_cast<int>(std::clamp(call / kCallWorthSharing, 1.0, most));
}

template <class Arguments>
void launch(const Kernel<Arguments>& kernel, const Tensor& like, const Shape& shape, int threads,
            Arguments& arguments) {
  const bool is_double = like.scalar_type() == at::kDouble;
  run_team(
      threads,
      [&](int granted) {
        arguments.workspace =
            Workspace::get(kernel.workspace(is_double, shape, arguments, granted));
      },
      [&](int thread, int granted, SpinBarrier& barrier) {
        kernel.run(is_double, shape, arguments, thread, granted, barrier);
      });
}

// ---- forward

template <class Int>
Outputs allocate(const Tensor& like, const Sizes<Int>& s, bool lstm, bool trace, bool save,
                 at::ScalarType type) {
  auto make = [&](std::initializer_list<Int> sizes, at::ScalarType of) {
    return at::empty_symint(
        c10::fmap(at::ArrayRef<Int>(sizes), [](Int n) { return c10::SymInt(n); }),
        like.options().dtype(of));
  };
  const auto saved_type = compute_type(like);
  auto keep = [&](std::initializer_list<Int> sizes) {
    if constexpr (std::is_same_v<Int, int64_t>) {
      return KeptBlocks::empty(sizes, like.options().dtype(saved_type));
    } else {
      return make(sizes, saved_type);
    }
  };
  const Int kept = lstm ? s.layers : 0, heads = s.heads, reads = s.reads;
  const Int record = kept * 5 * s.C + (s.layers - 1) * s.C + s.P;
  auto none = [&](at::ScalarType of) { return make({Int(0)}, of); };
  return {make({s.T, s.B, s.C + s.R}, type),
          make({kept, s.B, s.C}, type),
          make({kept, s.B, s.C}, type),
          make({s.B, s.N, s.M}, type),
          make({s.B, heads, s.N}, type),
          make({s.B, reads, s.M}, type),
          trace || save ? make({s.T, s.B, heads, s.N}, type) : none(type),
          save ? keep({s.T, s.B, record}) : none(saved_type),
          save ? keep({(s.T + kShortestSegment - 1) / kShortestSegment, s.B, s.M, slot_stride(s.N)})
               : none(saved_type)};
}

State<const void*> state_of(const std::vector<const void*>& parts) {
  if (parts.empty()) return {};
  return {parts[0], parts[1], parts[2], parts[3], parts[4]};
}

Outputs ntm_cpu(const Tensor& input, const Tensor& hidden, const Tensor& cell, const Tensor& memory,
                const Tensor& weightings, const Tensor& reads, at::TensorList controller,
                const Tensor& head_weight, const Tensor& head_bias, at::TensorList initial,
                const OptionalTensor& lengths, const OptionalTensor& reset, std::string_view heads,
                int64_t shift_range, bool lstm, bool squash, bool trace, bool save) {
  const Sizes64 s =
      check_ntm<int64_t>(input, hidden, cell, memory, weightings, reads, controller, head_weight,
                         head_bias, initial, lengths, reset, heads, shift_range, lstm, true);
  const auto type = compute_type(input);
  Outputs out = allocate(input, s, lstm, trace, save, type);
  auto& [features, hidden_out, cell_out, memory_out, weightings_out, reads_out, all_weightings,
         saved, checkpoints] = out;
  const Call call(s, lengths, reset, heads, shift_range, lstm, squash);
  Operands operands(type);
  const auto layers = operands(controller);
  const std::vector<const void*> first = operands({hidden, cell, memory, weightings, reads});
  Forward arguments = {
      operands(input),
      state_of(first),
      state_of(operands(initial)),
      layers.data(),
      operands(head_weight),
      operands(head_bias),
      data(features),
      {data(hidden_out), data(cell_out), data(memory_out), data(weightings_out), data(reads_out)},
      trace || save ? data(all_weightings) : nullptr,
      save ? data(saved) : nullptr,
      save ? data(checkpoints) : nullptr,
      nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), features, call.shape, threads_for(call.shape, 1),
         arguments);
  if (type != input.scalar_type()) {
    for (Tensor* t : {&features, &hidden_out, &cell_out, &memory_out, &weightings_out, &reads_out,
                      &all_weightings})
      *t = t->to(input.scalar_type());
  }
  return out;
}

Outputs ntm_meta(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                 const Tensor& memory, const Tensor& weightings, const Tensor& reads,
                 at::TensorList controller, const Tensor& head_weight, const Tensor& head_bias,
                 at::TensorList initial, const OptionalTensor& lengths, const OptionalTensor& reset,
                 std::string_view heads, int64_t shift_range, bool lstm, bool, bool trace,
                 bool save) {
  const auto s = check_ntm<c10::SymInt>(input, hidden, cell, memory, weightings, reads, controller,
                                        head_weight, head_bias, initial, lengths, reset, heads,
                                        shift_range, lstm, false);
  return allocate(input, s, lstm, trace, save, input.scalar_type());
}

void check_ntm_op(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                  const Tensor& memory, const Tensor& weightings, const Tensor& reads,
                  at::TensorList controller, const Tensor& head_weight, const Tensor& head_bias,
                  at::TensorList initial, const OptionalTensor& lengths,
                  const OptionalTensor& reset, std::string_view heads, int64_t shift_range,
                  bool lstm, bool, bool, bool) {
  check_ntm<c10::SymInt>(input, hidden, cell, memory, weightings, reads, controller, head_weight,
                         head_bias, initial, lengths, reset, heads, shift_range, lstm, true);
}

// ---- backward

// Gradients for: input; the state; the parameters; initial. What is not asked for stays empty.
using Mask = std::array<bool, 4>;

// In the order input, state (5), head_weight, head_bias, initial (5 or none), controller.
std::vector<Tensor> allocate_gradients(const Tensor& input, at::TensorList state,
                                       at::TensorList heads, at::TensorList initial,
                                       at::TensorList controller, Mask mask, at::ScalarType type) {
  std::vector<Tensor> out;
  const auto options = input.options().dtype(type);
  auto add = [&](const Tensor& like, bool wanted) {
    out.push_back(wanted ? at::empty_symint(like.sym_sizes(), options) : at::empty({0}, options));
  };
  add(input, mask[0]);
  for (const Tensor& t : state) add(t, mask[1]);
  for (const Tensor& t : heads) add(t, mask[2]);
  for (const Tensor& t : initial) add(t, mask[3]);
  for (const Tensor& t : controller) add(t, mask[2]);
  return out;
}

std::vector<Tensor> ntm_backward_cpu(
    const OptionalTensor& grad_features, const OptionalTensor& grad_hidden,
    const OptionalTensor& grad_cell, const OptionalTensor& grad_memory,
    const OptionalTensor& grad_weightings, const OptionalTensor& grad_reads,
    const OptionalTensor& grad_trace, const Tensor& input, const Tensor& hidden, const Tensor& cell,
    const Tensor& memory, const Tensor& weightings, const Tensor& reads, at::TensorList controller,
    const Tensor& head_weight, const Tensor& head_bias, at::TensorList initial,
    const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& features,
    const Tensor& trace, const Tensor& saved, const Tensor& checkpoints, std::string_view heads,
    int64_t shift_range, bool lstm, bool squash, Mask mask) {
  const Sizes64 s =
      check_ntm<int64_t>(input, hidden, cell, memory, weightings, reads, controller, head_weight,
                         head_bias, initial, lengths, reset, heads, shift_range, lstm, true);
  const auto type = compute_type(input);
  const Call call(s, lengths, reset, heads, shift_range, lstm, squash);
  std::vector<Tensor> out =
      allocate_gradients(input, {hidden, cell, memory, weightings, reads}, {head_weight, head_bias},
                         initial, controller, mask, type);
  Operands operands(type);
  const auto layers = operands(controller);
  const std::vector<const void*> first = operands({hidden, cell, memory, weightings, reads});
  Tensor grad_steps;
  Backward arguments = {};
  if (grad_features.has_value()) {  // as it lies: often expanded from one number
    grad_steps = grad_features->to(type);
    arguments.grad_features = grad_steps.const_data_ptr();
    for (int i = 0; i < 3; ++i) arguments.grad_features_strides[i] = grad_steps.stride(i);
  }
  arguments.grad_final = {operands(grad_hidden), operands(grad_cell), operands(grad_memory),
                          operands(grad_weightings), operands(grad_reads)};
  arguments.grad_trace = operands(grad_trace);
  arguments.input = operands(input);
  arguments.state = state_of(first);
  arguments.initial = state_of(operands(initial));
  arguments.controller = layers.data();
  arguments.head_weight = operands(head_weight);
  arguments.features = operands(features);
  arguments.trace = operands(trace);
  arguments.saved = operands(saved);
  arguments.checkpoints = operands(checkpoints);
  auto state_at = [&](size_t i) -> State<void*> {
    return {data(out[i]), data(out[i + 1]), data(out[i + 2]), data(out[i + 3]), data(out[i + 4])};
  };
  if (mask[0]) arguments.grad_input = data(out[0]);
  if (mask[1]) arguments.grad_state = state_at(1);
  if (mask[3] && !initial.empty()) arguments.grad_initial = state_at(8);
  std::vector<void*> grad_controller;
  if (mask[2]) {
    for (size_t i = 8 + initial.size(); i < out.size(); ++i)
      grad_controller.push_back(data(out[i]));
    arguments.grad_controller = grad_controller.data();
    arguments.grad_head_weight = data(out[6]);
    arguments.grad_head_bias = data(out[7]);
  }
  launch(SEQMEM_CHOOSE(backward_kernel), out[0], call.shape, threads_for(call.shape, 3), arguments);
  if (type != input.scalar_type())
    for (Tensor& t : out) t = t.to(input.scalar_type());
  return out;
}

std::vector<Tensor> ntm_backward_meta(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor& input,
    const Tensor& hidden, const Tensor& cell, const Tensor& memory, const Tensor& weightings,
    const Tensor& reads, at::TensorList controller, const Tensor& head_weight,
    const Tensor& head_bias, at::TensorList initial, const OptionalTensor&, const OptionalTensor&,
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::string_view, int64_t, bool,
    bool, Mask mask) {
  return allocate_gradients(input, {hidden, cell, memory, weightings, reads},
                            {head_weight, head_bias}, initial, controller, mask,
                            input.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_NTM_TENSORS                                                                     \
  "Tensor input, Tensor hidden, Tensor cell, Tensor memory, Tensor weightings, Tensor reads, " \
  "Tensor[] controller, Tensor head_weight, Tensor head_bias, Tensor[] initial, "              \
  "Tensor? lengths, Tensor? reset, "
#define SEQMEM_NTM_OPTIONS "str heads, int shift_range, bool lstm, bool squash, "
  m.def("ntm(" SEQMEM_NTM_TENSORS SEQMEM_NTM_OPTIONS
        "bool trace, bool save) -> (Tensor features, Tensor hidden, Tensor cell, Tensor memory, "
        "Tensor weightings, Tensor reads, Tensor trace, Tensor saved, Tensor checkpoints)",
        tags);
  m.def("check_ntm(" SEQMEM_NTM_TENSORS SEQMEM_NTM_OPTIONS "bool trace, bool save) -> ()", tags);
  m.def(
      "ntm_backward(Tensor? grad_features, Tensor? grad_hidden, Tensor? grad_cell, "
      "Tensor? grad_memory, Tensor? grad_weightings, Tensor? grad_reads, Tensor? "
      "grad_trace, " SEQMEM_NTM_TENSORS
      "Tensor features, Tensor trace, Tensor saved, Tensor checkpoints, " SEQMEM_NTM_OPTIONS
      "bool[4] output_mask) -> Tensor[]",
      tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("ntm", ntm_cpu);
  m.impl("ntm_backward", ntm_backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("ntm", ntm_meta);
  m.impl("ntm_backward", ntm_backward_meta);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_ntm", check_ntm_op);
  m.impl("ntm", Unsupported<kName, &check_ntm_op, Outputs>::call);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) {
  m.impl("ntm", Unsupported<kName, &check_ntm_op, Outputs>::call);
}

}  // namespace seqmem::ntm
