// Hard attention on a GPU; see the header. A row of K logits belongs to a group of neighbouring
// lanes of a warp, or to a whole block where K is large:
//   highest logit m; z = sum exp(x - m) and the sum of exp(x - m) (x - m), which gives the entropy;
//   then the action by an inclusive scan, or the loss, or the gradient.
// The three passes read the row again, from the L1 cache after the first.
//
// Floor: rows K elements in, and out for a gradient; 256 x 10 float32 are 10 KB, so the launch sets
// the time. Predicted on an H100: 2 to 3 us a kernel, 3 to 5 us of host time a call.
#include "hard_attention_kernel.h"

#include "block.cuh"

namespace seqmem::cuda {
namespace {

constexpr int64_t kBlockRow = 1024;      // logits from which on a row takes a whole block
constexpr int64_t kOneBlockWork = 8192;  // logits of which one block sums the loss

template <class A>
struct Sums {
  A highest, total, log_total, entropy;
};

// The threads that share a row: `lanes` of a warp, or the block. Its warps take segments of K.
template <bool whole_block>
struct Group {
  int lanes;
  int64_t first_row, step;

  __device__ explicit Group(int lanes_of_row)
      : lanes(whole_block ? 32 : lanes_of_row),
        first_row(whole_block ? blockIdx.x
                              : (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes),
        step(whole_block ? gridDim.x : int64_t(gridDim.x) * kThreads / lanes) {}
  __device__ int lane() const { return threadIdx.x % lanes; }
  __device__ bool leads() const { return whole_block ? threadIdx.x == 0 : lane() == 0; }
  __device__ int64_t begin(int64_t K) const { return whole_block ? K * warp() / kWarps : 0; }
  __device__ int64_t end(int64_t K) const { return whole_block ? K * (warp() + 1) / kWarps : K; }

  template <class A>
  __device__ A largest(A x) const {
    if constexpr (whole_block) {
      return largest_of_block(x);
    } else {
      for (int d = lanes / 2; d > 0; d /= 2) x = larger(x, __shfl_xor_sync(~0u, x, d));
      return x;
    }
  }
  template <class A>
  __device__ A sum(A x) const {
    if constexpr (whole_block) {
      return sum_of_block(x);
    } else {
      return sum_of_lanes(x, lanes);
    }
  }
  // The sum over the warps before this one.
  template <class A>
  __device__ A sum_before(A x) const {
    A before = 0;
    if constexpr (whole_block) {
      __shared__ A of_warp[kWarps];
      x = sum_of_lanes(x, 32);
      __syncthreads();
      if (lane() == 0) of_warp[warp()] = x;
      __syncthreads();
      for (int w = 0; w < warp(); ++w) before += of_warp[w];
    }
    return before;
  }

 private:
  static __device__ int warp() { return threadIdx.x / 32; }
};

// All lanes of a warp take part, with or without a row.
template <class T, bool whole_block>
__device__ Sums<arithmetic_t<T>> read_row(const Group<whole_block>& group, const Policy& p,
                                          int64_t row, bool there) {
  using A = arithmetic_t<T>;
  const int64_t first = there ? group.begin(p.K) + group.lane() : p.K, end = group.end(p.K);
  A highest = -A(INFINITY), total = 0, moment = 0;
  for (int64_t k = first; k < end; k += group.lanes)
    highest = larger(one<T>(p.logits, row * p.K + k), highest);
  highest = group.largest(highest);
  for (int64_t k = first; k < end; k += group.lanes) {
    const A x = one<T>(p.logits, row * p.K + k) - highest, e = exponential(x);
    total += e;
    moment += e == A(0) ? A(0) : e * x;
  }
  total = group.sum(total);
  moment = group.sum(moment);
  return {highest, total, logarithm(total), logarithm(total) - moment / total};
}

template <class T>
__device__ arithmetic_t<T> log_prob_of(const Policy& p, int64_t row, int64_t action,
                                       const Sums<arithmetic_t<T>>& sums) {
  if (action < 0 || action >= p.K) return arithmetic_t<T>(NAN);
  return one<T>(p.logits, row * p.K + action) - sums.highest - sums.log_total;
}

// The first action at which the cumulative sum of exp(x - m) passes `target`; the last one of any
// probability where rounding lets none pass.
template <class T, bool whole_block>
__device__ int64_t choose(const Group<whole_block>& group, const Policy& p, int64_t row, bool there,
                          arithmetic_t<T> highest, arithmetic_t<T> target) {
  using A = arithmetic_t<T>;
  const int64_t begin = group.begin(p.K), end = group.end(p.K);
  auto probability = [&](int64_t k) {
    return there && k < end ? exponential(one<T>(p.logits, row * p.K + k) - highest) : A(0);
  };
  A reached = 0;
  if constexpr (whole_block) {
    for (int64_t k = begin + group.lane(); k < end; k += group.lanes) reached += probability(k);
    reached = group.sum_before(reached);
  }
  int64_t chosen = p.K, last = 0;
  for (int64_t start = begin; start < end; start += group.lanes) {
    const int64_t k = start + group.lane();
    const A e = probability(k);
    A sum = e;  // inclusive over the lanes
    for (int d = 1; d < group.lanes; d *= 2) {
      const A lower = __shfl_up_sync(~0u, sum, d, group.lanes);
      if (group.lane() >= d) sum += lower;
    }
    if (e > A(0)) {
      last = k;
      if (reached + sum > target && chosen == p.K) chosen = k;
    }
    reached += __shfl_sync(~0u, sum, group.lanes - 1, group.lanes);
  }
  // Below 2^53, so exact.
  chosen = int64_t(-group.largest(-double(chosen)));
  last = int64_t(group.largest(double(last)));
  return chosen < p.K ? chosen : last;
}

template <class T, bool whole_block>
__global__ void __launch_bounds__(kThreads, 2)
    sample_kernel(Policy p, int lanes, const arithmetic_t<T>* uniform, int64_t* action,
                  void* log_prob, void* entropy) {
  const Group<whole_block> group(lanes);
  const int64_t row = group.first_row;
  const bool there = row < p.rows;
  const auto sums = read_row<T>(group, p, row, there);
  const int64_t chosen =
      choose<T>(group, p, row, there, sums.highest, there ? uniform[row] * sums.total : sums.total);
  if (!there || !group.leads()) return;
  action[row] = chosen;
  set_one<T>(log_prob, row, log_prob_of<T>(p, row, chosen, sums));
  set_one<T>(entropy, row, sums.entropy);
}

template <class T>
__device__ arithmetic_t<T> advantage(const Loss& loss, int64_t row) {
  const auto value = one<T>(loss.returns, row);
  return loss.baseline ? value - one<T>(loss.baseline, row * loss.baseline_stride) : value;
}

// Each row's loss, or the block's sum of them: as `out` if there is one block, else in `partial`.
template <class T, bool whole_block>
__global__ void __launch_bounds__(kThreads, 2)
    loss_kernel(Policy p, Loss loss, int lanes, void* out, double* partial) {
  using A = arithmetic_t<T>;
  const Group<whole_block> group(lanes);
  const int64_t rounds = (p.rows + group.step - 1) / group.step;
  double total = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row = group.first_row + round * group.step;
    const bool there = row < p.rows;
    const auto sums = read_row<T>(group, p, row, there);
    if (!there || !group.leads()) continue;
    A value = -log_prob_of<T>(p, row, loss.action[row], sums) * advantage<T>(loss, row);
    if (loss.entropy_weight != 0) value -= A(loss.entropy_weight) * sums.entropy;
    if (loss.per_row)
      set_one<T>(out, row, value);
    else
      total += value;
  }
  if (loss.per_row) return;
  total = sum_of_block(total);
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1)
    partial[blockIdx.x] = total;
  else
    set_one<T>(out, 0, A(loss.mean ? total / double(p.rows) : total));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Policy p, Loss loss, void* out, const double* partial, int64_t count) {
  double total = 0;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) total += partial[k];
  total = sum_of_block(total);
  if (threadIdx.x == 0)
    set_one<T>(out, 0, arithmetic_t<T>(loss.mean ? total / double(p.rows) : total));
}

// What the gradients by a row's log-probability and entropy are.
struct OfSample {
  const int64_t* action;
  const void *grad_log_prob, *grad_entropy;

  template <class T>
  __device__ void read(const Policy&, int64_t row, arithmetic_t<T>& by_log_prob,
                       arithmetic_t<T>& by_entropy) const {
    by_log_prob = grad_log_prob ? one<T>(grad_log_prob, row) : 0;
    by_entropy = grad_entropy ? one<T>(grad_entropy, row) : 0;
  }
};

struct OfLoss {
  const int64_t* action;
  Loss loss;
  const void* grad;

  template <class T>
  __device__ void read(const Policy& p, int64_t row, arithmetic_t<T>& by_log_prob,
                       arithmetic_t<T>& by_entropy) const {
    using A = arithmetic_t<T>;
    A g = one<T>(grad, loss.per_row ? row : 0);
    if (loss.mean) g /= A(p.rows);
    by_log_prob = -advantage<T>(loss, row) * g;
    by_entropy = -A(loss.entropy_weight) * g;
  }
};

// by_log_prob (onehot - p) - by_entropy p (log p + H)
template <class T, bool whole_block, class From>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Policy p, From from, int lanes, void* grad_logits) {
  using A = arithmetic_t<T>;
  const Group<whole_block> group(lanes);
  const int64_t row = group.first_row;
  const bool there = row < p.rows;
  const auto sums = read_row<T>(group, p, row, there);
  if (!there) return;
  A by_log_prob, by_entropy;
  from.template read<T>(p, row, by_log_prob, by_entropy);
  const int64_t action = from.action[row];
  for (int64_t k = group.begin(p.K) + group.lane(); k < group.end(p.K); k += group.lanes) {
    const A x = one<T>(p.logits, row * p.K + k) - sums.highest;
    const A probability = exponential(x) / sums.total;
    const A slope = probability == A(0) ? A(0) : probability * (x - sums.log_total + sums.entropy);
    set_one<T>(grad_logits, row * p.K + k,
               by_log_prob * (A(k == action) - probability) - by_entropy * slope);
  }
}

// ---- launches

// Lanes of a warp that share a row.
int lanes_of_row(int64_t K) {
  int lanes = 1;
  while (lanes < 32 && lanes < K) lanes *= 2;
  return lanes;
}

// A group for each row.
int64_t blocks_of(const Policy& p, int lanes) {
  return p.K > kBlockRow ? p.rows : (p.rows * lanes + kThreads - 1) / kThreads;
}

// Calls f with values of the storage type and of whether a block takes a row.
template <class F>
cudaError_t with_kernel(Storage storage, const Policy& p, const F& f) {
  return with_type(storage, [&](auto tag) {
    return p.K > kBlockRow ? f(tag, std::true_type{}) : f(tag, std::false_type{});
  });
}

template <class From>
cudaError_t backward(Storage storage, const Policy& p, const From& from, void* grad_logits,
                     cudaStream_t stream) {
  const int lanes = lanes_of_row(p.K);
  return with_kernel(storage, p, [&](auto tag, auto whole_block) {
    return launch(backward_kernel<decltype(tag), whole_block.value, From>, blocks_of(p, lanes), 1,
                  stream, p, from, lanes, grad_logits);
  });
}

struct LossLaunch {
  int lanes;
  int64_t blocks;
};

// One block for all rows where they are few, with as many lanes a row as four rounds leave.
LossLaunch launch_of(const Policy& p, const Loss& loss) {
  const int lanes = lanes_of_row(p.K);
  if (loss.per_row || p.rows * p.K > kOneBlockWork || p.K > kBlockRow)
    return {lanes, blocks_of(p, lanes)};
  LossLaunch one_block = {lanes, 1};
  while (one_block.lanes > 1 && p.rows * one_block.lanes > 4 * kThreads) one_block.lanes /= 2;
  return one_block;
}

}  // namespace

cudaError_t hard_attention_sample(Storage storage, const Policy& p, const void* uniform,
                                  int64_t* action, void* log_prob, void* entropy,
                                  cudaStream_t stream) {
  const int lanes = lanes_of_row(p.K);
  return with_kernel(storage, p, [&](auto tag, auto whole_block) {
    using T = decltype(tag);
    return launch(sample_kernel<T, whole_block.value>, blocks_of(p, lanes), 1, stream, p, lanes,
                  static_cast<const arithmetic_t<T>*>(uniform), action, log_prob, entropy);
  });
}

cudaError_t hard_attention_sample_backward(Storage storage, const Policy& p, const int64_t* action,
                                           const void* grad_log_prob, const void* grad_entropy,
                                           void* grad_logits, cudaStream_t stream) {
  return backward(storage, p, OfSample{action, grad_log_prob, grad_entropy}, grad_logits, stream);
}

int64_t hard_attention_loss_workspace(const Policy& p, const Loss& loss) {
  const int64_t blocks = launch_of(p, loss).blocks;
  return loss.per_row || blocks <= 1 ? 0 : blocks;
}

cudaError_t hard_attention_loss(Storage storage, const Policy& p, const Loss& loss, void* out,
                                double* workspace, cudaStream_t stream) {
  const LossLaunch l = launch_of(p, loss);
  return with_kernel(storage, p, [&](auto tag, auto whole_block) {
    using T = decltype(tag);
    const cudaError_t error = launch(loss_kernel<T, whole_block.value>, l.blocks, 1, stream, p,
                                     loss, l.lanes, out, workspace);
    if (error != cudaSuccess || loss.per_row || l.blocks <= 1) return error;
    return launch(sum_kernel<T>, 1, 1, stream, p, loss, out, workspace, l.blocks);
  });
}

cudaError_t hard_attention_loss_backward(Storage storage, const Policy& p, const Loss& loss,
                                         const void* grad, void* grad_logits, cudaStream_t stream) {
  return backward(storage, p, OfLoss{loss.action, loss, grad}, grad_logits, stream);
}

}  // namespace seqmem::cuda
