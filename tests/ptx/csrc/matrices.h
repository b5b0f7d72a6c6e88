// How the factors of tensor-core products lie in registers.
#pragma once

#include "functions.h"

namespace ptx {

struct TF32 {};  // a float whose last 13 bits do not count

template <class T>
constexpr int elements_in_register = is_short_float<T> ? 2 : 1;

template <class T>
float element(uint32_t bits, int k) {
  if constexpr (std::is_same_v<T, TF32>)
    return std::bit_cast<float>(bits & ~0x1fffu);
  else
    return read<T>(bits >> 16 * k);
}

// a [16, K] from registers, of which operand `first` is the first: pieces of 8 rows and 4
// registers' columns, of which lane l holds row l / 4 and neighbouring columns from l % 4 on.
template <class T, int K>
void left_factor(Warp& w, const Instruction& i, int first, float (&a)[16][K]) {
  constexpr int per = elements_in_register<T>, block = 4 * per;
  for (int r = 0; r < 2 * K / block; ++r) {
    const auto* lanes = w.lanes<uint32_t>(i, first + r);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int k = 0; k < per; ++k)
        a[lane / 4 + r % 2 * 8][r / 2 * block + lane % 4 * per + k] = element<T>(lanes[lane], k);
  }
}

}  // namespace ptx
