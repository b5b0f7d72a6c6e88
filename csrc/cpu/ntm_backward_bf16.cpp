// NTM backward over a whole sequence in bf16: as ntm_backward_kernel.cpp, in float32 but for the
// products with weights and those of their gradients, which run on tiles or dot products.
#include "../common/machine_backward.h"
#include "../common/machine_backward_weights_bf16.h"
#include "ntm_backward_heads.h"

namespace seqmem::ntm {
namespace {

template <class S>
using Run = BackwardRun<compute_t<S>, BackwardHeads<compute_t<S>>, BackwardWeightsInBf16,
                        OuterProductsInBf16>;

}  // namespace

const Kernel<Backward, Shape> SEQMEM_ISA::backward_kernel =
    Entry<Run, Types::BFloat16, Backward, Shape>::table;

}  // namespace seqmem::ntm
