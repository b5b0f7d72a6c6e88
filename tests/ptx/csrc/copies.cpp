// cp.async: a lane copies a few bytes from global to shared memory while it goes on.
//
// A copy may be carried out at any time between its start and the wait for its group. So its place
// counts as written at both and nobody may read it between them, and the source is read as late as
// may be: a place used too early or still in use, and a source overwritten too early, all show.
#include <algorithm>
#include <cstring>

#include "memory.h"

namespace ptx {
namespace {

constexpr int kMostBytes = 16;

// Operands: where to, where from, and how many bytes to read; the others become 0.
void start(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [&](int lane) {
    const Copy copy = {.instruction = &i,
                       .lane = lane,
                       .to = w.lanes<uint32_t>(i, 0)[lane],
                       .from = w.any_width(i, 1, lane) + i.immediate,
                       .bytes_read = w.lanes<uint32_t>(i, 2)[lane],
                       .group = w.copy_groups};
    expect_bytes(w, i, lane, copy.to, i.bytes);
    w.copies.push_back(copy);
  });
}

void finish(Warp& w, const Copy& copy) {
  const Instruction& i = *copy.instruction;
  uint8_t bytes[kMostBytes] = {};
  // As many bytes as it says, in pieces that any address is aligned to.
  for (uint32_t at = 0; at < std::min<uint32_t>(copy.bytes_read, i.bytes); at += 4)
    if (!load_bytes(w, i, copy.lane, Space::Global, copy.from + at, 4, bytes + at))
      std::memset(bytes + at, 0xff, 4);
  store_bytes(w, i, copy.lane, Space::Shared, copy.to, i.bytes, bytes);
}

void commit(Warp& w, const Instruction&, Mask) { ++w.copy_groups; }

// For all groups but the last few.
void wait(Warp& w, const Instruction& i, Mask) {
  const auto waits = [&](const Copy& copy) { return copy.group + i.immediate < w.copy_groups; };
  for (const Copy& copy : w.copies)
    if (waits(copy)) finish(w, copy);
  std::erase_if(w.copies, waits);
}

}  // namespace

void add_copies(Operations& table) {
  table["cp.async"] = start;
  table["cp.async.commit"] = commit;
  table["cp.async.wait"] = wait;
}

}  // namespace ptx
