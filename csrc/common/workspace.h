// Scratch memory that a calling thread keeps between calls: fresh pages cost about a microsecond
// each, which for a short call is more than the arithmetic.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "pages.h"

namespace seqmem {

class Workspace {
 public:
  ~Workspace() { std::free(data_); }

  // At least `bytes`, aligned to a cache line, of undefined content. Valid until the next call
  // from the same thread.
  static char* get(int64_t bytes) {
    thread_local Workspace mine;
    return mine.reserve(bytes);
  }

 private:
  static constexpr int64_t kKept = 64 << 20;  // a larger block is let go at the next smaller call

  char* reserve(int64_t bytes) {
    if (bytes <= size_ && (size_ <= kKept || bytes > kKept)) return data_;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const Pages fresh = take_pages(bytes, " of workspace");
    data_ = static_cast<char*>(fresh.data);
    size_ = fresh.bytes;
    return data_;
  }

  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace seqmem
