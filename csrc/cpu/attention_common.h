// What attention's forward and backward kernels share: products with packed operands, masks.
#pragma once

#include "../common/kernel_run.h"
#include "../common/lanes.h"
#include "../common/packed.h"
#include "attention_kernel.h"

namespace seqmem::attention {
namespace {

constexpr int64_t kMaxRows = 96;  // of a block
constexpr int64_t kChunk = 128;   // keys whose values stay in the L1 cache

// Query rows of a block: as many as `most`, but only so many that their score rows, `arrays` of
// them for each query, fit `bytes` of the L2 cache.
template <class C>
SEQMEM_INLINE int64_t block_rows(int64_t Tq, int64_t Tk, int arrays, int64_t bytes, int64_t most) {
  const int64_t R = kTileRows<C>;
  const int64_t fit = bytes / (score_stride<C>(Tk) * int64_t(sizeof(C)) * arrays) / R * R;
  return min(max(min(fit, most), R), Tq);
}

// out[r][j] = a[r] . row j of a matrix that pack_lanes has packed, for `rows` rows of a and the
// first n of its total_rows rows.
template <class C>
void multiply_packed_lanes(int64_t rows, int64_t n, int64_t width, const C* a, int64_t a_stride,
                           const C* panels, int64_t total_rows, C* out, int64_t out_stride) {
  constexpr int L = kLanes<C>;
  for_panels(0, ceil_div(n, L), [&](auto vectors, int64_t v) {
    constexpr int V = decltype(vectors)::value;
    const int64_t first = v * L, step = L * min<int64_t>(4, ceil_div(total_rows - first, L));
    for_row_blocks<C>(rows, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      const C* from[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) from[r] = a + (start + r) * a_stride;
      tile_multiply_into<R, V, C>(false, width, from, 1, panels + first * width, L, step,
                                  out + start * out_stride + first, out_stride);
    });
  });
}

// out[r] = sum_k a[r][k] b[k], k = 0..K-1, for `rows` rows and a padded width, where b are the
// first of the total_rows rows that pack_columns has packed. K goes in chunks, so that a chunk of a
// panel of b stays in the L1 cache while all rows of a use it.
template <class C>
void multiply_packed_columns(int64_t rows, int64_t K, int64_t width, const C* a, int64_t a_stride,
                             const C* panels, int64_t total_rows, C* out, int64_t out_stride) {
  constexpr int L = kLanes<C>;
  for (int64_t k = 0; k < K; k += kChunk) {
    const int64_t n = min(kChunk, K - k);
    for_panels(0, width / L, [&](auto vectors, int64_t v) {
      constexpr int V = decltype(vectors)::value;
      const C* panel = panels + v * L * total_rows + k * V * L;
      for_row_blocks<C>(rows, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const C* from[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) from[r] = a + (start + r) * a_stride + k;
        tile_multiply_into<R, V, C>(k > 0, n, from, 1, panel, L, V * L,
                                    out + start * out_stride + v * L, out_stride);
      });
    });
  }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Shorts __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));

// Lanes of -1 where the first n bytes of a mask are not zero, else 0. Where `preceded`, as many
// bytes as the vector has lanes may be read before p. Widened in two steps, for GCC splits a
// conversion to four times the width into one for each element.
template <class C>
SEQMEM_INLINE IntVec<C> allowed_lanes(const uint8_t* p, int n, bool preceded = false) {
  Bytes bytes = {};
  if (n < kLanes<C>) {
    if (kLanes<C> == 8 && preceded) {
      uint64_t few;
      __builtin_memcpy(&few, p + n - 8, 8);
      bytes = (Bytes)Longs{few >> (8 * (8 - n)), 0};
    } else {
      for (int i = 0; i < n; ++i) bytes[i] = p[i];
    }
  } else if constexpr (kLanes<C> == 16) {
    __builtin_memcpy(&bytes, p, sizeof bytes);
  } else {  // by way of a register: a vector that was stored in parts is slow to load
    uint64_t few = 0;
    __builtin_memcpy(&few, p, kLanes<C>);
    bytes = (Bytes)Longs{few, 0};
  }
  if constexpr (std::is_same_v<C, double>) {
    IntVec<double> lanes;
    for (int i = 0; i < kLanes<double>; ++i) lanes[i] = bytes[i];
    return lanes != 0;
  } else {
#if SEQMEM_VEC_BYTES == 64
    return (IntVec<float>)__builtin_convertvector(__builtin_convertvector(bytes, HalfVec),
                                                  UintVec) != 0;
#else
    const Shorts shorts = (Shorts)shuffle(bytes, Bytes{}, [](int i) { return i / 2 + i % 2 * 16; });
#if SEQMEM_VEC_BYTES == 32
    return (IntVec<float>)__builtin_convertvector(shorts, UintVec) != 0;
#else
    return (IntVec<float>)shuffle(shorts, Shorts{}, [](int i) { return i / 2 + i % 2 * 8; }) != 0;
#endif
#endif
  }
}

// The mask rows of a block of queries, each Tk contiguous elements of bytes or C.
template <class C>
struct MaskRows {
  const uint8_t* allowed[kMaxRows];
  const C* added[kMaxRows];
};

// Rows that repeat one element (columns is 0), or that are stored in 16 bits, are written out to
// `buffer`, [rows][stride] of C.
template <class S, class C = compute_t<S>>
void mask_rows(MaskRows<C>& out, const Matrices& mask, MaskKind kind, int64_t n, int64_t i,
               int64_t rows, int64_t keys, C* buffer, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = mask.offset[n] + (i + r) * mask.rows;
    if (kind == MaskKind::Allowed) {
      out.allowed[r] = static_cast<const uint8_t*>(mask.data) + offset;
      if (mask.columns == 0) {
        uint8_t* row = reinterpret_cast<uint8_t*>(buffer + r * stride);
        __builtin_memset(row, *out.allowed[r], keys);
        out.allowed[r] = row;
      }
    } else {
      const S* from = static_cast<const S*>(mask.data) + offset;
      if constexpr (std::is_same_v<S, C>) {
        if (mask.columns == 1) {
          out.added[r] = from;
          continue;
        }
      }
      copy_row<S>(buffer + r * stride, from, mask.columns, keys, C(1));
      out.added[r] = buffer + r * stride;
    }
  }
}

// Whether mask_rows needs its buffer.
template <class S>
SEQMEM_INLINE bool copies_mask(const Shape& s, const Matrices& mask) {
  if (s.mask == MaskKind::None) return false;
  return mask.columns == 0 || (s.mask == MaskKind::Added && !std::is_same_v<S, compute_t<S>>);
}

// A task: some queries of one batch.
struct Task {
  int64_t n, group, begin, end;
};

// Takes the next task; false when none is left. Query rows are split at multiples of `block`.
SEQMEM_INLINE bool take_task(const Shape& s, const Plan& plan, int64_t block, Task& task) {
  const int64_t k = __atomic_fetch_add(&plan.next, 1, __ATOMIC_RELAXED);
  if (k >= s.N * plan.groups) return false;
  const int64_t blocks = ceil_div(s.Tq, block), g = k % plan.groups;
  task = {k / plan.groups, g, blocks * g / plan.groups * block,
          min(blocks * (g + 1) / plan.groups * block, s.Tq)};
  return true;
}

// The gradient [N, Tk, width] of keys or values: sums over a task's queries, each task's own where
// a batch has several. Rows are `stride` apart, and `keys` of them in a task; `to` is null where
// the gradient is not wanted.
template <class S>
class KeySums {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const int64_t groups;
  S* const to;
  const int64_t width, stride, keys;
  C* all;  // [N, groups, keys, stride], shared

 public:
  C* sums;  // [keys, stride], of the task at hand

  KeySums(const Shape& s, const Plan& plan, void* to, int64_t width, int64_t stride, int64_t keys)
      : s(s),
        groups(plan.groups),
        to(static_cast<S*>(to)),
        width(width),
        stride(stride),
        keys(keys) {}

  explicit operator bool() const { return to != nullptr; }

  void place(Carver& take) { all = take.array<C>(groups > 1 && to ? s.N * groups * size() : 0); }
  void place_own(Carver& take) { sums = take.array<C>(groups > 1 || !to ? 0 : size()); }

  void enter(const Task& task) {
    if (groups > 1) sums = all + (task.n * groups + task.group) * size();
  }
  void clear() {
    if (to) __builtin_memset(sums, 0, size() * sizeof(C));
  }

  // Batch n's, by its only task.
  void store_task(int64_t n, C factor = 1) const {
    if (groups == 1) store({n * s.Tk, (n + 1) * s.Tk}, n, sums, factor);
  }
  // One thread's share of all batches', after a barrier.
  void store_all(int thread, int threads, C factor = 1) const {
    store(share(s.N * s.Tk, thread, threads), 0, all, factor);
  }

 private:
  int64_t size() const { return keys * stride; }

  // factor * the sum over the groups, in their order; `from` begins with batch `first`.
  void store(Share rows, int64_t first, const C* from, C factor) const {
    for (int64_t row = rows.begin; to != nullptr && row < rows.end; ++row) {
      const C* part = from + (row / s.Tk - first) * groups * size() + row % s.Tk * stride;
      for (int64_t j = 0; j < width; j += L) {
        Vec<C> total = load(part + j);
        for (int64_t g = 1; g < groups; ++g) total += load(part + g * size() + j);
        store_n(to + row * width + j, factor * total, static_cast<int>(min<int64_t>(L, width - j)));
      }
    }
  }
};

// Keys that queries before `end` may see.
SEQMEM_INLINE int64_t visible_keys(const Shape& s, int64_t end) {
  return s.causal ? min(s.Tk, end) : s.Tk;
}

}  // namespace
}  // namespace seqmem::attention
