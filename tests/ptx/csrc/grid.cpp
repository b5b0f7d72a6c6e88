#include "grid.h"

#include <algorithm>
#include <stdexcept>

namespace ptx {
namespace {

uint32_t special_value(const Launch& launch, const Cta& cta, Special what, int lane, int warp) {
  const Options& o = launch.options;
  const int thread = warp * kLanes + lane, cluster = o.cluster;
  const Mask bit = Mask(1) << lane;
  switch (what) {
    case Special::TidX: return thread % o.block[0];
    case Special::TidY: return thread / o.block[0] % o.block[1];
    case Special::TidZ: return thread / o.block[0] / o.block[1];
    case Special::NtidX: return o.block[0];
    case Special::NtidY: return o.block[1];
    case Special::NtidZ: return o.block[2];
    case Special::CtaidX: return cta.place[0];
    case Special::CtaidY: return cta.place[1];
    case Special::CtaidZ: return cta.place[2];
    case Special::NctaidX: return o.grid[0];
    case Special::NctaidY: return o.grid[1];
    case Special::NctaidZ: return o.grid[2];
    case Special::LaneId: return lane;
    case Special::WarpId: return warp;
    case Special::NwarpId: return cta.warps;
    case Special::ClusterCtaRank:
    case Special::ClusterCtaidX: return cta.rank;
    case Special::ClusterNctaRank:
    case Special::ClusterNctaidX: return cluster;
    case Special::ClusterIdX: return cta.place[0] / cluster;
    case Special::NclusterIdX: return o.grid[0] / cluster;
    case Special::DynamicSharedBytes: return o.dynamic_shared_bytes;
    case Special::TotalSharedBytes: return o.shared_bytes;
    case Special::LanemaskLt: return bit - 1;
    case Special::LanemaskLe: return (bit - 1) | bit;
    case Special::LanemaskEq: return bit;
    case Special::LanemaskGe: return ~(bit - 1);
    case Special::LanemaskGt: return ~(bit - 1) & ~bit;
    case Special::Envreg1:
    case Special::Envreg2: break;  // by start()
  }
  return 0;
}

}  // namespace

Launch::Launch(const Program& program, const Options& options, std::vector<uint8_t> parameters)
    : program(program), options(options), parameters(std::move(parameters)), random_(options.seed) {
  threads_ = options.block[0] * options.block[1] * options.block[2];
  warps_per_cta_ = (threads_ + kLanes - 1) / kLanes;
  grid_workspace_.assign(64, 0);
  if (options.cooperative)
    add_region(reinterpret_cast<uint64_t>(grid_workspace_.data()), 64, kGridWorkspace, true);
}

void Launch::add_region(uint64_t base, uint64_t bytes, int label, bool written) {
  auto region = std::make_unique<Region>(
      Region{base, bytes, reinterpret_cast<uint8_t*>(base), label, Shadow(bytes, written)});
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), base,
                                      [](uint64_t at, const auto& r) { return at < r->base; });
  regions_.insert(after, std::move(region));
}

Region* Launch::region_of(uint64_t address) {
  if (last_region_ && address - last_region_->base < last_region_->bytes) return last_region_;
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                      [](uint64_t at, const auto& r) { return at < r->base; });
  if (after == regions_.begin()) return nullptr;
  Region* region = std::prev(after)->get();
  if (address - region->base >= region->bytes) return nullptr;
  return last_region_ = region;
}

Region* Launch::nearest_region(uint64_t address) {
  Region* nearest = nullptr;
  uint64_t least = ~uint64_t(0);
  for (const auto& region : regions_) {
    const uint64_t distance =
        address < region->base ? region->base - address : address - region->base - region->bytes;
    if (distance <= least) nearest = region.get(), least = distance;
  }
  return nearest;
}

void Launch::report(const Warp& w, const Instruction& i, int lane, Fault fault, int label,
                    int64_t offset, const Access& other) {
  const bool same_warp = other.warp == w.number;
  const auto [at, is_new] =
      seen_.try_emplace({fault, i.number, other.instruction, same_warp}, reports.size());
  if (is_new)
    reports.push_back({fault, i.number, other.instruction, int(w.number),
                       other.exists() ? int(other.warp) : -1, lane, label, offset, 0});
  ++reports[at->second].count;
}

// ---- blocks and warps start and end
// --------------------------------------------------------------

void Launch::run() {
  const int columns = options.grid[0] / options.cluster;
  std::vector<int> order(columns * options.grid[1] * options.grid[2]);
  for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<int>(k);
  if (!options.cooperative) std::shuffle(order.begin(), order.end(), random_);
  const size_t together = options.cooperative ? order.size() : 1;
  for (size_t k = 0; k < order.size(); k += together) {
    Group group;
    start(group, std::vector<int>(order.begin() + k, order.begin() + k + together));
    run(group);
  }
  for (const auto& region : regions_) {
    const int64_t offset = region->shadow.unwritten();
    if (offset >= 0)
      reports.push_back({Fault::NeverWritten, -1, -1, -1, -1, -1, region->label, offset, 1});
  }
}

void Launch::start(Group& group, const std::vector<int>& clusters) {
  const int size = options.cluster, columns = options.grid[0] / size;
  const int per_cluster = size * warps_per_cta_;
  group.launch = this;
  group.first_warp = clusters.front() * per_cluster;
  group.warps.resize(clusters.size() * per_cluster);
  group.ctas.resize(clusters.size() * size);
  group.clusters.resize(clusters.size());
  for (size_t k = 0; k < clusters.size(); ++k) {
    const int number = clusters[k];
    for (int rank = 0; rank < size; ++rank) {
      Cta& cta = group.ctas[k * size + rank];
      cta.group = &group;
      cta.rank = rank;
      cta.place[0] = number % columns * size + rank;
      cta.place[1] = number / columns % options.grid[1];
      cta.place[2] = number / columns / options.grid[1];
      cta.first_warp = (int(k) * size + rank) * warps_per_cta_;
      cta.warps = cta.alive = warps_per_cta_;
      cta.memory.assign(options.shared_bytes, 0xff);  // a NaN in every floating type
      cta.shared =
          std::make_unique<Region>(Region{0, uint64_t(options.shared_bytes), cta.memory.data(),
                                          kShared, Shadow(options.shared_bytes, false)});
      for (int warp = 0; warp < warps_per_cta_; ++warp)
        start(group.warps[cta.first_warp + warp], cta, warp);
    }
  }
}

void Launch::start(Warp& w, Cta& cta, int warp_of_cta) {
  w.cta = &cta;
  w.index = cta.first_warp + warp_of_cta;
  w.number = cta.group->first_warp + w.index;
  const int threads = std::min(kLanes, threads_ - warp_of_cta * kLanes);
  w.live = threads == kLanes ? kAllLanes : (Mask(1) << threads) - 1;
  w.clock.start(static_cast<int>(cta.group->warps.size()));
  w.clock.tick(w.index);
  Registers& r = w.registers;
  r.narrow.assign(program.narrow * kLanes, 0xffffffff);
  r.wide.assign(program.wide * kLanes, ~uint64_t(0));
  r.predicates.assign(program.predicates, 0xa5a5a5a5);
  const auto fill = [](auto* lanes, auto value) { std::fill(lanes, lanes + kLanes, value); };
  for (const auto& [number, value] : program.constants[0])
    fill(r.lanes<uint32_t>(number), static_cast<uint32_t>(value));
  for (const auto& [number, value] : program.constants[1]) fill(r.lanes<uint64_t>(number), value);
  for (const auto& [number, value] : program.constants[2])
    r.predicates[number] = static_cast<Mask>(value);
  const uint64_t workspace = reinterpret_cast<uint64_t>(grid_workspace_.data());
  for (const auto& [number, what] : program.special)
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t value = special_value(*this, cta, Special(what), lane, warp_of_cta);
      if (Special(what) == Special::Envreg1 && options.cooperative) value = workspace >> 32;
      if (Special(what) == Special::Envreg2 && options.cooperative) value = uint32_t(workspace);
      r.lanes<uint32_t>(number)[lane] = value;
    }
}

// At the end of a block nobody may still use its shared memory.
void Launch::finish(Group& group, Cta& cta) {
  if (options.cluster == 1) return;
  Clock end;
  end.start(static_cast<int>(group.warps.size()));
  for (int k = 0; k < cta.warps; ++k) end.join(group.warps[cta.first_warp + k].clock);
  found.clear();
  const uint32_t first = group.first_warp + cta.first_warp;
  cta.shared->shadow.foreign(first, cta.warps, group.first_warp, end, found);
  for (const auto& [fault, access] : found) {
    const Warp& other = group.warps[access.warp - group.first_warp];
    report(other, program.instructions[access.instruction], access.lane, fault, kShared, 0);
  }
}

// ---- the order of warps
// --------------------------------------------------------------------------

// Rounds in which every warp that can run does so once, in a new order, for a random while: mostly
// up to its next barrier, at times for a few instructions. That is fair, so waiting for a value
// that another warp will write comes to an end.
void Launch::run(Group& group) {
  mbarriers.clear();
  std::vector<int> order(group.warps.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<int>(k);
  while (true) {
    std::shuffle(order.begin(), order.end(), random_);
    bool moved = false, alive = false;
    for (const int k : order) {
      Warp& w = group.warps[k];
      alive |= w.state != State::Done;
      if (w.state != State::Ready) continue;
      moved = true;
      const uint64_t draw = random_();
      run(group, w, draw % 4 == 0 ? 1 + (draw >> 8) % 64 : 4000);
    }
    moved |= release_clusters(group);
    if (!alive) return;
    if (!moved) throw std::runtime_error("all warps wait: " + where_all_wait(group));
    if (instructions > options.most_instructions)
      throw std::runtime_error("does not end: " + std::to_string(instructions) + " instructions");
  }
}

void Launch::run(Group& group, Warp& w, uint64_t most) {
  constexpr int kPolls = 8;
  w.polls = 0;
  for (uint64_t count = 0; count < most && w.state == State::Ready && w.polls < kPolls; ++count) {
    int pc;
    const Mask active = next_lanes(w, pc);
    const Instruction& i = program.instructions[pc];
    Mask mask = active;
    if (i.guard >= 0) {
      const Mask guard = w.registers.predicates[i.guard];
      mask &= i.guard_negated ? ~guard : guard;
    }
    ++instructions;
    if (mask && mask != active && i.convergent && i.control != Control::Plain)
      throw std::runtime_error("a barrier that only some lanes reach, at instruction " +
                               std::to_string(pc));
    switch (i.control) {
      case Control::Plain:
        if (mask) i.run(w, i, mask);
        advance(w, active, pc + 1);
        break;
      case Control::Branch: branch(w, active, mask, pc, static_cast<int>(i.immediate)); break;
      case Control::Exit: exit_lanes(group, w, active, mask, pc); break;
      case Control::Barrier:
        advance(w, active, pc + 1);
        if (mask) arrive(group, w, i);
        break;
      case Control::ClusterArrive:
        if (mask) arrive_at_cluster(w, i);
        advance(w, active, pc + 1);
        break;
      case Control::ClusterWait:
        advance(w, active, pc + 1);
        if (mask) w.state = State::AtCluster;
        break;
    }
  }
}

// ---- lanes that diverge
// --------------------------------------------------------------------------

// The lanes that an instruction waits for.
Mask Launch::participants(const Warp& w, const Instruction& i, Mask active) const {
  if (i.members < 0) return w.live;
  const uint32_t* members = w.registers.narrow.data() + i.members * kLanes;
  return members[std::countr_zero(active)] & w.live;
}

// The lanes that go next: those furthest back, so that the others are met again, unless they are
// where they must wait for others.
Mask Launch::next_lanes(const Warp& w, int& pc) const {
  if (!w.diverged) {
    pc = w.pc;
    return w.live;
  }
  for (int after = -1;;) {
    pc = INT32_MAX;
    for (Mask rest = w.live; rest; rest &= rest - 1) {
      const int at = w.lane_pc[std::countr_zero(rest)];
      if (at > after && at < pc) pc = at;
    }
    if (pc == INT32_MAX)
      throw std::runtime_error("lanes of a warp wait for each other at instruction " +
                               std::to_string(after));
    Mask active = 0;
    for (Mask rest = w.live; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (w.lane_pc[lane] == pc) active |= Mask(1) << lane;
    }
    const Instruction& i = program.instructions[pc];
    if (!i.convergent) return active;
    const Mask wanted = participants(w, i, active);
    if ((active & wanted) == wanted) return active;
    after = pc;
  }
}

void Launch::advance(Warp& w, Mask lanes, int next) {
  if (!w.diverged) {
    w.pc = next;
    return;
  }
  each_lane(lanes, [&](int lane) { w.lane_pc[lane] = next; });
  if (lanes == w.live) {
    w.diverged = false;
    w.pc = next;
  }
}

void Launch::branch(Warp& w, Mask active, Mask taken, int pc, int target) {
  if (taken == active || taken == 0) {
    advance(w, active, taken ? target : pc + 1);
    return;
  }
  if (!w.diverged) std::fill(w.lane_pc, w.lane_pc + kLanes, pc);
  w.diverged = true;
  each_lane(taken, [&](int lane) { w.lane_pc[lane] = target; });
  each_lane(active & ~taken, [&](int lane) { w.lane_pc[lane] = pc + 1; });
}

void Launch::exit_lanes(Group& group, Warp& w, Mask active, Mask leaving, int pc) {
  advance(w, active, pc + 1);
  w.live &= ~leaving;
  if (w.live) return;
  w.state = State::Done;
  Cta& cta = *w.cta;
  if (--cta.alive == 0) finish(group, cta);
  for (int k = 0; k < 16; ++k) complete(group, cta, k);
}

// ---- barriers
// ------------------------------------------------------------------------------------

// The immediate says whether to wait there: bar.arrive does not.
void Launch::arrive(Group& group, Warp& w, const Instruction& i) {
  const int lane = std::countr_zero(w.live);
  const uint32_t number = w.lanes<uint32_t>(i, 0)[lane];
  if (number >= 16) throw std::runtime_error("barrier " + std::to_string(number));
  Barrier& barrier = w.cta->barriers[number];
  barrier.expected = i.operands > 1 ? int(w.lanes<uint32_t>(i, 1)[lane]) : 0;
  barrier.arrived += kLanes;
  barrier.clock.join(w.clock);
  w.clock.tick(w.index);
  if (i.immediate) {
    w.state = State::AtBarrier;
    w.barrier = static_cast<int>(number);
  }
  complete(group, *w.cta, static_cast<int>(number));
}

// Without a number of threads a barrier expects all that have not exited.
void Launch::complete(Group& group, Cta& cta, int number) {
  Barrier& barrier = cta.barriers[number];
  const int expected = barrier.expected ? barrier.expected : cta.alive * kLanes;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  for (int k = 0; k < cta.warps; ++k) {
    Warp& w = group.warps[cta.first_warp + k];
    if (w.state != State::AtBarrier || w.barrier != number) continue;
    w.clock.join(barrier.clock);
    w.state = State::Ready;
  }
  barrier.arrived = 0;
  barrier.clock.clear();
}

// The immediate says whether earlier writes are released.
void Launch::arrive_at_cluster(Warp& w, const Instruction& i) {
  Cluster& cluster = w.cta->group->clusters[w.index / (options.cluster * warps_per_cta_)];
  Clock& arrived = cluster.arrived[w.arrivals++ & 1];
  if (i.immediate) {
    arrived.join(w.clock);
    w.clock.tick(w.index);
  }
}

// Whoever waits may go on once all of the cluster have arrived as often as it has.
bool Launch::release_clusters(Group& group) {
  bool moved = false;
  const size_t size = group.warps.size() / group.clusters.size();
  for (size_t first = 0; first < group.warps.size(); first += size) {
    const Cluster& cluster = group.clusters[first / size];
    int least = INT32_MAX;
    for (size_t k = first; k < first + size; ++k)
      if (group.warps[k].state != State::Done) least = std::min(least, group.warps[k].arrivals);
    for (size_t k = first; k < first + size; ++k) {
      Warp& w = group.warps[k];
      if (w.state != State::AtCluster || w.arrivals > least) continue;
      w.clock.join(cluster.arrived[(w.arrivals - 1) & 1]);
      w.state = State::Ready;
      moved = true;
    }
  }
  return moved;
}

std::string Launch::where_all_wait(const Group& group) const {
  std::string text;
  for (const Warp& w : group.warps) {
    if (w.state == State::Done) continue;
    text +=
        "warp " + std::to_string(w.number) + " at instruction " + std::to_string(w.pc - 1) + "; ";
    if (text.size() > 300) break;
  }
  return text;
}

}  // namespace ptx
