// Attention forward in bf16 on tiles or dot products, softmax alone. Threads take tasks, parts of a
// batch's queries, and go through each in blocks of up to 32 queries, whose score rows stay in L2:
//   once a batch  keys [Tk, D] and values [Tk, Dv] packed into panels of 64 columns: 64 keys by
//                 blocks of 32 features; 64 features by blocks of 32 keys
//   pass 1  scores[rows, Tk] = query key^T, float32    a panel in L1 for all the rows
//   pass 2  scores -> e^(scale score - highest), masked; their sums
//   pass 3  weights[rows, Tk] = scores / sum, bf16, kept for pass 4 and stored; past the caches
//           where they are large
//   pass 4  output[rows, Dv] = weights value
// Weights enter pass 4 rounded, as they do where products and softmax are separate ops.
#include "../common/past_caches.h"
#include "attention_bf16.h"
#include "attention_softmax.h"

namespace seqmem::attention {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // of score rows
constexpr int64_t kPastCaches = 8 << 20;    // bytes of weights from which on they bypass the caches

template <class S>
class ForwardRun : KernelRun<Forward, ThreadOf<Shape, Plan>> {
  using C = float;
  static constexpr int L = kLanes<C>;

  // Query rows of a block; stride of score rows
  const int64_t block = block_rows<C>(s.Tq, s.Tk, 1, kBlockBytes, kMostRows);
  const int64_t stride = score_stride<C>(ceil_div(s.Tk, kPanel) * kPanel);
  // D and Tk in whole blocks of k, and some more
  const int64_t query_stride = ceil_div(s.D, kDepth) * kDepth;
  const int64_t weight_stride = ceil_div(s.Tk, kDepth) * kDepth + kDepth;
  const int64_t key_panel_count = ceil_div(s.Tk, kPanel);
  const int64_t value_panel_count = ceil_div(s.Dv, kPanel);
  const bool past_caches = s.N * s.Tq * s.Tk * int64_t(sizeof(S)) >= kPastCaches &&
                           s.Tk % kDepth == 0 &&
                           reinterpret_cast<uintptr_t>(a.weights) % sizeof(Vec<C>) == 0;

  Panels key_panels{nullptr, query_stride / kDepth, is_wide(block)};
  Panels value_panels{nullptr, ceil_div(s.Tk, kDepth), is_wide(block)};
  S *queries, *weights;  // of a block: [block, query_stride], [block, weight_stride]
  C *scores, *out;       // [block, stride], [block, value_panel_count][64]
  C* mask_copy;          // [block, stride]

 public:
  using KernelRun<Forward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      key_panels.data = take.array<S>(key_panel_count * kPanel * query_stride);
      value_panels.data = take.array<S>(value_panel_count * kPanel * value_panels.depth * kDepth);
      queries = take.array<S>(block * query_stride);
      weights = take.array<S>(block * weight_stride);
      scores = take.array<C>(block * stride);
      out = take.array<C>(block * value_panel_count * kPanel);
      mask_copy = take.array<C>(copies_mask<S>(s, a.mask) ? block * stride : 0);
    });
    return take.used();
  }

  void run() {
    int64_t packed = -1;  // the batch whose keys and values the panels hold
    Task task;
    while (take_task(s, plan, block, task)) {
      if (task.n != packed) {
        packed = task.n;
        pack_as_columns(key_panels, Rows<S>(a.key, packed), s.Tk, s.D);
        pack_as_rows(value_panels, Rows<S>(a.value, packed), s.Tk, s.Dv, value_panel_count);
      }
      for (int64_t i = task.begin; i < task.end; i += block)
        run_block(task.n, i, min(block, task.end - i));
    }
    tiles_release();
    if (past_caches) settle_stores();
  }

 private:
  void run_block(int64_t n, int64_t i, int64_t rows) {
    const int64_t keys = visible_keys(s, i + rows);
    MaskRows<C> mask;
    if (s.mask != MaskKind::None)
      mask_rows<S>(mask, a.mask, s.mask, n, i, rows, keys, mask_copy, stride);
    copy_left(queries, query_stride, Rows<S>(a.query, n), i, rows, s.D, query_stride);
    const RowGroup group = row_group(0, rows, key_panels.wide);
    configure(rows);
    for (int64_t p = 0; p < ceil_div(keys, kPanel); ++p)
      sum_products(group, {{key_panels, p, queries, query_stride, key_panels.depth}}, nullptr, 0,
                   scores + p * kPanel, stride, kNothing);
    for (int64_t r = 0; r < rows; ++r) {
      C* row = scores + r * stride;
      const C highest = masked_row(i, r, row, keys, mask);
      weigh(static_cast<S*>(a.weights) + (n * s.Tq + i + r) * s.Tk, weights + r * weight_stride,
            row, keys, C(1) / exponentials<C>(row, keys, highest));
    }
    tiles_fence();
    for (int64_t p = 0; p < value_panel_count; ++p)
      sum_products(group, {{value_panels, p, weights, weight_stride, ceil_div(keys, kDepth)}},
                   nullptr, 0, out + p * kPanel, value_panel_count * kPanel, kNothing);
    for (int64_t r = 0; r < rows; ++r)
      store_row(static_cast<S*>(a.output) + (n * s.Tq + i + r) * s.Dv,
                out + r * value_panel_count * kPanel, s.Dv);
  }

  // The scaled and masked row's maximum.
  C masked_row(int64_t i, int64_t r, C* row, int64_t keys, const MaskRows<C>& mask) {
    const int64_t last = s.causal ? min(keys, i + r + 1) : keys;
    const C scale = C(s.scale);
    switch (s.mask) {
      case MaskKind::Allowed:
        return mask_row<C, MaskKind::Allowed, true>(row, keys, last, mask.allowed[r], nullptr,
                                                    scale);
      case MaskKind::Added:
        return mask_row<C, MaskKind::Added, true>(row, keys, last, nullptr, mask.added[r], scale);
      default: return mask_row<C, MaskKind::None, true>(row, keys, last, nullptr, nullptr, scale);
    }
  }

  // row / its sum, as a left operand in `kept` and as a result in `to`.
  void weigh(S* to, S* kept, const C* row, int64_t keys, C inverse) {
    const int64_t whole = ceil_div(keys, kDepth) * kDepth;
    for (int64_t j = 0; j < whole; j += L)
      store(kept + j, first_lanes(inverse * load(row + j),
                                  static_cast<int>(min<int64_t>(L, max<int64_t>(0, keys - j)))));
    const int64_t copied = min(whole, s.Tk);
    if (past_caches) {
      for (int64_t j = 0; j < copied; j += 2 * L)
        store_past_caches(reinterpret_cast<C*>(to + j), load(reinterpret_cast<const C*>(kept + j)));
    } else {
      __builtin_memcpy(to, kept, copied * sizeof(S));
    }
    // Beyond the diagonal: zero, or NaN where the whole row is.
    const Vec<C> rest = splat(inverse * C(0));
    for (int64_t j = keys; j < s.Tk; j += L)
      store_n(to + j, rest, static_cast<int>(min<int64_t>(L, s.Tk - j)));
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::BFloat16, Forward, Shape, Plan>::table;

}  // namespace seqmem::attention
