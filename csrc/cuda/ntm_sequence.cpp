// Runs the kernels of ntm_sequence_kernel.h, as ops for `_triton/ntm.py`.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../common/storage.h"
#include "launcher.h"
#include "ntm_sequence_kernel.h"

namespace seqmem::ntm {
namespace {

using at::Tensor;

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}
template <class T>
T* pointer(Maybe t) {
  return t.has_value() ? pointer<T>(*t) : nullptr;
}

int32_t size(int64_t n) { return static_cast<int32_t>(n); }

// False where no kernel serves such a call; nothing has been written then. The backward likewise.
bool forward_sequence(const Tensor& zx, const Tensor& weight, const Tensor& head_weight,
                      const Tensor& head_bias, const Tensor& hidden, const Tensor& memory,
                      const Tensor& cell, const Tensor& weightings, const Tensor& reads,
                      at::TensorList initial, Maybe lengths, Maybe reset, const Tensor& features,
                      const Tensor& hidden_out, const Tensor& memory_out, Maybe trace, Maybe record,
                      Maybe checkpoints, int64_t segment, int64_t writes, int64_t taps,
                      bool squash) {
  if (memory.scalar_type() == at::kDouble) return false;
  const c10::cuda::CUDAGuard guard(zx.device());
  const cuda::NtmShape shape = {.steps = features.size(0),
                                .batch = features.size(1),
                                .record = record.has_value() ? record->size(-1) : 0,
                                .checkpoint = checkpoints.has_value() ? checkpoints->stride(1) : 0,
                                .segment = segment,
                                .padded_memory = 0,
                                .control = size(hidden.size(-1)),
                                .slots = size(memory.size(1)),
                                .width = size(memory.size(2)),
                                .values = size(head_bias.numel()),
                                .heads = size(weightings.size(1)),
                                .writes = static_cast<uint32_t>(writes),
                                .taps = size(taps),
                                .read_width = size(features.size(2) - hidden.size(-1)),
                                .padded_width = initial.empty() ? 0 : size(initial[2].size(-1)),
                                .squash = squash};
  const Storage storage = storage_of(memory);
  if (!cuda::ntm_forward_sequence_serves(storage, shape)) return false;
  const auto of_initial = [&](size_t k) {
    return initial.empty() ? nullptr : pointer<const float>(initial[k]);
  };
  const cuda::NtmForward arguments = {.zx = pointer<const float>(zx),
                                      .weight = pointer<const float>(weight),
                                      .head_weight = pointer<const float>(head_weight),
                                      .head_bias = pointer<const float>(head_bias),
                                      .hidden = pointer<const float>(hidden),
                                      .memory = pointer<const void>(memory),
                                      .cell = pointer<float>(cell),
                                      .weightings = pointer<float>(weightings),
                                      .reads = pointer<float>(reads),
                                      .initial_hidden = of_initial(0),
                                      .initial_cell = of_initial(1),
                                      .initial_memory = of_initial(2),
                                      .initial_weightings = of_initial(3),
                                      .initial_reads = of_initial(4),
                                      .lengths = pointer<const int64_t>(lengths),
                                      .reset = pointer<const bool>(reset),
                                      .features = pointer<void>(features),
                                      .hidden_out = pointer<float>(hidden_out),
                                      .memory_out = pointer<void>(memory_out),
                                      .trace = pointer<void>(trace),
                                      .record = pointer<float>(record),
                                      .checkpoints = pointer<float>(checkpoints)};
  C10_CUDA_CHECK(cuda::ntm_forward_sequence(storage, shape, arguments, stream()));
  return true;
}

bool backward_sequence(Maybe grad_features, Maybe grad_trace, const Tensor& weight,
                       const Tensor& head_weight, const Tensor& cell, const Tensor& weightings,
                       at::TensorList initial, Maybe lengths, Maybe reset, const Tensor& trace,
                       const Tensor& record, const Tensor& checkpoints, const Tensor& memories,
                       at::TensorList state, at::TensorList of_initial, const Tensor& dz,
                       const Tensor& dp, int64_t slots, int64_t width, int64_t segment,
                       int64_t writes, int64_t taps, bool squash) {
  if (trace.scalar_type() == at::kDouble) return false;
  const c10::cuda::CUDAGuard guard(dz.device());
  const int64_t control = cell.size(-1);
  const auto stride = [&](int64_t d) {
    return grad_features.has_value() ? grad_features->stride(d) : 0;
  };
  const cuda::NtmShape shape = {.steps = dz.size(0),
                                .batch = dz.size(1),
                                .record = record.size(-1),
                                .checkpoint = checkpoints.stride(1),
                                .segment = segment,
                                .padded_memory = memories.stride(1),
                                .control = size(control),
                                .slots = size(slots),
                                .width = size(width),
                                .values = size(dp.size(-1)),
                                .heads = size(weightings.size(1)),
                                .writes = static_cast<uint32_t>(writes),
                                .taps = size(taps),
                                .read_width = size(state[4].size(-1) * state[4].size(-2)),
                                .padded_width = size(memories.size(-1)),
                                .squash = squash};
  const Storage storage = storage_of(trace);
  if (!cuda::ntm_backward_sequence_serves(storage, shape)) return false;
  const auto one_of = [](at::TensorList list, size_t k) {
    return list.empty() ? nullptr : pointer<float>(list[k]);
  };
  const cuda::NtmBackward arguments = {.grad_features = pointer<const void>(grad_features),
                                       .f_t = stride(0),
                                       .f_b = stride(1),
                                       .f_c = stride(2),
                                       .grad_trace = pointer<const void>(grad_trace),
                                       .weight = pointer<const float>(weight),
                                       .head_weight = pointer<const float>(head_weight),
                                       .cell = pointer<const void>(cell),
                                       .weightings = pointer<const void>(weightings),
                                       .initial_cell = one_of(initial, 0),
                                       .initial_memory = one_of(initial, 1),
                                       .initial_weightings = one_of(initial, 2),
                                       .lengths = pointer<const int64_t>(lengths),
                                       .reset = pointer<const bool>(reset),
                                       .trace = pointer<const void>(trace),
                                       .record = pointer<const float>(record),
                                       .checkpoints = pointer<const float>(checkpoints),
                                       .memories = pointer<float>(memories),
                                       .d_hidden = one_of(state, 0),
                                       .d_cell = one_of(state, 1),
                                       .d_memory = one_of(state, 2),
                                       .d_weightings = one_of(state, 3),
                                       .d_reads = one_of(state, 4),
                                       .i_hidden = one_of(of_initial, 0),
                                       .i_cell = one_of(of_initial, 1),
                                       .i_memory = one_of(of_initial, 2),
                                       .i_weightings = one_of(of_initial, 3),
                                       .i_reads = one_of(of_initial, 4),
                                       .dz = pointer<float>(dz),
                                       .dp = pointer<float>(dp)};
  C10_CUDA_CHECK(cuda::ntm_backward_sequence(storage, shape, arguments, stream()));
  return true;
}

}  // namespace

// Not public: they write into what `_triton/ntm.py` gives them, all of it contiguous but for
// grad_features.
TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def(
      "ntm_forward_sequence_(Tensor zx, Tensor weight, Tensor head_weight, Tensor head_bias, "
      "Tensor hidden, Tensor memory, Tensor(a!) cell, Tensor(b!) weightings, Tensor(c!) reads, "
      "Tensor[] initial, Tensor? lengths, Tensor? reset, Tensor(d!) features, "
      "Tensor(e!) hidden_out, Tensor(f!) memory_out, Tensor(g!)? trace, Tensor(h!)? record, "
      "Tensor(i!)? checkpoints, int segment, int writes, int taps, bool squash) -> bool");
  m.def(
      "ntm_backward_sequence_(Tensor? grad_features, Tensor? grad_trace, Tensor weight, "
      "Tensor head_weight, Tensor cell, Tensor weightings, Tensor[] initial, Tensor? lengths, "
      "Tensor? reset, Tensor trace, Tensor record, Tensor checkpoints, Tensor(a!) memories, "
      "Tensor(b!)[] state, Tensor(c!)[] of_initial, Tensor(d!) dz, Tensor(e!) dp, int slots, "
      "int width, int segment, int writes, int taps, bool squash) -> bool");
}

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  m.impl("ntm_forward_sequence_", &forward_sequence);
  m.impl("ntm_backward_sequence_", &backward_sequence);
}

}  // namespace seqmem::ntm
