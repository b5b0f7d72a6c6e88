// A warp's registers, and the instructions that work on them.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "values.h"

namespace ptx {

class Warp;
struct Cta;
struct Instruction;

// One instruction for the lanes in the mask.
using Operation = void (*)(Warp&, const Instruction&, Mask);
using Operations = std::unordered_map<std::string, Operation>;

// What the scheduler must know; all else is Plain.
enum class Control : uint8_t { Plain, Branch, Exit, Barrier, ClusterArrive, ClusterWait };

struct Instruction {
  Operation run = nullptr;
  Control control = Control::Plain;
  bool convergent = false;  // waits for the other lanes: all, or those of `members`
  bool guard_negated = false;
  int guard = -1;    // a predicate, or none
  int members = -1;  // a register with the mask of lanes that take part, or none
  int number = 0;    // in the program
  const int* operand = nullptr;
  int operands = 0;
  uint32_t wide = 0;      // bit k: operand k is a register of 64 bits, where a type may have either
  int64_t immediate = 0;  // the offset of an address, a branch's target
  // Of memory operations: how many elements of how many bytes, and in which order they are seen.
  uint8_t bytes = 0, count = 1, space = 0, flags = 0;
};

// Registers by number, a value for each lane; predicates are masks. Floats are seen in place: the
// compiler is told that types alias.
struct Registers {
  std::vector<uint32_t> narrow;
  std::vector<uint64_t> wide;
  std::vector<Mask> predicates;

  template <class S>
  S* lanes(int number) {
    if constexpr (sizeof(S) == 8)
      return reinterpret_cast<S*>(wide.data() + number * kLanes);
    else
      return reinterpret_cast<S*>(narrow.data() + number * kLanes);
  }
};

// What a warp knows of the others: for each, the last of its clock's ticks that happened before
// now.
class Clock {
 public:
  void start(int warps) { ticks_.assign(warps, 0); }
  bool empty() const { return ticks_.empty(); }
  void swap(Clock& other) { ticks_.swap(other.ticks_); }
  void clear() { ticks_.clear(); }
  uint32_t of(int warp) const { return ticks_[warp]; }
  void tick(int warp) { ++ticks_[warp]; }
  void join(const Clock& other) {
    if (ticks_.size() < other.ticks_.size()) ticks_.resize(other.ticks_.size(), 0);
    for (size_t k = 0; k < other.ticks_.size(); ++k)
      if (ticks_[k] < other.ticks_[k]) ticks_[k] = other.ticks_[k];
  }

 private:
  std::vector<uint32_t> ticks_;
};

enum class State : uint8_t { Ready, AtBarrier, AtCluster, Done };

// A product of wgmma that has been asked for.
struct Product {
  void (*compute)(Warp&, const Product&);
  const Instruction* instruction;
  uint64_t left, right;  // descriptors
  bool adds;
  int64_t group;
};

// A copy of cp.async that has been asked for.
struct Copy {
  const Instruction* instruction;
  int lane;
  uint32_t to;
  uint64_t from;
  uint32_t bytes_read;
  int64_t group;
};

class Warp {
 public:
  Registers registers;
  Cta* cta = nullptr;
  int index = 0;        // among the warps that are resident together
  uint32_t number = 0;  // among all of the launch

  State state = State::Ready;
  int polls = 0;          // strong loads in this turn: after some it lets others run
  int barrier = 0;        // that it waits at
  int arrivals = 0;       // at the cluster's barrier
  Mask live = kAllLanes;  // lanes that have not exited
  bool diverged = false;
  int pc = 0;  // of all live lanes, unless they have diverged
  int lane_pc[kLanes] = {};

  std::vector<uint8_t> local;  // memory of each lane, made at its first use

  std::vector<Product> products;  // that have not been waited for
  int64_t product_groups = 0;
  std::vector<Copy> copies;  // likewise
  int64_t copy_groups = 0;

  Clock clock;     // the own entry is the present; accesses carry it
  Clock fenced;    // at the last fence: what later relaxed writes publish
  Clock observed;  // by relaxed reads: known from the next fence on

  template <class S>
  S* lanes(const Instruction& i, int operand) {
    return registers.lanes<S>(i.operand[operand]);
  }
  Mask& predicate(const Instruction& i, int operand) {
    return registers.predicates[i.operand[operand]];
  }
  // A register that an instruction allows to be of 32 or 64 bits.
  uint64_t any_width(const Instruction& i, int operand, int lane) {
    return i.wide >> operand & 1 ? lanes<uint64_t>(i, operand)[lane]
                                 : lanes<uint32_t>(i, operand)[lane];
  }
  void set_any_width(const Instruction& i, int operand, int lane, uint64_t bits) {
    if (i.wide >> operand & 1)
      lanes<uint64_t>(i, operand)[lane] = bits;
    else
      lanes<uint32_t>(i, operand)[lane] = static_cast<uint32_t>(bits);
  }
};

template <class F>
inline void each_lane(Mask mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

template <class S>
void copy_lanes(Mask mask, S* to, const S* from) {
  each_lane(mask, [=](int lane) { to[lane] = from[lane]; });
}

// d[lane] = f(lane) for the lanes of the mask; f is computed for all, and must not mind. Operands
// are the same register or separate, so that lanes do not depend on each other and the compiler may
// vectorize.
template <class S, class F>
inline void fill_lanes(Mask mask, S* d, F f) {
  S others[kLanes];
  S* to = mask == kAllLanes ? d : others;
#pragma GCC ivdep
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = f(lane);
  if (mask != kAllLanes) copy_lanes(mask, d, others);
}

void add_integer_operations(Operations& table);
void add_float_operations(Operations& table);
void add_comparisons(Operations& table);
void add_conversions(Operations& table);
void add_exchanges(Operations& table);
void add_matrix_operations(Operations& table);
void add_group_products(Operations& table);
void add_memory_operations(Operations& table);
void add_copies(Operations& table);
void add_mbarriers(Operations& table);

}  // namespace ptx
