// NTM functionals: schemas, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/ntm_addressing.py.
#include <algorithm>
#include <array>

#include "../common/dispatch.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../common/workspace.h"
#include "../cpu/ntm_addressing_kernel.h"
#include "ntm_addressing_check.h"

namespace seqmem::ntm_addressing {
namespace {

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

// ---- The kernels of each functional, on arguments that were checked. A gradient is null where it
// is not wanted.

class AddressingOperands {
 public:
  explicit AddressingOperands(const ContentInputs& in)
      : memory_(in.memory),
        key_(in.key),
        beta_(in.beta),
        gate_(std::nullopt),
        shift_(std::nullopt),
        gamma_(std::nullopt),
        prev_weights_(std::nullopt) {}
  explicit AddressingOperands(const AddressingInputs& in)
      : memory_(in.memory),
        key_(in.key),
        beta_(in.beta),
        gate_(in.gate),
        shift_(in.shift),
        gamma_(in.gamma),
        prev_weights_(in.prev_weights) {}
  Addressing pointers() const {
    return {.memory = memory_.data(),
            .key = key_.data(),
            .beta = beta_.data(),
            .gate = gate_.data(),
            .shift = shift_.data(),
            .gamma = gamma_.data(),
            .prev_weights = prev_weights_.data()};
  }

 private:
  const Operand memory_, key_, beta_, gate_, shift_, gamma_, prev_weights_;
};

// Of content as well.
template <class Inputs>
void run(const Inputs& in, const Shape& s, void* weights) {
  const auto& kernel = SEQMEM_CHOOSE(addressing_kernel);
  const Storage storage = storage_of(in.memory);
  const AddressingOperands operands(in);
  share_batch(s, kernel.workspace(storage, s), 1 + s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.forward(storage, s, operands.pointers(), weights, begin, end, scratch);
              });
}

template <class Inputs>
void run_backward(const Inputs& in, const Shape& s, const void* grad, void* memory, void* key,
                  void* beta, void* gate = nullptr, void* shift = nullptr, void* gamma = nullptr,
                  void* prev_weights = nullptr) {
  const auto& kernel = SEQMEM_CHOOSE(addressing_kernel);
  const Storage storage = storage_of(in.memory);
  const AddressingOperands operands(in);
  const AddressingGradients out = {memory, key, beta, gate, shift, gamma, prev_weights};
  share_batch(s, kernel.workspace(storage, s), 1 + 4 * s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.backward(storage, s, operands.pointers(), grad, out, begin, end, scratch);
              });
}

void run(const ReadInputs& in, const Shape& s, void* reads) {
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(in.memory);
  const Operand memory(in.memory), weights(in.weights);
  share_batch(s, kernel.workspace(storage, s), s.H, [&](int64_t begin, int64_t end, char* scratch) {
    kernel.read(storage, s, memory.data(), weights.data(), reads, begin, end, scratch);
  });
}

void run_backward(const ReadInputs& in, const Shape& s, const void* grad, void* grad_memory,
                  void* grad_weights) {
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(in.memory);
  const Operand memory(in.memory), weights(in.weights);
  share_batch(s, kernel.workspace(storage, s), 2 * s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.read_backward(storage, s, memory.data(), weights.data(), grad, grad_memory,
                                     grad_weights, begin, end, scratch);
              });
}

void run(const WriteInputs& in, const Shape& s, void* new_memory) {
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(in.memory);
  const Operand memory(in.memory), weights(in.weights), erase(in.erase), add(in.add);
  const Write arguments = {memory.data(), weights.data(), erase.data(), add.data()};
  share_batch(s, kernel.workspace(storage, s), s.H, [&](int64_t begin, int64_t end, char* scratch) {
    kernel.write(storage, s, arguments, new_memory, begin, end, scratch);
  });
}

void run_backward(const WriteInputs& in, const Shape& s, const void* grad, void* grad_memory,
                  void* grad_weights, void* grad_erase, void* grad_add) {
  const auto& kernel = SEQMEM_CHOOSE(memory_kernel);
  const Storage storage = storage_of(in.memory);
  const Operand memory(in.memory), weights(in.weights), erase(in.erase), add(in.add);
  const Write arguments = {memory.data(), weights.data(), erase.data(), add.data()};
  const WriteGradients out = {grad_memory, grad_weights, grad_erase, grad_add};
  share_batch(s, kernel.workspace(storage, s), 4 * s.H,
              [&](int64_t begin, int64_t end, char* scratch) {
                kernel.write_backward(storage, s, arguments, grad, out, begin, end, scratch);
              });
}

// ---- The ops

template <class Ops>
Tensor forward_cpu(const typename Ops::Inputs& in) {
  const auto c = Ops::template check<int64_t>(in);
  const Tensor out = at::empty(c.output, in.memory.options());
  run(in, {.B = c.B, .H = c.H, .N = c.N, .M = c.M, .taps = c.taps}, data(out));
  return out;
}

template <class Ops>
Tensor forward_meta(const typename Ops::Inputs& in) {
  return at::empty_symint(Ops::template check<c10::SymInt>(in).output, in.memory.options());
}

template <class Ops>
Tensors<Ops::n> backward_cpu(const typename Ops::BackwardInputs& in) {
  const auto c = Ops::template check_backward<int64_t>(in);
  const Tensors<Ops::n> out = gradients(in, in.output_mask);
  const Operand grad(in.grad);
  const Shape s = {.B = c.B, .H = c.H, .N = c.N, .M = c.M, .taps = c.taps};
  std::apply(
      [&](const auto&... of) {
        run_backward(static_cast<const typename Ops::Inputs&>(in), s, grad.data(), data(of)...);
      },
      out);
  return out;
}

template <class Ops>
Tensors<Ops::n> backward_meta(const typename Ops::BackwardInputs& in) {
  Ops::template check_backward<c10::SymInt>(in);
  return gradients(in, in.output_mask);
}

template <class Ops>
void define(torch::Library& m, const char* schema, const char* backward_schema) {
  Ops::Forward::template define<Ops::template check<c10::SymInt>, forward_cpu<Ops>,
                                forward_meta<Ops>>(m, schema);
  Ops::Backward::template define<Ops::template check_backward<c10::SymInt>, backward_cpu<Ops>,
                                 backward_meta<Ops>>(m, backward_schema);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
#define SEQMEM_CONTENT "Tensor memory, Tensor key, Tensor beta"
#define SEQMEM_ADDRESSING \
  SEQMEM_CONTENT ", Tensor gate, Tensor shift, Tensor gamma, Tensor prev_weights"
#define SEQMEM_READ "Tensor memory, Tensor weights"
#define SEQMEM_WRITE SEQMEM_READ ", Tensor erase, Tensor add"
  define<ContentOps>(m, "(" SEQMEM_CONTENT ") -> Tensor weights",
                     "(Tensor grad_weights, " SEQMEM_CONTENT
                     ", bool[3] output_mask) -> (Tensor grad_memory, Tensor grad_key, "
                     "Tensor grad_beta)");
  define<AddressingOps>(m, "(" SEQMEM_ADDRESSING ") -> Tensor weights",
                        "(Tensor grad_weights, " SEQMEM_ADDRESSING
                        ", bool[7] output_mask) -> (Tensor grad_memory, Tensor grad_key, "
                        "Tensor grad_beta, Tensor grad_gate, Tensor grad_shift, "
                        "Tensor grad_gamma, Tensor grad_prev_weights)");
  define<ReadOps>(m, "(" SEQMEM_READ ") -> Tensor reads",
                  "(Tensor grad_reads, " SEQMEM_READ
                  ", bool[2] output_mask) -> (Tensor grad_memory, Tensor grad_weights)");
  define<WriteOps>(m, "(" SEQMEM_WRITE ") -> Tensor new_memory",
                   "(Tensor grad_new_memory, " SEQMEM_WRITE
                   ", bool[4] output_mask) -> (Tensor grad_memory, Tensor grad_weights, "
                   "Tensor grad_erase, Tensor grad_add)");
}

#undef SEQMEM_CONTENT
#undef SEQMEM_ADDRESSING
#undef SEQMEM_READ
#undef SEQMEM_WRITE

}  // namespace seqmem::ntm_addressing
