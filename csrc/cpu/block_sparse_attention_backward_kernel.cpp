// Block-sparse attention backward. With P the weights, dP = dO V^T + dW, dS = P (dP - rowsum(dP P))
// where seen (entmax: S = P^(2 - alpha) for P and the mean of dP by S for the sum, in dS alone):
//   dQ = scale dS K,  dK = dS^T (scale Q),  dV = P^T dO.
// By query blocks, tasks and packed key blocks as in the forward (keys as columns, values as
// lanes), for each tile of at most 64 queries
//   pass 1  weights = P, grads = dO, copied
//   pass 2  slopes = grads value^T
//   pass 3  slopes -> dS, zero where not seen; kept, block by block
//   pass 4  grad_query = scale slopes key
// then by key blocks, each a task, over the blocks that hold it in the order of heads and queries
//   pass 5  dkey += dS^T (scale Q),  dvalue += P^T dO
// so that no sum depends on the threads.
#include "block_sparse_attention_blocks.h"

namespace seqmem::block_sparse_attention {
namespace {

constexpr int64_t kBlockBytes = 160 << 10;

template <class S>
class BackwardRun : KernelRun<Backward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  const int64_t Bk_pad = padded<C>(min(s.Bk, s.Tk));
  const int64_t stride = score_stride<C>(s.lists.longest * Bk_pad);
  const bool has_output = a.grad_output.data != nullptr;  // whether dO is there

  PackedBlocks packed{s, Bk_pad * (D_pad + s.Dv) * int64_t(sizeof(C))};
  C *keys, *values;                             // of packed blocks
  C *queries, *grads, *weights, *slopes, *out;  // of a tile
  C *block_weights, *dkey, *dvalue;             // of a key block
  Ranges t;

 public:
  using KernelRun<Backward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    const int64_t rows = min(kMaxRows, s.Bq);
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      packed.place(take);
      keys = take.array<C>(packed.slots * Bk_pad * D_pad);
      values = take.array<C>(packed.slots * Bk_pad * s.Dv);
      queries = take.array<C>(rows * D_pad);
      grads = take.array<C>(rows * Dv_pad);
      weights = take.array<C>(rows * stride);
      slopes = take.array<C>(rows * stride);
      out = take.array<C>(rows * D_pad);
      block_weights = take.array<C>(rows * Bk_pad);
      dkey = take.array<C>(Bk_pad * D_pad);
      dvalue = take.array<C>(Bk_pad * Dv_pad);
    });
    return take.used();
  }

  void run() {
    packed.forget();
    const int64_t group = s.Hq / s.Hk;
    Task task;
    if (a.grad_q != nullptr || a.grad_k != nullptr)
      while (take_task(s, plan, task))
        for (int64_t n = task.begin; n < task.end; ++n)
          for (int64_t h = task.head * group; h < (task.head + 1) * group; ++h)
            run_block(task, h, n);
    if (a.grad_k == nullptr && a.grad_v == nullptr) return;
    barrier.wait();
    while (true) {
      const int64_t k = __atomic_fetch_add(&plan.next_column, 1, __ATOMIC_RELAXED);
      if (k >= s.B * s.Hk * s.nK) return;
      run_column(k / s.nK / s.Hk, k / s.nK % s.Hk, k % s.nK);
    }
  }

 private:
  void run_block(const Task& task, int64_t h, int64_t n) {
    const int64_t first = n * s.Bq, last = min(first + s.Bq, s.Tq);
    const Blocks blocks = blocks_of(s, task.row, h, n);
    const int64_t R = rows_of_tile<C>(blocks.count * Bk_pad, min(kMaxRows, s.Bq), kBlockBytes);
    for (int64_t i = first; i < last; i += R)
      run_tile(task, h, blocks, i, min(R, last - i), i - first);
  }

  PackedBlocks::Found pack(const Task& task, int64_t key_block) {
    return packed.find(key_block, task.row * s.Hk + task.head, [&](int64_t slot) {
      const int64_t j = key_block * s.Bk, count = keys_of(s, key_block);
      C* to = keys + slot * Bk_pad * D_pad;
      pack_columns<S>(to, rows_of<S>(a.k, task.row, task.head, j, 1), count, s.D);
      pack_lanes<S>(values + slot * Bk_pad * s.Dv, rows_of<S>(a.v, task.row, task.head, j, 1),
                    count, s.Dv);
      return any_not_finite(to, count * D_pad);
    });
  }

  void run_tile(const Task& task, int64_t h, const Blocks& blocks, int64_t first, int64_t rows,
                int64_t row_of_block) {
    const int64_t b = task.row;
    if (has_output)
      copy_rows<S>(grads, rows_of<S>(a.grad_output, b, h, first, 1), rows, s.Dv, C(1));
    for (int64_t m = 0; m < blocks.count; ++m) {
      const int64_t key_block = blocks.key(m), x = m * Bk_pad;
      const int64_t place = ((blocks.first + m) * s.Bq + row_of_block) * s.Bk;
      set_ranges(t, s, b, first, rows, key_block);
      const int64_t slot = pack(task, key_block).slot;
      for (int64_t r = 0; r < rows; ++r)
        read_range(weights + r * stride + x, static_cast<const S*>(a.weights) + place + r * s.Bk, 0,
                   t.hi[r], 0, Bk_pad);
      if (has_output) {
        multiply_lanes(t, s.Dv, grads, Dv_pad, values + slot * Bk_pad * s.Dv, t.columns, slopes + x,
                       stride);
      } else {
        for (int64_t r = 0; r < rows; ++r) clear_outside(slopes + r * stride + x, 0, 0, Bk_pad);
      }
      for (int64_t r = 0; r < rows; ++r) {
        C *slope = slopes + r * stride + x, *weight = weights + r * stride + x;
        if (s.dropout.p > 0) meet_gradients(slope, weight, 0, t.hi[r], s.dropout);
        if (a.grad_weights != nullptr)
          add(slope, static_cast<const S*>(a.grad_weights) + place + r * s.Bk, t.hi[r]);
        if (s.dropout.p > 0) take_signs(slope, weight, 0, t.hi[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      finish_row(slopes + r * stride, weights + r * stride, line_of<C>(s, blocks, b, first + r),
                 blocks.count * Bk_pad);
    if (a.grad_k != nullptr) keep_slopes(blocks, rows, row_of_block);
    if (a.grad_q == nullptr) return;
    __builtin_memset(out, 0, rows * D_pad * sizeof(C));
    for (int64_t m = 0; m < blocks.count; ++m) {
      const int64_t key_block = blocks.key(m);
      set_ranges(t, s, b, first, rows, key_block);
      const auto [slot, exact] = pack(task, key_block);
      multiply_columns(t, exact, true, D_pad, slopes + m * Bk_pad, stride,
                       keys + slot * Bk_pad * D_pad, t.columns, 0, out, D_pad);
    }
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * D_pad;
      const int64_t to = (b * s.Hq + h) * s.Tq + first + r;
      store_scaled(static_cast<S*>(a.grad_q) + to * s.D, row, s.D, C(s.scale));
    }
  }

  static void add(C* to, const S* from, int64_t n) {
    for (int64_t x = 0; x < n; x += L)
      store(to + x, load(to + x) + load_n(from + x, static_cast<int>(min<int64_t>(L, n - x))));
  }

  // The gradient of a line's weights -> dS.
  void finish_row(C* slope, C* weight, int64_t n, int64_t columns) {
    const C total = s.alpha == 1 ? C(1) : to_slopes(weight, 0, n, s.alpha);
    close_range(slope, 0, n, C(0));
    const C mean = total == 0 ? C(0) : dot_of(slope, weight, 0, n) / total;
    scale_slopes(slope, weight, 0, n, mean, columns);
  }

  void keep_slopes(const Blocks& blocks, int64_t rows, int64_t row_of_block) {
    for (int64_t m = 0; m < blocks.count; ++m) {
      C* to = static_cast<C*>(a.slopes) + ((blocks.first + m) * s.Bq + row_of_block) * Bk_pad;
      for (int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(to + r * Bk_pad, slopes + r * stride + m * Bk_pad, Bk_pad * sizeof(C));
    }
  }

  void run_column(int64_t b, int64_t head, int64_t key_block) {
    __builtin_memset(dkey, 0, Bk_pad * D_pad * sizeof(C));
    __builtin_memset(dvalue, 0, Bk_pad * Dv_pad * sizeof(C));
    const int64_t group = s.Hq / s.Hk;
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
      const int64_t list = list_of(s, b, h);
      const int64_t* columns = s.lists.columns + list * (s.nK + 1) + key_block;
      for (int64_t n = columns[0]; n < columns[1]; ++n) {
        const int64_t place = s.lists.by_key[list * s.N + n];
        const int64_t first = s.lists.blocks[2 * (list * s.N + place)] * s.Bq;
        const int64_t last = min(first + s.Bq, s.Tq);
        for (int64_t i = first; i < last; i += kMaxRows)
          add_block(b, h, key_block, (b * s.Hq + h) * s.N + place, i, min(kMaxRows, last - i),
                    i - first);
      }
    }
    store_rows(static_cast<S*>(a.grad_k), dkey, b, head, key_block, s.D);
    store_rows(static_cast<S*>(a.grad_v), dvalue, b, head, key_block, s.Dv);
  }

  void add_block(int64_t b, int64_t h, int64_t key_block, int64_t place, int64_t first,
                 int64_t rows, int64_t row_of_block) {
    set_ranges(t, s, b, first, rows, key_block);
    const int64_t row = place * s.Bq + row_of_block;
    if (a.grad_v != nullptr && has_output) {
      copy_rows<S>(grads, rows_of<S>(a.grad_output, b, h, first, 1), rows, s.Dv, C(1));
      for (int64_t r = 0; r < rows; ++r)
        read_range(block_weights + r * Bk_pad, static_cast<const S*>(a.weights) + (row + r) * s.Bk,
                   0, t.hi[r], 0, Bk_pad);
      if (s.dropout.p > 0)
        for (int64_t r = 0; r < rows; ++r)
          meet_values(block_weights + r * Bk_pad, 0, t.hi[r], s.dropout);
      add_transposed(block_weights, grads, Dv_pad, dvalue);
    }
    if (a.grad_k != nullptr) {
      copy_rows<S>(queries, rows_of<S>(a.q, b, h, first, 1), rows, s.D, C(s.scale));
      add_transposed(static_cast<const C*>(a.slopes) + row * Bk_pad, queries, D_pad, dkey);
    }
  }

  // sums += of_block^T b.
  void add_transposed(const C* of_block, const C* b, int64_t width, C* sums) {
    multiply_transposed(t, any_not_finite(b, t.rows * width), -t.rows, t.columns + t.rows, width,
                        of_block, Bk_pad, b, width, sums);
  }

  void store_rows(S* to, const C* sums, int64_t b, int64_t head, int64_t key_block, int64_t width) {
    if (to == nullptr) return;
    to += ((b * s.Hk + head) * s.Tk + key_block * s.Bk) * width;
    for (int64_t x = 0; x < keys_of(s, key_block); ++x)
      store_row(to + x * width, sums + x * padded<C>(width), width);
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::block_sparse_attention
