// What the NTM functionals' kernels share: how a call over memories [N, M] is shared out.
//
// Blocks are 256 threads in groups of neighbouring lanes. Two ways:
//   by slots    a group takes a slot, its lanes the slot's vectors; sums over M are shuffles
//   by columns  a group takes a slot, and the block a tile of the slot's vectors for all N slots;
//               sums over N are shuffles, then shared memory
// A vector is 16 bytes where slots are whole ones of these and pointers are aligned to them, else
// one element. Sums are taken in an order that depends on the sizes alone, so that a call gives the
// same bits every time.
//
// Floor: each memory and each gradient of one is read or written once (write's backward and
// addressing's backward read it twice, the second time from the L2 cache), so that B N M = 64 x 128
// x 20 float32 takes about 1 us where DRAM sets the speed. Below that the launch does, and 3 to 6
// us of host time a call.
#pragma once

#include "block.cuh"
#include "ntm_addressing_kernel.h"

namespace seqmem::cuda {
namespace {

constexpr int64_t kBlocksWanted = 264;  // twice the multiprocessors of an H100

struct Plan {
  int lanes;         // of a group that takes a slot
  int column_lanes;  // the same where the block takes a tile of columns
  int64_t tiles;     // of columns
  int64_t slot_blocks, column_blocks;
};

template <class T, int Width>
Plan plan(const Shape& s) {
  const int64_t vectors = s.M / Width;
  Plan p = {1};
  while (p.lanes < 32 && p.lanes < vectors) p.lanes *= 2;
  auto blocks = [&](int lanes) { return s.B * s.H * ((vectors + lanes - 1) / lanes); };
  p.column_lanes = p.lanes;
  // Narrower tiles make more blocks, down to the 32 bytes that are loaded at once.
  while (p.column_lanes > 1 && p.column_lanes * Width * int(sizeof(T)) > 32 &&
         blocks(p.column_lanes) < kBlocksWanted && kThreads / p.column_lanes < s.N)
    p.column_lanes /= 2;
  p.tiles = (vectors + p.column_lanes - 1) / p.column_lanes;
  p.slot_blocks = (s.B * s.N * p.lanes + kThreads - 1) / kThreads;
  p.column_blocks = s.B * s.H * p.tiles;
  return p;
}

// This group's slot of all B N.
struct Slot {
  int lane, lanes;
  int64_t b, n;
  bool inside;

  __device__ Slot(const Shape& s, int lanes) : lane(threadIdx.x % lanes), lanes(lanes) {
    const int64_t slot = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
    inside = slot < s.B * s.N;
    b = inside ? slot / s.N : 0;
    n = inside ? slot % s.N : 0;
  }
  __device__ int64_t memory(const Shape& s) const { return (b * s.N + n) * s.M; }
  __device__ int64_t of_head(const Shape& s, int64_t h) const { return (b * s.H + h) * s.N + n; }
};

// This thread's vector of a tile of columns, for one batch row and head.
struct Columns {
  int group, groups;
  int64_t b, h, m;  // m: the vector's first value
  bool inside;

  template <int Width>
  __device__ static Columns make(const Shape& s, const Plan& p, int64_t block) {
    Columns c;
    const int64_t head = block / p.tiles, tile = block % p.tiles;
    c.group = threadIdx.x / p.column_lanes;
    c.groups = kThreads / p.column_lanes;
    c.b = head / s.H;
    c.h = head % s.H;
    c.m = (tile * p.column_lanes + threadIdx.x % p.column_lanes) * Width;
    c.inside = c.m < s.M;
    return c;
  }
  __device__ int64_t memory(const Shape& s, int64_t n) const { return (b * s.N + n) * s.M + m; }
  __device__ bool writes() const { return group == 0 && inside; }
};

// Calls f with a value of the storage type and the width of vectors that the call allows.
template <class F>
cudaError_t with_vectors(Storage storage, const Shape& s,
                         std::initializer_list<const void*> pointers, const F& f) {
  return with_type(storage, [&](auto tag) {
    constexpr int kWidth = 16 / sizeof(tag);
    return s.M % kWidth == 0 && aligned(pointers) ? f(tag, Constant<kWidth>{})
                                                  : f(tag, Constant<1>{});
  });
}

}  // namespace
}  // namespace seqmem::cuda
