// Whether kernels may run on tiles: these were compiled, the processor has them, the system saves
// them at context switches and grants them to this process.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "dispatch.h"

namespace seqmem {

// Linux grants tiles to a whole process, on request. It refuses while any thread has an alternate
// signal stack too small for them, and refuses such stacks afterwards: ask late, and once.
inline bool tiles_granted() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // xgetbv
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512_BF16
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // SSE and AVX (bits 1, 2), AVX-512 (5 to 7), the tiles' configuration and data (17, 18).
  constexpr unsigned needed = 0x600e6;
  if ((low & needed) != needed) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// ATEN_CPU_CAPABILITY that asks for lesser vectors than those beside the tiles turns these off too.
inline bool tiles_in_use() {
  static const bool in_use = &amx::tiles_build != nullptr &&
                             isa_in_use() == amx::tiles_build.vectors &&
                             (amx::tiles_build.emulated || tiles_granted());
  return in_use;
}

}  // namespace seqmem
