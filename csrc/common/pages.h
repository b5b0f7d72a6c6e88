// Whole pages from the system, huge ones for a large block: fresh memory costs a page fault for
// each, about a microsecond.
#pragma once

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace seqmem {

// To be given back by std::free.
struct Pages {
  void* at;
  int64_t bytes;
};

// At least `bytes`, aligned to a page, of undefined content; `purpose` is what the error names.
inline Pages take_pages(int64_t bytes, const char* purpose) {
  constexpr int64_t kPage = 4096, kHugePage = 2 << 20;
  const int64_t unit = bytes >= kHugePage ? kHugePage : kPage;
  const int64_t rounded = (bytes + unit - 1) / unit * unit;
  void* p = nullptr;
  const int failed = posix_memalign(&p, unit, rounded);
  TORCH_CHECK(failed == 0, "seqmem: out of memory for ", rounded, " bytes", purpose);
#ifdef MADV_HUGEPAGE
  if (unit == kHugePage) madvise(p, rounded, MADV_HUGEPAGE);
#endif
  return {p, rounded};
}

}  // namespace seqmem
