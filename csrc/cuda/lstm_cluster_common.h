// What the LSTM's cluster kernels share: exchanges between the blocks of a cluster, the bookkeeping
// of batch rows, the gates, and launches.
//
// A cluster of 8 or 16 blocks takes some batch rows through all steps. Each block owns some of the
// hidden units: their rows of weight_hh stay in its registers, and c of its units too. What a step
// needs from the other blocks travels through distributed shared memory by st.async, whose bytes
// the receiver's mbarrier counts: a step costs one such trip, no launch, and no barrier of the
// whole cluster.
//
// Forward: each block sends h of its units to all blocks. Backward: each block multiplies dz of its
// own units by its weights and sends every block the part of dh for that block's units; the
// receiver adds the parts in the order of the blocks, so that results are the same every time.
//
// Two buffers suffice. A block's part of step s + 2 leaves after it has received all parts of step
// s + 1, and those leave after their senders have read step s.
#pragma once

#include <cuda_runtime.h>

#include "common.h"
#include "lstm_cluster_kernel.h"
#include "lstm_gates.h"

namespace seqmem::cuda {
namespace {

inline __device__ uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

#if __CUDA_ARCH__ >= 900

// ---- distributed shared memory ------------------------------------------------------------------

// What to add to an address in this block for the same place in another block of the cluster.
__device__ uint32_t distance_to(uint32_t block, uint32_t address) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(block));
  return mapped - address;
}

__device__ uint32_t block_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Counts the bytes of one exchange, which st.async reports. Two take turns.
struct Arrival {
  uint32_t address;  // of two mbarriers

  // For thread 0; a barrier of the cluster must follow.
  __device__ void start(uint32_t bytes) const {
    for (uint32_t slot = 0; slot < 2; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address + 8 * slot) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    expect(0, bytes);
    expect(1, bytes);
  }

  __device__ void expect(uint32_t slot, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address + 8 * slot),
                 "r"(bytes)
                 : "memory");
  }

  // Waits for exchange number k into slot k % 2. What arrives is shared memory alone: an acquire of
  // the cluster's scope would empty the L1 cache at every step.
  __device__ void wait(uint32_t k) const {
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(address + 8 * (k % 2)), "r"(k / 2 % 2)
          : "memory");
    } while (done == 0);
  }
};

// Stores into another block and reports the bytes to its mbarrier.
__device__ void send(uint32_t to, const float (&v)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}
__device__ void send(uint32_t to, const float (&v)[2], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(to),
      "f"(v[0]), "f"(v[1]), "r"(barrier)
      : "memory");
}
__device__ void send(uint32_t to, const float (&v)[1], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
      "f"(v[0]), "r"(barrier)
      : "memory");
}

#endif  // __CUDA_ARCH__ >= 900

inline __device__ float across(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }

// ---- rows ---------------------------------------------------------------------------------------

// Rows fit 32 bits: no memory holds more of them.
inline __device__ int row_of(const Sequence& sequence, int t, int b) {
  if (t < 0 || t >= int(sequence.steps)) return 0;
  return sequence.offsets != nullptr ? int(sequence.offsets[t]) + b
                                     : t * int(sequence.t_stride) + b * int(sequence.b_stride);
}

// Steps of row b; 0 beyond the batch.
inline __device__ int length_of(const Sequence& sequence, int b) {
  if (b >= sequence.batch) return 0;
  if (sequence.lengths == nullptr) return int(sequence.steps);
  return int(max(int64_t(0), min(sequence.lengths[b], sequence.steps)));
}

// Whether reset cuts the state before step `seam` of a batch row, which is stored at `row`.
inline __device__ bool cut_at(const Sequence& sequence, int seam, int row, int length) {
  return sequence.reset != nullptr && seam < length && sequence.reset[row];
}

// Whether it cuts the state that the row begins with.
inline __device__ bool cut_at_start(const Sequence& sequence, int b, int length) {
  return !sequence.reverse && cut_at(sequence, 0, row_of(sequence, 0, b), length);
}

template <class T>
__device__ float element(const void* from, int64_t offset) {
  return from != nullptr ? widen(static_cast<const T*>(from)[offset]) : 0.0f;
}

template <class T>
__device__ void store(void* to, int64_t offset, float x) {
  static_cast<T*>(to)[offset] = narrow<T>(x);
}

// ---- backward -----------------------------------------------------------------------------------

// One unit of one batch row on its way back: the gradients of its gates, step by step. Per step:
// ask; receive unless it is the first; compute; store_dz.
template <class T>
class BackwardCell {
 public:
  // Without `owned` it has no steps and stores nothing.
  __device__ BackwardCell(const Sequence& sequence, const ClusterBackward& a, int b, int unit,
                          bool owned)
      : sequence_(sequence),
        a_(a),
        b_(b),
        unit_(unit),
        back_(sequence.reverse ? 1 : -1),
        length_(owned && unit < sequence.hidden && b < sequence.batch ? length_of(sequence, b)
                                                                      : -1) {
    if (is_stored()) {
      const int64_t state = state_offset(b);
      d_h_ = element<T>(a.grad_hy, state);
      d_c_ = element<T>(a.grad_cy, state);
    }
    t_ = (sequence.reverse ? 0 : int(sequence.steps) - 1) - back_;
    row_before_ = row_of(sequence, t_ + back_, b);
    row_further_ = row_of(sequence, t_ + 2 * back_, b);
    next_ = load();
    if (t_ + back_ < length_) c_ = element<T>(a.cells, state_offset(row_before_));
  }

  // Goes on to the next step: loads what the one after it needs, and computes all that needs no dh.
  __device__ void ask() {
    was_cut_ = cut_;
    saved_ = next_;
    t_ += back_;
    row_ = row_before_;
    row_before_ = row_further_;
    row_further_ = row_of(sequence_, t_ + 2 * back_, b_);
    next_ = load();
    cut_ = sequence_.reverse ? cut_at(sequence_, t_ + 1, row_before_, length_)
                             : cut_at(sequence_, t_, row_, length_);
    if (active() && a_.grad_cells != nullptr)
      d_cell_ = element<T>(a_.grad_cells, state_offset(row_));
    if (active() && a_.grad_gates != nullptr) {
#pragma unroll
      for (int g = 0; g < 4; ++g) d_gates_[g] = element<T>(a_.grad_gates, gate_offset(row_, g));
    }
    tanh_c_ = gate_tanh(c_);
  }

  // dh of the step before that one, which this sum sends back; where it was not active, dh stays.
  __device__ void receive(float d_h) {
    if (t_ - back_ < length_) d_h_ = was_cut_ ? 0.0f : d_h;
  }
  // The same of this step.
  __device__ void receive_of_this(float d_h) {
    if (active()) d_h_ = cut_ ? 0.0f : d_h;
  }

  __device__ void compute(float (&dz)[4]) {
    const float i = saved_.gates[0], f = saved_.gates[1], g = saved_.gates[2], o = saved_.gates[3];
    const float c_before = cut_ ? 0.0f : saved_.c_before;
    const float d_h = d_h_ + saved_.grad_output;
    const float d_c = d_c_ + d_cell_ + d_h * (o * (1.0f - tanh_c_ * tanh_c_));
    dz[0] = active() ? (d_gates_[0] + d_c * g) * (i * (1.0f - i)) : 0.0f;
    dz[1] = active() ? (d_gates_[1] + d_c * c_before) * (f * (1.0f - f)) : 0.0f;
    dz[2] = active() ? (d_gates_[2] + d_c * i) * (1.0f - g * g) : 0.0f;
    dz[3] = active() ? (d_gates_[3] + d_h * tanh_c_) * (o * (1.0f - o)) : 0.0f;
    if (active()) d_c_ = cut_ ? 0.0f : d_c * f;
    c_ = saved_.c_before;
  }

  __device__ void store_dz(const float (&dz)[4]) const {
    if (!is_stored() || !(active() || sequence_.offsets == nullptr)) return;
#pragma unroll
    for (int g = 0; g < 4; ++g) store<T>(a_.dz, gate_offset(row_, g), dz[g]);
  }

  __device__ void store_state() const {
    const int64_t state = state_offset(b_);
    if (is_stored() && a_.grad_hx != nullptr) store<T>(a_.grad_hx, state, d_h_);
    if (is_stored() && a_.grad_cx != nullptr) store<T>(a_.grad_cx, state, d_c_);
  }

 private:
  struct Saved {
    float gates[4], c_before, grad_output;  // c_before: c of the step before
  };

  __device__ bool is_stored() const { return length_ >= 0; }
  __device__ bool active() const { return t_ < length_; }

  __device__ int64_t state_offset(int row) const {
    return int64_t(row) * int(sequence_.hidden) + unit_;
  }
  __device__ int64_t gate_offset(int row, int gate) const {
    const int H = int(sequence_.hidden);
    return int64_t(row) * (4 * H) + (gate * H + unit_);
  }

  // Of the step before t_.
  __device__ Saved load() const {
    const int t = t_ + back_, before = t + back_;
    const bool first = t == (sequence_.reverse ? length_ - 1 : 0);
    Saved s = {};
    if (t >= 0 && t < length_) {
#pragma unroll
      for (int g = 0; g < 4; ++g) s.gates[g] = element<T>(a_.gates, gate_offset(row_before_, g));
      s.grad_output = element<T>(a_.grad_output, state_offset(row_before_));
      if (first) s.c_before = element<T>(a_.cx, state_offset(b_));
    }
    if (!first && before >= 0 && before < length_)
      s.c_before = element<T>(a_.cells, state_offset(row_further_));
    return s;
  }

  const Sequence& sequence_;
  const ClusterBackward& a_;
  const int b_, unit_, back_;
  const int length_;  // -1 where nothing is stored
  int t_, row_ = 0, row_before_, row_further_;
  float d_h_ = 0.0f, d_c_ = 0.0f, c_ = 0.0f;
  Saved saved_ = {}, next_;
  bool cut_ = false, was_cut_ = false;
  float d_gates_[4] = {}, d_cell_ = 0.0f, tanh_c_ = 0.0f;
};

}  // namespace

// ---- launches -----------------------------------------------------------------------------------

// H up to 64, one row a block: lstm_block_kernel.cu.
cudaError_t lstm_forward_block(Storage storage, const Sequence& sequence, const ClusterForward& a,
                               cudaStream_t stream);
cudaError_t lstm_backward_block(Storage storage, const Sequence& sequence, const ClusterBackward& a,
                                cudaStream_t stream);

// BFloat16 or Half, tiles of 8: lstm_cluster_16_kernel.cu.
cudaError_t lstm_forward_cluster_16(Storage storage, const Sequence& sequence,
                                    const ClusterForward& a, cudaStream_t stream);
cudaError_t lstm_backward_cluster_16(Storage storage, const Sequence& sequence,
                                     const ClusterBackward& a, cudaStream_t stream);

// What decides about the time of a step of a kernel: how many clusters run at once, of how many
// blocks of how many threads. None where the current device has no clusters of that size.
struct ClusterCount {
  int active = 0, blocks = 1, threads = 1;
};
ClusterCount lstm_count_clusters_forward(int tile, int64_t hidden);  // float32
ClusterCount lstm_count_clusters_backward(int tile, int64_t hidden);
ClusterCount lstm_count_clusters_16(Storage storage, int64_t hidden, bool backward);

namespace {

template <class Shape>
struct ClusterLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  ClusterLaunch(int64_t batch, int tile, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = Shape::kBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned((batch + tile - 1) / tile) * Shape::kBlocks);
    config.blockDim = dim3(Shape::kThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

// Clusters of 16 blocks; and, as a wish, a multiprocessor for each block of a cluster.
template <class Kernel>
cudaError_t allow_clusters(Kernel kernel) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeClusterSchedulingPolicyPreference,
                           cudaClusterSchedulingPolicySpread) != cudaSuccess)
    cudaGetLastError();
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

template <class Shape, class Arguments>
cudaError_t launch_clusters(Shape, void (*kernel)(Sequence, Arguments), int tile,
                            const Sequence& sequence, const Arguments& arguments,
                            cudaStream_t stream) {
  if (sequence.batch == 0) return cudaSuccess;
  const ClusterLaunch<Shape> launch(sequence.batch, tile, stream);
  const cudaError_t allowed = allow_clusters(kernel);
  if (allowed != cudaSuccess) return allowed;
  return cudaLaunchKernelEx(&launch.config, kernel, sequence, arguments);
}

template <class Shape, class Arguments>
ClusterCount count_clusters(Shape, void (*kernel)(Sequence, Arguments), int tile) {
  ClusterCount count = {0, Shape::kBlocks, Shape::kThreads};
  const ClusterLaunch<Shape> launch(1, tile, nullptr);
  if (allow_clusters(kernel) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count.active, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();  // a size that the device does not take is no error of the caller's
    count.active = 0;
  }
  return count;
}

}  // namespace
}  // namespace seqmem::cuda
