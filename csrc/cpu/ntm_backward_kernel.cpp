// NTM backward over a whole sequence: the controller as in common/machine_backward.h, the heads as
// in ntm_backward_heads.h.
#include "../common/machine_backward.h"
#include "ntm_backward_heads.h"

namespace seqmem::ntm {
namespace {

template <class C>
using Run = BackwardRun<C, BackwardHeads<C>>;

}  // namespace

const Kernel<Backward, Shape> SEQMEM_ISA::backward_kernel =
    Entry<Run, Types::FloatAndDouble, Backward, Shape>::table;

}  // namespace seqmem::ntm
