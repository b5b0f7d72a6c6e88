// Integer and bit operations.
#include <algorithm>
#include <limits>

#include "functions.h"

namespace ptx {
namespace {

template <class T>
constexpr uint32_t bits_of = sizeof(T) * 8;

struct Multiply {  // short integers would be widened to int, which overflows
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(uint64_t{a} * b);
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return static_cast<T>(uint64_t{a} * b + c);
  }
};
template <class D>
struct MultiplyWide {
  template <class T>
  D operator()(T a, T b) const {
    return static_cast<D>(D(a) * D(b));
  }
  template <class T>
  D operator()(T a, T b, D c) const {
    using U = std::make_unsigned_t<D>;
    return static_cast<D>(static_cast<U>(D(a) * D(b)) + static_cast<U>(c));
  }
};
template <class D>
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>((D(a) * D(b)) >> bits_of<T>);
  }
};
template <class D>
struct MultiplyHighAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(MultiplyHigh<D>()(a, b)) + c);
  }
};
// What PTX leaves open, a division by zero, gives what GPUs give.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T(0));
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-uint64_t(a));
    return a / b;
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return a % b;
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(-uint64_t(a));
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Negate()(a) : a;
  }
};
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t by) const {
    return by >= bits_of<T> ? T(0) : static_cast<T>(uint64_t(a) << by);
  }
};
struct ShiftRight {  // arithmetic where T is signed
  template <class T>
  T operator()(T a, uint32_t by) const {
    if (by >= bits_of<T>) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T(0);
    return static_cast<T>(a >> by);
  }
};
struct CountBits {
  template <class T>
  uint32_t operator()(T a) const {
    return std::popcount(a);
  }
};
struct CountLeadingZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return std::countl_zero(a);
  }
};
struct ReverseBits {
  uint32_t operator()(uint32_t a) const {
    uint32_t d = 0;
    for (int k = 0; k < 32; ++k) d |= (a >> k & 1) << (31 - k);
    return d;
  }
};

// d = `count` bits of a from `first` on, extended by sign where T is signed.
template <class T>
void extract_bits(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<Stored<T>>(i, 0);
  const auto* a = w.lanes<Stored<T>>(i, 1);
  const auto *first = w.lanes<uint32_t>(i, 2), *count = w.lanes<uint32_t>(i, 3);
  fill_lanes(mask, d, [=](int lane) {
    const uint32_t bits = std::min(count[lane] & 255, bits_of<T>), at = first[lane] & 255;
    T x = ShiftRight()(read<T>(a[lane]), at);
    if (bits == 0) x = 0;
    if (bits > 0 && bits < bits_of<T>)
      x = static_cast<T>(uint64_t(x) << (bits_of<T> - bits)) >> (bits_of<T> - bits);
    return written<T>(x);
  });
}

// d = b with `count` bits of a put in at `first`.
template <class T>
void insert_bits(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<T>(i, 0);
  const T *a = w.lanes<T>(i, 1), *b = w.lanes<T>(i, 2);
  const auto *first = w.lanes<uint32_t>(i, 3), *count = w.lanes<uint32_t>(i, 4);
  fill_lanes(mask, d, [=](int lane) {
    const uint32_t bits = count[lane] & 255, at = first[lane] & 255;
    const T ones = bits >= bits_of<T> ? ~T(0) : (T(1) << bits) - 1;
    const T where = ShiftLeft()(ones, at);
    return (b[lane] & ~where) | (ShiftLeft()(a[lane], at) & where);
  });
}

// Four bytes chosen among the eight of b:a; bit 3 of a choice spreads the byte's sign instead.
void permute_bytes(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<uint32_t>(i, 0);
  const auto *a = w.lanes<uint32_t>(i, 1), *b = w.lanes<uint32_t>(i, 2);
  const auto* choice = w.lanes<uint32_t>(i, 3);
  fill_lanes(mask, d, [=](int lane) {
    const uint64_t both = uint64_t(b[lane]) << 32 | a[lane];
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t wanted = choice[lane] >> 4 * k;
      uint32_t byte = both >> 8 * (wanted & 7) & 255;
      if (wanted & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * k;
    }
    return result;
  });
}

// Any function of three bits, given as its truth table.
void logic3(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<uint32_t>(i, 0);
  const auto *a = w.lanes<uint32_t>(i, 1), *b = w.lanes<uint32_t>(i, 2);
  const auto *c = w.lanes<uint32_t>(i, 3), *truth = w.lanes<uint32_t>(i, 4);
  fill_lanes(mask, d, [=](int lane) {
    uint32_t result = 0;
    for (int k = 0; k < 8; ++k)
      if (truth[lane] >> k & 1)
        result |= (k & 4 ? a[lane] : ~a[lane]) & (k & 2 ? b[lane] : ~b[lane]) &
                  (k & 1 ? c[lane] : ~c[lane]);
    return result;
  });
}

// b:a shifted by c; the upper word of it to the left, the lower word to the right.
template <bool Left, bool Clamp>
void funnel_shift(Warp& w, const Instruction& i, Mask mask) {
  auto* d = w.lanes<uint32_t>(i, 0);
  const auto *a = w.lanes<uint32_t>(i, 1), *b = w.lanes<uint32_t>(i, 2);
  const auto* c = w.lanes<uint32_t>(i, 3);
  fill_lanes(mask, d, [=](int lane) {
    const uint32_t by = Clamp ? std::min(c[lane], 32u) : c[lane] & 31;
    const uint64_t both = uint64_t(b[lane]) << 32 | a[lane];
    return static_cast<uint32_t>(Left ? both << by >> 32 : both >> by);
  });
}

// Several short registers as one long one, and back. The parts' size is in `bytes`.
void pack(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t part = (uint64_t(1) << 8 * i.bytes) - 1;
  each_lane(mask, [&](int lane) {
    uint64_t whole = 0;
    for (int k = 1; k < i.operands; ++k)
      whole |= (w.any_width(i, k, lane) & part) << 8 * i.bytes * (k - 1);
    w.set_any_width(i, 0, lane, whole);
  });
}
void unpack(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t part = (uint64_t(1) << 8 * i.bytes) - 1;
  each_lane(mask, [&](int lane) {
    const uint64_t whole = w.any_width(i, i.operands - 1, lane);
    for (int k = 0; k < i.operands - 1; ++k)
      w.set_any_width(i, k, lane, whole >> 8 * i.bytes * k & part);
  });
}

// Predicates are masks: a bit operation computes all lanes.
template <class F>
void predicates(Warp& w, const Instruction& i, Mask mask) {
  const Mask a = w.predicate(i, 1);
  Mask& d = w.predicate(i, 0);
  Mask result;
  if constexpr (std::is_invocable_v<F, Mask>)
    result = F()(a);
  else
    result = F()(a, w.predicate(i, 2));
  d = (d & ~mask) | (result & mask);
}

template <class U, class S>
void add_width(Operations& table, const std::string& bits) {
  const std::string u = "u" + bits, s = "s" + bits, b = "b" + bits;
  const auto both = [&](const std::string& name, Operation f) {
    add_names(table, name, {u.c_str(), s.c_str(), b.c_str()}, f);
  };
  const auto each = [&](const std::string& name, Operation of_unsigned, Operation of_signed) {
    table[name + "." + u] = of_unsigned;
    table[name + "." + s] = of_signed;
  };
  both("add", binary<std::plus<>, U>);
  both("sub", binary<std::minus<>, U>);
  both("mul.lo", binary<Multiply, U>);
  both("mad.lo", ternary<MultiplyAdd, U>);
  both("and", binary<std::bit_and<>, U>);
  both("or", binary<std::bit_or<>, U>);
  both("xor", binary<std::bit_xor<>, U>);
  both("not", unary<std::bit_not<>, U>);
  both("neg", unary<Negate, U>);
  both("mov", unary<std::identity, U>);
  both("shl", shift<ShiftLeft, U>);
  table["shr." + b] = shift<ShiftRight, U>;
  table["abs." + s] = unary<Absolute, S>;
  each("shr", shift<ShiftRight, U>, shift<ShiftRight, S>);
  each("div", binary<Divide, U>, binary<Divide, S>);
  each("rem", binary<Remainder, U>, binary<Remainder, S>);
  each("min", binary<Least, U>, binary<Least, S>);
  each("max", binary<Greatest, U>, binary<Greatest, S>);
}

template <class U, class S>
void add_bit_fields(Operations& table, const std::string& bits) {
  table["bfe.u" + bits] = extract_bits<U>;
  table["bfe.s" + bits] = extract_bits<S>;
  table["bfi.b" + bits] = insert_bits<U>;
  table["popc.b" + bits] = unary<CountBits, U, uint32_t>;
  table["clz.b" + bits] = unary<CountLeadingZeros, U, uint32_t>;
}

template <class T, class D>
void add_wide_products(Operations& table, const std::string& type) {
  table["mul.wide." + type] = binary<MultiplyWide<D>, T, D>;
  table["mad.wide." + type] = ternary<MultiplyWide<D>, T, D>;
  table["mul.hi." + type] = binary<MultiplyHigh<D>, T>;
  table["mad.hi." + type] = ternary<MultiplyHighAdd<D>, T>;
}

}  // namespace

void add_integer_operations(Operations& table) {
  add_width<uint16_t, int16_t>(table, "16");
  add_width<uint32_t, int32_t>(table, "32");
  add_width<uint64_t, int64_t>(table, "64");
  add_bit_fields<uint32_t, int32_t>(table, "32");
  add_bit_fields<uint64_t, int64_t>(table, "64");
  add_wide_products<uint16_t, uint32_t>(table, "u16");
  add_wide_products<int16_t, int32_t>(table, "s16");
  add_wide_products<uint32_t, uint64_t>(table, "u32");
  add_wide_products<int32_t, int64_t>(table, "s32");
  table["mul.hi.u64"] = binary<MultiplyHigh<unsigned __int128>, uint64_t>;
  table["mul.hi.s64"] = binary<MultiplyHigh<__int128>, int64_t>;
  add_names(table, "mov", {"f32", "f16", "bf16"}, unary<std::identity, uint32_t>);
  table["mov.f64"] = unary<std::identity, uint64_t>;
  table["brev.b32"] = unary<ReverseBits, uint32_t>;
  table["prmt.b32"] = permute_bytes;
  table["lop3.b32"] = logic3;
  table["shf.l.wrap.b32"] = funnel_shift<true, false>;
  table["shf.r.wrap.b32"] = funnel_shift<false, false>;
  table["shf.l.clamp.b32"] = funnel_shift<true, true>;
  table["shf.r.clamp.b32"] = funnel_shift<false, true>;
  table["pack"] = pack;
  table["unpack"] = unpack;
  table["and.pred"] = predicates<std::bit_and<>>;
  table["or.pred"] = predicates<std::bit_or<>>;
  table["xor.pred"] = predicates<std::bit_xor<>>;
  table["not.pred"] = predicates<std::bit_not<>>;
  table["mov.pred"] = predicates<std::identity>;
}

}  // namespace ptx
