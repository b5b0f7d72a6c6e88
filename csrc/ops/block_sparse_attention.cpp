// Block-sparse attention: schemas, the CPU and Meta keys. Arguments:
// seqmem_fast/ops/block_sparse_attention.py.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "../common/dispatch.h"
#include "../common/head_operands.h"
#include "../cpu/block_sparse_attention_kernel.h"
#include "block_sparse_attention_check.h"

namespace seqmem::block_sparse_attention {
namespace {

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The arguments as the kernels take them, alive as long as this.
class Call {
  const Tensor list_;
  const BoundOperand end_;
  std::vector<int64_t> rows_, by_key_, columns_;

 public:
  Shape shape;
  int64_t total = 0;  // listed blocks

  Call(const Inputs& in, const Sizes<int64_t>& s)
      : list_(in.blocks.contiguous()), end_(in.key_end), shape(shape_of(in, s)) {
    const int64_t heads = list_.size(1), nQ = shape.nQ, N = s.N;
    const int64_t* pairs = list_.const_data_ptr<int64_t>();
    rows_.assign(s.lists * (nQ + 1), 0);
    for (int64_t l = 0; l < s.lists; ++l) {
      int64_t* rows = rows_.data() + l * (nQ + 1);
      for (int64_t n = 0; n < N && pairs[2 * (l * N + n)] >= 0; ++n)
        ++rows[pairs[2 * (l * N + n)] + 1];
      for (int64_t i = 0; i < nQ; ++i) {
        shape.lists.longest = std::max(shape.lists.longest, rows[i + 1]);
        rows[i + 1] += rows[i];
      }
      total += rows[nQ];
    }
    shape.lists.blocks = pairs;
    shape.lists.rows = rows_.data();
    shape.lists.head = heads == 1 ? 0 : 1;
    shape.lists.row = list_.size(0) == 1 ? 0 : heads;
    total *= s.B * s.Hq / std::max<int64_t>(s.lists, 1);
  }

  // For a backward: the places of each key block.
  void sort_by_key() {
    const int64_t lists = int64_t(rows_.size()) / (shape.nQ + 1), N = shape.N, nK = shape.nK;
    columns_.assign(lists * (nK + 1), 0);
    by_key_.assign(lists * N, 0);
    for (int64_t l = 0; l < lists; ++l) {
      const int64_t count = rows_[l * (shape.nQ + 1) + shape.nQ];
      const int64_t* pairs = shape.lists.blocks + 2 * l * N;
      int64_t* columns = columns_.data() + l * (nK + 1);
      for (int64_t n = 0; n < count; ++n) ++columns[pairs[2 * n + 1] + 1];
      for (int64_t j = 0; j < nK; ++j) columns[j + 1] += columns[j];
      std::vector<int64_t> next(columns, columns + nK);
      for (int64_t n = 0; n < count; ++n) by_key_[l * N + next[pairs[2 * n + 1]]++] = n;
    }
    shape.lists.by_key = by_key_.data();
    shape.lists.columns = columns_.data();
  }

 private:
  Shape shape_of(const Inputs& in, const Sizes<int64_t>& s) const {
    const int64_t nQ = parts(s.Tq, in.block_queries), nK = parts(s.Tk, in.block_keys);
    return {head_shape(s, in), s.N,          in.block_queries, in.block_keys, nQ, nK, {},
            in.is_causal,      end_.bounds()};
  }
};

constexpr int64_t kTasksPerThread = 8;

int threads_for(const Call& call, double products) {
  const Shape& s = call.shape;
  const double scores = double(call.total) * std::min(s.Bq, s.Tq) * std::min(s.Bk, s.Tk);
  return threads_for_scores(double(s.B) * s.Hq * s.Tq, scores, s.D + s.Dv, products);
}

int64_t padded_keys(const Shape& s) {
  constexpr int64_t kVector = 16;  // lanes of the widest one
  return parts(std::min(s.Bk, s.Tk), kVector) * kVector;
}

Plan plan_for(const Shape& s, int threads) {
  constexpr int64_t kKept = 3 << 20;  // values of dS
  const int64_t heads = s.B * s.Hk, of_head = s.Hq / s.Hk * s.N * s.Bq * padded_keys(s);
  const int64_t at_once = std::clamp<int64_t>(kKept / std::max<int64_t>(of_head, 1), 1, heads);
  const int64_t tasks = threads == 1 ? 1 : threads * kTasksPerThread;
  return {.groups = std::clamp<int64_t>(parts(tasks, at_once), 1, s.nQ),
          .heads = at_once,
          .next = 0,
          .next_column = 0};
}

template <class Int>
Tensors<2> allocate(const ForwardInputs& in, const Sizes<Int>& s) {
  const Int rows = in.block_queries, columns = in.block_keys;
  return large_results<Int>(in, s, {s.B, s.Hq, s.N, rows, columns});
}

Tensors<2> forward_cpu(const ForwardInputs& in) {
  const auto s = check<int64_t>(in);
  Tensors<2> out = allocate(in, s);
  const auto& [output, weights] = out;
  if (s.B * s.Hq * s.Tq == 0) {
    weights.zero_();
    return out;
  }
  const Call call(in, s);
  const int threads = threads_for(call, 1);
  const Forward arguments = {.q = heads_of(in.q),
                             .k = heads_of(in.k),
                             .v = heads_of(in.v),
                             .output = data(output),
                             .weights = some_data(weights),
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads, arguments, storage_of(in.q), call.shape,
         plan_for(call.shape, threads));
  return out;
}

Tensors<2> forward_meta(const ForwardInputs& in) { return allocate(in, check<c10::SymInt>(in)); }

// What the backward keeps between its passes.
Tensor slopes_like(const Tensor& q, const Shape& s, const Plan& plan) {
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return KeptBlocks::empty({plan.heads * (s.Hq / s.Hk), s.N, s.Bq, padded_keys(s)},
                           q.options().dtype(type));
}

Tensors<3> backward_cpu(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  const bool none = s.B * s.Hq * s.Tq == 0;
  const Tensors<3> out = large_gradients(in, none);
  const auto& [grad_q, grad_k, grad_v] = out;
  if (none) return out;
  Call call(in, s);
  call.sort_by_key();
  const Operand weights(in.weights), grad_weights(in.grad_weights);
  const int threads = threads_for(call, 2.5);
  const Plan plan = plan_for(call.shape, threads);
  const bool scores = in.output_mask[0] || in.output_mask[1];
  const Tensor slopes = scores ? slopes_like(in.q, call.shape, plan) : Tensor();
  const Backward arguments = {.grad_output = heads_of(in.grad_output),
                              .grad_weights = grad_weights.data(),
                              .q = heads_of(in.q),
                              .k = heads_of(in.k),
                              .v = heads_of(in.v),
                              .weights = weights.data(),
                              .grad_q = some_data(grad_q),
                              .grad_k = some_data(grad_k),
                              .grad_v = some_data(grad_v),
                              .slopes = data(slopes),
                              .workspace = nullptr};
  launch(SEQMEM_CHOOSE(backward_kernel), threads, arguments, storage_of(in.q), call.shape, plan);
  return out;
}

Tensors<3> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return gradients_like(in.output_mask, in.q, in.k, in.v);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                \
  "Tensor q, Tensor k, Tensor v, Tensor blocks, int block_queries, int block_keys, " \
  "bool is_causal, Tensor? key_end, float? scale, float alpha, float dropout, Tensor? seed, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS "bool need_weights) -> (Tensor output, Tensor weights)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m, "(Tensor? grad_output, Tensor? grad_weights, " SEQMEM_INPUTS
         "Tensor weights, bool[3] output_mask) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

#undef SEQMEM_INPUTS

}  // namespace seqmem::block_sparse_attention
