// cvt. Pairs of types that kernels use much have an operation of their own; for the others, a
// lane's value goes through the widest type of its kind.
#include <cmath>
#include <limits>

#include "functions.h"

namespace ptx {
namespace {

// In the order that decode.py numbers them in.
enum class Type { U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, F32, F64 };
enum class Rounding { None, Nearest, TowardsZero, Down, Up };

struct Number {
  enum { Unsigned, Signed, Float } kind;
  union {
    uint64_t u;
    int64_t s;
    double f;  // holds every shorter float exactly
  };
  static Number of(uint64_t x) { return {.kind = Unsigned, .u = x}; }
  static Number of(int64_t x) { return {.kind = Signed, .s = x}; }
  static Number of(double x) { return {.kind = Float, .f = x}; }
};

Number load(Type type, uint64_t bits) {
  switch (type) {
    case Type::U8: return Number::of(uint64_t(read<uint8_t>(bits)));
    case Type::S8: return Number::of(int64_t(read<int8_t>(bits)));
    case Type::U16: return Number::of(uint64_t(read<uint16_t>(bits)));
    case Type::S16: return Number::of(int64_t(read<int16_t>(bits)));
    case Type::U32: return Number::of(uint64_t(read<uint32_t>(bits)));
    case Type::S32: return Number::of(int64_t(read<int32_t>(bits)));
    case Type::U64: return Number::of(uint64_t(bits));
    case Type::S64: return Number::of(int64_t(bits));
    case Type::F16: return Number::of(double(read<Half>(bits)));
    case Type::BF16: return Number::of(double(read<BFloat16>(bits)));
    case Type::F32: return Number::of(double(read<float>(bits)));
    case Type::F64: return Number::of(read<double>(bits));
  }
  return Number::of(uint64_t(0));
}

// Out of range is clamped, NaN is 0 (of 64 bits: the least or greatest value).
template <class D>
D clamped(double x) {
  using Limits = std::numeric_limits<D>;
  if (x != x) return sizeof(D) < 8 ? 0 : std::is_signed_v<D> ? Limits::min() : Limits::max();
  if (x <= double(Limits::min())) return Limits::min();
  if (x >= double(Limits::max())) return Limits::max();
  return static_cast<D>(x);
}

// The bits of an integer, extended by its sign to 64.
template <class D>
uint64_t integer(Number x) {
  const D result = x.kind == Number::Float ? clamped<D>(x.f) : static_cast<D>(x.u);
  return static_cast<uint64_t>(
      static_cast<std::conditional_t<std::is_signed_v<D>, int64_t, uint64_t>>(result));
}

template <class D>
D floating(Number x) {
  return x.kind == Number::Float ? D(x.f) : x.kind == Number::Signed ? D(x.s) : D(x.u);
}

uint64_t stored(Type type, Number x) {
  switch (type) {
    case Type::U8: return integer<uint8_t>(x);
    case Type::S8: return integer<int8_t>(x);
    case Type::U16: return integer<uint16_t>(x);
    case Type::S16: return integer<int16_t>(x);
    case Type::U32: return integer<uint32_t>(x);
    case Type::S32: return integer<int32_t>(x);
    case Type::U64: return integer<uint64_t>(x);
    case Type::S64: return integer<int64_t>(x);
    case Type::F16: return written<Half>(floating<float>(x));
    case Type::BF16: return written<BFloat16>(floating<float>(x));
    case Type::F32: return written<float>(floating<float>(x));
    case Type::F64: return written<double>(floating<double>(x));
  }
  return 0;
}

double rounded(Rounding rounding, double x) {
  switch (rounding) {
    case Rounding::None: return x;
    case Rounding::Nearest: return std::nearbyint(x);
    case Rounding::TowardsZero: return std::trunc(x);
    case Rounding::Down: return std::floor(x);
    case Rounding::Up: return std::ceil(x);
  }
  return x;
}

// The immediate holds both types and the rounding to whole numbers, four bits each.
void convert(Warp& w, const Instruction& i, Mask mask) {
  const auto to = Type(i.immediate & 15), from = Type(i.immediate >> 4 & 15);
  const auto rounding = Rounding(i.immediate >> 8);
  each_lane(mask, [&](int lane) {
    Number x = load(from, w.any_width(i, 1, lane));
    if (x.kind == Number::Float) x.f = rounded(rounding, x.f);
    w.set_any_width(i, 0, lane, stored(to, x));
  });
}

template <class D>
struct Cast {
  template <class T>
  Value<D> operator()(T x) const {
    return static_cast<Value<D>>(x);
  }
};
template <class D, class S>
constexpr Operation cast = unary<Cast<D>, S, D>;

// Two floats into one register, the first into its upper half.
template <class T>
void convert_pair(Warp& w, const Instruction& i, Mask mask) {
  const auto *a = w.lanes<uint32_t>(i, 1), *b = w.lanes<uint32_t>(i, 2);
  fill_lanes(mask, w.lanes<uint32_t>(i, 0), [=](int lane) {
    return written<T>(read<float>(a[lane])) << 16 | written<T>(read<float>(b[lane]));
  });
}

struct ToTF32 {  // ties away from zero
  uint32_t operator()(uint32_t a) const {
    return (a & 0x7f800000) != 0x7f800000 ? (a + 0x1000) & ~0x1fffu : a;
  }
};

}  // namespace

void add_conversions(Operations& table) {
  table["cvt"] = convert;
  table["cvt.u64.u32"] = cast<uint64_t, uint32_t>;
  table["cvt.s64.s32"] = cast<int64_t, int32_t>;
  table["cvt.u32.u64"] = cast<uint32_t, uint64_t>;
  table["cvt.f32.f16"] = cast<float, Half>;
  table["cvt.f32.bf16"] = cast<float, BFloat16>;
  table["cvt.f16.f32"] = cast<Half, float>;
  table["cvt.bf16.f32"] = cast<BFloat16, float>;
  table["cvt.f64.f32"] = cast<double, float>;
  table["cvt.f32.f64"] = cast<float, double>;
  table["cvt.f32.s32"] = cast<float, int32_t>;
  table["cvt.f16x2.f32"] = convert_pair<Half>;
  table["cvt.bf16x2.f32"] = convert_pair<BFloat16>;
  table["cvt.tf32.f32"] = unary<ToTF32, uint32_t>;
}

}  // namespace ptx
