// Tiles: eight registers of 16 rows of 64 bytes each, and the product of two tiles of bf16 added to
// one of float32 (Intel AMX). With SEQMEM_EMULATE_TILES the same operations on plain memory, so
// that the kernels run on any processor and sanitizers see what they read and write: to the bit
// what the hardware gives, subnormal numbers apart.
//
//   tiles 0-3   sums                     `rows` rows
//   tiles 4, 5  left operands, bf16      `rows` rows of 32 columns
//   tiles 6, 7  right operands, bf16     [16 pairs of rows][16 columns][2]
#pragma once

#include "vec_math.h"

namespace seqmem {
namespace {

#ifndef SEQMEM_EMULATE_TILES

// For sums and left operands of `rows` rows, 1 to 16. Until tiles_release() a thread's tiles are
// saved at every context switch.
SEQMEM_INLINE void tiles_configure(int rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
SEQMEM_INLINE void tiles_release() { asm volatile("tilerelease"); }

// Between ordinary stores and tile loads of the same memory: the compiler does not see the latter.
SEQMEM_INLINE void tiles_fence() { asm volatile("" ::: "memory"); }

template <int tile>
SEQMEM_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
SEQMEM_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(tile));
}
template <int tile>
SEQMEM_INLINE void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(tile) : "memory");
}
// sums += left * right
template <int sums, int left, int right>
SEQMEM_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
}

#else

thread_local uint32_t emulated_tiles[8][16][16];
thread_local int emulated_rows;

SEQMEM_INLINE void tiles_configure(int rows) { emulated_rows = rows; }
SEQMEM_INLINE void tiles_release() { emulated_rows = 0; }
SEQMEM_INLINE void tiles_fence() {}

template <int tile>
void tile_zero() {
  __builtin_memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
}
template <int tile>
void tile_load(const void* p, int64_t stride_bytes) {
  for (int row = 0; row < (tile < 6 ? emulated_rows : 16); ++row)
    __builtin_memcpy(emulated_tiles[tile][row], static_cast<const char*>(p) + row * stride_bytes,
                     64);
}
template <int tile>
void tile_store(void* p, int64_t stride_bytes) {
  for (int row = 0; row < (tile < 6 ? emulated_rows : 16); ++row)
    __builtin_memcpy(static_cast<char*>(p) + row * stride_bytes, emulated_tiles[tile][row], 64);
}
// As the instruction is defined: the pairs' first members are summed apart from the second ones.
template <int sums, int left, int right>
void tile_product() {
  constexpr int L = kLanes<float>;
  const auto* bits = emulated_tiles[right];
  for (int row = 0; row < emulated_rows; ++row)
    for (int column = 0; column < 16; column += L) {
      Vec<float> first{}, second{};
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t a = emulated_tiles[left][row][pair];
        UintVec b;
        __builtin_memcpy(&b, bits[pair] + column, sizeof b);
        first += (Vec<float>)(UintVec{} + (a << 16)) * (Vec<float>)(b << 16);
        second += (Vec<float>)(UintVec{} + (a & 0xffff0000u)) * (Vec<float>)(b & 0xffff0000u);
      }
      float* to = reinterpret_cast<float*>(emulated_tiles[sums][row] + column);
      store(to, load(to) + (first + second));
    }
}

#endif

}  // namespace
}  // namespace seqmem
