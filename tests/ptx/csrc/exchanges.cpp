// What lanes of a warp tell each other through registers.
#include <algorithm>

#include "functions.h"
#include "grid.h"

namespace ptx {
namespace {

enum class Shuffle { Up, Down, Xor, Index };

// d = a of another lane; the third and fourth operands give it and the limits of a part of the
// warp; a fifth, if any, says whether it is within them. Otherwise a lane keeps its own.
template <Shuffle Kind>
void shuffle(Warp& w, const Instruction& i, Mask mask) {
  const auto *a = w.lanes<uint32_t>(i, 1), *b = w.lanes<uint32_t>(i, 2);
  const auto* c = w.lanes<uint32_t>(i, 3);
  uint32_t result[kLanes];
  Mask within = 0;
  each_lane(mask, [&](int lane) {
    const int part = c[lane] >> 8 & 31, by = b[lane] & 31;
    const int least = lane & part, most = least | (c[lane] & 31 & ~part);
    int from = lane;
    switch (Kind) {
      case Shuffle::Up: from = lane - by; break;
      case Shuffle::Down: from = lane + by; break;
      case Shuffle::Xor: from = lane ^ by; break;
      case Shuffle::Index: from = least | (by & ~part); break;
    }
    const bool inside = Kind == Shuffle::Up ? from >= most : from <= most;
    if (!inside) from = lane;
    within |= Mask(inside) << lane;
    if (!(mask >> from & 1))
      w.cta->group->launch->report(w, i, lane, Fault::ShuffleFromNobody, kShared, from);
    result[lane] = a[from];
  });
  copy_lanes(mask, w.lanes<uint32_t>(i, 0), result);
  if (i.operands > 4) {
    Mask& p = w.predicate(i, 4);
    p = (p & ~mask) | within;
  }
}

enum class Vote { All, Any, Uniform };

template <Vote Kind>
void vote(Warp& w, const Instruction& i, Mask mask) {
  const Mask yes = w.predicate(i, 1) & mask;
  bool result = yes == mask;
  if (Kind == Vote::Any) result = yes != 0;
  if (Kind == Vote::Uniform) result = yes == mask || yes == 0;
  Mask& d = w.predicate(i, 0);
  d = result ? d | mask : d & ~mask;
}

void ballot(Warp& w, const Instruction& i, Mask mask) {
  const Mask yes = w.predicate(i, 1) & mask;
  fill_lanes(mask, w.lanes<uint32_t>(i, 0), [=](int) { return yes; });
}

void active_mask(Warp& w, const Instruction& i, Mask mask) {
  fill_lanes(mask, w.lanes<uint32_t>(i, 0), [=](int) { return mask; });
}

// The first lane is elected; d tells which it is, the predicate is true there.
void elect(Warp& w, const Instruction& i, Mask mask) {
  const uint32_t first = std::countr_zero(mask);
  fill_lanes(mask, w.lanes<uint32_t>(i, 0), [=](int) { return first; });
  Mask& p = w.predicate(i, 1);
  p = (p & ~mask) | Mask(1) << first;
}

template <class F, class T>
void reduce(Warp& w, const Instruction& i, Mask mask) {
  const auto* a = w.lanes<T>(i, 1);
  T result = a[std::countr_zero(mask)];
  each_lane(mask & (mask - 1), [&](int lane) { result = F()(result, a[lane]); });
  fill_lanes(mask, w.lanes<T>(i, 0), [=](int) { return result; });
}

}  // namespace

void add_exchanges(Operations& table) {
  table["shfl.up.b32"] = shuffle<Shuffle::Up>;
  table["shfl.down.b32"] = shuffle<Shuffle::Down>;
  table["shfl.bfly.b32"] = shuffle<Shuffle::Xor>;
  table["shfl.idx.b32"] = shuffle<Shuffle::Index>;
  table["vote.all.pred"] = vote<Vote::All>;
  table["vote.any.pred"] = vote<Vote::Any>;
  table["vote.uni.pred"] = vote<Vote::Uniform>;
  table["vote.ballot.b32"] = ballot;
  table["activemask.b32"] = active_mask;
  table["elect"] = elect;
  add_names(table, "redux.add", {"u32", "s32"}, reduce<std::plus<>, uint32_t>);
  table["redux.and.b32"] = reduce<std::bit_and<>, uint32_t>;
  table["redux.or.b32"] = reduce<std::bit_or<>, uint32_t>;
  table["redux.xor.b32"] = reduce<std::bit_xor<>, uint32_t>;
  table["redux.min.u32"] = reduce<Least, uint32_t>;
  table["redux.min.s32"] = reduce<Least, int32_t>;
  table["redux.max.u32"] = reduce<Greatest, uint32_t>;
  table["redux.max.s32"] = reduce<Greatest, int32_t>;
}

}  // namespace ptx
