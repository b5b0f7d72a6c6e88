// Indexed attention and the selection of keys: schemas, the CPU and Meta keys. Arguments:
// seqmem_fast/ops/indexed_attention.py.
#include <ATen/ops/empty.h>

#include "../common/dispatch.h"
#include "../common/head_operands.h"
#include "../cpu/indexed_attention_kernel.h"
#include "indexed_attention_check.h"

namespace seqmem::indexed_attention {
namespace {

// The features of each row side by side.
Tensor dense_rows(In t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous(); }

// The arguments as the kernels take them, alive as long as this.
struct Call {
  const Tensor q, k, v, index;
  const Shape shape;

  Call(const Inputs& in, const Sizes<int64_t>& s)
      : q(dense_rows(in.q)),
        k(dense_rows(in.k)),
        v(dense_rows(in.v)),
        index(in.index.contiguous()),
        shape{head_shape(s, in), s.C, s.lists, index.size(0) == 1 ? 0 : index.size(1),
              index.size(1) == 1 ? 0 : 1} {}

  int threads(double products) const {
    const double rows = double(shape.B) * shape.Hq * shape.Tq;
    return threads_for_scores(rows, rows * shape.C, shape.D + shape.Dv, 4 * products);
  }
};

template <class Int>
Tensors<2> allocate(const ForwardInputs& in, const Sizes<Int>& s) {
  return large_results<Int>(in, s, {s.B, s.Hq, s.Tq, s.C});
}

Tensors<2> forward_cpu(const ForwardInputs& in) {
  const auto s = check<int64_t>(in);
  Tensors<2> out = allocate(in, s);
  const auto& [output, weights] = out;
  if (s.B * s.Hq * s.Tq == 0) return out;
  const Call call(in, s);
  const Forward arguments = {.q = heads_of(call.q),
                             .k = heads_of(call.k),
                             .v = heads_of(call.v),
                             .index = call.index.const_data_ptr<int64_t>(),
                             .output = data(output),
                             .weights = some_data(weights),
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), call.threads(1), arguments, storage_of(in.q), call.shape,
         Plan{});
  return out;
}

Tensors<2> forward_meta(const ForwardInputs& in) { return allocate(in, check<c10::SymInt>(in)); }

Tensors<3> backward_cpu(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  const bool none = s.B * s.Hq * s.Tq == 0;
  const Tensors<3> out = large_gradients(in, none);
  const auto& [grad_q, grad_k, grad_v] = out;
  if (none) return out;
  const Call call(in, s);
  const bool by_keys = in.output_mask[1] || in.output_mask[2];
  auto scratch = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return by_keys ? KeptBlocks::empty(sizes, in.q.options().dtype(type)) : Tensor();
  };
  const auto type = in.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor slopes = scratch({s.B, s.Hq, s.Tq, s.C}, type);
  const Tensor places = scratch({s.lists, s.Tq * s.C}, at::kLong);
  const Tensor begins = scratch({s.lists, s.Tk + 1}, at::kLong);
  const Operand weights(in.weights), grad_weights(in.grad_weights);
  const OptionalTensor grad_output =
      in.grad_output.has_value() ? OptionalTensor(dense_rows(*in.grad_output)) : std::nullopt;
  auto longs = [](const Tensor& t) { return static_cast<int64_t*>(data(t)); };
  const Backward arguments = {.grad_output = heads_of(grad_output),
                              .grad_weights = grad_weights.data(),
                              .q = heads_of(call.q),
                              .k = heads_of(call.k),
                              .v = heads_of(call.v),
                              .index = call.index.const_data_ptr<int64_t>(),
                              .weights = weights.data(),
                              .grad_q = some_data(grad_q),
                              .grad_k = some_data(grad_k),
                              .grad_v = some_data(grad_v),
                              .slopes = data(slopes),
                              .places = longs(places),
                              .begins = longs(begins),
                              .workspace = nullptr};
  launch(SEQMEM_CHOOSE(backward_kernel), call.threads(2.5), arguments, storage_of(in.q), call.shape,
         Plan{});
  return out;
}

Tensors<3> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return gradients_like(in.output_mask, in.q, in.k, in.v);
}

Tensor select_cpu(const SelectionInputs& in) {
  const auto s = check_selection<int64_t>(in);
  const Tensor index = at::empty({s.B, s.Hq, s.Tq, in.count}, in.q.options().dtype(at::kLong));
  if (index.numel() == 0) return index;
  const BoundOperand end(in.key_end);
  const Shape shape = {head_shape(s, {in.scale, 1, 0, {}}), in.count, 0, 0, 0};
  const Selection arguments = {.q = heads_of(in.q),
                               .k = heads_of(in.k),
                               .index = index.mutable_data_ptr<int64_t>(),
                               .count = in.count,
                               .is_causal = in.is_causal,
                               .end = end.bounds(),
                               .workspace = nullptr};
  const double rows = double(s.B) * s.Hq * s.Tq;
  launch(SEQMEM_CHOOSE(selection_kernel), threads_for_scores(rows, rows * s.Tk, s.D, 1), arguments,
         storage_of(in.q), shape, Plan{});
  return index;
}

Tensor select_meta(const SelectionInputs& in) {
  const auto s = check_selection<c10::SymInt>(in);
  return at::empty_symint({s.B, s.Hq, s.Tq, in.count}, in.q.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                      \
  "Tensor q, Tensor k, Tensor v, Tensor index, float? scale, float alpha, float dropout, " \
  "Tensor? seed, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS "bool need_weights) -> (Tensor output, Tensor weights)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m, "(Tensor? grad_output, Tensor? grad_weights, " SEQMEM_INPUTS
         "Tensor weights, bool[3] output_mask) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  SelectionOp::define<check_selection<c10::SymInt>, select_cpu, select_meta>(
      m,
      "(Tensor q, Tensor k, int count, bool is_causal, Tensor? key_end, float? scale)"
      " -> Tensor index");
}

#undef SEQMEM_INPUTS

}  // namespace seqmem::indexed_attention
