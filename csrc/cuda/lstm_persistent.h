// lstm_persistent_kernel.h for tensors, all of them contiguous; what they mean is said there.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/op.h"

namespace seqmem::lstm {

// Whether few enough launches take the batch for these kernels to be the quickest.
bool persistent_serves(const at::Tensor& like, int64_t batch, int64_t hidden);

// `c` is the first cell state coming in, the last going out; `hx` must not be `hy`.
void forward_persistent(const at::Tensor& z, Maybe hx, const at::Tensor& hy, const at::Tensor& c,
                        const at::Tensor& output, Maybe cells, bool keep_gates,
                        const at::Tensor& weight_hh, Maybe bias_ih, Maybe bias_hh, Maybe lengths,
                        Maybe reset, int64_t steps, int64_t t_stride, int64_t b_stride,
                        bool reverse);

// `d_c` is the last cell state's gradient coming in, the first's going out.
void backward_persistent(const at::Tensor& dz, const at::Tensor& d_c, Maybe grad_output,
                         Maybe grad_hy, Maybe grad_gates, Maybe grad_cells,
                         const at::Tensor& weight_hh, Maybe cx, const at::Tensor& gates,
                         const at::Tensor& cells, Maybe lengths, Maybe reset, int64_t steps,
                         int64_t t_stride, int64_t b_stride, bool reverse);

}  // namespace seqmem::lstm
