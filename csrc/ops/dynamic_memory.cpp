// Dynamic memory: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/dynamic_memory.py.
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/huge_pages.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/dynamic_memory_kernel.h"

namespace seqmem::dynamic_memory {
namespace {

using at::Tensor;

constexpr char kName[] = "seqmem::dynamic_memory";

template <class Int>
struct Sizes {
  Int B, N, m, h;
};

template <class Int>
Sizes<Int> check(const Tensor& query, const Tensor& memory, const Tensor& gate_weight,
                 const Tensor& gate_bias, const Tensor& write_weight, const Tensor& write_bias,
                 const OptionalTensor& score_query, const OptionalTensor& mask, int64_t num_hops) {
  const Check<Int> check(kName, query, "query");
  check.floating_input();
  check.dims("query", query, 2);
  check.same_kind("memory", memory);
  TORCH_CHECK_VALUE(memory.dim() == 2 || memory.dim() == 3, kName,
                    ": expected memory of shape [N, m] or [B, N, m], got ", memory.sym_sizes());
  const Sizes<Int> s = {check.size(query, 0), check.size(memory, memory.dim() - 2),
                        check.size(memory, memory.dim() - 1), check.size(query, 1)};
  if (memory.dim() == 3) check.shape("memory", memory, {s.B, s.N, s.m});
  TORCH_CHECK_VALUE(s.N > 0 && s.m > 0, kName,
                    ": expected memory with at least one slot of at least one element, got ",
                    memory.sym_sizes());
  check.operand("gate_weight", gate_weight, {s.m, s.m + s.h});
  check.operand("gate_bias", gate_bias, {s.m});
  check.operand("write_weight", write_weight, {s.m, s.m + s.h});
  check.operand("write_bias", write_bias, {s.m});
  if (score_query.has_value()) {
    check.operand("score_query", *score_query, {s.B, s.m});
  } else {
    TORCH_CHECK_VALUE(s.h == s.m, kName, ": expected score_query where query is ", s.h,
                      " wide and memory ", s.m, ", got none");
  }
  if (mask.has_value()) {
    check.strided("mask", *mask);
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, kName, ": expected mask of dtype bool, got ",
                     mask->scalar_type());
    check.same_device("mask", *mask);
    check.shape("mask", *mask, {s.B, s.N});
  }
  TORCH_CHECK_VALUE(num_hops >= 0, kName, ": expected num_hops >= 0, got ", num_hops);
  return s;
}

template <class Int>
Sizes<Int> sizes_of(const Tensor& query, const Tensor& memory) {
  using C = Check<Int>;
  const int64_t last = memory.dim() - 1;
  return {C::size(query, 0), C::size(memory, last - 1), C::size(memory, last), C::size(query, 1)};
}

// ---- how a call is run
// ---------------------------------------------------------------------------

// Rows enough for packing the memory or the weights to pay.
constexpr int64_t kRowsWorthPacking = 4;

Shape shape_of(const Sizes<int64_t>& s, int64_t hops, bool shared, bool masked) {
  const bool many = s.B >= kRowsWorthPacking;
  return {s.B, s.N, s.m, s.h, hops, shared, shared && !masked && many, many};
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

template <class Kernel, class Arguments>
void launch(const Kernel& kernel, Storage storage, const Shape& shape, int wanted,
            Arguments& arguments) {
  run_team(
      wanted,
      [&](int threads) {
        arguments.workspace = Workspace::get(kernel.workspace(storage, shape, arguments, threads));
      },
      [&](int thread, int threads, SpinBarrier& barrier) {
        kernel.run(storage, shape, arguments, thread, threads, barrier);
      });
}

// ---- forward
// -------------------------------------------------------------------------------------

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

template <class Int>
Outputs allocate(const Tensor& query, const Sizes<Int>& s, int64_t hops, bool return_memory,
                 bool save) {
  auto none = [&] { return empty_like_of<Int>(query, {Int(0)}); };
  const auto computed = query.options().dtype(at::toOpMathType(query.scalar_type()));
  Tensor saved = save ? empty_of<Int>(computed, {Int(hops), s.B, Int(3), s.m}) : none();
  return {return_memory ? empty_like_of<Int>(query, {s.B, s.N, s.m}) : none(),
          empty_like_of<Int>(query, {Int(hops), s.B, s.N}), saved};
}

Outputs dynamic_memory_cpu(const Tensor& query, const Tensor& memory, const Tensor& gate_weight,
                           const Tensor& gate_bias, const Tensor& write_weight,
                           const Tensor& write_bias, const OptionalTensor& score_query,
                           const OptionalTensor& mask, int64_t num_hops, bool return_memory,
                           bool save) {
  const auto s = check<int64_t>(query, memory, gate_weight, gate_bias, write_weight, write_bias,
                                score_query, mask, num_hops);
  Outputs out = allocate(query, s, num_hops, return_memory, save);
  auto& [final_memory, attention, saved] = out;
  const Operand q(query), m(memory), w_g(gate_weight), b_g(gate_bias), w_w(write_weight),
      b_w(write_bias), score(score_query), slots(mask);
  const Shape shape = shape_of(s, num_hops, memory.dim() == 2, mask.has_value());
  if (return_memory) ask_for_huge_pages(final_memory);
  Forward arguments = {q.data(),
                       m.data(),
                       w_g.data(),
                       b_g.data(),
                       w_w.data(),
                       b_w.data(),
                       score.data(),
                       static_cast<const bool*>(slots.data()),
                       return_memory ? data(final_memory) : nullptr,
                       data(attention),
                       save ? data(saved) : nullptr,
                       nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), storage_of(query), shape,
         threads_for(shape, 1, return_memory), arguments);
  return out;
}

Outputs dynamic_memory_meta(const Tensor& query, const Tensor& memory, const Tensor& gate_weight,
                            const Tensor& gate_bias, const Tensor& write_weight,
                            const Tensor& write_bias, const OptionalTensor& score_query,
                            const OptionalTensor& mask, int64_t num_hops, bool return_memory,
                            bool save) {
  return allocate(query,
                  check<c10::SymInt>(query, memory, gate_weight, gate_bias, write_weight,
                                     write_bias, score_query, mask, num_hops),
                  num_hops, return_memory, save);
}

void check_op(const Tensor& query, const Tensor& memory, const Tensor& gate_weight,
              const Tensor& gate_bias, const Tensor& write_weight, const Tensor& write_bias,
              const OptionalTensor& score_query, const OptionalTensor& mask, int64_t num_hops, bool,
              bool) {
  check<c10::SymInt>(query, memory, gate_weight, gate_bias, write_weight, write_bias, score_query,
                     mask, num_hops);
}

// ---- backward
// ------------------------------------------------------------------------------------

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients for: query; memory; the four weights; score_query. What is not asked for stays empty.
template <class Int>
Gradients allocate_gradients(const Tensor& query, const Tensor& memory, const Sizes<Int>& s,
                             bool has_score, std::array<bool, 4> mask) {
  auto make = [&](bool wanted, std::initializer_list<Int> sizes) {
    return wanted ? empty_like_of<Int>(query, sizes) : empty_like_of<Int>(query, {Int(0)});
  };
  return {make(mask[0], {s.B, s.h}),
          memory.dim() == 2 ? make(mask[1], {s.N, s.m}) : make(mask[1], {s.B, s.N, s.m}),
          make(mask[2], {s.m, s.m + s.h}),
          make(mask[2], {s.m}),
          make(mask[2], {s.m, s.m + s.h}),
          make(mask[2], {s.m}),
          make(mask[3] && has_score, {s.B, s.m})};
}

Gradients dynamic_memory_backward_cpu(const OptionalTensor& grad_final,
                                      const OptionalTensor& grad_attention, const Tensor& query,
                                      const Tensor& memory, const Tensor& gate_weight,
                                      const Tensor&, const Tensor& write_weight, const Tensor&,
                                      const OptionalTensor& score_query, const OptionalTensor& mask,
                                      const Tensor& attention, const Tensor& saved,
                                      std::array<bool, 4> output_mask) {
  const auto s = sizes_of<int64_t>(query, memory);
  const bool has_score = score_query.has_value();
  Gradients out = allocate_gradients(query, memory, s, has_score, output_mask);
  auto& [g_query, g_memory, g_w_gate, g_b_gate, g_w_write, g_b_write, g_score] = out;
  const Operand q(query), m(memory), w_g(gate_weight), w_w(write_weight), score(score_query),
      slots(mask), weights(attention), kept(saved);
  const Shape shape = shape_of(s, attention.size(0), memory.dim() == 2, mask.has_value());
  auto wanted = [&](bool is, const Tensor& t) { return is ? data(t) : nullptr; };
  auto given = [](const OptionalTensor& t) {
    return t.has_value() ? t->const_data_ptr() : nullptr;
  };
  if (output_mask[1]) ask_for_huge_pages(g_memory);
  Backward arguments = {given(grad_final),
                        given(grad_attention),
                        {},
                        {},
                        q.data(),
                        m.data(),
                        w_g.data(),
                        w_w.data(),
                        score.data(),
                        static_cast<const bool*>(slots.data()),
                        weights.data(),
                        kept.data(),
                        wanted(output_mask[0], g_query),
                        wanted(output_mask[1], g_memory),
                        wanted(output_mask[2], g_w_gate),
                        wanted(output_mask[2], g_b_gate),
                        wanted(output_mask[2], g_w_write),
                        wanted(output_mask[2], g_b_write),
                        wanted(output_mask[3] && has_score, g_score),
                        nullptr};
  // Often expanded, of a sum: read where they lie.
  if (grad_final.has_value()) std::copy_n(grad_final->strides().data(), 3, arguments.final_strides);
  if (grad_attention.has_value())
    std::copy_n(grad_attention->strides().data(), 3, arguments.attention_strides);
  launch(SEQMEM_CHOOSE(backward_kernel), storage_of(query), shape,
         threads_for(shape, 2, grad_final.has_value() && !shape.shared), arguments);
  return out;
}

Gradients dynamic_memory_backward_meta(const OptionalTensor&, const OptionalTensor&,
                                       const Tensor& query, const Tensor& memory, const Tensor&,
                                       const Tensor&, const Tensor&, const Tensor&,
                                       const OptionalTensor& score_query, const OptionalTensor&,
                                       const Tensor&, const Tensor&,
                                       std::array<bool, 4> output_mask) {
  return allocate_gradients(query, memory, sizes_of<c10::SymInt>(query, memory),
                            score_query.has_value(), output_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_ARGUMENTS                                                                          \
  "(Tensor query, Tensor memory, Tensor gate_weight, Tensor gate_bias, Tensor write_weight, "     \
  "Tensor write_bias, Tensor? score_query, Tensor? mask, int num_hops, bool return_memory, bool " \
  "save)"
  m.def("dynamic_memory" SEQMEM_ARGUMENTS
        " -> (Tensor final_memory, Tensor attention, Tensor saved)",
        tags);
  m.def("check_dynamic_memory" SEQMEM_ARGUMENTS " -> ()", tags);
  m.def(
      "dynamic_memory_backward(Tensor? grad_final, Tensor? grad_attention, Tensor query, "
      "Tensor memory, Tensor gate_weight, Tensor gate_bias, Tensor write_weight, "
      "Tensor write_bias, Tensor? score_query, Tensor? mask, Tensor attention, Tensor saved, "
      "bool[4] output_mask) -> (Tensor grad_query, "
      "Tensor grad_memory, Tensor grad_gate_weight, Tensor grad_gate_bias, "
      "Tensor grad_write_weight, Tensor grad_write_bias, Tensor grad_score_query)",
      tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("dynamic_memory", dynamic_memory_cpu);
  m.impl("dynamic_memory_backward", dynamic_memory_backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("dynamic_memory", dynamic_memory_meta);
  m.impl("dynamic_memory_backward", dynamic_memory_backward_meta);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_dynamic_memory", check_op);
  m.impl("dynamic_memory", Unsupported<kName, &check_op, Outputs>::call);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) {
  m.impl("dynamic_memory", Unsupported<kName, &check_op, Outputs>::call);
}

}  // namespace seqmem::dynamic_memory
