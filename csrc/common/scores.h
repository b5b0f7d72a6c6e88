// What ops of scores, queries times keys, share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "team.h"

namespace seqmem {

inline double scale_of(const std::optional<double>& given, int64_t features) {
  return given.value_or(1 / std::sqrt(double(features)));
}

// For so many rows of queries and scores, whose products are with `features` in all. Estimates for
// one core, by microseconds: a smaller share is not worth a thread.
inline int threads_for_scores(double rows, double scores, int64_t features, double products,
                              double rows_per_microsecond = 10) {
  constexpr double kFlops = 60e3, kScores = 500, kShareWorthWaking = 45;
  const double once =
      2 * scores * double(features) / kFlops + scores / kScores + rows / rows_per_microsecond;
  const double share = once * products / kShareWorthWaking;
  return int(std::clamp(share, 1.0, double(available_threads())));
}

}  // namespace seqmem
