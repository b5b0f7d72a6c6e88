// Floating-point arithmetic. Approximate functions give the rounded exact value: a kernel that is
// right with these may still be off where a GPU's approximation is worse (about 2 units in the last
// place).
#include <cmath>
#include <limits>

#include "functions.h"

namespace ptx {
namespace {

struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};

// a * b + c rounded towards `Direction` (0: zero), from the product in double, which is exact, and
// the error of adding c to it.
template <int Direction>
struct MultiplyAddDirected {
  float operator()(float a, float b, float c) const {
    const double product = double(a) * b, sum = product + c;
    const double added = sum - product, error = (product - (sum - added)) + (c - added);
    const float nearest = static_cast<float>(sum);
    if (!std::isfinite(nearest)) return nearest;
    const double above = double(nearest) - sum;  // exact: neighbouring values
    const bool too_high = above > 0 || (above == 0 && error < 0);
    const bool too_low = above < 0 || (above == 0 && error > 0);
    const int direction = Direction != 0 ? Direction : sum > 0 ? -1 : 1;
    const float end = direction * std::numeric_limits<float>::infinity();
    return (direction < 0 ? too_high : too_low) ? std::nextafter(nearest, end) : nearest;
  }
};
template <int Direction>
struct AddDirected {
  float operator()(float a, float b) const { return MultiplyAddDirected<Direction>()(a, 1.f, b); }
};

// A NaN gives way to the other value, and -0 is less than 0.
struct LeastNumber {
  template <class T>
  T operator()(T a, T b) const {
    if (a != a) return b;
    return b != b || a < b || (a == b && std::signbit(a)) ? a : b;
  }
};
struct GreatestNumber {
  template <class T>
  T operator()(T a, T b) const {
    if (a != a) return b;
    return b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
  }
};
template <class F>
struct KeepingNan {
  template <class T>
  T operator()(T a, T b) const {
    return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : F()(a, b);
  }
};

struct Absolute {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
struct Saturate {  // to [0, 1], NaN to 0
  float operator()(float a) const { return a > 0 ? (a < 1 ? a : 1.f) : 0.f; }
};
struct CopySign {  // PTX gives the sign first
  template <class T>
  T operator()(T sign, T magnitude) const {
    return std::copysign(magnitude, sign);
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct ReciprocalRoot {
  template <class T>
  T operator()(T a) const {
    return 1 / std::sqrt(a);
  }
};
struct Exponential2 {
  float operator()(float a) const { return std::exp2(a); }
};
struct Logarithm2 {
  float operator()(float a) const { return std::log2(a); }
};
struct Tangent {
  float operator()(float a) const { return std::tanh(a); }
};
struct Sine {
  float operator()(float a) const { return std::sin(a); }
};
struct Cosine {
  float operator()(float a) const { return std::cos(a); }
};
template <class F>
struct UpperWord {  // double approximations give 20 bits of mantissa
  double operator()(double a) const {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(F()(a)) & ~uint64_t(0xffffffff));
  }
};

// And, for 16 bits, the same for both halves of a register.
template <class F, class T>
void put(Operations& table, const std::string& name, const std::string& type, Operation single) {
  table[name + "." + type] = single;
  if constexpr (is_short_float<T>) table[name + "." + type + "x2"] = paired<F, T>;
}

template <class T>
void add_type(Operations& table, const std::string& type) {
  const auto put1 = [&](auto f, const char* name) {
    put<decltype(f), T>(table, name, type, unary<decltype(f), T>);
  };
  const auto put2 = [&](auto f, const char* name) {
    put<decltype(f), T>(table, name, type, binary<decltype(f), T>);
  };
  put2(std::plus<>(), "add");
  put2(std::minus<>(), "sub");
  put2(std::multiplies<>(), "mul");
  put2(LeastNumber(), "min");
  put2(GreatestNumber(), "max");
  put2(KeepingNan<LeastNumber>(), "min.NaN");
  put2(KeepingNan<GreatestNumber>(), "max.NaN");
  put1(std::negate<>(), "neg");
  put1(Absolute(), "abs");
  put<MultiplyAdd, T>(table, "fma", type, ternary<MultiplyAdd, T>);
  if constexpr (is_short_float<T>) {
    put1(Exponential2(), "ex2");
    put1(Tangent(), "tanh");
  } else {
    put1(Reciprocal(), "rcp");
    put1(SquareRoot(), "sqrt");
    put2(std::divides<>(), "div");
    put2(CopySign(), "copysign");
  }
}

}  // namespace

void add_float_operations(Operations& table) {
  add_type<float>(table, "f32");
  add_type<double>(table, "f64");
  add_type<Half>(table, "f16");
  add_type<BFloat16>(table, "bf16");
  table["fma.rm.f32"] = ternary<MultiplyAddDirected<-1>, float>;
  table["fma.rp.f32"] = ternary<MultiplyAddDirected<1>, float>;
  table["fma.rz.f32"] = ternary<MultiplyAddDirected<0>, float>;
  table["add.rm.f32"] = binary<AddDirected<-1>, float>;
  table["add.rp.f32"] = binary<AddDirected<1>, float>;
  table["add.rz.f32"] = binary<AddDirected<0>, float>;
  table["saturate.f32"] = unary<Saturate, float>;
  table["ex2.f32"] = unary<Exponential2, float>;
  table["lg2.f32"] = unary<Logarithm2, float>;
  table["tanh.f32"] = unary<Tangent, float>;
  table["sin.f32"] = unary<Sine, float>;
  table["cos.f32"] = unary<Cosine, float>;
  table["rsqrt.f32"] = unary<ReciprocalRoot, float>;
  table["rcp.approx.f64"] = unary<UpperWord<Reciprocal>, double>;
  table["rsqrt.approx.f64"] = unary<UpperWord<ReciprocalRoot>, double>;
}

}  // namespace ptx
