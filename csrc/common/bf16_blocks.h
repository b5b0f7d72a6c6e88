// Sizes that kernels in bf16 share: right operands lie in blocks that fit a tile (AMX), in which a
// line of 64 bytes holds a pair of k for 16 columns.
#pragma once

#include "kernel_util.h"

namespace seqmem {
namespace {

constexpr int kBlock = 16;          // units, columns or rows of a tile
constexpr int kDepth = 32;          // members of the sum that one tile product takes
constexpr int kPanel = 4 * kBlock;  // columns of a panel
constexpr int64_t kTile = kBlock * kDepth;

}  // namespace
}  // namespace seqmem
