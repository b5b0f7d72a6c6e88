// What block-sparse attention's forward and backward share. The scores of a tile of queries of one
// query block lie in a line a row, block after block, each padded to whole vectors. As key blocks
// are in order and a bound cuts off the last keys, what a query sees is a beginning of its line.
#pragma once

#include "../common/dropout.h"
#include "../common/kernel_run.h"
#include "../common/normalizer_rows.h"
#include "block_sparse_attention_kernel.h"

namespace seqmem::block_sparse_attention {
namespace {

// The blocks of one query block, of one row and head.
struct Blocks {
  const int64_t* pairs;  // query block, key block
  int64_t first;         // the first one's place in the weights [B, Hq, N, ...]
  int64_t count;

  int64_t key(int64_t n) const { return pairs[2 * n + 1]; }
};

SEQMEM_INLINE int64_t list_of(const Shape& s, int64_t b, int64_t h) {
  return b * s.lists.row + h * s.lists.head;
}

SEQMEM_INLINE Blocks blocks_of(const Shape& s, int64_t b, int64_t h, int64_t query_block) {
  const int64_t list = list_of(s, b, h);
  const int64_t* rows = s.lists.rows + list * (s.nQ + 1) + query_block;
  return {s.lists.blocks + 2 * (list * s.N + rows[0]), (b * s.Hq + h) * s.N + rows[0],
          rows[1] - rows[0]};
}

// Query i of row b sees the keys before this one.
SEQMEM_INLINE int64_t end_of(const Shape& s, int64_t b, int64_t i) {
  const int64_t end = bound(s.end, b, i, s.Tk, s.Tk);
  return s.is_causal ? min(end, i + 1) : end;
}

// Keys of a key block.
SEQMEM_INLINE int64_t keys_of(const Shape& s, int64_t key_block) {
  return min(s.Bk, s.Tk - key_block * s.Bk);
}

// What queries first..first+rows-1 of row b see of a key block.
SEQMEM_INLINE void set_ranges(Ranges& t, const Shape& s, int64_t b, int64_t first, int64_t rows,
                              int64_t key_block) {
  t.rows = rows;
  t.columns = keys_of(s, key_block);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = end_of(s, b, first + r) - key_block * s.Bk;
    t.lo[r] = 0;
    t.hi[r] = max<int64_t>(min(end, t.columns), 0);
  }
}

// The length of query i's line.
template <class C>
int64_t line_of(const Shape& s, const Blocks& blocks, int64_t b, int64_t i) {
  const int64_t end = end_of(s, b, i);
  int64_t n = blocks.count;
  while (n > 0 && blocks.key(n - 1) * s.Bk >= end) --n;
  if (n == 0) return 0;
  const int64_t key_block = blocks.key(n - 1);
  return (n - 1) * padded<C>(min(s.Bk, s.Tk)) + min(end - key_block * s.Bk, keys_of(s, key_block));
}

// Queries of a tile whose lines are `columns` long: as many as `most`, but only so many that they
// fit `bytes` of a cache.
template <class C>
int64_t rows_of_tile(int64_t columns, int64_t most, int64_t bytes) {
  int64_t rows = most;
  while (rows > 8 && rows * columns * int64_t(sizeof(C)) > bytes) rows /= 2;
  return rows;
}

// Key blocks of a head, packed when a task meets them, and kept until another takes their slot.
class PackedBlocks {
  static constexpr int64_t kBytes = 4 << 20, kNone = -1;
  const int64_t nK_;
  int64_t* owner_;  // [slots]: the head and block that are there
  bool* exact_;     // [slots]: whether something in it is not finite

 public:
  const int64_t slots;

  PackedBlocks(const Shape& s, int64_t bytes_of_block)
      : nK_(s.nK), slots(max<int64_t>(min(s.nK, kBytes / max<int64_t>(bytes_of_block, 1)), 1)) {}

  void place(Carver& take) {
    owner_ = take.array<int64_t>(slots);
    exact_ = take.array<bool>(slots);
  }
  void forget() {
    for (int64_t n = 0; n < slots; ++n) owner_[n] = kNone;
  }

  struct Found {
    int64_t slot;
    bool exact;
  };
  // pack(slot) returns whether something is not finite.
  template <class Pack>
  SEQMEM_INLINE Found find(int64_t key_block, int64_t head, Pack&& pack) {
    const int64_t slot = key_block % slots, owner = head * nK_ + key_block;
    if (owner_[slot] != owner) {
      owner_[slot] = owner;
      exact_[slot] = pack(slot);
    }
    return {slot, exact_[slot]};
  }
};

// A task of query blocks: those of a part of a head of keys.
struct Task {
  int64_t row, head, begin, end;
};

SEQMEM_INLINE int64_t take_next(int64_t& next) {
  return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
}

// Number k of all tasks.
SEQMEM_INLINE Task task_of(const Shape& s, const Plan& plan, int64_t k) {
  const int64_t head = k / plan.groups, group = k % plan.groups;
  return {head / s.Hk, head % s.Hk, s.nQ * group / plan.groups, s.nQ * (group + 1) / plan.groups};
}

}  // namespace
}  // namespace seqmem::block_sparse_attention
