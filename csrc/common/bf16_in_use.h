// Which kernels serve bf16: on tiles (AMX) or on vectors of dot products (AVX512-BF16), if they
// were compiled and the processor has these; else those that compute in float32.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "dispatch.h"

namespace seqmem {

#if defined(__x86_64__)

// The processor's words on a leaf; zeros where it does not know it.
struct CpuId {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit CpuId(unsigned leaf, unsigned part = 0) {
    __get_cpuid_count(leaf, part, &a, &b, &c, &d);
  }
};
inline bool has_avx512_bf16() { return CpuId(7, 1).a >> 5 & 1; }

// The system saves tiles at context switches and grants them to this process. Linux grants them to
// a whole process, on request. It refuses while any thread has an alternate signal stack too small
// for them, and refuses such stacks afterwards: ask late, and once.
inline bool tiles_granted() {
  const bool xgetbv = CpuId(1).c >> 27 & 1;
  const unsigned features = CpuId(7).d;
  if (!xgetbv || !(features >> 22 & 1) || !(features >> 24 & 1)) return false;  // AMX-BF16, -TILE
  if (!has_avx512_bf16()) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // SSE and AVX (bits 1, 2), AVX-512 (5 to 7), the tiles' configuration and data (17, 18).
  constexpr unsigned needed = 0x600e6;
  if ((low & needed) != needed) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// AMD's processors multiply bf16 twice as fast as float32, Intel's half as fast (but for tiles).
inline bool dot_products_pay() {
  const CpuId vendor(0);
  const bool amd = vendor.b == 0x68747541 && vendor.d == 0x69746e65 && vendor.c == 0x444d4163;
  return amd && has_avx512_bf16();
}

#else

inline bool tiles_granted() { return false; }
inline bool dot_products_pay() { return false; }

#endif

enum class Bf16 { Float32, Tiles, DotProducts };

// ATEN_CPU_CAPABILITY that asks for lesser vectors than those beside them turns both off.
inline Bf16 bf16_in_use() {
  static const Bf16 in_use = [] {
    const auto serves = [](const Bf16Build* build, bool (*by_processor)()) {
      return build != nullptr && build->vectors == isa_in_use() &&
             (build->emulated || by_processor());
    };
    if (serves(&amx::bf16_build, tiles_granted)) return Bf16::Tiles;
    if (serves(&avx512_bf16::bf16_build, dot_products_pay)) return Bf16::DotProducts;
    return Bf16::Float32;
  }();
  return in_use;
}

}  // namespace seqmem

// The table of `kernel` that bf16_in_use() names, which is not Float32.
#define SEQMEM_CHOOSE_BF16(kernel) \
  (::seqmem::bf16_in_use() == ::seqmem::Bf16::Tiles ? amx::kernel : avx512_bf16::kernel)
