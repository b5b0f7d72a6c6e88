// attention's arguments and their checks, the same for every device and grad mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/check.h"
#include "../common/matrices.h"

namespace seqmem::attention {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr char kName[] = "seqmem::attention";

template <class Int>
struct Sizes {
  Leading<Int> batch;  // the leading dimensions of all arguments, broadcast
  Int Tq, Tk, D, Dv;
};

template <class Int>
Sizes<Int> check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                           const OptionalTensor& mask) {
  const Check<Int> check(kName, query, "query");
  check.floating_input();
  check.same_kind("key", key);
  check.same_kind("value", value);
  check_matrices(check, "query", query);
  check_matrices(check, "key", key);
  check_matrices(check, "value", value);
  Sizes<Int> s;
  s.Tq = check.size(query, query.dim() - 2);
  s.D = check.size(query, query.dim() - 1);
  s.Tk = check.size(key, key.dim() - 2);
  s.Dv = check.size(value, value.dim() - 1);
  TORCH_CHECK_VALUE(s.D > 0, check.op(), ": expected query with at least one feature, got shape ",
                    query.sym_sizes());
  TORCH_CHECK_VALUE(check.size(key, key.dim() - 1) == s.D, check.op(),
                    ": expected key of shape [..., ", s.Tk, ", ", s.D, "], got ", key.sym_sizes());
  TORCH_CHECK_VALUE(check.size(value, value.dim() - 2) == s.Tk, check.op(),
                    ": expected value of shape [..., ", s.Tk, ", ", s.Dv, "], got ",
                    value.sym_sizes());
  s.batch.widen(check, "query", query);
  s.batch.widen(check, "key", key);
  s.batch.widen(check, "value", value);
  if (mask.has_value()) {
    check_mask(check, query, *mask, s.Tq, s.Tk);
    s.batch.widen(check, "mask", *mask);
  }
  return s;
}

}  // namespace seqmem::attention
