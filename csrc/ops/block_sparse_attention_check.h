// Block-sparse attention's signatures, their arguments by name, and the checks, which are the same
// for every device and grad mode.
#pragma once

#include "../common/heads_check.h"

namespace seqmem::block_sparse_attention {

using at::Tensor;

inline constexpr char kName[] = "seqmem::block_sparse_attention",
                      kBackwardName[] = "seqmem::block_sparse_attention_backward";
using ForwardOp = Op<kName, Tensors<2>(In, In, In, In, int64_t, int64_t, bool, Maybe, Scale, double,
                                       double, Maybe, bool)>;
using BackwardOp =
    Op<kBackwardName, Tensors<3>(Maybe, Maybe, In, In, In, In, int64_t, int64_t, bool, Maybe, Scale,
                                 double, double, Maybe, In, std::array<bool, 3>)>;

struct BlockInputs {
  In blocks;
  int64_t block_queries, block_keys;
  bool is_causal;
  Maybe key_end;
};
struct Inputs : HeadInputs, BlockInputs, WeightInputs {};
using ForwardInputs = ForwardOf<Inputs>;
using BackwardInputs = BackwardOf<Inputs>;

template <class Int>
struct Sizes : HeadSizes<Int> {
  Int lists, N;  // lists of N places
};

// Each list: blocks that exist, each once, in order; after them, places that hold none. A GPU would
// have to be waited for: there, a place that is no block holds none.
template <class Int>
void check_blocks(const Check<Int>& check, const Inputs& in) {
  const Tensor list = in.blocks.contiguous();
  const int64_t* pair = list.const_data_ptr<int64_t>();
  const int64_t places = list.size(2), rows = in.q.size(2), columns = in.k.size(2);
  for (int64_t n = 0; n < list.numel() / 2; ++n, pair += 2) {
    const bool none = pair[0] == -1 && pair[1] == -1, first = n % places == 0;
    const bool exists = pair[0] >= 0 && pair[0] <= (rows - 1) / in.block_queries && rows > 0 &&
                        pair[1] >= 0 && pair[1] <= (columns - 1) / in.block_keys && columns > 0;
    const bool follows =
        first ||
        (pair[-2] >= 0 && (pair[-2] < pair[0] || (pair[-2] == pair[0] && pair[-1] < pair[1])));
    TORCH_CHECK_VALUE(none || (exists && follows), check.op(),
                      ": expected blocks that exist, in order, and then none (-1, -1), got (",
                      pair[0], ", ", pair[1], ") at place ", n % places, " of list ", n / places);
  }
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  const auto heads = check_heads(check, in.q, in.k, in.v);
  check.typed("blocks", in.blocks, at::kLong);
  check.dims("blocks", in.blocks, 4);
  const auto lists = lists_of(check, in.blocks, heads);
  const Int N = check.size(in.blocks, 2);
  check.shape("blocks", in.blocks, {lists[0], lists[1], N, 2});
  constexpr int64_t kMost = 1 << 20;  // products of sizes stay in range
  for (const int64_t size : {in.block_queries, in.block_keys})
    TORCH_CHECK_VALUE(1 <= size && size <= kMost, check.op(),
                      ": expected block of two sizes in 1..", kMost, ", got ", size);
  check_bound(check, "key_end", in.key_end, heads);
  check_weighing(check, in);
  if (in.blocks.is_cpu()) check_blocks(check, in);
  return {heads, lists[0] * lists[1], N};
}

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.q, "q"), in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.q, "q");
  const auto s = check_inputs(check, in);
  check.operand("grad_output", in.grad_output, {s.B, s.Hq, s.Tq, s.Dv});
  const Int rows = in.block_queries, columns = in.block_keys;
  check.operand("grad_weights", in.grad_weights, {s.B, s.Hq, s.N, rows, columns});
  check.operand("weights", in.weights, {s.B, s.Hq, s.N, rows, columns});
  return s;
}

}  // namespace seqmem::block_sparse_attention
