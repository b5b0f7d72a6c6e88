// Reading and writing memory as a lane does, with all checks.
#pragma once

#include "grid.h"

namespace ptx {

// In the order that decode.py numbers them in.
enum class Space : uint8_t { Global, Shared, Local, Generic };

// How an access takes part in synchronisation: bits of an instruction's flags.
constexpr uint8_t kSigned = 1, kAtomic = 2, kAcquire = 4, kRelease = 8;

// Generic addresses. A block's own shared memory starts at 0 there, that of the cluster's block of
// rank r at (r + 1) << kRankShift.
constexpr uint64_t kSharedWindow = uint64_t(1) << 56, kLocalWindow = uint64_t(1) << 57;
constexpr int kRankShift = 24;

// False where there is no such memory; it has been reported then.
bool load_bytes(Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int bytes,
                uint8_t* to);
bool store_bytes(Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int bytes,
                 const uint8_t* from);

// A lane's shared memory that a copy will write. Until then it holds NaNs, and to read it is a
// fault.
void expect_bytes(Warp& w, const Instruction& i, int lane, uint64_t address, int bytes);

// For an operation that reads and writes at once; null where there is no such memory.
uint8_t* atomic_access(Warp& w, const Instruction& i, int lane, Space space, uint64_t address,
                       int bytes);

// The elements of a store, in registers from operand `first` on, as memory has them.
void pack_elements(Warp& w, const Instruction& i, int first, int lane, uint8_t* to);

}  // namespace ptx
