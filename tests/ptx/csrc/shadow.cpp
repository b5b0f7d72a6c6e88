#include "shadow.h"

#include <algorithm>
#include <cstring>

#include "grid.h"

namespace ptx {
namespace {

// Whether an earlier access happened before what warp w does now in the access's lane.
bool ordered(const Warp& w, const Access& earlier, const Access& now) {
  if (!earlier.exists() || earlier.warp == Access::kHost) return true;
  const int64_t index = int64_t(earlier.warp) - w.cta->group->first_warp;
  if (index < 0 || index >= int64_t(w.cta->group->warps.size())) return false;
  if (index == w.index && earlier.lane == now.lane) return true;
  if (index == w.index) return earlier.clock < w.clock.of(w.index);
  return earlier.clock <= w.clock.of(index);
}

}  // namespace

Shadow::Shadow(uint64_t bytes, bool written) : bytes_(bytes), written_(written) {}

Shadow::Page& Shadow::page_of(uint64_t offset) {
  const uint64_t number = offset / kPage;
  if (number == last_number_) return *last_page_;
  const auto [at, is_new] = pages_.try_emplace(number);
  if (is_new) {
    at->second.cells.resize(kPage >> at->second.shift);
    if (written_)
      for (Cell& cell : at->second.cells) cell.write.warp = Access::kHost;
  }
  last_number_ = number;
  return *(last_page_ = &at->second);
}

// Both halves of a piece have its history.
void Shadow::refine(Page& page) {
  std::vector<Cell> halves;
  halves.reserve(page.cells.size() * 2);
  for (const Cell& cell : page.cells) {
    halves.push_back(cell);
    halves.push_back(cell);
    if (cell.more < 0) continue;
    halves.back().more = static_cast<int>(lists_.size());
    lists_.push_back(std::vector<Access>(lists_[cell.more]));
  }
  page.cells = std::move(halves);
  --page.shift;
}

template <class F>
void Shadow::each_piece(uint64_t offset, int bytes, F f) {
  for (const uint64_t end = offset + bytes; offset < end;) {
    Page& page = page_of(offset);
    const uint64_t stop = std::min(end, (offset / kPage + 1) * kPage);
    while ((offset | stop) & ((1 << page.shift) - 1)) refine(page);
    const int size = 1 << page.shift;
    for (; offset < stop; offset += size) f(page.cells[offset % kPage >> page.shift], offset, size);
  }
}

void Shadow::read(const Warp& w, uint64_t offset, int bytes, const Access& access,
                  std::vector<Found>& found) {
  each_piece(offset, bytes, [&](Cell& cell, uint64_t, int) {
    if (!cell.write.exists())
      found.push_back({Fault::ReadUnwritten, {}});
    else if (!ordered(w, cell.write, access) && !(cell.write.atomic && access.atomic))
      found.push_back({Fault::ReadAfterWrite, cell.write});
    else if (cell.write.in_flight)
      found.push_back({Fault::ReadInFlight, cell.write});
    add_reader(w, cell, access);
  });
}

void Shadow::write(const Warp& w, uint64_t offset, int bytes, const Access& access,
                   const uint8_t* memory, const uint8_t* value, std::vector<Found>& found) {
  each_piece(offset, bytes, [&](Cell& cell, uint64_t at, int size) {
    const bool changes = !cell.write.exists() || access.in_flight || cell.write.in_flight ||
                         std::memcmp(memory + (at - offset), value + (at - offset), size) != 0;
    const bool after_write = ordered(w, cell.write, access);
    if (changes) {
      const bool together = cell.write.warp == access.warp && cell.write.clock == access.clock &&
                            cell.write.instruction == access.instruction;
      if (!after_write && !(cell.write.atomic && access.atomic))
        found.push_back({together ? Fault::LanesDisagree : Fault::WriteAfterWrite, cell.write});
      const auto check = [&](const Access& reader) {
        if (!ordered(w, reader, access) && !(reader.atomic && access.atomic))
          found.push_back({Fault::WriteAfterRead, reader});
      };
      check(cell.reader);
      if (cell.more >= 0)
        for (const Access& reader : lists_[cell.more]) check(reader);
      forget_readers(cell);
    }
    if (changes || after_write) cell.write = access;
  });
}

// One entry for each warp, the latest. An entry that happened before now says nothing that the new
// one does not say.
void Shadow::add_reader(const Warp& w, Cell& cell, const Access& access) {
  const auto takes_over = [&](Access& earlier) {
    const bool same_warp = earlier.warp == access.warp;
    if (!same_warp && !ordered(w, earlier, access)) return false;
    const bool together = same_warp && earlier.clock == access.clock;
    const bool atomic = access.atomic && (!together || earlier.atomic);
    const uint8_t lane = together && earlier.lane != access.lane ? Access::kManyLanes : access.lane;
    earlier = access;
    earlier.lane = lane;
    earlier.atomic = atomic;
    return true;
  };
  if (takes_over(cell.reader)) return;
  if (cell.more < 0) {
    if (free_lists_.empty()) {
      free_lists_.push_back(static_cast<int>(lists_.size()));
      lists_.emplace_back();
    }
    cell.more = free_lists_.back();
    free_lists_.pop_back();
  }
  for (Access& earlier : lists_[cell.more])
    if (takes_over(earlier)) return;
  lists_[cell.more].push_back(access);
}

void Shadow::forget_readers(Cell& cell) {
  cell.reader = {};
  if (cell.more < 0) return;
  lists_[cell.more].clear();
  free_lists_.push_back(cell.more);
  cell.more = -1;
}

int64_t Shadow::unwritten() const {
  if (written_) return -1;
  for (uint64_t offset = 0; offset < bytes_;) {
    const auto found = pages_.find(offset / kPage);
    if (found == pages_.end()) return static_cast<int64_t>(offset);
    const Page& page = found->second;
    if (!page.cells[offset % kPage >> page.shift].write.exists())
      return static_cast<int64_t>(offset);
    offset += uint64_t(1) << page.shift;
  }
  return -1;
}

void Shadow::foreign(uint32_t first, int count, uint32_t base, const Clock& clock,
                     std::vector<Found>& found) const {
  const auto check = [&](const Access& access) {
    if (!access.exists() || (access.warp >= first && access.warp < first + count)) return;
    if (access.clock > clock.of(access.warp - base))
      found.push_back({Fault::MayHaveExited, access});
  };
  for (const auto& [number, page] : pages_)
    for (const Cell& cell : page.cells) {
      check(cell.write);
      check(cell.reader);
      if (cell.more >= 0)
        for (const Access& reader : lists_[cell.more]) check(reader);
    }
}

}  // namespace ptx
