// wgmma: four warps multiply matrices of which the right one, and perhaps the left one, is in
// shared memory. Warp k of the four computes rows 16 k to 16 k + 15, which no other warp takes part
// in.
//
// Products are asynchronous: they are computed as late as that may be, when their group is waited
// for, so that a result used too early and a factor overwritten too early both show.
#include <cstring>

#include "matrices.h"
#include "memory.h"

namespace ptx {
namespace {

constexpr uint8_t kLeftInRegisters = 1, kLeftTransposed = 2, kRightTransposed = 4;
constexpr int kRowBytes = 32;  // of the inner dimension that one instruction takes
constexpr int kChunk = 16;     // bytes that swizzling keeps together

// A matrix in shared memory as its descriptor says: rows (of the left factor, or columns of the
// right one) with the inner dimension contiguous, or the other way around where transposed.
struct Tile {
  uint32_t start, leading, stride, swizzle;  // bytes; swizzle: 0, 32, 64 or 128

  explicit Tile(uint64_t descriptor) {
    constexpr uint32_t widths[] = {0, 128, 64, 32};
    const auto field = [=](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    start = field(0);
    leading = field(16);
    stride = field(32);
    swizzle = widths[descriptor >> 62];
  }

  // Of the chunk that begins `byte` bytes into line `line`: what is not contiguous is in lines of
  // 8, at `stride`; bytes beyond the swizzle's width continue at `leading`.
  uint32_t address(uint32_t line, uint32_t byte) const {
    const uint32_t width = swizzle ? swizzle : kChunk;
    const uint32_t at =
        start + line / 8 * stride + line % 8 * width + byte / width * leading + byte % width;
    const uint32_t mask = swizzle ? swizzle / kChunk - 1 : 0;
    return at ^ ((at >> 7 & mask) << 4);
  }
};

// f(row, k, value) of all elements of `rows` rows from row `first` on.
template <class T, class F>
void each_element(Warp& w, const Instruction& i, const Tile& tile, bool transposed, int first,
                  int rows, F f) {
  constexpr int bytes = is_short_float<T> ? 2 : 4, inner = kRowBytes / bytes;
  const int lines = transposed ? inner : rows, length = (transposed ? rows : inner) * bytes;
  for (int line = 0; line < lines; ++line)
    for (int byte = 0; byte < length; byte += kChunk) {
      uint8_t chunk[kChunk];
      const uint32_t at =
          transposed ? tile.address(line, first * bytes + byte) : tile.address(first + line, byte);
      if (!load_bytes(w, i, line % kLanes, Space::Shared, at, kChunk, chunk))
        std::memset(chunk, 0xff, kChunk);
      for (int k = 0; k < kChunk / bytes; ++k) {
        uint32_t bits = 0;
        std::memcpy(&bits, chunk + k * bytes, bytes);
        const int place = byte / bytes + k;
        f(transposed ? place : line, transposed ? line : place, element<T>(bits, 0));
      }
    }
}

// d [16 of 64, N] = a b (+ d); `count` registers hold d, then come a, b and whether to add.
template <class T>
void compute(Warp& w, const Product& product) {
  constexpr int inner = is_short_float<T> ? 16 : 8, most = 256;
  const Instruction& i = *product.instruction;
  const int columns = 2 * i.count;
  float a[16][inner], b[inner][most];
  if (i.flags & kLeftInRegisters)
    left_factor<T, inner>(w, i, i.count, a);
  else
    each_element<T>(w, i, Tile(product.left), i.flags & kLeftTransposed,
                    (w.index - w.cta->first_warp) % 4 * 16, 16,
                    [&](int row, int k, float x) { a[row][k] = x; });
  each_element<T>(w, i, Tile(product.right), i.flags & kRightTransposed, 0, columns,
                  [&](int column, int k, float x) { b[k][column] = x; });
  for (int r = 0; r < i.count; ++r) {
    auto* d = w.lanes<float>(i, r);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + lane % 4 * 2 + r % 2;
      float sum = product.adds ? d[lane] : 0.0f;
      for (int k = 0; k < inner; ++k) sum += a[row][k] * b[k][column];
      d[lane] = sum;
    }
  }
}

template <class T>
void start(Warp& w, const Instruction& i, Mask) {
  const int left = i.count, right = left + (i.flags & kLeftInRegisters ? 4 : 1);
  w.products.push_back({.compute = compute<T>,
                        .instruction = &i,
                        .left = i.flags & kLeftInRegisters ? 0 : w.lanes<uint64_t>(i, left)[0],
                        .right = w.lanes<uint64_t>(i, right)[0],
                        .adds = (w.predicate(i, right + 1) & 1) != 0,
                        .group = w.product_groups});
}

void commit(Warp& w, const Instruction&, Mask) { ++w.product_groups; }

// For all groups but the last few.
void wait(Warp& w, const Instruction& i, Mask) {
  size_t done = 0;
  for (; done < w.products.size(); ++done) {
    const Product& product = w.products[done];
    if (product.group + i.immediate >= w.product_groups) break;
    product.compute(w, product);
  }
  w.products.erase(w.products.begin(), w.products.begin() + done);
}

}  // namespace

void add_group_products(Operations& table) {
  table["wgmma.f16"] = start<Half>;
  table["wgmma.bf16"] = start<BFloat16>;
  table["wgmma.tf32"] = start<TF32>;
  table["wgmma.commit"] = commit;
  table["wgmma.wait"] = wait;
}

}  // namespace ptx
