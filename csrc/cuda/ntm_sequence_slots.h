// The memory of the NTM's kernel over time, and a head's addressing.
#pragma once

#include "ntm_sequence_common.h"

namespace seqmem::cuda {
namespace {

// A thread's part of the memory: kSlots slots, kSlotThreads apart, and of each the values lane,
// lane + 4, ...
template <int kSlots>
class Memory {
  const NtmShape& s_;
  const int lane_, first_;
  float x_[kSlots][kValues];

 public:
  __device__ explicit Memory(const NtmShape& s)
      : s_(s), lane_(threadIdx.x % 4), first_(threadIdx.x / 4) {}

  template <class T>
  __device__ void load(const void* from, int64_t at, int width) {
    each([&](int n, int m, float& x) { x = one<T>(from, at + int64_t(n) * width + m); });
  }
  template <class T>
  __device__ void store(void* to, int64_t at) {
    each([&](int n, int m, float& x) { set_one<T>(to, at + int64_t(n) * s_.width + m, x); });
  }

  __device__ int slot(int i) const { return first_ + i * kSlotThreads; }
  __device__ bool there(int i) const { return slot(i) < s_.slots; }
  __device__ bool speaks() const { return lane_ == 0; }  // for its slots
  __device__ float& at(int i, int j) { return x_[i][j]; }
  __device__ float at(int i, int j) const { return x_[i][j]; }

  // Of what all slots share: a key, an erase, an add. Zero where the thread has none.
  __device__ void values_of(const float* shared, float (&y)[kValues]) const {
#pragma unroll
    for (int j = 0; j < kValues; ++j)
      y[j] = lane_ + 4 * j < s_.width ? shared[lane_ + 4 * j] : 0.0f;
  }

  // Cosines of the slots and the key, into [N], and if wanted their norms and the key's.
  __device__ void similarity(const float* key, float* cosine, float* norms = nullptr,
                             float* of_key = nullptr) const {
    float y[kValues], squares = 0;
    values_of(key, y);
#pragma unroll
    for (int j = 0; j < kValues; ++j) squares = fmaf(y[j], y[j], squares);
    const float norm_of_key = sqrtf(sum_of_four(squares));
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      float product = 0, norm = 0;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        product = fmaf(x_[i][j], y[j], product);
        norm = fmaf(x_[i][j], x_[i][j], norm);
      }
      product = sum_of_four(product);
      norm = sqrtf(sum_of_four(norm));
      if (lane_ != 0 || !there(i)) continue;
      cosine[slot(i)] = product / (norm * norm_of_key + 1e-8f);
      if (norms != nullptr) norms[slot(i)] = norm;
    }
    if (of_key != nullptr && threadIdx.x == 0) *of_key = norm_of_key;
  }

  // weighting(n): of slot n.
  template <class Weighting>
  __device__ void write(const Weighting& weighting, const float* erase, const float* add) {
    float e[kValues], a[kValues];
    values_of(erase, e);
    values_of(add, a);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float w = there(i) ? weighting(slot(i)) : 0.0f;
#pragma unroll
      for (int j = 0; j < kValues; ++j) x_[i][j] = x_[i][j] * (1.0f - w * e[j]) + w * a[j];
    }
  }

  // sum_n w_n x_n over the warp's slots, into [M].
  __device__ void read(const float* weighting, float* partial) const {
    float w[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) w[i] = there(i) ? weighting[slot(i)] : 0.0f;
    sum_slots(partial, [&](int i, int j) { return w[i] * x_[i][j]; });
  }

  // The sum of f(slot, value) over the warp's slots, into [M].
  template <class F>
  __device__ void sum_slots(float* partial, const F& f) const {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) sum += f(i, j);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (threadIdx.x % 32 < 4 && lane_ + 4 * j < s_.width) partial[lane_ + 4 * j] = sum;
    }
  }

  // f(slot, value's place, value) of all that the thread has; the others become 0.
  template <class F>
  __device__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const int m = lane_ + 4 * j;
        if (there(i) && m < s_.width)
          f(slot(i), m, x_[i][j]);
        else
          x_[i][j] = 0;
      }
  }
};

// The first kSlotThreads threads, with a slot each or, kSlotThreads apart, several.
template <int kSlots, class Arrays>
class Addressing {
  const NtmShape& s_;
  Arrays& shared_;

 public:
  __device__ Addressing(const NtmShape& s, Arrays& shared) : s_(s), shared_(shared) {}

  // One head's weighting, from beta, gate, taps, gamma and its weighting of the step before, in
  // whose place it comes; `keep` is given each slot's.
  template <class Keep>
  __device__ void operator()(const float* p, float* weightings, const Keep& keep) const {
    const float beta = p[0], gate = p[1], gamma = p[2 + s_.taps];
    float w[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) w[i] = there(i) ? beta * shared_.cosine[slot(i)] : 0.0f;
    float inverse = 1.0f / softmax(w);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (!there(i)) continue;
      const float before = weightings[slot(i)];
      shared_.gated[slot(i)] = before + gate * (w[i] * inverse - before);
    }
    sync_slots();
    shift(p + 2, w);
    // Slots at zero or below stay at zero; a NaN does not.
#pragma unroll
    for (int i = 0; i < kSlots; ++i) w[i] = w[i] <= 0.0f ? minus_infinity() : gamma * logf(w[i]);
    const float total = softmax(w);
    inverse = total == 0.0f ? 1.0f : 1.0f / total;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (!there(i)) continue;
      weightings[slot(i)] = w[i] * inverse;
      keep(slot(i), w[i] * inverse);
    }
  }

  __device__ int slot(int i) const { return int(threadIdx.x) + i * kSlotThreads; }
  __device__ bool there(int i) const { return slot(i) < s_.slots; }

  // Slot n - by around all slots.
  __device__ int around(int n, int by) const {
    const int from = n - by;
    return from < 0 ? from + s_.slots : from >= s_.slots ? from - s_.slots : from;
  }

  // z becomes e^(z - largest); their sum.
  __device__ float softmax(float (&z)[kSlots]) const {
    float top = minus_infinity(), sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (there(i)) top = larger(z[i], top);
    top = reduce_slots<true>(top, shared_.largest);
    if (top == minus_infinity()) top = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      z[i] = there(i) ? expf(z[i] - top) : 0.0f;
      sum += z[i];
    }
    return reduce_slots<false>(sum, shared_.sums);
  }

  // `gated`, moved by the softmax of the taps.
  __device__ void shift(const float* taps, float (&w)[kSlots]) const {
    float top = minus_infinity(), sum = 0;
#pragma unroll 1
    for (int j = 0; j < s_.taps; ++j) top = fmaxf(top, taps[j]);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) w[i] = 0;
#pragma unroll 1
    for (int j = 0; j < s_.taps; ++j) {
      const float tap = expf(taps[j] - top);
      sum += tap;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int from = around(slot(i), j - s_.taps / 2);
        if (there(i)) w[i] = fmaf(tap, shared_.gated[from], w[i]);
      }
    }
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) w[i] *= inverse;
  }
};

}  // namespace
}  // namespace seqmem::cuda
