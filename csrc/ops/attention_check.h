// attention's arguments and their checks, the same for every device and grad mode.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "../common/check.h"
#include "../common/matrices.h"

namespace seqmem::attention {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr char kName[] = "seqmem::attention";

template <class Int>
struct Sizes {
  c10::SmallVector<Int, 4> batch;  // the leading dimensions of all arguments, broadcast
  Int Tq, Tk, D, Dv;

  c10::SmallVector<Int, 6> with(const Int& rows, const Int& columns) const {
    c10::SmallVector<Int, 6> sizes(batch.begin(), batch.end());
    sizes.push_back(rows);
    sizes.push_back(columns);
    return sizes;
  }
};

// Widens `batch` by the leading dimensions of t.
template <class Int>
void broadcast_leading(const Check<Int>& check, c10::SmallVector<Int, 4>& batch, const char* name,
                       const Tensor& t) {
  const int64_t leading = std::max<int64_t>(t.dim() - 2, 0);
  if (leading > static_cast<int64_t>(batch.size()))
    batch.insert(batch.begin(), leading - batch.size(), Int(1));
  for (int64_t i = 0; i < leading; ++i) {
    Int& here = batch[batch.size() - leading + i];
    const Int size = check.size(t, i);
    if (here == 1) {
      here = size;
    } else {
      TORCH_CHECK_VALUE(size == 1 || size == here, check.op(), ": expected ", name,
                        " with leading dimensions that broadcast to ", batch, ", got shape ",
                        t.sym_sizes());
    }
  }
}

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
  broadcast_leading(check, s.batch, "query", query);
  broadcast_leading(check, s.batch, "key", key);
  broadcast_leading(check, s.batch, "value", value);
  if (mask.has_value()) {
    check_mask(check, query, *mask, s.Tq, s.Tk);
    broadcast_leading(check, s.batch, "mask", *mask);
  }
  return s;
}

}  // namespace seqmem::attention
