// Whole pages from the system. A large block gets huge ones, because fresh memory costs a page
// fault per page, about a microsecond each.
#pragma once

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace seqmem {

// Free `data` with std::free.
struct Pages {
  void* data;
  int64_t bytes;
};

// At least `bytes` of undefined content, aligned to a page. `purpose` ends the error message.
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
