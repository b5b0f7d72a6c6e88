// The backward of the NTM's kernel over time: a head's addressing, and the controller.
#pragma once

#include "ntm_sequence_controller.h"
#include "ntm_sequence_slots.h"

namespace seqmem::cuda {
namespace {

constexpr int kMostInputs = kRowThreads / 4;  // R M + C
constexpr int kSlots = 1;                     // of a thread: with two, registers would spill

__host__ __device__ inline int inputs_of(const NtmShape& s) { return s.read_width + s.control; }

// What the block shares. Sizes that are constants spare registers for addresses.
struct BackwardShared {
  float dz[4 * kMostControl];        // zeros beyond 4C
  float dp[kMostValues];             // zeros beyond P
  float raw[kMostValues];            // head values
  float values[kMostValues];         // the same, activated
  float d_hidden[kMostControl];      // of the state between steps, as d_reads
  float d_reads[kMostInputs];        // [R M]
  float d_read[kMostInputs];         // [R M] of this step's readings
  float largest[kSlotWarps];         // of a reduction
  float sums[kSlotWarps];            // of another one
  float several[2][3 * kSlotWarps];  // of others, in turns
  float numbers[4];                  // the key's norm, and its pull
  float cosine[kSlotThreads];        // of slots, as all that follow
  float norm[kSlotThreads];
  float gated[kSlotThreads];
  float by_weighting[kSlotThreads];  // the weighting's gradient through memory and reading
  float by_shifted[kSlotThreads];
  float weighting[kSlotThreads];
  float by_dot[kSlotThreads];   // through the slot's product with the key
  float by_norm[kSlotThreads];  // through its norm
  float partial[3][kRowWarps * kMostWidth];
  // Behind it: float4 weights [units of a lane, 4 (R M + C)], d_weightings [Hd, N], d_taps [taps].

  static int64_t bytes(const NtmShape& s) {
    return int64_t(sizeof(BackwardShared)) + int64_t(fours(s.control)) * 64 * inputs_of(s) +
           4 * (int64_t(s.slots) * s.heads + s.taps);
  }
  __device__ float4* weights() { return reinterpret_cast<float4*>(this + 1); }
  __device__ float* d_weightings(const NtmShape& s) {
    return reinterpret_cast<float*>(weights() + fours(s.control) * 4 * inputs_of(s));
  }
};

// ---- addressing, for the threads that have slots

class AddressingGradient : Addressing<kSlots, BackwardShared> {
  using Base = Addressing<kSlots, BackwardShared>;
  const NtmShape& s_;
  BackwardShared& shared_;
  float* const d_taps_;

 public:
  __device__ AddressingGradient(const NtmShape& s, BackwardShared& shared, float* d_taps)
      : Base(s, shared), s_(s), shared_(shared), d_taps_(d_taps) {}

  // One head, from where its beta stands among the head values; `previous` and `grad_trace` give a
  // slot's weighting of the step before and its own gradient. dp: of the head values from beta on.
  template <class Previous, class GradTrace>
  __device__ void operator()(int beta_at, float* d_weightings, const Previous& previous,
                             const GradTrace& grad_trace, float* dp) const {
    const float *p = shared_.values + beta_at, *raw = shared_.raw + beta_at, *taps = p + 2;
    const float beta = p[0], gate = p[1], gamma = p[2 + s_.taps];
    float content[kSlots], before[kSlots], shifted[kSlots], log[kSlots], w[kSlots];
    each([&](int i, int n, bool there) { content[i] = there ? beta * shared_.cosine[n] : 0.0f; });
    float inverse = 1.0f / Base::softmax(content);
    each([&](int i, int n, bool there) {
      content[i] *= inverse;
      before[i] = there ? previous(n) : 0.0f;
      if (there) shared_.gated[n] = before[i] + gate * (content[i] - before[i]);
    });
    sync_slots();
    Base::shift(taps, shifted);
    each([&](int i, int, bool) {
      const bool none = shifted[i] <= 0.0f;
      log[i] = none ? 0.0f : logf(shifted[i]);
      w[i] = none ? minus_infinity() : gamma * log[i];
    });
    const float total = Base::softmax(w);
    inverse = total == 0.0f ? 1.0f : 1.0f / total;

    float dw[kSlots], sum[1] = {};
    each([&](int i, int n, bool there) {
      w[i] = there ? w[i] * inverse : 0.0f;
      dw[i] = there ? shared_.by_weighting[n] + d_weightings[n] + grad_trace(n) : 0.0f;
      sum[0] += dw[i] * w[i];
    });
    sum_over_slots(sum, several(0));
    float sums[3] = {};  // of gamma, gate, and of the content's softmax
    each([&](int i, int n, bool there) {
      const float d_log = w[i] * (dw[i] - sum[0]);
      sums[0] += d_log * log[i];
      if (!there) return;
      shared_.weighting[n] = w[i];
      shared_.by_shifted[n] = shifted[i] <= 0.0f ? 0.0f : gamma * d_log / shifted[i];
    });
    sync_slots();

    float tap_sum = 0, top = minus_infinity(), d_content[kSlots] = {};
#pragma unroll 1
    for (int j = 0; j < s_.taps; ++j) top = fmaxf(top, taps[j]);
#pragma unroll 1
    for (int j = 0; j < s_.taps; ++j) {
      const float tap = expf(taps[j] - top);
      const int by = j - s_.taps / 2;
      float d_tap[1] = {};
      tap_sum += tap;
      each([&](int i, int n, bool there) {
        if (!there) return;
        d_content[i] = fmaf(tap, shared_.by_shifted[Base::around(n, -by)], d_content[i]);
        d_tap[0] += shared_.by_shifted[n] * shared_.gated[Base::around(n, by)];
      });
      sum_over_slots(d_tap, several(1 - j % 2));
      if (threadIdx.x == 0) d_taps_[j] = d_tap[0];
    }
    inverse = 1.0f / tap_sum;
    each([&](int i, int n, bool there) {
      const float du = d_content[i] * inverse;
      sums[1] += du * (content[i] - before[i]);
      if (there) d_weightings[n] = (1.0f - gate) * du;
      d_content[i] = gate * du;
      sums[2] += d_content[i] * content[i];
    });
    sum_over_slots(sums, several(1 - s_.taps % 2));

    const float norm_of_key = shared_.numbers[0];
    float of_key[2] = {};  // of beta, and the key's pull
    each([&](int i, int n, bool there) {
      if (!there) return;
      const float cosine = shared_.cosine[n], norm = shared_.norm[n];
      const float dy = content[i] * (d_content[i] - sums[2]);
      const float by_dot = beta * dy / (norm * norm_of_key + 1e-8f), of_norms = by_dot * cosine;
      // A NaN norm is not above 0; it must not turn into 0 either.
      const float by_norm = norm > 0.0f ? of_norms * norm_of_key / norm : norm == norm ? 0 : norm;
      shared_.by_dot[n] = by_dot;
      shared_.by_norm[n] = by_norm;
      of_key[0] += dy * cosine;
      of_key[1] += of_norms * norm;
    });
    sum_over_slots(of_key, several(s_.taps % 2));
    if (threadIdx.x != 0) return;
    shared_.numbers[1] = norm_of_key > 0.0f ? of_key[1] / norm_of_key : 0.0f;
    dp[0] = of_key[0] * sigmoid(raw[0]);
    dp[1] = sums[1] * gate * (1.0f - gate);
    dp[2 + s_.taps] = sums[0] * sigmoid(raw[2 + s_.taps]);
    float mean = 0;
    for (int j = 0; j < s_.taps; ++j) mean += d_taps_[j] * expf(taps[j] - top) * inverse;
    for (int j = 0; j < s_.taps; ++j)
      dp[2 + j] = expf(taps[j] - top) * inverse * (d_taps_[j] - mean);
  }

 private:
  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) f(i, Base::slot(i), Base::there(i));
  }
  __device__ float* several(int turn) const { return shared_.several[turn]; }
};

// ---- the controller

// Four lanes have a unit: its gates' and its state's gradients, and a quarter of the weights of its
// part in the head values. Four lanes have one of [reads, h], and a quarter of its weights in all
// gates.
template <class T>
class ControllerGradient {
  const NtmShape& s_;
  const NtmBackward& a_;
  const int unit_, lane_;
  const bool there_;
  float4 of_values_[fours(kMostValues) / 4];
  float gate_ = 0, of_cell_ = 0, before_ = 0;  // of the step: this lane's gate, c and the c before

 public:
  float d_cell = 0;

  __device__ ControllerGradient(const NtmShape& s, const NtmBackward& a, BackwardShared& shared)
      : s_(s),
        a_(a),
        unit_(threadIdx.x / 4),
        lane_(threadIdx.x % 4),
        there_(threadIdx.x < 4 * s.control) {
    for (int q = 0; threadIdx.x < 4 * inputs_of(s) && q < fours(s.control); ++q)
      shared.weights()[q * 4 * inputs_of(s) + threadIdx.x] = of_gates(q);
    const auto weight = [&](int p) {
      return there_ && p < s.values ? a.head_weight[p * s.control + unit_] : 0.0f;
    };
#pragma unroll
    for (int j = 0; j < fours(kMostValues) / 4; ++j) {
      const int p = 4 * (lane_ + 4 * j);
      of_values_[j] = {weight(p), weight(p + 1), weight(p + 2), weight(p + 3)};
    }
  }

  // Asks for what the step `row` of this block's batch row needs.
  __device__ void fetch(int64_t row, int64_t b, bool first, bool cut) {
    if (!there_) return;
    const float* kept = a_.record + row * s_.record + unit_;
    gate_ = kept[lane_ * s_.control];
    of_cell_ = kept[4 * s_.control];
    before_ = cut     ? a_.initial_cell[unit_]
              : first ? one<T>(a_.cell, b * s_.control + unit_)
                      : a_.record[(row - s_.batch) * s_.record + 4 * s_.control + unit_];
  }

  // From the gradients of the head values and of h as a feature to dz.
  __device__ void gates(int64_t row, float of_feature, BackwardShared& shared) {
    const auto* dp = reinterpret_cast<const float4*>(shared.dp);
    float dh = 0;
#pragma unroll
    for (int j = 0; j < fours(kMostValues) / 4; ++j) dh = dot(of_values_[j], dp[lane_ + 4 * j], dh);
    dh = sum_of_four(dh) + of_feature + (there_ ? shared.d_hidden[unit_] : 0.0f);
    const auto of_lane = [&](int k) { return __shfl_sync(~0u, gate_, k, 4); };
    const float i = of_lane(0), f = of_lane(1), g = of_lane(2), o = of_lane(3);
    const float tanh_c = tanhf(of_cell_);
    const float dc = d_cell + dh * o * (1.0f - tanh_c * tanh_c);
    const float by_gate = lane_ == 0   ? dc * g
                          : lane_ == 1 ? dc * before_
                          : lane_ == 2 ? dc * i
                                       : dh * tanh_c;
    const float slope = lane_ == 2 ? 1.0f - g * g : gate_ * (1.0f - gate_);
    if (!there_) return;
    d_cell = dc * f;
    shared.dz[threadIdx.x] = by_gate * slope;
    a_.dz[row * 4 * s_.control + threadIdx.x] = by_gate * slope;
  }

  // From dz to the gradients of the reads and of h before the step.
  __device__ void inputs(BackwardShared& shared) const {
    const auto* dz = reinterpret_cast<const float4*>(shared.dz) + lane_;
    float sum = 0, odd = 0;
    const int stride = 4 * inputs_of(s_);
    const bool real = int(threadIdx.x) < stride;
    const float4* weights = shared.weights() + (real ? threadIdx.x : 0);
    int units = fours(s_.control);
#pragma unroll 1
    for (; units > 1; units -= 2) {
      sum = dot(weights[0], dz[0], sum);
      odd = dot(weights[stride], dz[4], odd);
      weights += 2 * stride;
      dz += 8;
    }
    if (units > 0) sum = dot(weights[0], dz[0], sum);
    sum = sum_of_four(sum + odd);
    if (!real || lane_ != 0) return;
    const int k = int(threadIdx.x) / 4 - s_.read_width;
    (k < 0 ? shared.d_reads[k + s_.read_width] : shared.d_hidden[k]) = sum;
  }

 private:
  // The weights of this thread's input in the gates of its q-th unit.
  __device__ float4 of_gates(int q) const {
    const int from = 4 * (lane_ + 4 * q), inputs = inputs_of(s_);
    const bool real = int(threadIdx.x) < 4 * inputs;
    const auto weight = [&](int k) {
      return real && k < 4 * s_.control ? a_.weight[k * inputs + int(threadIdx.x) / 4] : 0.0f;
    };
    return {weight(from), weight(from + 1), weight(from + 2), weight(from + 3)};
  }
};

}  // namespace
}  // namespace seqmem::cuda
