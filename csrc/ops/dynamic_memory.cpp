// Dynamic memory: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/dynamic_memory.py.
#include <ATen/OpMathType.h>

#include <algorithm>
#include <array>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/op.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/dynamic_memory_kernel.h"

namespace seqmem::dynamic_memory {
namespace {

using at::Tensor;

// Gradients are asked for of: query; memory; the four weights; score_query.
using Mask = std::array<bool, 4>;

constexpr char kName[] = "seqmem::dynamic_memory";
constexpr char kBackwardName[] = "seqmem::dynamic_memory_backward";
using ForwardOp = Op<kName, Tensors<3>(In, In, In, In, In, In, Maybe, Maybe, int64_t, bool, bool)>;
using BackwardOp =
    Op<kBackwardName, Tensors<7>(Maybe, Maybe, In, In, In, In, In, In, Maybe, Maybe, In, In, Mask)>;

struct Inputs {
  In query, memory, gate_weight, gate_bias, write_weight, write_bias;
  Maybe score_query, mask;
};

struct ForwardInputs : Inputs {
  int64_t num_hops;
  bool return_memory, save;
};

struct Gradients {
  Maybe grad_final, grad_attention;
};

struct BackwardInputs : Gradients, Inputs {
  In attention, saved;
  Mask output_mask;
};

template <class Int>
struct Sizes {
  Int B, N, m, h;
};

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  const Tensor& memory = in.memory;
  check.floating_input();
  check.dims("query", in.query, 2);
  check.same_kind("memory", memory);
  TORCH_CHECK_VALUE(memory.dim() == 2 || memory.dim() == 3, check.op(),
                    ": expected memory of shape [N, m] or [B, N, m], got ", memory.sym_sizes());
  const Sizes<Int> s = {check.size(in.query, 0), check.size(memory, memory.dim() - 2),
                        check.size(memory, memory.dim() - 1), check.size(in.query, 1)};
  if (memory.dim() == 3) check.shape("memory", memory, {s.B, s.N, s.m});
  TORCH_CHECK_VALUE(s.N > 0 && s.m > 0, check.op(),
                    ": expected memory with at least one slot of at least one element, got ",
                    memory.sym_sizes());
  check.operand("gate_weight", in.gate_weight, {s.m, s.m + s.h});
  check.operand("gate_bias", in.gate_bias, {s.m});
  check.operand("write_weight", in.write_weight, {s.m, s.m + s.h});
  check.operand("write_bias", in.write_bias, {s.m});
  check.operand("score_query", in.score_query, {s.B, s.m});
  TORCH_CHECK_VALUE(in.score_query.has_value() || s.h == s.m, check.op(),
                    ": expected score_query where query is ", s.h, " wide and memory ", s.m,
                    ", got none");
  if (in.mask.has_value()) check.typed("mask", *in.mask, at::kBool, {s.B, s.N});
  return s;
}

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  const Check<Int> check(kName, in.query, "query");
  const auto s = check_inputs(check, in);
  TORCH_CHECK_VALUE(in.num_hops >= 0, kName, ": expected num_hops >= 0, got ", in.num_hops);
  return s;
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.query, "query");
  const auto s = check_inputs(check, in);
  check.same_kind("attention", in.attention);
  check.dims("attention", in.attention, 3);
  const Int hops = check.size(in.attention, 0);
  check.operand("attention", in.attention, {hops, s.B, s.N});
  check.typed("saved", in.saved, at::toOpMathType(in.query.scalar_type()),
              {hops, s.B, Int(3), s.m});
  check.operand("grad_final", in.grad_final, {s.B, s.N, s.m});
  check.operand("grad_attention", in.grad_attention, {hops, s.B, s.N});
  return s;
}

// ---- how a call is run

// Rows enough for packing the memory or the weights to pay.
constexpr int64_t kRowsWorthPacking = 4;

Shape shape_of(const Sizes<int64_t>& s, const Inputs& in, int64_t hops) {
  const bool many = s.B >= kRowsWorthPacking, shared = in.memory.dim() == 2;
  return {.B = s.B,
          .N = s.N,
          .m = s.m,
          .h = s.h,
          .hops = hops,
          .shared = shared,
          .tiled = shared && !in.mask.has_value() && many,
          .pack = many};
}

// Estimates in microseconds of one core; they only steer how many threads are woken.
constexpr double kProductsPerMicrosecond = 20e3, kElementsPerMicrosecond = 2e3;
constexpr double kCallWorthSharing = 75;

int threads_for(const Shape& s, double passes, bool whole_memory) {
  const double hop = 2.0 * s.N * s.m + 2.0 * s.m * s.m + double(s.N) * 8;
  const double products = passes * s.B * (hop * s.hops + 2.0 * s.m * s.h);
  const double elements = whole_memory ? double(s.B) * s.N * s.m : 0;
  const double cost = products / kProductsPerMicrosecond + elements / kElementsPerMicrosecond;
  const double most = std::min<double>(available_threads(), std::max<int64_t>(s.B, 1));
  return static_cast<int>(std::clamp(cost / kCallWorthSharing, 1.0, most));
}

// ---- forward

template <class Int>
Tensors<3> allocate(const ForwardInputs& in, const Sizes<Int>& s) {
  const Tensor& like = in.query;
  const auto computed = like.options().dtype(at::toOpMathType(like.scalar_type()));
  const Int hops(in.num_hops);
  auto none = [&] { return empty_like_of<Int>(like, {Int(0)}); };
  return {in.return_memory ? result_of<Int>(like.options(), {s.B, s.N, s.m}) : none(),
          empty_like_of<Int>(like, {hops, s.B, s.N}),
          in.save ? empty_of<Int>(computed, {hops, s.B, Int(3), s.m}) : none()};
}

Tensors<3> forward_cpu(const ForwardInputs& in) {
  const auto s = check<int64_t>(in);
  Tensors<3> out = allocate(in, s);
  const auto& [final_memory, attention, saved] = out;
  const Operand query(in.query), memory(in.memory), gate_weight(in.gate_weight),
      gate_bias(in.gate_bias), write_weight(in.write_weight), write_bias(in.write_bias),
      score_query(in.score_query), mask(in.mask);
  const Shape shape = shape_of(s, in, in.num_hops);
  const Forward arguments = {.query = query.data(),
                             .memory = memory.data(),
                             .gate_weight = gate_weight.data(),
                             .gate_bias = gate_bias.data(),
                             .write_weight = write_weight.data(),
                             .write_bias = write_bias.data(),
                             .score_query = score_query.data(),
                             .mask = static_cast<const bool*>(mask.data()),
                             .final_memory = data(final_memory),
                             .attention = data(attention),
                             .saved = data(saved),
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads_for(shape, 1, in.return_memory), arguments,
         storage_of(in.query), shape);
  return out;
}

Tensors<3> forward_meta(const ForwardInputs& in) { return allocate(in, check<c10::SymInt>(in)); }

// ---- backward

Tensors<7> allocate_gradients(const BackwardInputs& in) {
  const auto [of_query, of_memory, of_weights, of_score] = in.output_mask;
  return gradients_like(
      {of_query, of_memory, of_weights, of_weights, of_weights, of_weights, of_score}, in.query,
      in.memory, in.gate_weight, in.gate_bias, in.write_weight, in.write_bias, in.score_query);
}

Tensors<7> backward_cpu(const BackwardInputs& in) {
  const auto s = check_backward<int64_t>(in);
  Tensors<7> out = allocate_gradients(in);
  if (in.output_mask[1])
    std::get<1>(out) = KeptBlocks::result(in.memory.sizes(), in.memory.options());
  const auto& [grad_query, grad_memory, grad_gate_weight, grad_gate_bias, grad_write_weight,
               grad_write_bias, grad_score_query] = out;
  const Operand query(in.query), memory(in.memory), gate_weight(in.gate_weight),
      write_weight(in.write_weight), score_query(in.score_query), mask(in.mask),
      attention(in.attention), saved(in.saved);
  const Shape shape = shape_of(s, in, in.attention.size(0));
  Backward arguments = {.grad_final = nullptr,
                        .grad_attention = nullptr,
                        .final_strides = {},
                        .attention_strides = {},
                        .query = query.data(),
                        .memory = memory.data(),
                        .gate_weight = gate_weight.data(),
                        .write_weight = write_weight.data(),
                        .score_query = score_query.data(),
                        .mask = static_cast<const bool*>(mask.data()),
                        .attention = attention.data(),
                        .saved = saved.data(),
                        .grad_query = data(grad_query),
                        .grad_memory = data(grad_memory),
                        .grad_gate_weight = data(grad_gate_weight),
                        .grad_gate_bias = data(grad_gate_bias),
                        .grad_write_weight = data(grad_write_weight),
                        .grad_write_bias = data(grad_write_bias),
                        .grad_score_query = data(grad_score_query),
                        .workspace = nullptr};
  // Often expanded, of a sum: read as they are laid out.
  auto take = [](const OptionalTensor& grad, const void*& values, int64_t* strides) {
    if (!grad.has_value()) return;
    values = grad->const_data_ptr();
    std::copy_n(grad->strides().data(), 3, strides);
  };
  take(in.grad_final, arguments.grad_final, arguments.final_strides);
  take(in.grad_attention, arguments.grad_attention, arguments.attention_strides);
  launch(SEQMEM_CHOOSE(backward_kernel),
         threads_for(shape, 2, in.grad_final.has_value() && !shape.shared), arguments,
         storage_of(in.query), shape);
  return out;
}

Tensors<7> backward_meta(const BackwardInputs& in) {
  check_backward<c10::SymInt>(in);
  return allocate_gradients(in);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_INPUTS                                                                        \
  "Tensor query, Tensor memory, Tensor gate_weight, Tensor gate_bias, Tensor write_weight, " \
  "Tensor write_bias, Tensor? score_query, Tensor? mask, "
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(" SEQMEM_INPUTS
         "int num_hops, bool return_memory, bool save) -> (Tensor final_memory, Tensor attention, "
         "Tensor saved)");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m, "(Tensor? grad_final, Tensor? grad_attention, " SEQMEM_INPUTS
         "Tensor attention, Tensor saved, bool[4] output_mask) -> (Tensor grad_query, "
         "Tensor grad_memory, Tensor grad_gate_weight, Tensor grad_gate_bias, "
         "Tensor grad_write_weight, Tensor grad_write_bias, Tensor grad_score_query)");
}

#undef SEQMEM_INPUTS

}  // namespace seqmem::dynamic_memory
