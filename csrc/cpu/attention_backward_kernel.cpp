// Attention backward. With P the weights and dW their gradient, for a block of query rows
//   dP = dO V^T + dW,  dS = P (dP - rowsum(dP P)), zero where masked,
//   dQ = scale dS K,  dK += dS^T (scale Q),  dV += P^T dO
// while the rows of P and dS are in the second-level cache.
#include "attention_common.h"

namespace seqmem::attention {
namespace {

// Fewer rows would add to all of dK and dV more often, which costs more than a spilt cache.
constexpr int64_t kBlockBytes = 400 << 10;

// out[k] += sum_r a[r][k] b[r], k = 0..keys-1, over `rows` rows of a block.
template <class C>
void accumulate_transposed(int64_t rows, int64_t keys, int64_t width, const C* a, int64_t a_stride,
                           const C* b, C* out, bool first_block) {
  constexpr int L = kLanes<C>;
  for (int64_t first = 0; first < width; first += 4 * L) {
    with_vectors(min<int64_t>(4, ceil_div(width - first, L)), [&](auto constant) {
      constexpr int V = decltype(constant)::value;
      for_row_blocks<C>(keys, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const C* from[R];
        Vec<C> acc[R][V];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          from[r] = a + start + r;
          SEQMEM_UNROLL
          for (int v = 0; v < V; ++v)
            acc[r][v] = first_block ? Vec<C>{} : load(out + (start + r) * width + first + v * L);
        }
        tile_multiply<R, V, C>(rows, from, a_stride, b + first, L, width, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int v = 0; v < V; ++v) store(out + (start + r) * width + first + v * L, acc[r][v]);
      });
    });
  }
}

template <class S>
class BackwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Plan& plan;
  const Backward& a;
  const int thread, threads;
  const int64_t block, stride;
  const int64_t Dp, Dvp;
  const bool has_output, scores_wanted;  // whether dO is there, whether any of dQ, dK, dmask is

  // This thread's own.
  C *value_panels, *key_columns, *queries, *grads, *weights, *slopes, *out, *mask_buffer;
  C *own_key, *own_value;  // sums of one task
  // Shared: the sums of every task, where a batch has several.
  C *all_keys, *all_values;

 public:
  BackwardRun(const Shape& s, const Plan& plan, const Backward& a, int thread, int threads)
      : s(s),
        plan(plan),
        a(a),
        thread(thread),
        threads(threads),
        block(block_rows<C>(s.Tq, s.Tk, 2, kBlockBytes, kMostRows)),
        stride(row_stride<C>(s.Tk)),
        Dp(padded<C>(s.D)),
        Dvp(padded<C>(s.Dv)),
        has_output(a.grad_output.data != nullptr),
        scores_wanted(a.grad_query != nullptr || a.grad_key != nullptr || a.grad_mask != nullptr) {}

  int64_t place(char* base) {
    Carver take(base);
    const bool shared = plan.groups > 1;
    const bool keys = a.grad_key != nullptr, values = a.grad_value != nullptr;
    all_keys = take.array<C>(shared && keys ? s.N * plan.groups * s.Tk * Dp : 0);
    all_values = take.array<C>(shared && values ? s.N * plan.groups * s.Tk * Dvp : 0);
    for (int i = 0; i < threads; ++i) {
      C* panels = take.array<C>(has_output && scores_wanted ? padded<C>(s.Tk) * s.Dv : 0);
      C* columns = take.array<C>(a.grad_query != nullptr ? s.Tk * Dp : 0);
      C* q = take.array<C>(block * Dp);
      C* g = take.array<C>(block * Dvp);
      C* w = take.array<C>(block * stride);
      C* d = take.array<C>(block * stride);
      C* o = take.array<C>(block * Dp);
      C* m = take.array<C>(copies_mask<S>(s, a.mask) ? block * stride : 0);
      C* k = take.array<C>(!shared && keys ? s.Tk * Dp : 0);
      C* v = take.array<C>(!shared && values ? s.Tk * Dvp : 0);
      if (i != thread) continue;
      value_panels = panels, key_columns = columns, queries = q, grads = g, weights = w;
      slopes = d, out = o, mask_buffer = m, own_key = k, own_value = v;
    }
    return take.used();
  }

  void run(SpinBarrier& barrier) {
    int64_t held = -1;  // the batch whose keys and values are packed
    Task task;
    while (take_task(s, plan, block, task)) {
      if (task.n != held) pack(held = task.n);
      const int64_t place = task.n * plan.groups + task.group;
      if (plan.groups > 1) {
        own_key = all_keys + place * s.Tk * Dp;
        own_value = all_values + place * s.Tk * Dvp;
      }
      // Under a causal mask a block adds to the keys that it sees alone.
      if (s.causal || task.begin == task.end) clear_sums();
      for (int64_t i = task.begin; i < task.end; i += block)
        run_block(task.n, i, min(block, task.end - i), i == task.begin && !s.causal);
      if (plan.groups == 1) store_sums(task.n);
    }
    if (plan.groups == 1) return;
    barrier.wait();
    add_groups(static_cast<S*>(a.grad_key), all_keys, s.D, Dp);
    add_groups(static_cast<S*>(a.grad_value), all_values, s.Dv, Dvp);
  }

 private:
  void pack(int64_t n) {
    if (has_output && scores_wanted) pack_lanes<S>(value_panels, Rows<S>(a.value, n), s.Tk, s.Dv);
    if (a.grad_query != nullptr) pack_columns<S>(key_columns, Rows<S>(a.key, n), s.Tk, s.D);
  }

  void clear_sums() {
    if (a.grad_key != nullptr) __builtin_memset(own_key, 0, s.Tk * Dp * sizeof(C));
    if (a.grad_value != nullptr) __builtin_memset(own_value, 0, s.Tk * Dvp * sizeof(C));
  }

  void store_sums(int64_t n) {
    for (int64_t k = 0; k < s.Tk; ++k) {
      if (a.grad_key != nullptr)
        store_row(static_cast<S*>(a.grad_key) + (n * s.Tk + k) * s.D, own_key + k * Dp, s.D);
      if (a.grad_value != nullptr)
        store_row(static_cast<S*>(a.grad_value) + (n * s.Tk + k) * s.Dv, own_value + k * Dvp, s.Dv);
    }
  }

  // to[n][k] = the sum over the groups, in their order; keys are shared out to the threads.
  void add_groups(S* to, const C* sums, int64_t width, int64_t wide) {
    if (to == nullptr) return;
    const Share mine = share(s.N * s.Tk, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const C* from = sums + (row / s.Tk * plan.groups * s.Tk + row % s.Tk) * wide;
      for (int64_t j = 0; j < wide; j += L) {
        Vec<C> total = load(from + j);
        for (int64_t g = 1; g < plan.groups; ++g) total += load(from + g * s.Tk * wide + j);
        store_n(to + row * width + j, total, static_cast<int>(min<int64_t>(L, width - j)));
      }
    }
  }

  void run_block(int64_t n, int64_t i, int64_t rows, bool first) {
    const int64_t keys = visible_keys(s, i + rows);
    const Rows<S> query(a.query, n), grad_output(a.grad_output, n);
    for (int64_t r = 0; r < rows; ++r) {
      copy_row<S>(queries + r * Dp, query.row(i + r), query.columns, s.D, C(s.scale));
      if (has_output)
        copy_row<S>(grads + r * Dvp, grad_output.row(i + r), grad_output.columns, s.Dv, C(1));
      const S* from = static_cast<const S*>(a.weights) + (n * s.Tq + i + r) * s.Tk;
      copy_row<S>(weights + r * stride, from, 1, keys, C(1));
      // finish_row takes whole steps of four vectors
      for (int64_t j = padded<C>(keys); j % (4 * L) != 0; j += L) {
        store(weights + r * stride + j, Vec<C>{});
        store(slopes + r * stride + j, Vec<C>{});
      }
    }
    if (a.grad_value != nullptr && has_output) {
      accumulate_transposed<C>(rows, keys, Dvp, weights, stride, grads, own_value, first);
    } else if (first) {
      if (a.grad_value != nullptr) __builtin_memset(own_value, 0, s.Tk * Dvp * sizeof(C));
    }
    if (!scores_wanted) return;
    MaskRows<C> mask;
    if (s.mask == MaskKind::Allowed)
      mask_rows<S>(mask, a.mask, s.mask, n, i, rows, keys, mask_buffer, stride);
    if (has_output) multiply_values(rows, keys);
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(n, i, r, keys, s.mask == MaskKind::Allowed ? mask.allowed[r] : nullptr);
      if (a.grad_mask == nullptr) continue;
      S* to = static_cast<S*>(a.grad_mask) + (n * s.Tq + i + r) * s.Tk;
      store_row(to, slopes + r * stride, keys);
      for (int64_t j = keys; j < s.Tk; j += L)
        store_n(to + j, Vec<C>{}, static_cast<int>(min<int64_t>(L, s.Tk - j)));
    }
    if (a.grad_query != nullptr) {
      multiply_rows<C>(rows, keys, Dp, slopes, stride, key_columns, s.Tk, out, Dp);
      for (int64_t r = 0; r < rows; ++r) {
        C* row = out + r * Dp;
        for (int64_t j = 0; j < Dp; j += L) store(row + j, C(s.scale) * load(row + j));
        store_row(static_cast<S*>(a.grad_query) + (n * s.Tq + i + r) * s.D, row, s.D);
      }
    }
    if (a.grad_key != nullptr)
      accumulate_transposed<C>(rows, keys, Dp, slopes, stride, queries, own_key, first);
  }

  // slopes = dO V^T
  void multiply_values(int64_t rows, int64_t keys) {
    const C* from_rows[kMostRows];
    for (int64_t r = 0; r < rows; ++r) from_rows[r] = grads + r * Dvp;
    for (int64_t first = 0; first < keys; first += 4 * L) {
      const C* panel = value_panels + first * s.Dv;
      const int64_t step = L * min<int64_t>(4, ceil_div(s.Tk - first, L));
      with_vectors(min<int64_t>(4, ceil_div(keys - first, L)), [&](auto constant) {
        constexpr int V = decltype(constant)::value;
        for_row_blocks<C>(rows, [&](auto block, int64_t start) {
          constexpr int R = decltype(block)::value;
          Vec<C> acc[R][V] = {};
          tile_multiply<R, V, C>(s.Dv, from_rows + start, 1, panel, L, step, acc);
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int v = 0; v < V; ++v)
            store(slopes + (start + r) * stride + first + v * L, acc[r][v]);
        });
      });
    }
  }

  // slopes -> dS, from dO V^T where there is a dO.
  void finish_row(int64_t n, int64_t i, int64_t r, int64_t keys, const uint8_t* allowed) {
    C* slope = slopes + r * stride;
    const C* weight = weights + r * stride;
    if (!has_output)
      for (int64_t j = 0; j < keys; j += L) store(slope + j, Vec<C>{});
    if (a.grad_weights.data != nullptr) {
      const Rows<S> grad_weights(a.grad_weights, n);
      const S* grad = grad_weights.row(i + r);
      const int64_t step = grad_weights.columns;
      for (int64_t j = 0; j < keys; j += L) {
        const int lanes = static_cast<int>(min<int64_t>(L, keys - j));
        store(slope + j, load(slope + j) + load_apart(grad + j * step, step, lanes));
      }
    }
    // Both rows are zero from the last key to the next whole step.
    Vec<C> total[4] = {};
    for (int64_t j = 0; j < keys; j += 4 * L) SEQMEM_UNROLL
    for (int v = 0; v < 4; ++v) total[v] += load(slope + j + v * L) * load(weight + j + v * L);
    const C mean = sum<C>((total[0] + total[1]) + (total[2] + total[3]));
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

int64_t workspace(Storage storage, const Shape& s, const Plan& plan, const Backward& a,
                  int threads) {
  return with_storage(storage, [&](auto tag) {
    return BackwardRun<decltype(tag)>(s, plan, a, 0, threads).place(nullptr);
  });
}

void run(Storage storage, const Shape& s, const Plan& plan, const Backward& a, int thread,
         int threads, SpinBarrier& barrier) {
  with_storage(storage, [&](auto tag) {
    BackwardRun<decltype(tag)> call(s, plan, a, thread, threads);
    call.place(static_cast<char*>(a.workspace));
    call.run(barrier);
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
const BackwardKernel backward_kernel = {workspace, run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::attention
