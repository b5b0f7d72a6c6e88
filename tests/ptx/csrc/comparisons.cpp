// Comparisons into predicates, and the choice by one.
#include "functions.h"

namespace ptx {
namespace {

struct Numbers {
  template <class T>
  bool operator()(T a, T b) const {
    return a == a && b == b;
  }
};

template <class F, class T, bool Swapped = false, bool Negated = false>
void compare(Warp& w, const Instruction& i, Mask mask) {
  const auto* a = w.lanes<Stored<T>>(i, Swapped ? 2 : 1);
  const auto* b = w.lanes<Stored<T>>(i, Swapped ? 1 : 2);
  Mask found = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    found |= Mask(F()(read<T>(a[lane]), read<T>(b[lane])) != Negated) << lane;
  Mask& d = w.predicate(i, 0);
  d = (d & ~mask) | (found & mask);
}

template <class T>
void add_type(Operations& table, const std::string& type) {
  const auto put = [&](const char* name, Operation f) {
    table[std::string("setp.") + name + "." + type] = f;
  };
  put("eq", compare<std::equal_to<>, T>);
  put("lt", compare<std::less<>, T>);
  put("le", compare<std::less_equal<>, T>);
  put("gt", compare<std::less<>, T, true>);
  put("ge", compare<std::less_equal<>, T, true>);
  if constexpr (std::is_integral_v<T>) {
    put("ne", compare<std::equal_to<>, T, false, true>);
    put("lo", compare<std::less<>, T>);
    put("ls", compare<std::less_equal<>, T>);
    put("hi", compare<std::less<>, T, true>);
    put("hs", compare<std::less_equal<>, T, true>);
  } else {  // with a NaN `ne` is false, and all whose names end in u are true
    table["setp.neu." + type] = compare<std::equal_to<>, T, false, true>;
    put("ltu", compare<std::less_equal<>, T, true, true>);
    put("leu", compare<std::less<>, T, true, true>);
    put("gtu", compare<std::less_equal<>, T, false, true>);
    put("geu", compare<std::less<>, T, false, true>);
    put("num", compare<Numbers, T>);
    put("nan", compare<Numbers, T, false, true>);
    struct Different {
      bool operator()(Value<T> a, Value<T> b) const { return a < b || a > b; }
    };
    struct EqualOrNan {
      bool operator()(Value<T> a, Value<T> b) const { return !(a < b || a > b); }
    };
    put("ne", compare<Different, T>);
    put("equ", compare<EqualOrNan, T>);
  }
}

template <class T>
void select(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<T>(i, 0);
  const T *a = w.lanes<T>(i, 1), *b = w.lanes<T>(i, 2);
  const Mask chosen = w.predicate(i, 3);
  fill_lanes(mask, d, [=](int lane) { return chosen >> lane & 1 ? a[lane] : b[lane]; });
}

}  // namespace

void add_comparisons(Operations& table) {
  add_type<uint16_t>(table, "u16");
  add_type<int16_t>(table, "s16");
  add_type<uint32_t>(table, "u32");
  add_type<int32_t>(table, "s32");
  add_type<uint64_t>(table, "u64");
  add_type<int64_t>(table, "s64");
  add_type<float>(table, "f32");
  add_type<double>(table, "f64");
  add_type<Half>(table, "f16");
  add_type<BFloat16>(table, "bf16");
  for (const char* bits : {"16", "32", "64"})
    for (const char* name : {"setp.eq.", "setp.ne."})
      table[std::string(name) + "b" + bits] = table[std::string(name) + "u" + bits];
  add_names(table, "selp", {"b16", "u16", "s16", "b32", "u32", "s32", "f32"}, select<uint32_t>);
  add_names(table, "selp", {"b64", "u64", "s64", "f64"}, select<uint64_t>);
}

}  // namespace ptx
