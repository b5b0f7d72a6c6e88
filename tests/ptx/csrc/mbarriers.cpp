// mbarriers: objects in shared memory that count arrivals and the bytes of asynchronous copies.
//
// An asynchronous store is done at once, on behalf of its warp: who waits for the barrier knows of
// it and of what the warp did before, and nobody else does.
#include <stdexcept>

#include "functions.h"
#include "memory.h"

namespace ptx {
namespace {

constexpr int kBytes = 8;

Launch& launch_of(const Warp& w) { return *w.cta->group->launch; }

// The barrier at an address of shared memory; a use of it counts as an atomic access.
MBarrier& barrier_at(Warp& w, const Instruction& i, int lane, uint64_t address) {
  const uint8_t* data = atomic_access(w, i, lane, Space::Shared, address, kBytes);
  auto& barriers = launch_of(w).mbarriers;
  const auto found = barriers.find(data);
  if (found == barriers.end())
    throw std::runtime_error("no mbarrier there, at instruction " + std::to_string(i.number));
  return found->second;
}

void complete(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.known[barrier.phase % 2].swap(barrier.arriving);
  barrier.arriving.clear();
  ++barrier.phase;
  barrier.pending = barrier.count;
}

void arrive(Warp& w, MBarrier& barrier, int arrivals, int64_t bytes) {
  barrier.arriving.join(w.clock);
  w.clock.tick(w.index);
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  complete(barrier);
}

// The address, the count.
void initialize(Warp& w, const Instruction& i, Mask mask) {
  const auto* count = w.lanes<uint32_t>(i, 1);
  each_lane(mask, [&](int lane) {
    const uint8_t zeros[kBytes] = {};
    const uint64_t address = w.any_width(i, 0, lane) + i.immediate;
    if (!store_bytes(w, i, lane, Space::Shared, address, kBytes, zeros)) return;
    const uint8_t* data = atomic_access(w, i, lane, Space::Shared, address, kBytes);
    launch_of(w).mbarriers[data] = {.count = int(count[lane]), .pending = int(count[lane])};
  });
}

// d, which names the phase; the address; how many arrivals; how many bytes are expected.
void arrive_and_expect(Warp& w, const Instruction& i, Mask mask) {
  const auto *arrivals = w.lanes<uint32_t>(i, 2), *bytes = w.lanes<uint32_t>(i, 3);
  each_lane(mask, [&](int lane) {
    const uint64_t address = w.any_width(i, 1, lane) + i.immediate;
    MBarrier& barrier = barrier_at(w, i, lane, address);
    w.lanes<uint64_t>(i, 0)[lane] = barrier.phase;
    arrive(w, barrier, int(arrivals[lane]), bytes[lane]);
  });
}

// p, the address, the phase's parity or what arriving gave. Who finds it unfinished lets others
// run.
template <bool Parity>
void test_wait(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [&](int lane) {
    const uint64_t address = w.any_width(i, 1, lane) + i.immediate;
    const MBarrier& barrier = barrier_at(w, i, lane, address);
    const uint64_t phase = w.any_width(i, 2, lane);
    const bool done = Parity ? barrier.phase % 2 != phase : barrier.phase > phase;
    if (done && i.flags & kAcquire) w.clock.join(barrier.known[(barrier.phase + 1) % 2]);
    if (!done) ++w.polls;
    Mask& p = w.predicate(i, 0);
    p = done ? p | Mask(1) << lane : p & ~(Mask(1) << lane);
  });
}

// The barrier's address, then as a store has it: the address, registers.
void store_async(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [&](int lane) {
    uint8_t memory[64];
    pack_elements(w, i, 2, lane, memory);
    const int bytes = i.bytes * i.count;
    const uint64_t address = w.any_width(i, 1, lane) + i.immediate;
    if (!store_bytes(w, i, lane, Space::Shared, address, bytes, memory)) return;
    arrive(w, barrier_at(w, i, lane, w.any_width(i, 0, lane)), 0, -bytes);
  });
}

}  // namespace

void add_mbarriers(Operations& table) {
  table["mbarrier.init"] = initialize;
  table["mbarrier.arrive"] = arrive_and_expect;
  table["mbarrier.wait"] = test_wait<false>;
  table["mbarrier.wait.parity"] = test_wait<true>;
  table["st.async"] = store_async;
}

}  // namespace ptx
