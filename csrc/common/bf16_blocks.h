// Operands of the products in bf16, the same on tiles and on dot products: right ones lie in blocks
// that fit a tile (AMX), in which a line of 64 bytes holds a pair of k for 16 columns.
#pragma once

#include "kernel_util.h"

namespace seqmem {
namespace {

constexpr int kBlock = 16;          // units, columns or rows of a tile
constexpr int kDepth = 32;          // members of the sum that one tile product takes
constexpr int kPanel = 4 * kBlock;  // columns of a panel
constexpr int64_t kTile = kBlock * kDepth;
constexpr int64_t kMostRows = 32;  // that are multiplied by a panel at once

// Rows of a left operand that are multiplied together. On tiles they are one or two blocks of 16,
// which begin at `block`; on dot products one block of all.
struct RowGroup {
  int64_t first, count;
  int64_t block[2];
  bool two;
};

// A right operand in panels of 64 columns: wide [panel][k][4 blocks], else
// [panel][half][k][2 blocks].
struct Panels {
  bf16* data;
  int64_t depth;  // blocks of k
  bool wide;
  int halves = 2;  // 1: panels of 32 columns, not wide

  bf16* tile(int64_t panel, int64_t k, int column) const {
    if (wide) return data + ((panel * depth + k) * 4 + column) * kTile;
    return data + (((panel * 2 + column / 2) * depth + k) * 2 + column % 2) * kTile;
  }
};

// A term of a sum of products: rows of `left` times the first `blocks` blocks of a panel.
struct Term {
  const Panels& panels;
  int64_t panel;
  const bf16* left;
  int64_t stride, blocks;
  int64_t zeros = 0;  // pairs of k at the end that are zero, and need not be multiplied

  int64_t pairs() const { return blocks * kDepth / 2 - zeros; }
};

}  // namespace
}  // namespace seqmem
