// Operations made of a function of a lane's values.
#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>

#include "warp.h"

namespace ptx {

// d = F(a), F(a, b), F(a, b, c); all of type T, or the result of type D.
template <class F, class T, class D = T>
void unary(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<Stored<D>>(i, 0);
  const auto* a = w.lanes<Stored<T>>(i, 1);
  fill_lanes(mask, d, [=](int lane) { return written<D>(F()(read<T>(a[lane]))); });
}

template <class F, class T, class D = T>
void binary(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<Stored<D>>(i, 0);
  const auto* a = w.lanes<Stored<T>>(i, 1);
  const auto* b = w.lanes<Stored<T>>(i, 2);
  fill_lanes(mask, d,
             [=](int lane) { return written<D>(F()(read<T>(a[lane]), read<T>(b[lane]))); });
}

// The third operand may have another type, as has that of mad.wide.
template <class F, class T, class D = T>
void ternary(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<Stored<D>>(i, 0);
  const auto* a = w.lanes<Stored<T>>(i, 1);
  const auto* b = w.lanes<Stored<T>>(i, 2);
  const auto* c = w.lanes<Stored<D>>(i, 3);
  fill_lanes(mask, d, [=](int lane) {
    return written<D>(F()(read<T>(a[lane]), read<T>(b[lane]), read<D>(c[lane])));
  });
}

// A value shifted by a number of bits that is always of 32 bits.
template <class F, class T>
void shift(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<Stored<T>>(i, 0);
  const auto* a = w.lanes<Stored<T>>(i, 1);
  const auto* b = w.lanes<uint32_t>(i, 2);
  fill_lanes(mask, d, [=](int lane) { return written<T>(F()(read<T>(a[lane]), b[lane])); });
}

// Both 16-bit halves of 32-bit registers; T is Half or BFloat16.
template <class F, class T>
void paired(Warp& w, const Instruction& i, Mask mask) {
  const uint32_t* operand[3] = {};
  for (int k = 1; k < i.operands; ++k) operand[k - 1] = w.lanes<uint32_t>(i, k);
  auto* d = w.lanes<uint32_t>(i, 0);
  fill_lanes(mask, d, [&](int lane) {
    const auto half = [&](int shift) {
      const auto value = [&](int k) { return read<T>(operand[k][lane] >> shift); };
      if constexpr (std::is_invocable_v<F, float, float, float>)
        return written<T>(F()(value(0), value(1), value(2)));
      else if constexpr (std::is_invocable_v<F, float, float>)
        return written<T>(F()(value(0), value(1)));
      else
        return written<T>(F()(value(0)));
    };
    return half(0) | half(16) << 16;
  });
}

struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};

inline void add_names(Operations& table, const std::string& stem,
                      std::initializer_list<const char*> types, Operation operation) {
  for (const char* type : types) table[stem + "." + type] = operation;
}

}  // namespace ptx
