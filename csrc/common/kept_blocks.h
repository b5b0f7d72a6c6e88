// Memory for large results, for what a forward leaves to its backward, and for gradients of
// weights: let go once a training step. The allocator gives such memory back to the system, and
// each step would fault it in anew, which can take longer than the arithmetic; blocks kept here are
// used again by the next step.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "operand.h"
#include "pages.h"

namespace seqmem {

class KeptBlocks {
 public:
  static constexpr int64_t kWorthKeeping = 256 << 10;

  // A contiguous tensor of undefined content, in a kept block if it has `least` bytes or more.
  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options,
                          int64_t least = kWorthKeeping) {
    const int64_t bytes = c10::multiply_integers(sizes) * int64_t(options.dtype().itemsize());
    if (bytes < least) return at::empty(sizes, options);
    const Pages block = pool().take(bytes);
    return at::for_blob(block.data, sizes)
        .deleter([block](void*) { pool().give(block); })
        .options(options)
        .allocator(c10::GetDefaultCPUAllocator())
        .resizeable_storage()  // a result may be resized by whoever gets it
        .make_tensor();
  }

  // For a result: the memory of smaller ones, the allocator itself keeps.
  static at::Tensor result(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return empty(sizes, options, 8 << 20);
  }

 private:
  // Free blocks are kept up to what was in use at once, which is what a training step takes.
  static constexpr int64_t kLeast = 64 << 20, kMost = 512 << 20;

  // Never destroyed: tensors may outlive whatever is.
  static KeptBlocks& pool() {
    static auto* const blocks = new KeptBlocks;
    return *blocks;
  }

  // The smallest free block that is large enough and not twice so.
  Pages take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto i = free_.begin(); i != free_.end(); ++i)
        if (i->bytes >= bytes && i->bytes / 2 <= bytes &&
            (best == free_.end() || i->bytes < best->bytes))
          best = i;
      if (best != free_.end()) {
        const Pages block = *best;
        free_.erase(best);
        kept_ -= block.bytes;
        lend(block);
        return block;
      }
    }
    const Pages block = take_pages(bytes, "");
    const std::lock_guard<std::mutex> lock(mutex_);
    lend(block);
    return block;
  }

  void lend(const Pages& block) {
    lent_ += block.bytes;
    most_ = std::clamp(lent_, most_, kMost);
  }

  // The oldest blocks make room.
  void give(const Pages& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    kept_ += block.bytes;
    lent_ -= block.bytes;
    while (kept_ > most_) {
      std::free(free_.front().data);
      kept_ -= free_.front().bytes;
      free_.erase(free_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Pages> free_;
  int64_t kept_ = 0, lent_ = 0, most_ = kLeast;  // bytes
};

// A result, on the CPU in a kept block if it is large.
template <class Int>
at::Tensor result_of(const at::TensorOptions& options, c10::ArrayRef<Int> sizes) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return KeptBlocks::result(sizes, options);
  } else {
    return empty_of<Int>(options, sizes);
  }
}
template <class Int>
at::Tensor result_of(const at::TensorOptions& options, std::initializer_list<Int> sizes) {
  return result_of<Int>(options, c10::ArrayRef<Int>(sizes));
}
// Of the sizes of another tensor.
template <class Int>
at::Tensor result_like(const at::Tensor& like, const at::TensorOptions& options) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return result_of<Int>(options, like.sizes());
  } else {
    return result_of<Int>(options, like.sym_sizes());
  }
}

// What lives for about a training step, on the CPU in a kept block; empty where it is not wanted.
template <class Int>
at::Tensor kept_of(bool wanted, const at::TensorOptions& options,
                   std::initializer_list<Int> sizes) {
  if (!wanted) return empty_of<Int>(options, {Int(0)});
  if constexpr (std::is_same_v<Int, int64_t>) {
    return KeptBlocks::empty(sizes, options);
  } else {
    return empty_of<Int>(options, sizes);
  }
}

}  // namespace seqmem
