// The NTM functionals' arguments and their checks, the same for every device and grad mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/check.h"

namespace seqmem::ntm_addressing {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Letters as in seqmem_fast/ops/ntm_addressing.py; an absent batch or head dimension counts as one.
template <class Int>
struct Sizes {
  Int B = 1, H = 1, N, M, taps = 0;
  bool batched, heads;  // whether these dimensions are there
};

// Checks of one call: memory [N, M] or [B, N, M] decides on the batch, `first` on the heads.
template <class Int>
class Arguments {
 public:
  Sizes<Int> s;

  Arguments(const char* op, const Tensor& memory, const char* first_name, const Tensor& first)
      : check_(op, memory, "memory") {
    check_.floating_input();
    const int64_t dims = memory.dim();
    TORCH_CHECK_VALUE(dims == 2 || dims == 3, op, ": expected memory with 2 or 3 dimensions, got ",
                      dims, " (shape ", memory.sym_sizes(), ")");
    s.N = Check<Int>::size(memory, dims - 2);
    s.M = Check<Int>::size(memory, dims - 1);
    TORCH_CHECK_VALUE(s.N > 0 && s.M > 0, op,
                      ": expected memory with at least one slot of at least one value, got ",
                      memory.sym_sizes());
    check_.same_kind(first_name, first);
    TORCH_CHECK_VALUE(first.dim() == dims - 1 || first.dim() == dims, op, ": expected ", first_name,
                      " with ", dims - 1, " dimensions (one head) or ", dims,
                      " (several) beside memory of shape ", memory.sym_sizes(), ", got ",
                      first.dim(), " (shape ", first.sym_sizes(), ")");
    s.batched = dims == 3;
    s.heads = first.dim() == dims;
    if (s.batched) s.B = Check<Int>::size(memory, 0);
    if (s.heads) s.H = Check<Int>::size(first, dims - 2);
    TORCH_CHECK_VALUE(s.H > 0, op, ": expected ", first_name, " of at least one head, got shape ",
                      first.sym_sizes());
  }

  // [B, H, rest...], without the dimensions that are not there.
  template <class... Rest>
  void per_head(const char* name, const Tensor& t, const Rest&... rest) const {
    if (s.batched && s.heads) return check_.operand(name, t, {s.B, s.H, rest...});
    if (s.batched) return check_.operand(name, t, {s.B, rest...});
    if (s.heads) return check_.operand(name, t, {s.H, rest...});
    check_.operand(name, t, {rest...});
  }

  void shift(const Tensor& t) {
    const int64_t dims = s.batched + s.heads + 1;
    check_.same_kind("shift", t);
    check_.dims("shift", t, dims);
    s.taps = Check<Int>::size(t, dims - 1);
    TORCH_CHECK_VALUE(s.taps % 2 == 1, check_.op(),
                      ": expected shift with an odd number of taps (2 r + 1), got ", s.taps);
    TORCH_CHECK_VALUE(s.taps <= s.N + 1, check_.op(), ": expected shift that moves by at most ",
                      s.N / 2, " (half the slots of memory), got one that moves by ", s.taps / 2);
    per_head("shift", t, s.taps);
  }

 private:
  const Check<Int> check_;
};

template <class Int>
Sizes<Int> check_content(const Tensor& memory, const Tensor& key, const Tensor& beta) {
  const Arguments<Int> a("seqmem::ntm_content_addressing", memory, "key", key);
  a.per_head("key", key, a.s.M);
  a.per_head("beta", beta);
  return a.s;
}

template <class Int>
Sizes<Int> check_addressing(const Tensor& memory, const Tensor& key, const Tensor& beta,
                            const Tensor& gate, const Tensor& shift, const Tensor& gamma,
                            const Tensor& prev_weights) {
  Arguments<Int> a("seqmem::ntm_addressing", memory, "key", key);
  a.per_head("key", key, a.s.M);
  a.per_head("beta", beta);
  a.per_head("gate", gate);
  a.shift(shift);
  a.per_head("gamma", gamma);
  a.per_head("prev_weights", prev_weights, a.s.N);
  return a.s;
}

template <class Int>
Sizes<Int> check_read(const Tensor& memory, const Tensor& weights) {
  const Arguments<Int> a("seqmem::ntm_read", memory, "weights", weights);
  a.per_head("weights", weights, a.s.N);
  return a.s;
}

template <class Int>
Sizes<Int> check_write(const Tensor& memory, const Tensor& weights, const Tensor& erase,
                       const Tensor& add) {
  const Arguments<Int> a("seqmem::ntm_write", memory, "weights", weights);
  a.per_head("weights", weights, a.s.N);
  a.per_head("erase", erase, a.s.M);
  a.per_head("add", add, a.s.M);
  return a.s;
}

}  // namespace seqmem::ntm_addressing
