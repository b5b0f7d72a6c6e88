// A launch: its blocks and warps, in an order drawn at random among the legal ones.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "shadow.h"
#include "warp.h"

namespace ptx {

struct Program {
  int narrow = 0, wide = 0, predicates = 0;  // registers
  std::vector<Instruction> instructions;
  std::vector<int> operands;
  // Registers that hold a constant: by kind (narrow, wide, predicates), with its value.
  std::vector<std::pair<int, uint64_t>> constants[3];
  std::vector<std::pair<int, int>> special;  // register, Special
};

// Special registers, all of 32 bits, in the order that decode.py numbers them in.
enum class Special {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NwarpId,
  ClusterCtaRank,
  ClusterNctaRank,
  ClusterCtaidX,
  ClusterNctaidX,
  ClusterIdX,
  NclusterIdX,
  Envreg1,
  Envreg2,
  DynamicSharedBytes,
  TotalSharedBytes,
  LanemaskLt,
  LanemaskLe,
  LanemaskEq,
  LanemaskGe,
  LanemaskGt,
};

// Memory that accesses are checked against: an argument's, a module's variable, a block's shared.
struct Region {
  uint64_t base, bytes;
  uint8_t* data;
  int label;  // of a global region: what Python calls it
  Shadow shadow;
};

struct Options {
  int grid[3], block[3];
  int cluster;  // blocks in one, along x
  int shared_bytes, dynamic_shared_bytes;
  int local_bytes;  // a lane's
  int cooperative;  // all blocks are resident together
  uint64_t seed;
  uint64_t most_instructions;  // by all warps; more means that the kernel does not end
};

struct Barrier {
  int arrived = 0, expected = 0;  // threads
  Clock clock;                    // of all that arrived
};

struct MBarrier {
  int count = 0;      // arrivals of a phase
  int pending = 0;    // that are still to come
  int64_t bytes = 0;  // that are still to come
  uint64_t phase = 0;
  Clock arriving;  // of the phase that goes on
  Clock known[2];  // after a phase, by its parity
};

struct Group;

struct Cta {
  Group* group = nullptr;
  int rank = 0;  // in its cluster
  int place[3] = {};
  int first_warp = 0;  // index in the group
  int warps = 0, alive = 0;
  std::vector<uint8_t> memory;  // shared
  std::unique_ptr<Region> shared;
  Barrier barriers[16];
};

struct Cluster {
  Clock arrived[2];  // what is known after a phase, by its parity
};

class Launch;

// The blocks that are resident together: a cluster, or all of a cooperative grid.
struct Group {
  Launch* launch = nullptr;
  uint32_t first_warp = 0;  // its number in the launch
  std::vector<Warp> warps;
  std::vector<Cta> ctas;
  std::vector<Cluster> clusters;
};

constexpr int kShared = -1, kGridWorkspace = -2;  // labels of memory that Python has not given

struct Report {
  Fault fault;
  int instruction, other;  // of the other access, or -1
  int warp, other_warp;    // numbers in the launch
  int lane;
  int label;       // of the region, or kShared; where it is in none, of the nearest
  int64_t offset;  // in it
  int64_t count;
};

class Launch {
 public:
  Launch(const Program& program, const Options& options, std::vector<uint8_t> parameters);

  void add_region(uint64_t base, uint64_t bytes, int label, bool written);
  void run();

  Region* region_of(uint64_t address);
  Region* nearest_region(uint64_t address);
  void report(const Warp& w, const Instruction& i, int lane, Fault fault, int label, int64_t offset,
              const Access& other = {});

  const Program& program;
  const Options options;
  std::vector<uint8_t> parameters;
  std::vector<Report> reports;
  uint64_t instructions = 0;
  // What releases at an address have published.
  std::unordered_map<uint64_t, Clock> published;
  std::unordered_map<const uint8_t*, MBarrier> mbarriers;
  std::vector<Shadow::Found> found;  // of one access

 private:
  void start(Group& group, const std::vector<int>& clusters);
  void start(Warp& w, Cta& cta, int warp_of_cta);
  void run(Group& group);
  void run(Group& group, Warp& w, uint64_t most);
  Mask next_lanes(const Warp& w, int& pc) const;
  Mask participants(const Warp& w, const Instruction& i, Mask active) const;
  void advance(Warp& w, Mask lanes, int next);
  void branch(Warp& w, Mask active, Mask taken, int pc, int target);
  void exit_lanes(Group& group, Warp& w, Mask active, Mask leaving, int pc);
  void arrive(Group& group, Warp& w, const Instruction& i);
  void complete(Group& group, Cta& cta, int barrier);
  void arrive_at_cluster(Warp& w, const Instruction& i);
  bool release_clusters(Group& group);
  void finish(Group& group, Cta& cta);
  std::string where_all_wait(const Group& group) const;

  int threads_, warps_per_cta_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Region>> regions_;  // by address
  Region* last_region_ = nullptr;
  std::map<std::tuple<Fault, int, int, bool>, size_t> seen_;
  std::vector<uint8_t> grid_workspace_;
};

}  // namespace ptx
