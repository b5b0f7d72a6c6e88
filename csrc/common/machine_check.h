// Checks that the ops of a machine, a controller with a memory of slots, share.
#pragma once

#include <string>

#include "check.h"

namespace seqmem::machine {

// Sets s.layers and s.kept, the layers that have a state; s has I, C and R, the values read.
template <class Int, class Sizes>
void check_controller(const Check<Int>& check, Sizes& s, at::TensorList controller, bool lstm) {
  const int64_t each = lstm ? 4 : 2, count = static_cast<int64_t>(controller.size());
  TORCH_CHECK_VALUE(count > 0 && count % each == 0, check.op(), ": expected ", each,
                    " controller tensors a layer, got ", count, " in all");
  s.layers = count / each;
  s.kept = lstm ? s.layers : 0;
  const Int rows = s.C * (lstm ? 4 : 1);
  for (int64_t i = 0; i < count; ++i) {
    const std::string name = "controller[" + std::to_string(i) + "]";
    const Int below = i < each ? s.I + s.R : s.C;
    if (i % each == 0) {
      check.operand(name.c_str(), controller[i], {rows, below});
    } else if (lstm && i % each == 1) {
      check.operand(name.c_str(), controller[i], {rows, s.C});
    } else {
      check.operand(name.c_str(), controller[i], {rows});
    }
  }
}

}  // namespace seqmem::machine
