// What a lane's register holds, and how each PTX type is read from it and written to it.
//
// A register of up to 32 bits is one uint32_t for each lane, one of 64 bits a uint64_t. What is
// above a shorter value's bits does not count: whoever reads it cuts it off.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;  // a bit for each lane
constexpr Mask kAllLanes = ~Mask(0);

// 16-bit floats are tags: their arithmetic is float, rounded once at the end.
struct Half {};
struct BFloat16 {};

template <class T>
constexpr bool is_short_float = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

template <class T>
constexpr int size_of = is_short_float<T> ? 2 : sizeof(T);

// What a T is computed in.
template <class T>
using Value = std::conditional_t<is_short_float<T>, float, T>;

// What a register stores for a T.
template <class T>
using Stored = std::conditional_t<size_of<T> == 8, uint64_t, uint32_t>;

// The unsigned integer of T's size.
template <class T>
using Bits =
    std::conditional_t<size_of<T> == 8, uint64_t,
                       std::conditional_t<size_of<T> == 4, uint32_t,
                                          std::conditional_t<size_of<T> == 2, uint16_t, uint8_t>>>;

inline float from_half(uint32_t bits) {
  return std::bit_cast<_Float16>(static_cast<uint16_t>(bits));
}
inline float from_bfloat16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline uint32_t to_half(float x) {
  if (x != x) return 0x7fff;  // PTX's only NaN of 16 bits
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
inline uint32_t to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

template <class T, class S>
inline Value<T> read(S stored) {
  const auto bits = static_cast<Bits<T>>(stored);
  if constexpr (std::is_same_v<T, Half>) return from_half(bits);
  if constexpr (std::is_same_v<T, BFloat16>) return from_bfloat16(bits);
  if constexpr (!is_short_float<T>) return std::bit_cast<T>(bits);
}

// A GPU's arithmetic knows one NaN of each size; the CPU's would keep one of the operands'.
template <class T>
inline Stored<T> written(Value<T> x) {
  if constexpr (std::is_same_v<T, Half>) return to_half(x);
  if constexpr (std::is_same_v<T, BFloat16>) return to_bfloat16(x);
  if constexpr (std::is_same_v<T, float>) return x == x ? std::bit_cast<uint32_t>(x) : 0x7fffffff;
  if constexpr (std::is_same_v<T, double>)
    return x == x ? std::bit_cast<uint64_t>(x) : 0x7fffffffffffffff;
  if constexpr (std::is_integral_v<T>) return std::bit_cast<Bits<T>>(x);
}

}  // namespace ptx
