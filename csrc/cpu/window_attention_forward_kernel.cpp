// Window attention forward. A task is a part of the queries that see one head of keys; under a
// dilation, of one class of them (window_attention_band.h). Once for every few tiles of it
//   keys of the band [n, D] packed into panels [D][4 L keys], values [n, Dv] into panels
//   [n][4 L columns]; global keys and values likewise, once a task
// and for each tile of at most 32 queries of each head that reads those keys
//   pass 1  scores = (scale query) key^T, global scores likewise; only vectors of keys that a block
//           of rows sees
//   pass 2  scores -> e^(score - highest) where seen, 0 elsewhere; their sums. Another normaliser
//           takes the scores of the keys that a row sees, side by side, to weights of sum 1
//   pass 3  weights = scores / sum, stored as a band; past the caches where they are large
//   pass 4  output = (scores value + global scores global value) / sum
#include "window_attention_band.h"

namespace seqmem::window_attention {
namespace {

constexpr int64_t kForwardRows = 32, kBlockBytes = 192 << 10;
constexpr int64_t kPastCaches = 8 << 20;  // bytes of weights from which on they bypass the caches

template <class S>
class ForwardRun : KernelRun<Forward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const int64_t R = rows_of_tile<C>(s, kForwardRows, kBlockBytes), W = s.W();
  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  const bool past_caches = s.B * s.Hq * s.Tq * W * int64_t(sizeof(S)) >= kPastCaches &&
                           W % L == 0 &&
                           reinterpret_cast<uintptr_t>(a.weights) % sizeof(Vec<C>) == 0;

  // Panels of the packed keys and values, and of the global ones.
  int64_t most_keys, stride, global_stride;
  C *key_panels, *value_panels, *global_keys, *global_values;
  C *queries, *scores, *global_scores, *out;  // of a tile
  C* line;                                    // the scores of a row side by side
  char* line_buffer;
  bool exact = false, exact_global = false;  // whether some value is not finite

 public:
  using KernelRun<Forward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    const Tiling tiling(s, class_of(s, 0), R);
    most_keys = padded<C>(tiling.most_keys<C>(packed_tiles(s, R)));
    stride = score_stride<C>(tiling.most_keys<C>(1));
    global_stride = score_stride<C>(s.G);
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      key_panels = take.array<C>(most_keys * s.D);
      value_panels = take.array<C>(most_keys * Dv_pad);
      global_keys = take.array<C>(padded<C>(s.G) * s.D);
      global_values = take.array<C>(s.G * Dv_pad);
      queries = take.array<C>(R * D_pad);
      scores = take.array<C>(R * stride);
      global_scores = take.array<C>(s.G > 0 ? R * global_stride : 0);
      out = take.array<C>(R * Dv_pad);
      line = take.array<C>(s.alpha == 1 ? 0 : longest_line(stride + s.G));
      line_buffer = take.array<char>(s.alpha == 1 ? 0 : line_bytes(stride + s.G));
    });
    return take.used();
  }

  void run() {
    Task task;
    while (take_task(s, plan, task)) {
      const Tiling tiling(s, class_of(s, task.first_query), R);
      exact_global = pack(task, 0, 1, s.G, global_keys, global_values);
      const Span tiles = tiles_of(tiling, plan, task.group);
      const int64_t step = packed_tiles(s, R);
      for (int64_t tile = tiles.begin; tile < tiles.end; tile += step)
        run_tiles(task, tiling, {tile, min(tile + step, tiles.end)});
    }
    if (past_caches) settle_stores();
  }

 private:
  // `count` keys and values from key `first` on; whether some value is not finite.
  bool pack(const Task& task, int64_t first, int64_t step, int64_t count, C* keys, C* values) {
    if (count == 0) return false;
    pack_lanes<S>(keys, rows_of<S>(a.k, task.row, task.head, first, step), count, s.D);
    pack_columns<S>(values, rows_of<S>(a.v, task.row, task.head, first, step), count, s.Dv);
    return any_not_finite(values, count * Dv_pad);
  }

  void run_tiles(const Task& task, const Tiling& tiling, Span tiles) {
    const Span keys = tiling.template keys<C>(tiles.begin, tiles.end);
    const int64_t first = tiling.c.first_key + keys.begin * s.dilation;
    exact = pack(task, first, s.dilation, keys.end - keys.begin, key_panels, value_panels);
    const int64_t group = s.Hq / s.Hk;
    Tile tile;
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      set_tile<C>(tile, tiling, task.row, t);
      for (int64_t h = task.head * group; h < (task.head + 1) * group; ++h)
        run_tile(task.row, h, tiling.c, tile, keys);
    }
  }

  void run_tile(int64_t b, int64_t h, const Class& c, const Tile& t, Span packed) {
    const int64_t rows = t.band.rows, at = t.base - packed.begin, count = packed.end - packed.begin;
    const int64_t first = c.first_query + t.query * s.dilation;
    const Rows<S> query = rows_of<S>(a.q, b, h, first, s.dilation);
    for (int64_t r = 0; r < rows; ++r)
      copy_row<S>(queries + r * D_pad, query.row(r), query.columns, s.D, C(s.scale));
    multiply_lanes(t.band, s.D, queries, D_pad, key_panels + at * s.D, count - at, scores, stride);
    multiply_lanes(t.global, s.D, queries, D_pad, global_keys, s.G, global_scores, global_stride);
    C inverse[kMaxRows];
    for (int64_t r = 0; r < rows; ++r) {
      inverse[r] = normalise(t, r);
      const int64_t row = (b * s.Hq + h) * s.Tq + first + r * s.dilation;
      const int64_t column = t.diagonal + r;  // of the scores, where the band's first is
      if (s.dropout.p > 0) drop_some(t, r, row);
      if (a.weights != nullptr)
        write_range(static_cast<S*>(a.weights) + row * W, W, scores + r * stride, t.band.lo[r],
                    t.band.hi[r], column, inverse[r], past_caches);
      if (a.global_weights != nullptr)
        write_range(static_cast<S*>(a.global_weights) + row * s.G, s.G,
                    global_scores + r * global_stride, t.global.lo[r], t.global.hi[r], 0,
                    inverse[r], false);
    }
    if (s.dropout.p > 0)
      for (int64_t r = 0; r < rows; ++r) {
        meet_values(scores + r * stride, t.band.lo[r], t.band.hi[r], s.dropout);
        meet_values(global_scores + r * global_stride, t.global.lo[r], t.global.hi[r], s.dropout);
      }
    multiply_columns(t.band, exact, false, Dv_pad, scores, stride, value_panels, count, at, out,
                     Dv_pad);
    if (s.G > 0)
      multiply_columns(t.global, exact_global, true, Dv_pad, global_scores, global_stride,
                       global_values, s.G, 0, out, Dv_pad);
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * Dv_pad;
      const int64_t to = (b * s.Hq + h) * s.Tq + first + r * s.dilation;
      store_scaled(static_cast<S*>(a.output) + to * s.Dv, row, s.Dv, inverse[r]);
    }
  }

  // Row r of the tile, row number `row` of the weights; global keys are columns after the band's.
  void drop_some(const Tile& t, int64_t r, int64_t row) {
    const uint32_t key = key_of(s.dropout, row);
    const int64_t first = t.diagonal + r, width = W;
    drop(scores + r * stride, t.band.lo[r], t.band.hi[r], s.dropout, key,
         [=](int64_t x) { return x - first; });
    drop(global_scores + r * global_stride, t.global.lo[r], t.global.hi[r], s.dropout, key,
         [=](int64_t x) { return width + x; });
  }

  // Scores of row r -> weights that still have to be multiplied by what it returns.
  C normalise(const Tile& t, int64_t r) {
    C *band = scores + r * stride, *global = global_scores + r * global_stride;
    const bool near = t.band.lo[r] < t.band.hi[r], far = t.global.lo[r] < t.global.hi[r];
    if (s.alpha != 1) {
      sparse(band, t.band, global, t.global, r);
      return C(1);
    }
    C top = -kInfinity<C>, total = 0;
    Span here = {}, there = {};
    if (near) top = highest(band, here = close_range(band, t.band.lo[r], t.band.hi[r], top));
    if (far) {
      there = close_range(global, t.global.lo[r], t.global.hi[r], -kInfinity<C>);
      const C other = highest(global, there);
      top = other > top ? other : top;
    }
    if (near) total = exponentials<C>(band + here.begin, here.end - here.begin, top);
    if (far) total += exponentials<C>(global + there.begin, there.end - there.begin, top);
    clear_outside(band, t.band.lo[r], t.band.hi[r], t.band.columns);
    if (s.G > 0) clear_outside(global, t.global.lo[r], t.global.hi[r], s.G);
    return near || far ? C(1) / total : C(0);
  }

  void sparse(C* band, const Ranges& near, C* global, const Ranges& far, int64_t r) {
    const int64_t n = max<int64_t>(near.hi[r] - near.lo[r], 0);
    const int64_t more = max<int64_t>(far.hi[r] - far.lo[r], 0);
    __builtin_memcpy(line, band + near.lo[r], n * sizeof(C));
    __builtin_memcpy(line + n, global + far.lo[r], more * sizeof(C));
    entmax_row(line, n + more, s.alpha, line_buffer, stride + s.G);
    __builtin_memcpy(band + near.lo[r], line, n * sizeof(C));
    __builtin_memcpy(global + far.lo[r], line + n, more * sizeof(C));
    clear_outside(band, near.lo[r], near.hi[r], near.columns);
    if (s.G > 0) clear_outside(global, far.lo[r], far.hi[r], s.G);
  }
};

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::window_attention
