// NTM forward over a whole sequence in bf16: as ntm_forward_kernel.cpp, in float32 but for the
// products with weights, which run on tiles or dot products.
#include "../common/machine_forward.h"
#include "../common/machine_forward_weights_bf16.h"
#include "ntm_forward_heads.h"

namespace seqmem::ntm {
namespace {

template <class S>
using Run = ForwardRun<compute_t<S>, ForwardHeads<compute_t<S>>, ForwardWeightsInBf16>;

}  // namespace

const Kernel<Forward, Shape> SEQMEM_ISA::forward_kernel =
    Entry<Run, Types::BFloat16, Forward, Shape>::table;

}  // namespace seqmem::ntm
