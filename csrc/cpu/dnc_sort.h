// The order of slots by their usage: ascending, equal ones by their index, NaN last.
//
// float: keys of 64 bits, the number above and the index below it, are all different, so that a
// bitonic network sorts them stably, a vector of them at a time:
//   for size = 2, 4 .. n, for distance = size / 2 .. 1: key i and key i + distance change places
//   unless they are in order, upwards where bit `size` of i is 0
// double: a merge sort of indices.
#pragma once

#include "../common/machine_math.h"

namespace seqmem::dnc {
namespace {

using Keys = VecTypes<double>::ints;

SEQMEM_INLINE int64_t power_of_two(int64_t n) {
  int64_t p = kLanes<double>;
  while (p < n) p *= 2;
  return p;
}

// Whole numbers in the order of the floating ones.
SEQMEM_INLINE int32_t ordered(float x) {
  if (x != x) return INT32_MAX;
  x += 0.0f;  // -0 is 0
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

class Network {
  static constexpr int K = kLanes<double>;
  static SEQMEM_INLINE Keys get(const int64_t* p) {
    Keys x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static SEQMEM_INLINE void put(int64_t* p, Keys x) { __builtin_memcpy(p, &x, sizeof x); }

  // Keys `distance` apart within a vector.
  template <int distance>
  static SEQMEM_INLINE void within(int64_t* key, int64_t n, int64_t size) {
    if constexpr (distance > 0) {
      for (int64_t i = 0; i < n; i += K) {
        const Keys x = get(key + i);
        const Keys y = shuffle(x, x, [](int lane) { return lane ^ distance; });
        Keys lower;
        for (int lane = 0; lane < K; ++lane)
          lower[lane] = ((lane & distance) == 0) == (((i + lane) & size) == 0) ? -1 : 0;
        const Keys less = x < y ? x : y, more = x < y ? y : x;
        put(key + i, (less & lower) | (more & ~lower));
      }
      within<distance / 2>(key, n, size);
    }
  }
  template <int distance>
  static SEQMEM_INLINE void from(int64_t* key, int64_t n, int64_t size) {
    if (size / 2 >= distance) return within<distance>(key, n, size);
    if constexpr (distance > 1) from<distance / 2>(key, n, size);
  }

 public:
  // n: a power of two, of at least a vector.
  static void sort(int64_t* key, int64_t n) {
    for (int64_t size = 2; size <= n; size *= 2) {
      int64_t distance = size / 2;
      for (; distance >= K; distance /= 2)
        for (int64_t base = 0; base < n; base += 2 * distance) {
          const bool up = (base & size) == 0;
          for (int64_t i = base; i < base + distance; i += K) {
            const Keys x = get(key + i), y = get(key + i + distance);
            const Keys less = x < y ? x : y, more = x < y ? y : x;
            put(key + i, up ? less : more);
            put(key + i + distance, up ? more : less);
          }
        }
      from<K / 2>(key, n, size);
    }
  }
};

// One thread's; order is [n], as is left by run().
template <class C>
class Sorter {
 public:
  int64_t* order;

  void place(Carver& take, int64_t n) {
    order = take.array<int64_t>(power_of_two(n));
    if constexpr (std::is_same_v<C, double>) other = take.array<int64_t>(n);
  }

  void run(const C* x, int64_t n) {
    if constexpr (std::is_same_v<C, float>) {
      const int64_t all = power_of_two(n);
      for (int64_t i = 0; i < n; ++i) order[i] = int64_t(ordered(x[i])) * (int64_t(1) << 32) + i;
      for (int64_t i = n; i < all; ++i) order[i] = INT64_MAX;
      Network::sort(order, all);
      for (int64_t i = 0; i < n; ++i) order[i] &= 0xffffffff;
    } else {
      merge_sort(x, n);
    }
  }

 private:
  int64_t* other;

  void merge_sort(const C* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    for (int64_t run = 1; run < n; run *= 2) {
      for (int64_t begin = 0; begin < n; begin += 2 * run) {
        const int64_t middle = min(begin + run, n), end = min(begin + 2 * run, n);
        int64_t left = begin, right = middle;
        for (int64_t to = begin; to < end; ++to) {
          // The right one only where it is less, and nothing is less than a number but a number.
          const bool take_left =
              right == end ||
              (left < middle &&
               !(x[order[right]] < x[order[left]] ||
                 (x[order[left]] != x[order[left]] && x[order[right]] == x[order[right]])));
          other[to] = take_left ? order[left++] : order[right++];
        }
      }
      for (int64_t i = 0; i < n; ++i) order[i] = other[i];
    }
  }
};

}  // namespace
}  // namespace seqmem::dnc
