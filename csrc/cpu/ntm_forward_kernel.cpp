// NTM forward over a whole sequence: the controller as in common/machine_forward.h, the heads as in
// ntm_forward_heads.h.
#include "../common/machine_forward.h"
#include "ntm_forward_heads.h"

namespace seqmem::ntm {
namespace {

template <class C>
using Run = ForwardRun<C, ForwardHeads<C>>;

}  // namespace

const Kernel<Forward, Shape> SEQMEM_ISA::forward_kernel =
    Entry<Run, Types::FloatAndDouble, Forward, Shape>::table;

}  // namespace seqmem::ntm
