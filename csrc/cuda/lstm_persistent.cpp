// Runs the kernels of lstm_persistent_kernel.h, for lstm_sequence.cpp and, as ops, for
// `_triton/lstm.py`.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "launcher.h"
#include "lstm_persistent.h"
#include "lstm_persistent_kernel.h"

namespace seqmem::lstm {
namespace {

using at::Tensor;

// From batch row b on: `stride` rows further, of a tensor that may be absent.
const void* from(Maybe t, int64_t b, int64_t stride) {
  if (!t.has_value()) return nullptr;
  const int64_t width = t->dim() > 1 ? t->size(-1) : 1;
  return static_cast<const char*>(t->const_data_ptr()) + b * stride * width * t->element_size();
}
void* into(Maybe t, int64_t b, int64_t stride) { return const_cast<void*>(from(t, b, stride)); }

// As the kernels' vectors want it: a view may begin anywhere.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : t.clone();
}

// All bytes: what the kernels wait for others to overwrite.
void clear(const Tensor& t) {
  C10_CUDA_CHECK(cudaMemsetAsync(t.mutable_data_ptr(), cuda::kNotYet, t.nbytes(), stream()));
}

struct Placement {
  int64_t hidden, steps, t_stride, b_stride;
  bool reverse;
  Maybe lengths, reset;

  // `batch` rows from row b on.
  cuda::PersistentLayout of(int64_t b, int64_t batch) const {
    return {batch,
            hidden,
            steps,
            t_stride,
            b_stride,
            reverse,
            static_cast<const int64_t*>(from(lengths, b, 1)),
            reset.has_value() ? reset->const_data_ptr<bool>() + b * b_stride : nullptr};
  }
};

// Batch rows in turns of as many as one launch takes.
template <class Launch>
void in_turns(const Tensor& like, int64_t batch, int64_t hidden, Launch launch) {
  const auto storage = storage_of(like);
  const int64_t most = cuda::lstm_persistent_rows(storage, batch, hidden);
  TORCH_INTERNAL_ASSERT(most > 0 || batch == 0);
  for (int64_t b = 0; b < batch; b += most) launch(storage, b, std::min(most, batch - b));
}

constexpr int64_t kMostLaunches = 2;  // for more batch rows a GEMM per step is quicker

}  // namespace

bool persistent_serves(const Tensor& like, int64_t batch, int64_t hidden) {
  const c10::cuda::CUDAGuard guard(like.device());
  const int64_t most = cuda::lstm_persistent_rows(storage_of(like), batch, hidden);
  return most > 0 && (batch + most - 1) / most <= kMostLaunches;
}

void forward_persistent(const Tensor& z, Maybe hx, const Tensor& hy, const Tensor& c,
                        const Tensor& output, Maybe cells, bool keep_gates, const Tensor& weight_hh,
                        Maybe bias_ih, Maybe bias_hh, Maybe lengths, Maybe reset, int64_t steps,
                        int64_t t_stride, int64_t b_stride, bool reverse) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Placement layout = {hy.size(1), steps, t_stride, b_stride, reverse, lengths, reset};
  const Tensor weights = aligned(weight_hh);
  const OptionalTensor first = hx.has_value() ? OptionalTensor(aligned(*hx)) : std::nullopt;
  clear(output);
  in_turns(z, hy.size(0), hy.size(1), [&](Storage storage, int64_t b, int64_t batch) {
    const cuda::PersistentForward arguments = {.z = from(z, b, b_stride),
                                               .weight_hh = weights.const_data_ptr(),
                                               .bias_ih = from(bias_ih, 0, 0),
                                               .bias_hh = from(bias_hh, 0, 0),
                                               .hx = from(first, b, 1),
                                               .hy = into(hy, b, 1),
                                               .c = static_cast<float*>(into(c, b, 1)),
                                               .output = into(output, b, b_stride),
                                               .gates = keep_gates ? into(z, b, b_stride) : nullptr,
                                               .cells = into(cells, b, b_stride)};
    C10_CUDA_CHECK(
        cuda::lstm_forward_persistent(storage, layout.of(b, batch), arguments, stream()));
  });
}

void backward_persistent(const Tensor& dz, const Tensor& d_c, Maybe grad_output, Maybe grad_hy,
                         Maybe grad_gates, Maybe grad_cells, const Tensor& weight_hh, Maybe cx,
                         const Tensor& gates, const Tensor& cells, Maybe lengths, Maybe reset,
                         int64_t steps, int64_t t_stride, int64_t b_stride, bool reverse) {
  const c10::cuda::CUDAGuard guard(dz.device());
  const Placement layout = {d_c.size(1), steps, t_stride, b_stride, reverse, lengths, reset};
  clear(dz);
  in_turns(dz, d_c.size(0), d_c.size(1), [&](Storage storage, int64_t b, int64_t batch) {
    const cuda::PersistentBackward arguments = {.grad_output = from(grad_output, b, b_stride),
                                                .grad_hy = from(grad_hy, b, 1),
                                                .grad_gates = from(grad_gates, b, b_stride),
                                                .grad_cells = from(grad_cells, b, b_stride),
                                                .weight_hh = weight_hh.const_data_ptr(),
                                                .cx = from(cx, b, 1),
                                                .gates = from(gates, b, b_stride),
                                                .cells = from(cells, b, b_stride),
                                                .d_c = static_cast<float*>(into(d_c, b, 1)),
                                                .dz = into(dz, b, b_stride)};
    C10_CUDA_CHECK(
        cuda::lstm_backward_persistent(storage, layout.of(b, batch), arguments, stream()));
  });
}

namespace {

void lstm_forward_persistent_cuda(const Tensor& z, const Tensor& h, const Tensor& c,
                                  const Tensor& output, Maybe cells, bool keep_gates,
                                  bool zero_state, const Tensor& weight_hh, Maybe bias_ih,
                                  Maybe bias_hh, Maybe lengths, Maybe reset, int64_t steps,
                                  int64_t t_stride, int64_t b_stride, bool reverse) {
  OptionalTensor hx;
  if (!zero_state) hx = h.clone();
  forward_persistent(z, hx, h, c, output, cells, keep_gates, weight_hh, bias_ih, bias_hh, lengths,
                     reset, steps, t_stride, b_stride, reverse);
}

}  // namespace

// Not public: they write into what `_triton/lstm.py` gives them, all of it contiguous.
#define SEQMEM_SEQUENCE_ARGUMENTS \
  "Tensor? lengths, Tensor? reset, int steps, int t_stride, int b_stride, bool reverse) -> ()"

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  m.def(
      "lstm_forward_persistent_(Tensor(a!) z, Tensor(b!) h, Tensor(c!) c, Tensor(d!) output, "
      "Tensor(e!)? cells, bool keep_gates, bool zero_state, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, " SEQMEM_SEQUENCE_ARGUMENTS);
  m.def(
      "lstm_backward_persistent_(Tensor(a!) dz, Tensor(b!) d_c, Tensor? grad_output, "
      "Tensor? grad_hy, Tensor? grad_gates, Tensor? grad_cells, Tensor weight_hh, Tensor? cx, "
      "Tensor gates, Tensor cells, " SEQMEM_SEQUENCE_ARGUMENTS);
  m.def("lstm_persistent_serves(Tensor like, int batch, int hidden) -> bool");
}

#undef SEQMEM_SEQUENCE_ARGUMENTS

TORCH_LIBRARY_IMPL(seqmem, CUDA, m) {
  m.impl("lstm_forward_persistent_", &lstm_forward_persistent_cuda);
  m.impl("lstm_backward_persistent_", &backward_persistent);
  m.impl("lstm_persistent_serves", &persistent_serves);
}

}  // namespace seqmem::lstm
