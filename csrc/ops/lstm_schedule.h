// How an LSTM call is shared out among threads, and which kernels serve it.
#pragma once

#include <unistd.h>

#include <algorithm>

#include "../common/bf16_in_use.h"
#include "../common/team.h"
#include "../cpu/lstm_kernel.h"
#include "lstm_check.h"

namespace seqmem::lstm {

using Sizes64 = Sizes<int64_t>;

struct Schedule {
  Plan plan;
  int threads;
};

// Estimates in microseconds of one core; they only steer the choices below. A barrier costs little,
// but where another program holds the other core each one may wait for a time slice, so short steps
// stay on one thread; shorter ones of a single row do not, for it has no rows to share.
constexpr double kFlopsPerMicrosecond = 60e3, kBytesPerMicrosecond = 40e3;
constexpr double kStepWorthSharing = 3, kLoneStepWorthSharing = 0.7;
constexpr double kCallWorthSharing = 50;
constexpr int64_t kRowsPerWeight = 12;  // that make up for reading a weight from beyond L2

// Of one core, in bytes; the C library does not always know it.
inline int64_t second_cache() {
  static const int64_t bytes = [] {
    int64_t told = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    told = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(told > 0 ? told : 512 << 10, 256 << 10, 4 << 20);
  }();
  return bytes;
}

// Threads share rows where each gets several, and many if the weights do not stay in its cache;
// else they share hidden units, which halves the weights each thread reads but needs a barrier per
// step.
inline Schedule share_out(const Sizes64& s, int64_t element, bool projected,
                          int64_t recurrent_width) {
  const int available = available_threads();
  const double flops = 8.0 * s.H * s.B * recurrent_width;
  const double bytes = 4.0 * s.H * recurrent_width * element;
  const double step = std::max(flops / kFlopsPerMicrosecond, bytes / kBytesPerMicrosecond);
  const double call = step * s.T * (1 + double(s.I) / recurrent_width);
  auto limit = [&](double threads) { return int(std::clamp(threads, 1.0, double(available))); };
  const int by_rows = std::min<int64_t>(limit(call / kCallWorthSharing), std::max<int64_t>(s.B, 1));
  const double step_worth = s.B == 1 ? kLoneStepWorthSharing : kStepWorthSharing;
  const int by_units = std::min<int64_t>(
      limit(std::min(step / step_worth, call / kCallWorthSharing)), std::max<int64_t>(s.H / 16, 1));
  const int64_t enough = 2 * bytes <= second_cache() ? 6 : kRowsPerWeight;
  const bool rows = projected || s.B >= enough * by_rows || by_units == 1;
  return {{rows, true, 1}, rows ? by_rows : by_units};
}

// Packing pays when several steps, or many rows of one step, reuse the weights; widths hardly
// matter, measured.
inline bool worth_packing(const Sizes64& s) { return s.T > 1 ? s.T * (s.B + 8) > 60 : s.B >= 100; }

// In the backward packing is a plain copy, but the products run slower without it: for many rows,
// and for many steps, each of which reads W_hh anew.
constexpr int64_t kRowsWorthPacking = 48;

inline bool worth_packing_backward(const Sizes64& s, int64_t element) {
  const int64_t steps = 4 * s.H * s.P * element > 4 * second_cache() ? 8 : 24;
  return s.T * s.B > kRowsWorthPacking || s.T > steps;
}

inline Schedule schedule_forward(const Sizes64& s, int64_t element, bool projected) {
  Schedule schedule = share_out(s, element, projected, s.P);
  schedule.plan.pack = worth_packing(s);
  schedule.plan.chunk = std::max<int64_t>(1, 128 / std::max<int64_t>(s.B, 1));
  return schedule;
}

inline Schedule schedule_backward(const Sizes64& s, int64_t element, bool projected) {
  Schedule schedule = share_out(s, element, projected, s.P);
  schedule.plan.pack = worth_packing_backward(s, element);
  schedule.plan.chunk = std::max<int64_t>(1, 256 / std::max<int64_t>(s.B, 1));
  return schedule;
}

// ---- in bf16, on tiles or dot products: thresholds as measured on two cores of a Sapphire Rapids
// and of a Zen 4

// The weights of several steps are packed anew in every call, which takes about as long as the
// products of a row or two by the float32 kernels, which need no packing for so few.
constexpr int64_t kRowsWorthBf16 = 4;

inline bool runs_in_bf16(const Sizes64& s, at::ScalarType type, bool projected) {
  return type == at::kBFloat16 && !projected && s.T * s.B >= (s.T == 1 ? 1 : kRowsWorthBf16) &&
         bf16_in_use() != Bf16::Float32;
}

// Threads share rows where each gets several and W_hh stays in its cache beside them, else units.
inline Schedule share_out_in_bf16(const Sizes64& s) {
  const double kFlopsPerMicrosecond = bf16_in_use() == Bf16::Tiles ? 1e6 : 150e3;
  constexpr double kFlopsWorthAThread = 7.5e6;
  constexpr double kBytesPerMicrosecond = 130e3, kStepWorthSharing = 2;
  constexpr int64_t kSharedWeights = 512 << 10;
  const double step_flops = 8.0 * s.H * s.B * (s.I + s.H), bytes = 8.0 * s.H * (s.I + s.H);
  const double step = std::max(step_flops / kFlopsPerMicrosecond, bytes / kBytesPerMicrosecond);
  const double most =
      std::clamp(s.T * step_flops / kFlopsWorthAThread, 1.0, double(available_threads()));
  const int64_t by_rows = std::min<int64_t>(most, std::max<int64_t>(s.B / 2, 1));
  const int64_t by_units =
      std::min<int64_t>(std::clamp(step / kStepWorthSharing, 1.0, most), (s.H + 15) / 16);
  const bool rows = by_units == 1 || (by_rows > 1 && 8 * s.H * s.H <= kSharedWeights);
  return {{rows, true, 0}, static_cast<int>(rows ? by_rows : by_units)};
}

// The input is projected within each step where a thread has rows enough to make up for reading
// both weights each time, and they are in its cache; else of several steps at once.
inline Schedule schedule_forward_in_bf16(const Sizes64& s) {
  constexpr int64_t kCachedWeights = 2200 << 10, kLargeWeight = 1 << 20;
  Schedule schedule = share_out_in_bf16(s);
  const auto& [plan, threads] = schedule;
  const int64_t rows = plan.by_rows ? (s.B + threads - 1) / threads : s.B;
  const int64_t bytes = 8 * s.H * (s.I + s.H) / (plan.by_rows ? 1 : threads);
  if (rows < 16 || bytes > kCachedWeights)
    schedule.plan.chunk = std::max<int64_t>(1, (8 * s.H * s.I > kLargeWeight ? 256 : 32) / rows);
  return schedule;
}

// A chunk's operands stay in the second cache. By shape alone: the order of the weights' sums, and
// so their bits, depends on it.
inline Schedule schedule_backward_in_bf16(const Sizes64& s) {
  Schedule schedule = share_out_in_bf16(s);
  schedule.plan.chunk = std::max<int64_t>(1, (s.H <= 64 ? 1024 : 256) / s.B);
  return schedule;
}

}  // namespace seqmem::lstm
