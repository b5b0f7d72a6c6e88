// The controller of the NTM's kernel over time: gates, cell, h, and from h the head values.
#pragma once

#include "ntm_sequence_common.h"

namespace seqmem::cuda {
namespace {

enum class Activation { kNone, kTanh, kSigmoid, kSoftplus, kAboveOne };

// Of one of the head values: in turn each head's key, beta, gate, taps, gamma, and if it writes,
// erase and add.
__device__ Activation activation(const NtmShape& s, int value) {
  const auto vector = s.squash ? Activation::kTanh : Activation::kNone;
  for (int h = 0; h < s.heads; ++h) {
    if (value < s.width) return vector;
    value -= s.width;
    if (value == 0) return Activation::kSoftplus;
    if (value == 1) return Activation::kSigmoid;
    if (value < 2 + s.taps) return Activation::kNone;
    if (value == 2 + s.taps) return Activation::kAboveOne;
    value -= 3 + s.taps;
    if (!(s.writes >> h & 1)) continue;
    if (value < 2 * s.width) return value < s.width ? Activation::kSigmoid : vector;
    value -= 2 * s.width;
  }
  return Activation::kNone;
}

__device__ float activated(float x, Activation how) {
  switch (how) {
    case Activation::kTanh: return tanhf(x);
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kSoftplus: return softplus(x);
    case Activation::kAboveOne: return 1.0f + softplus(x);
    default: return x;
  }
}

// A thread's gate, its unit's state, and its quarter of a head value's weights. Of the gate's
// weights kFours fours are in registers.
template <int kFours>
class Controller {
  const NtmShape& s_;
  const NtmForward& a_;
  const int gate_, unit_, lane_;  // of four
  const bool there_;
  float4 own_[kFours > 0 ? kFours : 1];       // weights of the gate
  float4 of_value_[fours(kMostControl) / 4];  // of the head value
  float bias_ = 0;
  Activation activation_ = Activation::kNone;

 public:
  float cell = 0;

  __device__ Controller(const NtmShape& s, const NtmForward& a, const Shared& shared)
      : s_(s),
        a_(a),
        gate_(threadIdx.x),
        unit_(threadIdx.x / 4),
        lane_(threadIdx.x % 4),
        there_(threadIdx.x < 4 * s.control) {
#pragma unroll
    for (int q = 0; q < kFours; ++q) own_[q] = rows(q);
    for (int q = 0; there_ && q < shared_rows(s, kFours); ++q)
      shared.weights[q * 4 * s.control + gate_] = rows(kFours + q);
    const int value = threadIdx.x / 4;
    const auto weight = [&](int k) {
      return k < s.control && value < s.values ? a.head_weight[k * s.values + value] : 0.0f;
    };
#pragma unroll
    for (int j = 0; j < fours(kMostControl) / 4; ++j) {
      const int k = 4 * (lane_ + 4 * j);
      of_value_[j] = {weight(k), weight(k + 1), weight(k + 2), weight(k + 3)};
    }
    if (value >= s.values) return;
    bias_ = a.head_bias[value];
    activation_ = activation(s, value);
  }

  // The state before the first step, or what a reset goes back to.
  __device__ void start(const float* hidden, const float* of_cell, float* input) {
    if (!there_) return;
    cell = of_cell[unit_];
    if (lane_ == 0) input[4 * fours(s_.read_width) + unit_] = hidden[unit_];
  }

  __device__ float first_sum(int64_t row) const {
    return there_ ? a_.zx[row * 4 * s_.control + gate_] : 0.0f;
  }

  // z: first_sum of this step. Leaves h in `next`.
  __device__ void step(float z, int64_t row, const Shared& shared, const float* input,
                       float* next) {
    const auto* x = reinterpret_cast<const float4*>(input);
    float odd = 0;
#pragma unroll
    for (int q = 0; q < kFours; q += 2) {
      z = dot(own_[q], x[q], z);
      odd = dot(own_[q + 1], x[q + 1], odd);
    }
    x += kFours;
    const float4* weights = shared.weights + (there_ ? gate_ : 0);
    const int stride = 4 * s_.control;
#pragma unroll 1
    for (int rows = shared_rows(s_, kFours); rows > 0; rows -= 2) {
      z = dot(weights[0], x[0], z);
      odd = dot(weights[stride], x[1], odd);
      weights += 2 * stride;
      x += 2;
    }
    z += odd;
    const float activated = lane_ == 2 ? tanhf(z) : sigmoid(z);
    const auto of_lane = [&](int k) { return __shfl_sync(~0u, activated, k, 4); };
    const float i = of_lane(0), f = of_lane(1), g = of_lane(2), o = of_lane(3);
    cell = fmaf(f, cell, i * g);
    const float h = o * tanhf(cell);
    if (!there_) return;
    if (a_.record != nullptr) {
      float* kept = a_.record + row * s_.record + unit_;
      kept[lane_ * s_.control] = activated;
      if (lane_ == 0) kept[4 * s_.control] = cell;
    }
    if (lane_ == 0) next[4 * fours(s_.read_width) + unit_] = h;
  }

  // From h, in `next`, to the head values.
  __device__ void head_values(int64_t row, const float* next, float* values) const {
    const auto* h = reinterpret_cast<const float4*>(next + 4 * fours(s_.read_width));
    float sum = 0;
#pragma unroll
    for (int j = 0; j < fours(kMostControl) / 4; ++j)
      sum = dot(of_value_[j], h[lane_ + 4 * j], sum);
    sum = sum_of_four(sum) + bias_;
    const int value = threadIdx.x / 4;
    if (lane_ != 0 || value >= s_.values) return;
    values[value] = activated(sum, activation_);
    if (a_.record != nullptr) a_.record[row * s_.record + 5 * s_.control + value] = sum;
  }

  __device__ void finish(int64_t b) const {
    if (there_ && lane_ == 0) a_.cell[b * s_.control + unit_] = cell;
  }

 private:
  // The gate's weights of the q-th four rows of x.
  __device__ float4 rows(int q) const {
    return {row_of(4 * q), row_of(4 * q + 1), row_of(4 * q + 2), row_of(4 * q + 3)};
  }
  __device__ float row_of(int padded) const {
    const int of_reads = 4 * fours(s_.read_width), k = padded - of_reads;
    const bool real = k < 0 ? padded < s_.read_width : k < s_.control;
    const int row = k < 0 ? padded : s_.read_width + k;
    return there_ && real ? a_.weight[row * 4 * s_.control + gate_] : 0.0f;
  }
};

}  // namespace
}  // namespace seqmem::cuda
