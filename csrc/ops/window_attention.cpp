// Window attention: schemas, the CPU and Meta keys. Arguments: seqmem_fast/ops/window_attention.py.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/head_operands.h"
#include "../cpu/window_attention_kernel.h"
#include "window_attention_check.h"

namespace seqmem::window_attention {
namespace {

// The arguments as the kernels take them, alive as long as this.
struct Call {
  const BoundOperand start, end;
  const Shape shape;

  Call(const Inputs& in, const Sizes<int64_t>& s)
      : start(in.key_start), end(in.key_end), shape(shape_of(in, s)) {}

 private:
  Shape shape_of(const Inputs& in, const Sizes<int64_t>& s) const {
    return {head_shape(s, in), s.left,         s.right,        in.dilation,
            in.offset,         in.global_keys, start.bounds(), end.bounds()};
  }
};

constexpr int64_t kTasksPerThread = 4;

int threads_for(const Shape& s, double products) {
  const double rows = double(s.B) * s.Hq * s.Tq;
  return threads_for_scores(rows, rows * std::min(s.W() + s.G, s.Tk), s.D + s.Dv, products);
}

// Queries below which a part of a head is not worth the packing of its keys.
constexpr int64_t kRowsOfTask = 96;

int64_t groups_for(const Shape& s, int64_t tasks) {
  const int64_t heads = std::max<int64_t>(s.B * s.Hk * std::min(s.dilation, s.Tq), 1);
  const int64_t least = std::max(kRowsOfTask, std::min(s.W(), s.Tk));
  const int64_t queries = s.Tq / s.dilation * (s.Hq / s.Hk);
  return std::clamp<int64_t>((tasks + heads - 1) / heads, 1, std::max<int64_t>(queries / least, 1));
}

template <class Int>
Tensors<3> allocate(const ForwardInputs& in, const Sizes<Int>& s) {
  const Tensor output = result_of<Int>(in.q.options(), {s.B, s.Hq, s.Tq, s.Dv});
  if (!in.need_weights)
    return {output, at::empty({0}, in.q.options()), at::empty({0}, in.q.options())};
  return {output, result_of<Int>(in.q.options(), {s.B, s.Hq, s.Tq, s.W()}),
          result_of<Int>(in.q.options(), {s.B, s.Hq, s.Tq, Int(in.global_keys)})};
}

Tensors<3> forward_cpu(const ForwardInputs& in) {
  const auto s = check<int64_t>(in);
  Tensors<3> out = allocate(in, s);
  const auto& [output, weights, global_weights] = out;
  if (s.B * s.Hq * s.Tq == 0) return out;
  const Call call(in, s);
  const int threads = threads_for(call.shape, 1);
  const Plan plan = {.groups = groups_for(call.shape, threads == 1 ? 1 : threads * kTasksPerThread),
                     .next = 0};
  const bool global = in.need_weights && in.global_keys > 0;
  const Forward arguments = {.q = heads_of(in.q),
                             .k = heads_of(in.k),
                             .v = heads_of(in.v),
                             .output = data(output),
                             .weights = in.need_weights ? data(weights) : nullptr,
                             .global_weights = global ? data(global_weights) : nullptr,
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads, arguments, storage_of(in.q), call.shape, plan);
  return out;
}

Tensors<3> forward_meta(const ForwardInputs& in) { return allocate(in, check<c10::SymInt>(in)); }

// The parts of a head that are summed separately; the same at any number of threads.
constexpr int64_t kBackwardTasks = 16;

Tensors<3> backward_cpu(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  const Tensors<3> out = large_gradients(in, s.Tq < in.dilation || s.Hq == 0);
  const auto& [grad_q, grad_k, grad_v] = out;
  if (s.B * s.Hq * s.Tq > 0) {
    const Call call(in, s);
    const Plan plan = {.groups = groups_for(call.shape, kBackwardTasks), .next = 0};
    const Operand weights(in.weights), global_weights(in.global_weights);
    const Backward arguments = {.grad_output = heads_of(in.grad_output),
                                .grad_weights = heads_of(in.grad_weights),
                                .grad_global = heads_of(in.grad_global_weights),
                                .q = heads_of(in.q),
                                .k = heads_of(in.k),
                                .v = heads_of(in.v),
                                .weights = weights.data(),
                                .global_weights = global_weights.data(),
                                .grad_q = some_data(grad_q),
                                .grad_k = some_data(grad_k),
                                .grad_v = some_data(grad_v),
                                .workspace = nullptr};
    launch(SEQMEM_CHOOSE(backward_kernel), threads_for(call.shape, 2.5), arguments,
           storage_of(in.q), call.shape, plan);
  }
  return out;
}

Tensors<3> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return gradients_like(in.output_mask, in.q, in.k, in.v);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                \
  "Tensor q, Tensor k, Tensor v, int left, int right, int dilation, int offset, "    \
  "Tensor? key_start, Tensor? key_end, int global_keys, float? scale, float alpha, " \
  "float dropout, Tensor? seed, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS
         "bool need_weights) -> (Tensor output, Tensor weights, Tensor global_weights)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m, "(Tensor? grad_output, Tensor? grad_weights, Tensor? grad_global_weights, " SEQMEM_INPUTS
         "Tensor weights, Tensor global_weights, bool[3] output_mask)"
         " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

#undef SEQMEM_INPUTS

}  // namespace seqmem::window_attention
