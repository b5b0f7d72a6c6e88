// Runs the kernel of ntm_sequence_kernel.h, as an op for `_triton/ntm.py`.
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

// False where no kernel serves such a call; nothing has been written then.
bool forward_sequence(const Tensor& zx, const Tensor& weight, const Tensor& head_weight,
                      const Tensor& head_bias, const Tensor& hidden, const Tensor& memory,
                      const Tensor& cell, const Tensor& weightings, const Tensor& reads,
                      at::TensorList initial, Maybe lengths, Maybe reset, const Tensor& features,
                      const Tensor& hidden_out, const Tensor& memory_out, Maybe trace, Maybe record,
                      Maybe checkpoints, int64_t segment, int64_t writes, int64_t taps,
                      bool squash) {
  if (memory.scalar_type() == at::kDouble) return false;
  const c10::cuda::CUDAGuard guard(zx.device());
  const auto size = [](int64_t n) { return static_cast<int32_t>(n); };
  const cuda::NtmShape shape = {.steps = features.size(0),
                                .batch = features.size(1),
                                .record = record.has_value() ? record->size(-1) : 0,
                                .checkpoint = checkpoints.has_value() ? checkpoints->stride(1) : 0,
                                .segment = segment,
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

}  // namespace

// Not public: it writes into what `_triton/ntm.py` gives it, all of it contiguous.
TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def(
      "ntm_forward_sequence_(Tensor zx, Tensor weight, Tensor head_weight, Tensor head_bias, "
      "Tensor hidden, Tensor memory, Tensor(a!) cell, Tensor(b!) weightings, Tensor(c!) reads, "
      "Tensor[] initial, Tensor? lengths, Tensor? reset, Tensor(d!) features, "
      "Tensor(e!) hidden_out, Tensor(f!) memory_out, Tensor(g!)? trace, Tensor(h!)? record, "
      "Tensor(i!)? checkpoints, int segment, int writes, int taps, bool squash) -> bool");
}

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) { m.impl("ntm_forward_sequence_", &forward_sequence); }

}  // namespace seqmem::ntm
