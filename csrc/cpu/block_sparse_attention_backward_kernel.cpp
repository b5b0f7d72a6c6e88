// Block-sparse attention backward. With P the weights, dP = dO V^T + dW, dS = P (dP - rowsum(dP P))
// where seen (entmax: S = P^(2 - alpha) for P and the mean of dP by S for the sum, in dS alone):
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
// By query blocks, tasks and packed key blocks as in the forward (keys as columns, values as
// lanes), for each tile of at most 64 queries
//   pass 1  weights = P, grads = dO
//   pass 2  slopes = grads value^T
//   pass 3  slopes -> dS, zero where not seen, kept for pass 5
//   pass 4  grad_query = scale slopes key
// then by key blocks, each a task, over the blocks that hold it in the order of heads and queries
//   pass 5  dkey += scale dS^T Q,  dvalue += P^T dO
// so that no sum depends on the threads. A few heads at a time, whose dS stay in a cache.
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
  const bool has_output = a.grad_output.data != nullptr;  // whether dO is there

  PackedBlocks packed{s, Bk_pad * (D_pad + s.Dv) * int64_t(sizeof(C))};
  C *keys, *values;                    // of packed blocks
  C *queries, *grads, *weights, *out;  // of a tile; weights block by block, as the slopes
  C** slopes_at;                       // [longest]: a tile's rows in each of its blocks
  C *dkey, *dvalue;                    // of a key block
  Ranges t;
  int64_t first_head = 0;  // of those of keys whose turn it is

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
      weights = take.array<C>(s.lists.longest * rows * Bk_pad);
      out = take.array<C>(rows * D_pad);
      slopes_at = take.array<C*>(s.lists.longest);
      dkey = take.array<C>(Bk_pad * D_pad);
      dvalue = take.array<C>(Bk_pad * Dv_pad);
    });
    return take.used();
  }

  void run() {
    packed.forget();
    // A thread keeps the number of a task that it took too early until its heads' turn has come.
    int64_t task = take_next(plan.next), column = take_next(plan.next_column);
    for (int64_t heads = s.B * s.Hk; first_head < heads; first_head += plan.heads) {
      const int64_t last_head = min(first_head + plan.heads, heads);
      if (a.grad_q != nullptr || a.grad_k != nullptr)
        for (; task < last_head * plan.groups; task = take_next(plan.next))
          run_task(task_of(s, plan, task));
      if (a.grad_k == nullptr && a.grad_v == nullptr) continue;
      barrier.wait();
      for (; column < last_head * s.nK; column = take_next(plan.next_column))
        run_column(column / s.nK / s.Hk, column / s.nK % s.Hk, column % s.nK);
      barrier.wait();
    }
  }

 private:
  void run_task(const Task& task) {
    const int64_t group = s.Hq / s.Hk;
    for (int64_t n = task.begin; n < task.end; ++n)
      for (int64_t h = task.head * group; h < (task.head + 1) * group; ++h) run_block(task, h, n);
  }

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
      set_ranges(t, s, b, first, rows, blocks.key(m));
      const int64_t slot = pack(task, blocks.key(m)).slot, place = blocks.first + m;
      copy_weights(place, row_of_block, weights + m * rows * Bk_pad);
      slopes_at[m] = slopes_of(place, row_of_block);
      if (has_output) {
        multiply_lanes(t, s.Dv, grads, Dv_pad, values + slot * Bk_pad * s.Dv, t.columns,
                       slopes_at[m], Bk_pad);
      } else {
        __builtin_memset(slopes_at[m], 0, rows * Bk_pad * sizeof(C));
      }
      if (s.dropout.p > 0 || a.grad_weights != nullptr)
        for (int64_t r = 0; r < rows; ++r)
          add_gradients(slopes_at[m] + r * Bk_pad, weights + (m * rows + r) * Bk_pad,
                        (place * s.Bq + row_of_block + r) * s.Bk, t.hi[r]);
    }
    for (int64_t r = 0; r < rows; ++r)
      finish_row(blocks.count, r, rows, line_of<C>(s, blocks, b, first + r));
    if (a.grad_q == nullptr) return;
    __builtin_memset(out, 0, rows * D_pad * sizeof(C));
    for (int64_t m = 0; m < blocks.count; ++m) {
      set_ranges(t, s, b, first, rows, blocks.key(m));
      const auto [slot, exact] = pack(task, blocks.key(m));
      multiply_columns(t, exact, true, D_pad, slopes_at[m], Bk_pad, keys + slot * Bk_pad * D_pad,
                       t.columns, 0, out, D_pad);
    }
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * D_pad;
      const int64_t to = (b * s.Hq + h) * s.Tq + first + r;
      store_scaled(static_cast<S*>(a.grad_q) + to * s.D, row, s.D, C(s.scale));
    }
  }

  // What dropout and the weights' own gradient, at `place`, do to n slopes; the weights, a copy,
  // lose the signs of the dropped ones.
  void add_gradients(C* slope, C* weight, int64_t place, int64_t n) {
    if (s.dropout.p > 0) meet_gradients(slope, weight, 0, n, s.dropout);
    if (a.grad_weights != nullptr) {
      const S* from = static_cast<const S*>(a.grad_weights) + place;
      for (int64_t x = 0; x < n; x += L)
        store(slope + x,
              load(slope + x) + load_n(from + x, static_cast<int>(min<int64_t>(L, n - x))));
    }
    if (s.dropout.p > 0) take_signs(slope, weight, 0, n);
  }

  // The gradient of the n weights of row r of a tile -> dS.
  void finish_row(int64_t count, int64_t r, int64_t rows, int64_t n) {
    C sum = 0, total = 0;
    each_part(count, r, rows, n, [&](C* slope, C* weight, int64_t part) {
      close_range(slope, 0, part, C(0));
      if (s.alpha != 1) total += to_slopes(weight, 0, part, s.alpha);
      sum += dot_of(slope, weight, 0, part);
    });
    if (s.alpha == 1) total = 1;
    const C mean = total == 0 ? C(0) : sum / total;
    each_part(count, r, rows, n, [&](C* slope, C* weight, int64_t part) {
      scale_slopes(slope, weight, 0, part, mean, Bk_pad);
    });
  }

  // f(slopes, weights, how many of them) for each block of a line of n weights.
  template <class F>
  SEQMEM_INLINE void each_part(int64_t count, int64_t r, int64_t rows, int64_t n, F&& f) const {
    for (int64_t m = 0; m < count; ++m, n -= Bk_pad)
      f(slopes_at[m] + r * Bk_pad, weights + (m * rows + r) * Bk_pad,
        max<int64_t>(min(n, Bk_pad), 0));
  }

  // Those of a row of the block that has this place among the weights'.
  C* slopes_of(int64_t place, int64_t row) const {
    const int64_t kept = place - first_head * (s.Hq / s.Hk) * s.N;
    return static_cast<C*>(a.slopes) + (kept * s.Bq + row) * Bk_pad;
  }

  // A block's weights in the ranges.
  void copy_weights(int64_t place, int64_t row, C* to) const {
    const S* from = static_cast<const S*>(a.weights) + (place * s.Bq + row) * s.Bk;
    for (int64_t r = 0; r < t.rows; ++r)
      read_range(to + r * Bk_pad, from + r * s.Bk, 0, t.hi[r], 0, Bk_pad);
  }

  // The same as they met the values: where they are, if they are as the products need them.
  const C* met_weights(int64_t place, int64_t row) const {
    if constexpr (std::is_same_v<S, C>)
      if (s.Bk == Bk_pad && s.dropout.p == 0 && all_seen())
        return static_cast<const S*>(a.weights) + (place * s.Bq + row) * s.Bk;
    copy_weights(place, row, weights);
    if (s.dropout.p > 0)
      for (int64_t r = 0; r < t.rows; ++r) meet_values(weights + r * Bk_pad, 0, t.hi[r], s.dropout);
    return weights;
  }

  bool all_seen() const {
    for (int64_t r = 0; r < t.rows; ++r)
      if (t.hi[r] < s.Bk) return false;
    return true;
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
    store_rows(static_cast<S*>(a.grad_k), dkey, b, head, key_block, s.D, C(s.scale));
    store_rows(static_cast<S*>(a.grad_v), dvalue, b, head, key_block, s.Dv, C(1));
  }

  void add_block(int64_t b, int64_t h, int64_t key_block, int64_t place, int64_t first,
                 int64_t rows, int64_t row_of_block) {
    set_ranges(t, s, b, first, rows, key_block);
    if (a.grad_v != nullptr && has_output)
      add_transposed(met_weights(place, row_of_block),
                     side_by_side(rows_of<S>(a.grad_output, b, h, first, 1), s.Dv, grads), Dv_pad,
                     dvalue);
    if (a.grad_k != nullptr)
      add_transposed(slopes_of(place, row_of_block),
                     side_by_side(rows_of<S>(a.q, b, h, first, 1), s.D, queries), D_pad, dkey);
  }

  // Rows of whole vectors one after the other: where they are, if they are so, or a copy.
  const C* side_by_side(const Rows<S>& from, int64_t width, C* copy) const {
    if constexpr (std::is_same_v<S, C>)
      if (from.columns == 1 && from.rows == width && width == padded<C>(width)) return from.data;
    copy_rows<S>(copy, from, t.rows, width, C(1));
    return copy;
  }

  // sums += of_block^T b.
  void add_transposed(const C* of_block, const C* b, int64_t width, C* sums) {
    multiply_transposed(t, any_not_finite(b, t.rows * width), -t.rows, t.columns + t.rows, width,
                        of_block, Bk_pad, b, width, sums);
  }

  void store_rows(S* to, const C* sums, int64_t b, int64_t head, int64_t key_block, int64_t width,
                  C factor) {
    if (to == nullptr) return;
    to += ((b * s.Hk + head) * s.Tk + key_block * s.Bk) * width;
    for (int64_t x = 0; x < keys_of(s, key_block); ++x)
      store_scaled(to + x * width, sums + x * padded<C>(width), width, factor);
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::block_sparse_attention
