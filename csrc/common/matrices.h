// Arguments that are batches of matrices [..., rows, columns], whose leading dimensions broadcast,
// and the masks of such scores.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ne.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "check.h"
#include "kept_blocks.h"

namespace seqmem {

// The leading dimensions of all arguments, broadcast.
template <class Int>
class Leading {
 public:
  // Takes in those of an argument [..., rows, columns]; a mask may lack these two as well.
  void widen(const Check<Int>& check, const char* name, const at::Tensor& t) {
    const int64_t own = std::max<int64_t>(t.dim() - 2, 0);
    if (own > count()) sizes_.insert(sizes_.begin(), own - count(), Int(1));
    for (int64_t i = 0; i < own; ++i) {
      Int& here = sizes_[count() - own + i];
      const Int size = check.size(t, i);
      if (size == 1) continue;
      TORCH_CHECK_VALUE(here == 1 || here == size, check.op(), ": expected ", name,
                        " with leading dimensions that broadcast to ", sizes_, ", got shape ",
                        t.sym_sizes());
      here = size;
    }
  }

  // A result; a large one lies in memory that the next call finds again.
  at::Tensor empty(const at::Tensor& like, const Int& rows, const Int& columns) const {
    std::vector<Int> sizes(sizes_.begin(), sizes_.end());
    sizes.push_back(rows);
    sizes.push_back(columns);
    if constexpr (std::is_same_v<Int, int64_t>) {
      constexpr int64_t kLarge = 8 << 20;
      return KeptBlocks::empty(sizes, like.options(), kLarge);
    } else {
      return at::empty_symint(sizes, like.options());
    }
  }

  const c10::SmallVector<Int, 4>& sizes() const { return sizes_; }

  int64_t total() const {
    int64_t product = 1;
    for (const int64_t size : sizes_) product *= size;
    return product;
  }

  // Which matrix of a contiguous t serves each of the broadcast ones.
  std::vector<int64_t> matrices_of(const at::Tensor& t) const {
    std::vector<int64_t> found = {0};
    int64_t own = 1;  // matrices of t
    for (int64_t d = 0; d < t.dim() - 2; ++d) own *= t.size(d);
    for (int64_t d = 0; d < count(); ++d) {
      const int64_t place = t.dim() - 2 - count() + d;
      const int64_t size = place < 0 ? 1 : t.size(place);
      if (size > 0) own /= size;
      std::vector<int64_t> wider;
      wider.reserve(found.size() * sizes_[d]);
      for (const int64_t start : found)
        for (int64_t i = 0; i < sizes_[d]; ++i) wider.push_back(start + (size == 1 ? 0 : i * own));
      found = std::move(wider);
    }
    return found;
  }

 private:
  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }
  c10::SmallVector<Int, 4> sizes_;
};

template <class Int>
void check_matrices(const Check<Int>& check, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() >= 2, check.op(), ": expected ", name,
                    " with at least 2 dimensions, got ", t.dim(), " (shape ", t.sym_sizes(), ")");
}

// A mask of scores [..., rows, columns]: bool or integer, or of the scores' dtype and added.
template <class Int>
void check_mask(const Check<Int>& check, const at::Tensor& scores_like, const at::Tensor& mask,
                const Int& rows, const Int& columns) {
  check.strided("mask", mask);
  const auto type = mask.scalar_type();
  TORCH_CHECK_TYPE(c10::isIntegralType(type, true) || type == scores_like.scalar_type(), check.op(),
                   ": expected mask of dtype bool, an integer or ", scores_like.scalar_type(),
                   ", got ", type);
  check.same_device("mask", mask);
  auto fits = [&](int64_t from_end, const Int& wanted) {
    if (mask.dim() < from_end) return true;
    const Int size = check.size(mask, mask.dim() - from_end);
    return size == 1 || size == wanted;
  };
  TORCH_CHECK_VALUE(fits(1, columns) && fits(2, rows), check.op(),
                    ": expected mask that broadcasts to [..., ", rows, ", ", columns, "], got ",
                    mask.sym_sizes());
}

// A mask as kernels take it: bool or floating, contiguous, [..., rows or 1, columns].
inline at::Tensor usable_mask(at::Tensor mask, int64_t columns) {
  if (!mask.is_floating_point() && mask.scalar_type() != at::kBool) mask = mask.ne(0);
  while (mask.dim() < 2) mask = mask.unsqueeze(0);
  if (mask.size(-1) != columns) {
    auto sizes = mask.sizes().vec();
    sizes.back() = columns;
    mask = mask.expand(sizes);
  }
  return mask.contiguous();
}

}  // namespace seqmem
