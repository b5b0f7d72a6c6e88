// Fresh memory costs a page fault for each 4 KiB, which for large results is more than the
// arithmetic; huge pages cost one for each 2 MiB.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/mman.h>

#include <cstdint>

namespace seqmem {

inline void ask_for_huge_pages([[maybe_unused]] const at::Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr uintptr_t kWorthAsking = 8 << 20;
  const uintptr_t bytes = fresh.numel() * fresh.element_size();
  if (bytes < kWorthAsking) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace seqmem
