// What the launchers of all ops share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../common/operand.h"

namespace seqmem {

inline cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline at::Tensor dense(Maybe t) { return t.has_value() ? t->contiguous() : at::Tensor(); }

}  // namespace seqmem
