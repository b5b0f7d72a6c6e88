// What is known about each piece of memory: who wrote it last, who has read it since, and whether
// that happened before an access that comes now.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "warp.h"

namespace ptx {

enum class Fault : uint8_t {
  ReadAfterWrite,  // races: two accesses, one of them a write, in no certain order
  WriteAfterWrite,
  WriteAfterRead,
  LanesDisagree,  // one instruction of one warp writes different values to one place
  OutOfBounds,
  Misaligned,
  ReadUnwritten,
  NeverWritten,   // an output, at the end
  NotStarted,     // shared memory of a block that may not run yet
  MayHaveExited,  // shared memory of a block that may have ended
  ShuffleFromNobody,
  ReadInFlight,  // what a copy that has not been waited for will write
};

struct Access {
  static constexpr uint32_t kNobody = ~0u, kHost = ~0u - 1;
  static constexpr uint8_t kManyLanes = 255;

  uint32_t warp = kNobody;
  uint32_t clock = 0;
  int instruction = -1;
  uint8_t lane = 0;
  bool atomic = false;
  bool in_flight = false;  // the start of a copy: its bytes come later

  bool exists() const { return warp != kNobody; }
};

// Memory is followed in pages, from their first access on, and within them in pieces of 4 bytes,
// until an access needs 2 or 1.
class Shadow {
 public:
  struct Found {
    Fault fault;
    Access other;
  };

  // `written`: by the host, before the launch.
  Shadow(uint64_t bytes, bool written);

  // An access of `bytes` bytes at an offset, and the faults it makes. `memory` is what the piece
  // holds, `value` what is to be written: a write that changes nothing harms nobody.
  void read(const Warp& w, uint64_t offset, int bytes, const Access& access,
            std::vector<Found>& found);
  void write(const Warp& w, uint64_t offset, int bytes, const Access& access, const uint8_t* memory,
             const uint8_t* value, std::vector<Found>& found);

  // The first piece that nobody has written, or -1.
  int64_t unwritten() const;
  // Accesses by warps outside [first, first + count) that did not happen before `clock`.
  void foreign(uint32_t first, int count, uint32_t base, const Clock& clock,
               std::vector<Found>& found) const;

 private:
  struct Cell {
    Access write, reader;
    int more = -1;  // further readers, in lists_
  };

  struct Page {
    int shift = 2;  // log2 of the size of a piece
    std::vector<Cell> cells;
  };
  static constexpr uint64_t kPage = 4096;

  // f(cell, offset, size) of each piece of an access.
  template <class F>
  void each_piece(uint64_t offset, int bytes, F f);
  Page& page_of(uint64_t offset);
  void refine(Page& page);
  void add_reader(const Warp& w, Cell& cell, const Access& access);
  void forget_readers(Cell& cell);

  uint64_t bytes_;
  bool written_;
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_number_ = ~uint64_t(0);
  Page* last_page_ = nullptr;
  std::vector<std::vector<Access>> lists_;
  std::vector<int> free_lists_;
};

}  // namespace ptx
