// Window attention backward. With P the weights, dP = dO V^T + dW, dS = P (dP - rowsum(dP P)) where
// seen (entmax: S = P^(2 - alpha) for P and the mean of dP by S for the sum, in dS alone):
//   dQ = scale dS K,  dK = dS^T (scale Q),  dV = P^T dO.
// Tasks and tiles as in the forward, but of at most 64 queries. Once for every few tiles
//   keys of the band packed into panels [n][4 L columns], values into panels [Dv][4 L keys]
// and for each tile of each head that reads those keys, in this order
//   pass 1  queries = scale Q, grads = dO, weights = P, copied; P is zero beyond the band
//   pass 2  dvalue += weights^T grads
//   pass 3  slopes = grads value^T
//   pass 4  slopes -> dS, zero beyond the band
//   pass 5  grad_query = scale slopes key
//   pass 6  dkey += slopes^T queries
// and likewise of the global keys. A task has its own dkey and dvalue, of the keys that its tiles
// see. Where a key has several tasks these are added at the end, in the tasks' order.
#include "window_attention_band.h"

namespace seqmem::window_attention {
namespace {

constexpr int64_t kBackwardRows = 64, kBlockBytes = 200 << 10;

template <class S>
class BackwardRun : KernelRun<Backward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const int64_t R = rows_of_tile<C>(s, kBackwardRows, kBlockBytes), W = s.W();
  const int64_t D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  // Whether dO is there, whether any of dQ, dK is, whether a key may have several tasks or, among
  // the global ones, one of another class
  const bool has_output = a.grad_output.data != nullptr;
  const bool scores_wanted = a.grad_q != nullptr || a.grad_k != nullptr;
  const bool shared = plan.groups > 1 || (s.G > 0 && s.dilation > 1);

  int64_t most_keys, stride, global_stride;
  int64_t rows_of_sums;      // of one task: G and the keys that its tiles see
  C *all_dkey, *all_dvalue;  // [tasks, rows_of_sums, D_pad or Dv_pad], if shared
  C *dkey, *dvalue;          // of a task
  C *key_panels, *value_panels, *global_keys, *global_values;
  C *queries, *grads, *weights, *slopes, *global_weights, *global_slopes, *out;  // of a tile
  bool exact = false, exact_global = false;  // whether some key is not finite

 public:
  using KernelRun<Backward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    const Tiling tiling(s, class_of(s, 0), R);
    most_keys = padded<C>(tiling.most_keys<C>(packed_tiles(s, R)));
    stride = score_stride<C>(tiling.most_keys<C>(1));
    global_stride = score_stride<C>(s.G);
    rows_of_sums = s.G + (shared ? tiling.most_keys<C>(ceil_div(tiling.tiles() + 1, plan.groups))
                                 : ceil_div(s.Tk, s.dilation));
    const int64_t key_size = a.grad_k != nullptr ? rows_of_sums * D_pad : 0;
    const int64_t value_size = a.grad_v != nullptr ? rows_of_sums * Dv_pad : 0;
    const int64_t tasks = shared ? s.B * s.Hk * classes(s) * plan.groups : 0;
    Carver take(base);
    all_dkey = take.array<C>(tasks * key_size);
    all_dvalue = take.array<C>(tasks * value_size);
    take.per_thread(thread, threads, [&] {
      dkey = take.array<C>(shared ? 0 : key_size);
      dvalue = take.array<C>(shared ? 0 : value_size);
      key_panels = take.array<C>(most_keys * D_pad);
      value_panels = take.array<C>(most_keys * s.Dv);
      global_keys = take.array<C>(s.G * D_pad);
      global_values = take.array<C>(padded<C>(s.G) * s.Dv);
      queries = take.array<C>(R * D_pad);
      grads = take.array<C>(R * Dv_pad);
      weights = take.array<C>(R * stride);
      slopes = take.array<C>(R * stride);
      global_weights = take.array<C>(s.G > 0 ? R * global_stride : 0);
      global_slopes = take.array<C>(s.G > 0 ? R * global_stride : 0);
      out = take.array<C>(R * D_pad);
    });
    return take.used();
  }

  void run() {
    Task task;
    while (take_task(s, plan, task)) {
      const Tiling tiling(s, class_of(s, task.first_query), R);
      const Span tiles = tiles_of(tiling, plan, task.group);
      const Span keys = keys_of(tiling, tiles);
      const int64_t used = s.G + keys.end - keys.begin;
      if (shared) {
        const int64_t index = index_of(task) * rows_of_sums;
        dkey = all_dkey + index * D_pad;
        dvalue = all_dvalue + index * Dv_pad;
      }
      if (a.grad_k != nullptr) __builtin_memset(dkey, 0, used * D_pad * sizeof(C));
      if (a.grad_v != nullptr) __builtin_memset(dvalue, 0, used * Dv_pad * sizeof(C));
      exact_global = pack(task, 0, 1, s.G, global_keys, global_values);
      const int64_t step = packed_tiles(s, R);
      for (int64_t tile = tiles.begin; tile < tiles.end; tile += step)
        run_tiles(task, tiling, {tile, min(tile + step, tiles.end)}, keys.begin);
      if (shared) continue;
      store_sums(task, tiling.c, static_cast<S*>(a.grad_k), dkey, s.D, D_pad);
      store_sums(task, tiling.c, static_cast<S*>(a.grad_v), dvalue, s.Dv, Dv_pad);
    }
    if (!shared) return;
    barrier.wait();
    add_tasks(static_cast<S*>(a.grad_k), all_dkey, s.D, D_pad);
    add_tasks(static_cast<S*>(a.grad_v), all_dvalue, s.Dv, Dv_pad);
  }

 private:
  // Of a task's sums: all of a class where it is its only task.
  Span keys_of(const Tiling& tiling, Span tiles) const {
    if (!shared) return {0, tiling.c.keys};
    if (tiles.begin == tiles.end) return {0, 0};
    return tiling.template keys<C>(tiles.begin, tiles.end);
  }

  int64_t index_of(const Task& task) const {
    const int64_t head = task.row * s.Hk + task.head;
    return (head * classes(s) + task.first_query) * plan.groups + task.group;
  }

  bool pack(const Task& task, int64_t first, int64_t step, int64_t count, C* keys, C* values) {
    if (count == 0 || !scores_wanted) return false;
    pack_columns<S>(keys, rows_of<S>(a.k, task.row, task.head, first, step), count, s.D);
    pack_lanes<S>(values, rows_of<S>(a.v, task.row, task.head, first, step), count, s.Dv);
    return any_not_finite(keys, count * D_pad);
  }

  void run_tiles(const Task& task, const Tiling& tiling, Span tiles, int64_t first_sum) {
    const Span keys = tiling.template keys<C>(tiles.begin, tiles.end);
    const int64_t first = tiling.c.first_key + keys.begin * s.dilation;
    exact = pack(task, first, s.dilation, keys.end - keys.begin, key_panels, value_panels);
    const int64_t group = s.Hq / s.Hk;
    Tile tile;
    for (int64_t h = task.head * group; h < (task.head + 1) * group; ++h)
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        set_tile<C>(tile, tiling, task.row, t);
        run_tile(task.row, h, tiling.c, tile, keys, first_sum);
      }
  }

  void run_tile(int64_t b, int64_t h, const Class& c, const Tile& t, Span packed,
                int64_t first_sum) {
    const int64_t rows = t.band.rows, at = t.base - packed.begin, count = packed.end - packed.begin;
    const int64_t first = c.first_query + t.query * s.dilation;
    const Rows<S> query = rows_of<S>(a.q, b, h, first, s.dilation);
    const Rows<S> grad_output = rows_of<S>(a.grad_output, b, h, first, s.dilation);
    for (int64_t r = 0; r < rows; ++r) {
      copy_row<S>(queries + r * D_pad, query.row(r), query.columns, s.D, C(s.scale));
      if (has_output)
        copy_row<S>(grads + r * Dv_pad, grad_output.row(r), grad_output.columns, s.Dv, C(1));
    }
    const int64_t row = (b * s.Hq + h) * s.Tq + first;
    read_weights(t, row);
    const int64_t sum_row = s.G + t.base - first_sum;
    if (a.grad_v != nullptr && has_output) {
      if (s.dropout.p > 0)
        for (int64_t r = 0; r < rows; ++r) {
          meet_values(weights + r * stride, t.band.lo[r], t.band.hi[r], s.dropout);
          meet_values(global_weights + r * global_stride, t.global.lo[r], t.global.hi[r],
                      s.dropout);
        }
      const bool alone = any_not_finite(grads, rows * Dv_pad);
      add_transposed(t, alone, Dv_pad, weights, global_weights, grads, dvalue, sum_row);
    }
    if (!scores_wanted) return;
    if (s.dropout.p > 0) read_weights(t, row);
    if (has_output) {
      multiply_lanes(t.band, s.Dv, grads, Dv_pad, value_panels + at * s.Dv, count - at, slopes,
                     stride);
      multiply_lanes(t.global, s.Dv, grads, Dv_pad, global_values, s.G, global_slopes,
                     global_stride);
    }
    for (int64_t r = 0; r < rows; ++r) finish_row(b, h, first + r * s.dilation, t, r);
    if (a.grad_q != nullptr) {
      multiply_columns(t.band, exact, false, D_pad, slopes, stride, key_panels, count, at, out,
                       D_pad);
      if (s.G > 0)
        multiply_columns(t.global, exact_global, true, D_pad, global_slopes, global_stride,
                         global_keys, s.G, 0, out, D_pad);
      for (int64_t r = 0; r < rows; ++r) {
        C* from = out + r * D_pad;
        store_scaled(static_cast<S*>(a.grad_q) + (row + r * s.dilation) * s.D, from, s.D,
                     C(s.scale));
      }
    }
    if (a.grad_k != nullptr) {
      const bool alone = any_not_finite(queries, rows * D_pad);
      add_transposed(t, alone, D_pad, slopes, global_slopes, queries, dkey, sum_row);
    }
  }

  // A tile's, whose first is row number `row` of the weights.
  void read_weights(const Tile& t, int64_t row) {
    for (int64_t r = 0; r < t.band.rows; ++r) {
      read_range(weights + r * stride,
                 static_cast<const S*>(a.weights) + (row + r * s.dilation) * W, t.band.lo[r],
                 t.band.hi[r], t.diagonal + r, t.band.columns);
      if (s.G > 0)
        read_range(global_weights + r * global_stride,
                   static_cast<const S*>(a.global_weights) + (row + r * s.dilation) * s.G,
                   t.global.lo[r], t.global.hi[r], 0, t.global.columns);
    }
  }

  // sums += of_band^T b and of_global^T b, of the keys from row `at` on and of the global ones.
  void add_transposed(const Tile& t, bool alone, int64_t width, const C* of_band,
                      const C* of_global, const C* b, C* sums, int64_t at) {
    multiply_transposed(t.band, alone, t.diagonal, W, width, of_band, stride, b, width,
                        sums + at * width);
    if (s.G > 0)  // a row sees all of them: no column lies before its diagonal
      multiply_transposed(t.global, alone, -t.global.rows, s.G + t.global.rows, width, of_global,
                          global_stride, b, width, sums);
  }

  // slopes -> dS, from dO V^T where there is a dO.
  void finish_row(int64_t b, int64_t h, int64_t i, const Tile& t, int64_t r) {
    C *near = slopes + r * stride, *far = global_slopes + r * global_stride;
    C *near_weights = weights + r * stride, *far_weights = global_weights + r * global_stride;
    const Rows<S> near_grad = rows_of<S>(a.grad_weights, b, h, i, 1);
    const Rows<S> far_grad = rows_of<S>(a.grad_global, b, h, i, 1);
    add_gradient(near, near_weights, t.band, r, near_grad, t.diagonal + r);
    if (s.G > 0) add_gradient(far, far_weights, t.global, r, far_grad, 0);
    C total = 1;
    if (s.alpha != 1) {
      total = to_slopes(near_weights, t.band.lo[r], t.band.hi[r], s.alpha);
      if (s.G > 0) total += to_slopes(far_weights, t.global.lo[r], t.global.hi[r], s.alpha);
    }
    // Where a row sees nothing, nothing is there to be read.
    C mean = 0;
    if (t.band.lo[r] < t.band.hi[r]) mean += dot_of(near, near_weights, t.band.lo[r], t.band.hi[r]);
    if (t.global.lo[r] < t.global.hi[r])
      mean += dot_of(far, far_weights, t.global.lo[r], t.global.hi[r]);
    if (s.alpha != 1) mean = total == 0 ? C(0) : mean / total;
    scale_slopes(near, near_weights, t.band.lo[r], t.band.hi[r], mean, t.band.columns);
    if (s.G > 0)
      scale_slopes(far, far_weights, t.global.lo[r], t.global.hi[r], mean, t.global.columns);
  }

  // slope += the gradient of the weights themselves; zero around the range.
  void add_gradient(C* slope, C* weight, const Ranges& t, int64_t r, const Rows<S>& grad,
                    int64_t diagonal) {
    const int64_t lo = t.lo[r], hi = t.hi[r];
    if (lo >= hi) return;
    const Span whole = {lo / L * L, ceil_div(hi, L) * L};
    if (!has_output)
      for (int64_t x = whole.begin; x < whole.end; x += L) store(slope + x, Vec<C>{});
    if (s.dropout.p > 0) meet_gradients(slope, weight, lo, hi, s.dropout);
    if (grad.data != nullptr) {
      const S* from = grad.data + (lo - diagonal) * grad.columns;
      for (int64_t x = lo; x < hi; x += L) {
        const int lanes = static_cast<int>(min<int64_t>(L, hi - x));
        store(slope + x,
              load(slope + x) + load_strided(from + (x - lo) * grad.columns, grad.columns, lanes));
      }
    }
    if (s.dropout.p > 0) take_signs(slope, weight, lo, hi);
    close_range(slope, lo, hi, C(0));
  }

  // A class's keys, from its only task.
  void store_sums(const Task& task, const Class& c, S* to, const C* sums, int64_t width,
                  int64_t width_pad) {
    if (to == nullptr) return;
    to += (task.row * s.Hk + task.head) * s.Tk * width;
    for (int64_t m = 0; m < c.keys; ++m) {
      const int64_t j = c.first_key + m * s.dilation;
      store_row(to + j * width, sums + (j < s.G ? j : s.G + m) * width_pad, width);
    }
  }

  // Every key's gradient from the sums of its tasks, in their order; keys are shared out to the
  // threads.
  void add_tasks(S* to, const C* sums, int64_t width, int64_t width_pad) {
    if (to == nullptr) return;
    const Share mine = share(s.B * s.Hk * s.Tk, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t head = row / s.Tk, j = row % s.Tk;
      C* total = width_pad == D_pad ? queries : grads;
      for (int64_t x = 0; x < width_pad; x += L) store(total + x, Vec<C>{});
      const int64_t own = (j % s.dilation - s.offset % s.dilation + s.dilation) % s.dilation;
      const Span seen = j < s.G ? Span{0, classes(s)} : Span{own, min(own + 1, classes(s))};
      for (int64_t first = seen.begin; first < seen.end; ++first) {
        const Class c = class_of(s, first);
        const Tiling tiling(s, c, R);
        const int64_t m = (j - c.first_key) / s.dilation;
        for (int64_t g = 0; g < plan.groups; ++g) {
          const Span tiles = tiles_of(tiling, plan, g), keys = keys_of(tiling, tiles);
          if (tiles.begin == tiles.end || (j >= s.G && (m < keys.begin || m >= keys.end))) continue;
          const int64_t task = (head * classes(s) + first) * plan.groups + g;
          const C* from =
              sums + (task * rows_of_sums + (j < s.G ? j : s.G + m - keys.begin)) * width_pad;
          for (int64_t x = 0; x < width_pad; x += L)
            store(total + x, load(total + x) + load(from + x));
        }
      }
      store_row(to + row * width, total, width);
    }
  }
};

}  // namespace

const Kernel<Backward, Shape, Plan> SEQMEM_ISA::backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;

}  // namespace seqmem::window_attention
