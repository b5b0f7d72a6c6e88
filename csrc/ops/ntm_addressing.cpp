// NTM functionals: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/ntm_addressing.py.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/ntm_addressing_kernel.h"
#include "ntm_addressing_check.h"

namespace seqmem::ntm_addressing {
namespace {

constexpr char kContent[] = "seqmem::ntm_content_addressing",
               kAddressing[] = "seqmem::ntm_addressing", kRead[] = "seqmem::ntm_read",
               kWrite[] = "seqmem::ntm_write";

using Content3 = std::tuple<Tensor, Tensor, Tensor>;
using Addressing7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Read2 = std::tuple<Tensor, Tensor>;
using Write4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// [B, H, width], without the dimensions that are not there.
template <class Int>
Tensor per_head(const Tensor& like, const Sizes<Int>& s, const Int& width) {
  if (s.batched && s.heads) return empty_like_of<Int>(like, {s.B, s.H, width});
  if (s.batched) return empty_like_of<Int>(like, {s.B, width});
  if (s.heads) return empty_like_of<Int>(like, {s.H, width});
  return empty_like_of<Int>(like, {width});
}

// A gradient that is asked for, laid out densely; else an empty tensor.
Tensor gradient(const Tensor& of, bool wanted) {
  return wanted ? at::empty_like(of, at::MemoryFormat::Contiguous) : at::empty({0}, of.options());
}

void* data_if(bool wanted, const Tensor& t) { return wanted ? data(t) : nullptr; }

// The sizes of arguments that a forward has checked.
Shape shape_of(const Tensor& memory, const Tensor& weights_or_key, int64_t taps = 0) {
  const int64_t dims = memory.dim();
  return {dims == 3 ? memory.size(0) : 1,
          weights_or_key.dim() == dims ? weights_or_key.size(dims - 2) : 1, memory.size(dims - 2),
          memory.size(dims - 1), taps};
}

Shape shape_of(const Sizes<int64_t>& s) { return {s.B, s.H, s.N, s.M, s.taps}; }

// Estimates of one core, in nanoseconds; they only steer how many threads take part. Waking them
// costs as much as a hundred microseconds.
constexpr double kPerValue = 0.5, kPerWeight = 8, kShareWorthWaking = 150e3;

// Calls f(begin, end, scratch) on shares of the batch.
template <class F>
void share_batch(const Shape& s, int64_t bytes, double passes, const F& f) {
  const double row = double(s.N) * (s.M * passes * kPerValue + s.H * kPerWeight);
  const double most = std::min<double>(available_threads(), s.B * row / kShareWorthWaking);
  const int threads = std::clamp<int64_t>(int64_t(most), 1, std::max<int64_t>(s.B, 1));
  char* scratch = nullptr;
  run_team(
      threads, [&](int n) { scratch = Workspace::get(bytes * n); },
      [&](int thread, int n, SpinBarrier&) {
        f(s.B * thread / n, s.B * (thread + 1) / n, scratch + bytes * thread);
      });
}

// ---- addressing

void address(const Shape& s, const Tensor& memory, const Addressing& a, const Tensor& out) {
  const auto& kernel = SEQMEM_CHOOSE(addressing_kernel);
  const Storage storage = storage_of(memory);
  share_batch(s, kernel.workspace(storage, s), 1 + s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.forward(storage, s, a, data(out), begin, end, scratch);
              });
}

void address_backward(const Shape& s, const Tensor& memory, const Addressing& a, const Tensor& grad,
                      const AddressingGradients& out) {
  const auto& kernel = SEQMEM_CHOOSE(addressing_kernel);
  const Storage storage = storage_of(memory);
  const Operand g(grad);
  share_batch(s, kernel.workspace(storage, s), 1 + 4 * s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.backward(storage, s, a, g.data(), out, begin, end, scratch);
              });
}

Tensor content_cpu(const Tensor& memory, const Tensor& key, const Tensor& beta) {
  const auto s = check_content<int64_t>(memory, key, beta);
  const Tensor out = per_head(memory, s, s.N);
  const Operand m(memory), k(key), b(beta);
  address(shape_of(s), memory, {m.data(), k.data(), b.data(), nullptr, nullptr, nullptr, nullptr},
          out);
  return out;
}

Tensor content_meta(const Tensor& memory, const Tensor& key, const Tensor& beta) {
  const auto s = check_content<c10::SymInt>(memory, key, beta);
  return per_head(memory, s, s.N);
}

void check_content_op(const Tensor& memory, const Tensor& key, const Tensor& beta) {
  check_content<c10::SymInt>(memory, key, beta);
}

Content3 content_backward_meta(const Tensor&, const Tensor& memory, const Tensor& key,
                               const Tensor& beta, std::array<bool, 3> mask) {
  return {gradient(memory, mask[0]), gradient(key, mask[1]), gradient(beta, mask[2])};
}

Content3 content_backward_cpu(const Tensor& grad, const Tensor& memory, const Tensor& key,
                              const Tensor& beta, std::array<bool, 3> mask) {
  Content3 out = content_backward_meta(grad, memory, key, beta, mask);
  const auto& [grad_memory, grad_key, grad_beta] = out;
  const Operand m(memory), k(key), b(beta);
  const AddressingGradients to = {data_if(mask[0], grad_memory),
                                  data_if(mask[1], grad_key),
                                  data_if(mask[2], grad_beta),
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  nullptr};
  address_backward(shape_of(memory, key), memory,
                   {m.data(), k.data(), b.data(), nullptr, nullptr, nullptr, nullptr}, grad, to);
  return out;
}

Tensor addressing_cpu(const Tensor& memory, const Tensor& key, const Tensor& beta,
                      const Tensor& gate, const Tensor& shift, const Tensor& gamma,
                      const Tensor& prev_weights) {
  const auto s = check_addressing<int64_t>(memory, key, beta, gate, shift, gamma, prev_weights);
  const Tensor out = per_head(memory, s, s.N);
  const Operand m(memory), k(key), b(beta), g(gate), t(shift), c(gamma), w(prev_weights);
  address(shape_of(s), memory,
          {m.data(), k.data(), b.data(), g.data(), t.data(), c.data(), w.data()}, out);
  return out;
}

Tensor addressing_meta(const Tensor& memory, const Tensor& key, const Tensor& beta,
                       const Tensor& gate, const Tensor& shift, const Tensor& gamma,
                       const Tensor& prev_weights) {
  const auto s = check_addressing<c10::SymInt>(memory, key, beta, gate, shift, gamma, prev_weights);
  return per_head(memory, s, s.N);
}

void check_addressing_op(const Tensor& memory, const Tensor& key, const Tensor& beta,
                         const Tensor& gate, const Tensor& shift, const Tensor& gamma,
                         const Tensor& prev_weights) {
  check_addressing<c10::SymInt>(memory, key, beta, gate, shift, gamma, prev_weights);
}

Addressing7 addressing_backward_meta(const Tensor&, const Tensor& memory, const Tensor& key,
                                     const Tensor& beta, const Tensor& gate, const Tensor& shift,
                                     const Tensor& gamma, const Tensor& prev_weights,
                                     std::array<bool, 7> mask) {
  return {gradient(memory, mask[0]),      gradient(key, mask[1]),   gradient(beta, mask[2]),
          gradient(gate, mask[3]),        gradient(shift, mask[4]), gradient(gamma, mask[5]),
          gradient(prev_weights, mask[6])};
}

Addressing7 addressing_backward_cpu(const Tensor& grad, const Tensor& memory, const Tensor& key,
                                    const Tensor& beta, const Tensor& gate, const Tensor& shift,
                                    const Tensor& gamma, const Tensor& prev_weights,
                                    std::array<bool, 7> mask) {
  Addressing7 out =
      addressing_backward_meta(grad, memory, key, beta, gate, shift, gamma, prev_weights, mask);
  const auto& [d_memory, d_key, d_beta, d_gate, d_shift, d_gamma, d_weights] = out;
  const Operand m(memory), k(key), b(beta), g(gate), t(shift), c(gamma), w(prev_weights);
  const AddressingGradients to = {data_if(mask[0], d_memory), data_if(mask[1], d_key),
                                  data_if(mask[2], d_beta),   data_if(mask[3], d_gate),
                                  data_if(mask[4], d_shift),  data_if(mask[5], d_gamma),
                                  data_if(mask[6], d_weights)};
  address_backward(shape_of(memory, key, shift.size(-1)), memory,
                   {m.data(), k.data(), b.data(), g.data(), t.data(), c.data(), w.data()}, grad,
                   to);
  return out;
}

// ---- reading and writing

Tensor read_cpu(const Tensor& memory, const Tensor& weights) {
  const auto sizes = check_read<int64_t>(memory, weights);
  const Shape s = shape_of(sizes);
  const Tensor out = per_head(memory, sizes, s.M);
  const Operand m(memory), w(weights);
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(memory);
  share_batch(s, kernel.workspace(storage, s), s.H, [&](int64_t begin, int64_t end, char* scratch) {
    kernel.read(storage, s, m.data(), w.data(), data(out), begin, end, scratch);
  });
  return out;
}

Tensor read_meta(const Tensor& memory, const Tensor& weights) {
  const auto s = check_read<c10::SymInt>(memory, weights);
  return per_head(memory, s, s.M);
}

void check_read_op(const Tensor& memory, const Tensor& weights) {
  check_read<c10::SymInt>(memory, weights);
}

Read2 read_backward_meta(const Tensor&, const Tensor& memory, const Tensor& weights,
                         std::array<bool, 2> mask) {
  return {gradient(memory, mask[0]), gradient(weights, mask[1])};
}

Read2 read_backward_cpu(const Tensor& grad, const Tensor& memory, const Tensor& weights,
                        std::array<bool, 2> mask) {
  Read2 out = read_backward_meta(grad, memory, weights, mask);
  void* grad_memory = data_if(mask[0], std::get<0>(out));
  void* grad_weights = data_if(mask[1], std::get<1>(out));
  const Shape s = shape_of(memory, weights);
  const Operand m(memory), w(weights), g(grad);
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(memory);
  share_batch(s, kernel.workspace(storage, s), 2 * s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.read_backward(storage, s, m.data(), w.data(), g.data(), grad_memory,
                                     grad_weights, begin, end, scratch);
              });
  return out;
}

Tensor write_cpu(const Tensor& memory, const Tensor& weights, const Tensor& erase,
                 const Tensor& add) {
  const Shape s = shape_of(check_write<int64_t>(memory, weights, erase, add));
  const Tensor out = gradient(memory, true);
  const Operand m(memory), w(weights), e(erase), a(add);
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(memory);
  const Write arguments = {m.data(), w.data(), e.data(), a.data()};
  share_batch(s, kernel.workspace(storage, s), s.H, [&](int64_t begin, int64_t end, char* scratch) {
    kernel.write(storage, s, arguments, data(out), begin, end, scratch);
  });
  return out;
}

Tensor write_meta(const Tensor& memory, const Tensor& weights, const Tensor& erase,
                  const Tensor& add) {
  check_write<c10::SymInt>(memory, weights, erase, add);
  return gradient(memory, true);
}

void check_write_op(const Tensor& memory, const Tensor& weights, const Tensor& erase,
                    const Tensor& add) {
  check_write<c10::SymInt>(memory, weights, erase, add);
}

Write4 write_backward_meta(const Tensor&, const Tensor& memory, const Tensor& weights,
                           const Tensor& erase, const Tensor& add, std::array<bool, 4> mask) {
  return {gradient(memory, mask[0]), gradient(weights, mask[1]), gradient(erase, mask[2]),
          gradient(add, mask[3])};
}

Write4 write_backward_cpu(const Tensor& grad, const Tensor& memory, const Tensor& weights,
                          const Tensor& erase, const Tensor& add, std::array<bool, 4> mask) {
  Write4 out = write_backward_meta(grad, memory, weights, erase, add, mask);
  const auto& [grad_memory, grad_weights, grad_erase, grad_add] = out;
  const Shape s = shape_of(memory, weights);
  const Operand m(memory), w(weights), e(erase), a(add), g(grad);
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(memory);
  const Write arguments = {m.data(), w.data(), e.data(), a.data()};
  const WriteGradients to = {data_if(mask[0], grad_memory), data_if(mask[1], grad_weights),
                             data_if(mask[2], grad_erase), data_if(mask[3], grad_add)};
  share_batch(s, kernel.workspace(storage, s), 4 * s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.write_backward(storage, s, arguments, g.data(), to, begin, end, scratch);
              });
  return out;
}

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
#define SEQMEM_CONTENT_ARGUMENTS "Tensor memory, Tensor key, Tensor beta"
#define SEQMEM_ADDRESSING_ARGUMENTS                                                          \
  "Tensor memory, Tensor key, Tensor beta, Tensor gate, Tensor shift, Tensor gamma, Tensor " \
  "prev_weights"
#define SEQMEM_READ_ARGUMENTS "Tensor memory, Tensor weights"
#define SEQMEM_WRITE_ARGUMENTS "Tensor memory, Tensor weights, Tensor erase, Tensor add"
  m.def("ntm_content_addressing(" SEQMEM_CONTENT_ARGUMENTS ") -> Tensor weights", tags);
  m.def("check_ntm_content_addressing(" SEQMEM_CONTENT_ARGUMENTS ") -> ()", tags);
  m.def("ntm_content_addressing_backward(Tensor grad_weights, " SEQMEM_CONTENT_ARGUMENTS
        ", bool[3] output_mask) -> (Tensor grad_memory, Tensor grad_key, Tensor grad_beta)",
        tags);
  m.def("ntm_addressing(" SEQMEM_ADDRESSING_ARGUMENTS ") -> Tensor weights", tags);
  m.def("check_ntm_addressing(" SEQMEM_ADDRESSING_ARGUMENTS ") -> ()", tags);
  m.def("ntm_addressing_backward(Tensor grad_weights, " SEQMEM_ADDRESSING_ARGUMENTS
        ", bool[7] output_mask) -> (Tensor grad_memory, Tensor grad_key, Tensor grad_beta, "
        "Tensor grad_gate, Tensor grad_shift, Tensor grad_gamma, Tensor grad_prev_weights)",
        tags);
  m.def("ntm_read(" SEQMEM_READ_ARGUMENTS ") -> Tensor reads", tags);
  m.def("check_ntm_read(" SEQMEM_READ_ARGUMENTS ") -> ()", tags);
  m.def("ntm_read_backward(Tensor grad_reads, " SEQMEM_READ_ARGUMENTS
        ", bool[2] output_mask) -> (Tensor grad_memory, Tensor grad_weights)",
        tags);
  m.def("ntm_write(" SEQMEM_WRITE_ARGUMENTS ") -> Tensor new_memory", tags);
  m.def("check_ntm_write(" SEQMEM_WRITE_ARGUMENTS ") -> ()", tags);
  m.def("ntm_write_backward(Tensor grad_new_memory, " SEQMEM_WRITE_ARGUMENTS
        ", bool[4] output_mask) -> (Tensor grad_memory, Tensor grad_weights, Tensor grad_erase, "
        "Tensor grad_add)",
        tags);
}

TORCH_LIBRARY_IMPL(seqmem, CPU, m) {
  m.impl("ntm_content_addressing", content_cpu);
  m.impl("ntm_content_addressing_backward", content_backward_cpu);
  m.impl("ntm_addressing", addressing_cpu);
  m.impl("ntm_addressing_backward", addressing_backward_cpu);
  m.impl("ntm_read", read_cpu);
  m.impl("ntm_read_backward", read_backward_cpu);
  m.impl("ntm_write", write_cpu);
  m.impl("ntm_write_backward", write_backward_cpu);
}

TORCH_LIBRARY_IMPL(seqmem, Meta, m) {
  m.impl("ntm_content_addressing", content_meta);
  m.impl("ntm_content_addressing_backward", content_backward_meta);
  m.impl("ntm_addressing", addressing_meta);
  m.impl("ntm_addressing_backward", addressing_backward_meta);
  m.impl("ntm_read", read_meta);
  m.impl("ntm_read_backward", read_backward_meta);
  m.impl("ntm_write", write_meta);
  m.impl("ntm_write_backward", write_backward_meta);
}

void refuse(torch::Library& m) {
  m.impl("ntm_content_addressing", Unsupported<kContent, &check_content_op, Tensor>::call);
  m.impl("ntm_addressing", Unsupported<kAddressing, &check_addressing_op, Tensor>::call);
  m.impl("ntm_read", Unsupported<kRead, &check_read_op, Tensor>::call);
  m.impl("ntm_write", Unsupported<kWrite, &check_write_op, Tensor>::call);
}

TORCH_LIBRARY_IMPL(seqmem, CompositeExplicitAutograd, m) {
  m.impl("check_ntm_content_addressing", check_content_op);
  m.impl("check_ntm_addressing", check_addressing_op);
  m.impl("check_ntm_read", check_read_op);
  m.impl("check_ntm_write", check_write_op);
  refuse(m);
}

// Nested tensors are the one kind that the key above leaves out.
TORCH_LIBRARY_IMPL(seqmem, NestedTensorCPU, m) { refuse(m); }

}  // namespace
}  // namespace seqmem::ntm_addressing
