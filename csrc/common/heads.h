// Heads of queries, keys or values by their strides, and bounds of the keys that a query sees.
#pragma once

#include <cstdint>

namespace seqmem {

// Element (b, h, t, d) is data[b * row + h * head + t * step + d * feature].
struct Heads {
  const void* data;  // null where absent
  int64_t row, head, step, feature;
};

// A bound for each query: at row b and query i it is data[b * row + i * query].
struct Bounds {
  const int64_t* data;  // null where there is none
  int64_t row, query;
};

// Dropout of weights by counting (dropout.h).
struct Dropout {
  double p = 0;  // the share that is dropped
  uint64_t seed = 0;
};

// B rows, Hq heads of queries, Hk of keys and values, a divisor of Hq, Tq queries, Tk keys, D and
// Dv features.
struct HeadShape {
  int64_t B, Hq, Hk, Tq, Tk, D, Dv;
  double scale;
  double alpha;  // of the normaliser: 1 is softmax, else entmax with this alpha
  Dropout dropout;
};

}  // namespace seqmem
