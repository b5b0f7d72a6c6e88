// Attention backward. With P the weights and dW their gradient,
//   dP = dO V^T + dW,  dS = P (dP - rowsum(dP P)), zero where masked (entmax: S' = P^(2 - alpha)
//   for P and the mean of dP by S' for the sum, in dS alone),
//   dQ = scale dS K,  dK = dS^T (scale Q),  dV = P^T dO.
// Threads take tasks, parts of a batch's queries, and go through each in blocks of at most 96
// queries, so few that their rows of P and dS stay in the L2 cache:
//   once a batch  values [Tk, Dv] packed into panels [Dv][4 L keys], keys [Tk, D] into
//                 panels [Tk][4 L columns]
//   pass 1  queries[rows, D] = scale Q, grads[rows, Dv] = dO, weights[rows, Tk] = P, copied
//   pass 2  dvalue[Tk, Dv] += weights^T grads                   columns of the block's grads in L1
//   pass 3  slopes[rows, Tk] = grads value^T                    a panel in L1 for all the rows
//   pass 4  slopes -> dS; stored where the mask's gradient is wanted
//   pass 5  grad_query[rows, D] = scale slopes key              128 rows of a panel in L1
//   pass 6  dkey[Tk, D] += slopes^T queries                     columns of the block's queries in
//   L1
// Where a batch has several tasks each has its own dkey and dvalue, which are added at the end.
// A block of entmax's weights with few keys a row goes row by row, over these keys alone, from keys
// [Tk, D] and values [Tk, Dv] copied to rows; no other block packs panels then.
#include "attention_common.h"
#include "attention_sparse_rows.h"

namespace seqmem::attention {
namespace {

// With fewer rows, dkey and dvalue would be gone through more often, which costs more than rows of
// P and dS that leave the cache.
constexpr int64_t kBlockBytes = 400 << 10;

template <class S>
class BackwardRun : KernelRun<Backward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  // Query rows of a block; stride of its rows of keys
  const int64_t block = rows_at_once();
  const int64_t stride = score_stride<C>(s.Tk), D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  // Whether dO is there, whether any of dQ, dK, dmask is
  const bool has_output = a.grad_output.data != nullptr;
  const bool scores_wanted =
      a.grad_query != nullptr || a.grad_key != nullptr || a.grad_mask != nullptr;
  const bool sparse = s.alpha != 1;  // entmax

  KeySums<S> of_keys{s, plan, a.grad_key, s.D, D_pad, s.Tk};
  KeySums<S> of_values{s, plan, a.grad_value, s.Dv, Dv_pad, s.Tk};
  // This thread's own.
  C *value_panels, *key_panels, *value_rows, *key_rows;
  int64_t *at, in_panels = -1, in_rows = -1;  // keys of a row that have a weight; copied batches
  C *queries, *grads, *weights, *slopes, *out, *mask_copy;  // of a block

 public:
  using KernelRun<Backward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    of_keys.place(take);
    of_values.place(take);
    take.per_thread(thread, threads, [&] {
      value_panels = take.array<C>(has_output && scores_wanted ? padded<C>(s.Tk) * s.Dv : 0);
      key_panels = take.array<C>(a.grad_query != nullptr ? s.Tk * D_pad : 0);
      value_rows = take.array<C>(sparse && has_output && scores_wanted ? s.Tk * Dv_pad : 0);
      key_rows = take.array<C>(sparse && a.grad_query != nullptr ? s.Tk * D_pad : 0);
      at = take.array<int64_t>(sparse ? filled<C>(s.Tk) : 0);
      queries = take.array<C>(block * D_pad);
      grads = take.array<C>(block * Dv_pad);
      weights = take.array<C>(block * stride);
      slopes = take.array<C>(block * stride);
      out = take.array<C>(block * D_pad);
      mask_copy = take.array<C>(copies_mask<S>(s, a.mask) ? block * stride : 0);
      of_keys.place_own(take);
      of_values.place_own(take);
    });
    return take.used();
  }

  void run() {
    Task task;
    while (take_task(s, plan, block, task)) {
      of_keys.enter(task);
      of_values.enter(task);
      // Under a causal mask a block adds only to the keys that it sees.
      if (s.causal || task.begin == task.end) clear_sums();
      for (int64_t i = task.begin; i < task.end; i += block)
        run_block(task.n, i, min(block, task.end - i), i == task.begin && !s.causal);
      of_keys.store_task(task.n);
      of_values.store_task(task.n);
    }
    if (plan.groups == 1) return;
    barrier.wait();
    of_keys.store_all(thread, threads);
    of_values.store_all(thread, threads);
  }

 private:
  // A task's rows in as few blocks as may be, of even sizes. Under a causal mask fewer at once, for
  // all rows of a block go over the keys that its last one sees.
  int64_t rows_at_once() const {
    const int64_t most =
        block_rows<C>(s.Tq, s.Tk, 2, kBlockBytes, s.causal ? kMaxRows / 2 : kMaxRows);
    const int64_t rows = ceil_div(s.Tq, plan.groups), R = kTileRows<C>;
    return min(ceil_div(ceil_div(rows, ceil_div(rows, most)), R) * R, most);
  }

  void pack(int64_t n) {
    if (n == in_panels) return;
    in_panels = n;
    if (has_output && scores_wanted) pack_lanes<S>(value_panels, Rows<S>(a.value, n), s.Tk, s.Dv);
    if (a.grad_query != nullptr) pack_columns<S>(key_panels, Rows<S>(a.key, n), s.Tk, s.D);
  }

  void copy(int64_t n) {
    if (n == in_rows) return;
    in_rows = n;
    if (has_output && scores_wanted)
      copy_rows<S>(value_rows, Rows<S>(a.value, n), s.Tk, s.Dv, C(1));
    if (a.grad_query != nullptr) copy_rows<S>(key_rows, Rows<S>(a.key, n), s.Tk, s.D, C(1));
  }

  void clear_sums() {
    of_keys.clear();
    of_values.clear();
  }

  void run_block(int64_t n, int64_t i, int64_t rows, bool first) {
    const int64_t keys = visible_keys(s, i + rows);
    const Rows<S> query(a.query, n), grad_output(a.grad_output, n);
    MaskRows<C> mask;
    if (s.mask == MaskKind::Allowed && scores_wanted)
      mask_rows<S>(mask, a.mask, s.mask, n, i, rows, keys, mask_copy, stride);
    for (int64_t r = 0; r < rows; ++r) {
      copy_row<S>(queries + r * D_pad, query.row(i + r), query.columns, s.D, C(s.scale));
      if (has_output)
        copy_row<S>(grads + r * Dv_pad, grad_output.row(i + r), grad_output.columns, s.Dv, C(1));
    }
    if (sparse && mostly_zero(n, i, rows, keys)) {
      if (first) clear_sums();
      copy(n);
      for (int64_t r = 0; r < rows; ++r)
        sparse_row(n, i, r, keys, s.mask == MaskKind::Allowed ? mask.allowed[r] : nullptr);
      return;
    }
    pack(n);
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = weights_of(n, i + r);
      copy_row<S>(weights + r * stride, from, 1, keys, C(1));
      // finish_row takes whole steps of four vectors
      for (int64_t j = padded<C>(keys); j % (4 * L) != 0; j += L) {
        store(weights + r * stride + j, Vec<C>{});
        store(slopes + r * stride + j, Vec<C>{});
      }
    }
    if (a.grad_value != nullptr && has_output) {
      matrix_multiply<true>(keys, rows, Dv_pad, weights, stride, grads, Dv_pad, of_values.sums,
                            !first);
    } else if (first) {
      of_values.clear();
    }
    if (!scores_wanted) return;
    if (has_output)
      multiply_packed_lanes(rows, keys, s.Dv, grads, Dv_pad, value_panels, s.Tk, slopes, stride);
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(n, i, r, keys, s.mask == MaskKind::Allowed ? mask.allowed[r] : nullptr);
      if (a.grad_mask == nullptr) continue;
      S* to = static_cast<S*>(a.grad_mask) + (n * s.Tq + i + r) * s.Tk;
      store_row(to, slopes + r * stride, keys);
      for (int64_t j = keys; j < s.Tk; j += L)
        store_n(to + j, Vec<C>{}, static_cast<int>(min<int64_t>(L, s.Tk - j)));
    }
    if (a.grad_query != nullptr) {
      multiply_packed_columns(rows, keys, D_pad, slopes, stride, key_panels, s.Tk, out, D_pad);
      for (int64_t r = 0; r < rows; ++r) {
        C* row = out + r * D_pad;
        store_scaled(static_cast<S*>(a.grad_query) + (n * s.Tq + i + r) * s.D, row, s.D,
                     C(s.scale));
      }
    }
    if (a.grad_key != nullptr)
      matrix_multiply<true>(keys, rows, D_pad, slopes, stride, queries, D_pad, of_keys.sums,
                            !first);
  }

  const S* weights_of(int64_t n, int64_t i) const {
    return static_cast<const S*>(a.weights) + (n * s.Tq + i) * s.Tk;
  }

  bool mostly_zero(int64_t n, int64_t i, int64_t rows, int64_t keys) const {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) count += count_weights(weights_of(n, i + r), keys);
    return count * kKeysPerWeight <= rows * keys;
  }

  void sparse_row(int64_t n, int64_t i, int64_t r, int64_t keys, const uint8_t* allowed) {
    C *weight = weights, *slope = slopes;
    const C *query = queries + r * D_pad, *grad = grads + r * Dv_pad;
    const int64_t count = find_weights(weights_of(n, i + r), keys, at, weight);
    if (a.grad_value != nullptr && has_output)
      scatter_add(count, at, weight, grad, Dv_pad, of_values.sums);
    if (!scores_wanted) return;
    if (has_output) {
      gather_dots(count, at, grad, value_rows, Dv_pad, slope);
    } else {
      for (int64_t k = 0; k < count; k += L) store(slope + k, Vec<C>{});
    }
    if (a.grad_weights.data != nullptr) {
      const Rows<S> grad_weights(a.grad_weights, n);
      for (int64_t k = 0; k < count; ++k)
        slope[k] += widen_one(grad_weights.row(i + r)[at[k] * grad_weights.columns]);
    }
    const C total = to_slopes(weight, 0, count, s.alpha), dot = dot_of(slope, weight, 0, count);
    scale_slopes(slope, weight, 0, count, total == 0 ? C(0) : dot / total, count);
    for (int64_t k = 0; allowed != nullptr && k < count; ++k)
      if (allowed[at[k]] == 0) slope[k] = 0;
    if (a.grad_mask != nullptr) {
      S* to = static_cast<S*>(a.grad_mask) + (n * s.Tq + i + r) * s.Tk;
      __builtin_memset(to, 0, s.Tk * sizeof(S));
      for (int64_t k = 0; k < count; ++k) store_n(to + at[k], splat(slope[k]), 1);
    }
    if (a.grad_query != nullptr) {
      gather_sum(count, at, slope, key_rows, D_pad, out);
      store_scaled(static_cast<S*>(a.grad_query) + (n * s.Tq + i + r) * s.D, out, s.D, C(s.scale));
    }
    if (a.grad_key != nullptr) scatter_add(count, at, slope, query, D_pad, of_keys.sums);
  }

  // slopes -> dS, from dO V^T where there is a dO.
  void finish_row(int64_t n, int64_t i, int64_t r, int64_t keys, const uint8_t* allowed) {
    C *slope = slopes + r * stride, *weight = weights + r * stride;
    const C weight_sum = s.alpha == 1 ? C(1) : to_slopes(weight, 0, keys, s.alpha);
    if (!has_output)
      for (int64_t j = 0; j < keys; j += L) store(slope + j, Vec<C>{});
    if (a.grad_weights.data != nullptr) {
      const Rows<S> grad_weights(a.grad_weights, n);
      const S* grad = grad_weights.row(i + r);
      for (int64_t j = 0; j < keys; j += L) {
        const int lanes = static_cast<int>(min<int64_t>(L, keys - j));
        store(slope + j, load(slope + j) + load_strided(grad + j * grad_weights.columns,
                                                        grad_weights.columns, lanes));
      }
    }
    // Both rows are zero from the last key to the next whole step.
    Vec<C> total[4] = {};
    for (int64_t j = 0; j < keys; j += 4 * L) SEQMEM_UNROLL
    for (int v = 0; v < 4; ++v) total[v] += load(slope + j + v * L) * load(weight + j + v * L);
    const C dot = lane_sum<C>((total[0] + total[1]) + (total[2] + total[3]));
    const C mean = weight_sum == 0 ? C(0) : dot / weight_sum;
    int64_t j = 0;
    if (allowed == nullptr) {
      for (; j < keys; j += L) store(slope + j, load(weight + j) * (load(slope + j) - mean));
      return;
    }
    auto masked = [&](int lanes) {
      const Vec<C> x = load(weight + j) * (load(slope + j) - mean);
      store(slope + j, allowed_lanes<C>(allowed + j, lanes) ? x : Vec<C>{});
    };
#pragma GCC unroll 4
    for (; j + L <= keys; j += L) masked(L);
    if (j < keys) masked(static_cast<int>(keys - j));
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::attention
