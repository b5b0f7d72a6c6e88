// Block-sparse attention forward. A task is a part of the query blocks of the heads that read one
// head of keys. A key block is packed when the task first meets it
//   keys [n, D] into panels [D][4 L keys], values [n, Dv] into panels [n][4 L columns]
// and for each tile of at most 32 queries of a query block, over the blocks of its list
//   pass 1  scores = (scale query) key^T; minus infinity in the lanes that pad a block
//   pass 2  scores -> e^(score - highest) where seen, 0 elsewhere; their sums. Another normaliser
//           takes them to weights of sum 1
//   pass 3  weights = scores / sum; past the caches where they are large
//   pass 4  output = (scores value) / sum
#include "block_sparse_attention_blocks.h"

namespace seqmem::block_sparse_attention {
namespace {

constexpr int64_t kForwardRows = 32, kBlockBytes = 192 << 10;
constexpr int64_t kPastCaches = 8 << 20;  // bytes of weights from which on they bypass the caches

template <class S>
class ForwardRun : KernelRun<Forward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  const int64_t Bk_pad = padded<C>(min(s.Bk, s.Tk));
  const int64_t stride = score_stride<C>(s.lists.longest * Bk_pad);
  const bool past_caches = s.B * s.Hq * s.N * s.Bq * s.Bk * int64_t(sizeof(S)) >= kPastCaches &&
                           s.Bk % L == 0 &&
                           reinterpret_cast<uintptr_t>(a.weights) % sizeof(Vec<C>) == 0;

  PackedBlocks packed{s, Bk_pad * (s.D + Dv_pad) * int64_t(sizeof(C))};
  C *keys, *values;           // of packed blocks
  C *queries, *scores, *out;  // of a tile
  char* line_buffer;

 public:
  using KernelRun<Forward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    const int64_t rows = min(kForwardRows, s.Bq);
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      packed.place(take);
      keys = take.array<C>(packed.slots * Bk_pad * s.D);
      values = take.array<C>(packed.slots * Bk_pad * Dv_pad);
      queries = take.array<C>(rows * D_pad);
      scores = take.array<C>(rows * stride);
      out = take.array<C>(rows * Dv_pad);
      line_buffer = take.array<char>(s.alpha == 1 ? 0 : line_bytes(stride));
    });
    return take.used();
  }

  void run() {
    packed.forget();
    const int64_t group = s.Hq / s.Hk;
    const int64_t tasks = s.B * s.Hk * plan.groups;
    for (int64_t k; (k = take_next(plan.next)) < tasks;) {
      const Task task = task_of(s, plan, k);
      for (int64_t n = task.begin; n < task.end; ++n)
        for (int64_t h = task.head * group; h < (task.head + 1) * group; ++h) run_block(task, h, n);
    }
    if (past_caches) settle_stores();
  }

 private:
  void run_block(const Task& task, int64_t h, int64_t n) {
    const int64_t first = n * s.Bq, last = min(first + s.Bq, s.Tq), b = task.row;
    const Blocks blocks = blocks_of(s, b, h, n);
    const int64_t R = rows_of_tile<C>(blocks.count * Bk_pad, min(kForwardRows, s.Bq), kBlockBytes);
    for (int64_t i = first; i < last; i += R)
      run_tile(task, h, blocks, i, min(R, last - i), i - first);
    if (a.weights == nullptr) return;
    S* weights = static_cast<S*>(a.weights);
    const int64_t block = s.Bq * s.Bk, rows = last - first;
    for (int64_t m = 0; m < blocks.count; ++m)
      __builtin_memset(weights + (blocks.first + m) * block + rows * s.Bk, 0,
                       (block - rows * s.Bk) * sizeof(S));
    const int64_t end = blocks.first + blocks.count, of_list = (b * s.Hq + h + 1) * s.N - end;
    if (n == s.nQ - 1) __builtin_memset(weights + end * block, 0, of_list * block * sizeof(S));
  }

  PackedBlocks::Found pack(const Task& task, int64_t key_block) {
    return packed.find(key_block, task.row * s.Hk + task.head, [&](int64_t slot) {
      const int64_t j = key_block * s.Bk, count = keys_of(s, key_block);
      C* to = values + slot * Bk_pad * Dv_pad;
      pack_lanes<S>(keys + slot * Bk_pad * s.D, rows_of<S>(a.k, task.row, task.head, j, 1), count,
                    s.D);
      pack_columns<S>(to, rows_of<S>(a.v, task.row, task.head, j, 1), count, s.Dv);
      return any_not_finite(to, count * Dv_pad);
    });
  }

  void run_tile(const Task& task, int64_t h, const Blocks& blocks, int64_t first, int64_t rows,
                int64_t row_of_block) {
    const int64_t b = task.row, columns = blocks.count * Bk_pad;
    const Rows<S> query = rows_of<S>(a.q, b, h, first, 1);
    for (int64_t r = 0; r < rows; ++r)
      copy_row<S>(queries + r * D_pad, query.row(r), query.columns, s.D, C(s.scale));
    Ranges t;
    for (int64_t m = 0; m < blocks.count; ++m) {
      const int64_t slot = pack(task, blocks.key(m)).slot;
      set_ranges(t, s, b, first, rows, blocks.key(m));
      C* to = scores + m * Bk_pad;
      multiply_lanes(t, s.D, queries, D_pad, keys + slot * Bk_pad * s.D, t.columns, to, stride);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t x = s.Bk; x < Bk_pad; ++x) to[r * stride + x] = -kInfinity<C>;
    }
    C inverse[kForwardRows];
    for (int64_t r = 0; r < rows; ++r)
      inverse[r] = normalise(scores + r * stride, line_of<C>(s, blocks, b, first + r), columns);
    __builtin_memset(out, 0, rows * Dv_pad * sizeof(C));
    for (int64_t m = 0; m < blocks.count; ++m) {
      const int64_t key_block = blocks.key(m);
      set_ranges(t, s, b, first, rows, key_block);
      C* from = scores + m * Bk_pad;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (blocks.first + m) * s.Bq + row_of_block + r;
        C* row = from + r * stride;
        if (s.dropout.p > 0)
          drop(row, 0, t.hi[r], s.dropout, key_of(s.dropout, place), [](int64_t x) { return x; });
        if (a.weights != nullptr)
          write_range(static_cast<S*>(a.weights) + place * s.Bk, s.Bk, row, 0, t.hi[r], 0,
                      inverse[r], past_caches);
        if (s.dropout.p > 0) meet_values(row, 0, t.hi[r], s.dropout);
      }
      const auto [slot, exact] = pack(task, key_block);
      multiply_columns(t, exact, true, Dv_pad, from, stride, values + slot * Bk_pad * Dv_pad,
                       t.columns, 0, out, Dv_pad);
    }
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * Dv_pad;
      const int64_t to = (b * s.Hq + h) * s.Tq + first + r;
      store_scaled(static_cast<S*>(a.output) + to * s.Dv, row, s.Dv, inverse[r]);
    }
  }

  // A line of scores -> weights that still have to be multiplied by what it returns.
  C normalise(C* row, int64_t n, int64_t columns) {
    C inverse = n == 0 ? 0 : 1;
    if (s.alpha != 1) {
      entmax_row(row, n, s.alpha, line_buffer, stride);
    } else if (n > 0) {
      const Span all = close_range(row, 0, n, -kInfinity<C>);
      inverse = C(1) / exponentials<C>(row, all.end, highest(row, all));
    }
    clear_outside(row, 0, n, columns);
    return inverse;
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::block_sparse_attention
