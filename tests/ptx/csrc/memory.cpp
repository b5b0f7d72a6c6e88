#include "memory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "functions.h"

namespace ptx {
namespace {

struct Place {
  Region* region = nullptr;  // null: local memory, which no other lane reaches
  uint64_t offset = 0;
  uint8_t* data = nullptr;  // null: there is no such memory
};

Launch& launch_of(const Warp& w) { return *w.cta->group->launch; }

// Shared memory of this block or of another of its cluster.
Place shared_place(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes) {
  Launch& launch = launch_of(w);
  const int rank = static_cast<int>(address >> kRankShift) - 1;
  const uint64_t offset = rank < 0 ? address : address & ((1 << kRankShift) - 1);
  if (rank >= launch.options.cluster || offset + bytes > uint64_t(launch.options.shared_bytes)) {
    launch.report(w, i, lane, Fault::OutOfBounds, kShared, static_cast<int64_t>(offset));
    return {};
  }
  Cta& cta = rank < 0 ? *w.cta : *(w.cta - w.cta->rank + rank);
  if (&cta != w.cta) {
    bool started = false;  // for certain: something that it did happened before now
    for (int k = 0; k < cta.warps; ++k) started |= w.clock.of(cta.first_warp + k) > 0;
    if (!started)
      launch.report(w, i, lane, Fault::NotStarted, kShared, static_cast<int64_t>(offset));
  }
  return {cta.shared.get(), offset, cta.memory.data() + offset};
}

Place global_place(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes) {
  Launch& launch = launch_of(w);
  Region* region = launch.region_of(address);
  if (region && address + bytes <= region->base + region->bytes)
    return {region, address - region->base, region->data + (address - region->base)};
  region = launch.nearest_region(address);
  launch.report(w, i, lane, Fault::OutOfBounds, region ? region->label : kShared,
                static_cast<int64_t>(address - (region ? region->base : 0)));
  return {};
}

Place local_place(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes) {
  Launch& launch = launch_of(w);
  const uint64_t each = launch.options.local_bytes;
  if (w.local.empty()) w.local.assign(each * kLanes, 0xff);
  if (address + bytes > each) {
    launch.report(w, i, lane, Fault::OutOfBounds, kShared, static_cast<int64_t>(address));
    return {};
  }
  return {nullptr, address, w.local.data() + lane * each + address};
}

Place place(Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int bytes) {
  if (space == Space::Generic) {
    space = Space::Global;
    if (address & kSharedWindow) space = Space::Shared;
    if (address & kLocalWindow) space = Space::Local;
    address &= ~(kSharedWindow | kLocalWindow);
  }
  if (address % bytes)
    launch_of(w).report(w, i, lane, Fault::Misaligned, kShared, static_cast<int64_t>(address));
  switch (space) {
    case Space::Shared: return shared_place(w, i, lane, static_cast<uint32_t>(address), bytes);
    case Space::Local: return local_place(w, i, lane, address, bytes);
    default: return global_place(w, i, lane, address, bytes);
  }
}

Access access(const Warp& w, const Instruction& i, int lane, bool atomic) {
  return {w.number, w.clock.of(w.index), i.number, static_cast<uint8_t>(lane), atomic};
}

void report_found(Warp& w, const Instruction& i, int lane, const Place& at) {
  Launch& launch = launch_of(w);
  for (const auto& [fault, other] : launch.found)
    launch.report(w, i, lane, fault, at.region->label, static_cast<int64_t>(at.offset), other);
}

void check_read(Warp& w, const Instruction& i, int lane, const Place& at, int bytes, bool atomic) {
  if (!at.region) return;
  launch_of(w).found.clear();
  at.region->shadow.read(w, at.offset, bytes, access(w, i, lane, atomic), launch_of(w).found);
  report_found(w, i, lane, at);
}

void check_write(Warp& w, const Instruction& i, int lane, const Place& at, int bytes,
                 const uint8_t* value, bool in_flight = false) {
  if (!at.region) return;
  launch_of(w).found.clear();
  Access now = access(w, i, lane, (i.flags & kAtomic) != 0);
  now.in_flight = in_flight;
  at.region->shadow.write(w, at.offset, bytes, now, at.data, value, launch_of(w).found);
  report_found(w, i, lane, at);
}

// A strong write makes known what its warp knew at its last fence, or knows now if it releases.
void publish(Warp& w, const Instruction& i, const Place& at, bool also_reads) {
  if (!(i.flags & kAtomic)) return;
  Clock& published = launch_of(w).published[reinterpret_cast<uint64_t>(at.data)];
  if (!also_reads) published.clear();
  if (i.flags & kRelease) {
    published.join(w.clock);
    w.clock.tick(w.index);
  } else if (!w.fenced.empty()) {
    published.join(w.fenced);
  }
}

// A strong read learns that now if it acquires, or at the next fence.
void observe(Warp& w, const Instruction& i, const Place& at) {
  if (!(i.flags & kAtomic)) return;
  const auto& published = launch_of(w).published;
  const auto found = published.find(reinterpret_cast<uint64_t>(at.data));
  ++w.polls;
  if (found == published.end()) return;
  (i.flags & kAcquire ? w.clock : w.observed).join(found->second);
}

// ---- instructions
// --------------------------------------------------------------------------------

uint64_t address(Warp& w, const Instruction& i, int operand, int lane) {
  return w.any_width(i, operand, lane) + i.immediate;
}

uint64_t element(const uint8_t* from, int bytes, bool with_sign) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, bytes);
  const int unused = 64 - 8 * bytes;
  return with_sign ? static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused) : bits;
}

// Registers, then the address.
void load(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [&](int lane) {
    uint8_t memory[64];
    if (!load_bytes(w, i, lane, Space(i.space), address(w, i, i.count, lane), i.bytes * i.count,
                    memory))
      std::memset(memory, 0xff, sizeof memory);
    for (int k = 0; k < i.count; ++k)
      w.set_any_width(i, k, lane, element(memory + k * i.bytes, i.bytes, i.flags & kSigned));
  });
}

// The address, then registers.
void store(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [&](int lane) {
    uint8_t memory[64];
    pack_elements(w, i, 1, lane, memory);
    store_bytes(w, i, lane, Space(i.space), address(w, i, 0, lane), i.bytes * i.count, memory);
  });
}

// Registers, then the address, which counts from the first parameter.
void load_parameter(Warp& w, const Instruction& i, Mask mask) {
  const auto& parameters = launch_of(w).parameters;
  each_lane(mask, [&](int lane) {
    for (int k = 0; k < i.count; ++k) {
      const size_t offset = address(w, i, i.count, lane) + k * i.bytes;
      if (offset + i.bytes > parameters.size()) throw std::runtime_error("no such parameter");
      w.set_any_width(i, k, lane, element(parameters.data() + offset, i.bytes, i.flags & kSigned));
    }
  });
}

struct Exchange {
  template <class T>
  T operator()(T, T x) const {
    return x;
  }
};
struct Increment {
  template <class T>
  T operator()(T old, T most) const {
    return old >= most ? 0 : old + 1;
  }
};
struct Decrement {
  template <class T>
  T operator()(T old, T most) const {
    return old == 0 || old > most ? most : old - 1;
  }
};
struct CompareAndSwap {
  template <class T>
  T operator()(T old, T expected, T x) const {
    return old == expected ? x : old;
  }
};

// d = what was there; operands: d, the address, one or two values.
template <class F, class T>
void atomic(Warp& w, const Instruction& i, Mask mask) {
  constexpr int bytes = size_of<T>;
  each_lane(mask, [&](int lane) {
    const Place at = place(w, i, lane, Space(i.space), address(w, i, 1, lane), bytes);
    if (!at.data) return;
    observe(w, i, at);
    check_read(w, i, lane, at, bytes, (i.flags & kAtomic) != 0);
    const uint64_t old = element(at.data, bytes, false);
    const auto value = [&](int k) { return read<T>(w.any_width(i, k, lane)); };
    uint64_t bits;
    if constexpr (std::is_invocable_v<F, Value<T>, Value<T>, Value<T>>)
      bits = written<T>(F()(read<T>(old), value(2), value(3)));
    else
      bits = written<T>(F()(read<T>(old), value(2)));
    check_write(w, i, lane, at, bytes, reinterpret_cast<const uint8_t*>(&bits));
    std::memcpy(at.data, &bits, bytes);
    publish(w, i, at, true);
    w.set_any_width(i, 0, lane, old);
  });
}

template <class T>
void add_bit_atomics(Operations& table, const std::string& bits) {
  table["atom.and.b" + bits] = atomic<std::bit_and<>, T>;
  table["atom.or.b" + bits] = atomic<std::bit_or<>, T>;
  table["atom.xor.b" + bits] = atomic<std::bit_xor<>, T>;
  table["atom.exch.b" + bits] = atomic<Exchange, T>;
  table["atom.cas.b" + bits] = atomic<CompareAndSwap, T>;
}

template <class T>
void add_integer_atomics(Operations& table, const std::string& type) {
  table["atom.add." + type] = atomic<std::plus<>, T>;
  table["atom.min." + type] = atomic<Least, T>;
  table["atom.max." + type] = atomic<Greatest, T>;
}

// Of one block it says nothing to the others.
void fence(Warp& w, const Instruction& i, Mask) {
  const bool of_block = i.immediate == 0;
  if (of_block && w.cta->group->ctas.size() > 1) return;
  w.clock.join(w.observed);
  w.observed.clear();
  w.fenced = w.clock;
  w.clock.tick(w.index);
}

// What the lanes did before happened before what they do next.
void sync_warp(Warp& w, const Instruction&, Mask) { w.clock.tick(w.index); }

// The address of the same place in another block of the cluster; generic if of 64 bits.
template <class T>
void map_address(Warp& w, const Instruction& i, Mask mask) {
  constexpr T offset = (T(1) << kRankShift) - 1;
  const T* a = w.lanes<T>(i, 1);
  const auto* rank = w.lanes<uint32_t>(i, 2);
  fill_lanes(mask, w.lanes<T>(i, 0), [=](int lane) {
    const T window = sizeof(T) == 8 ? static_cast<T>(kSharedWindow) : T(0);
    return window | (a[lane] & offset) | T(rank[lane] + 1) << kRankShift;
  });
}

void trap(Warp&, const Instruction& i, Mask) {
  throw std::runtime_error("trap at instruction " + std::to_string(i.number));
}

}  // namespace

bool load_bytes(Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int bytes,
                uint8_t* to) {
  const Place at = place(w, i, lane, space, address, bytes);
  if (!at.data) return false;
  observe(w, i, at);
  check_read(w, i, lane, at, bytes, (i.flags & kAtomic) != 0);
  std::memcpy(to, at.data, bytes);
  return true;
}

bool store_bytes(Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int bytes,
                 const uint8_t* from) {
  const Place at = place(w, i, lane, space, address, bytes);
  if (!at.data) return false;
  check_write(w, i, lane, at, bytes, from);
  publish(w, i, at, false);
  std::memcpy(at.data, from, bytes);
  return true;
}

void expect_bytes(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes) {
  const Place at = place(w, i, lane, Space::Shared, address, bytes);
  if (!at.data) return;
  check_write(w, i, lane, at, bytes, at.data, true);
  std::memset(at.data, 0xff, bytes);
}

uint8_t* atomic_access(Warp& w, const Instruction& i, int lane, Space space, uint64_t address,
                       int bytes) {
  const Place at = place(w, i, lane, space, address, bytes);
  if (!at.data) return nullptr;
  check_read(w, i, lane, at, bytes, true);
  return at.data;
}

void pack_elements(Warp& w, const Instruction& i, int first, int lane, uint8_t* to) {
  for (int k = 0; k < i.count; ++k) {
    const uint64_t bits = w.any_width(i, first + k, lane);
    std::memcpy(to + k * i.bytes, &bits, i.bytes);
  }
}

void add_memory_operations(Operations& table) {
  table["ld"] = load;
  table["st"] = store;
  table["ld.param"] = load_parameter;
  table["fence"] = fence;
  table["bar.warp.sync"] = sync_warp;
  table["mapa.u32"] = map_address<uint32_t>;
  table["mapa.u64"] = map_address<uint64_t>;
  table["trap"] = trap;
  add_integer_atomics<uint32_t>(table, "u32");
  add_integer_atomics<int32_t>(table, "s32");
  add_integer_atomics<uint64_t>(table, "u64");
  add_integer_atomics<int64_t>(table, "s64");
  add_bit_atomics<uint32_t>(table, "32");
  add_bit_atomics<uint64_t>(table, "64");
  table["atom.inc.u32"] = atomic<Increment, uint32_t>;
  table["atom.dec.u32"] = atomic<Decrement, uint32_t>;
  table["atom.cas.b16"] = atomic<CompareAndSwap, uint16_t>;
  table["atom.add.f32"] = atomic<std::plus<>, float>;
  table["atom.add.f64"] = atomic<std::plus<>, double>;
  table["atom.add.f16"] = atomic<std::plus<>, Half>;
  table["atom.add.bf16"] = atomic<std::plus<>, BFloat16>;
}

}  // namespace ptx
