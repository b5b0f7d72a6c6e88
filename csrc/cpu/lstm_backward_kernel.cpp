// LSTM backward over a whole sequence.
//
// Time runs backwards in chunks. Within a chunk each step turns dh, dc into dz (the gradient of
// the gates' pre-activations), kept as [vector of units][row][gate][lane], and dz into the dh of
// the step before. Then the chunk's share of the weights' and the input's gradients is one matrix
// product each, while dz is still in cache.
#include "../common/gemm.h"
#include "lstm_common.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

// Rows of a chunk multiplied at once, so that their slice of dz stays in the first cache.
constexpr int64_t kRowsInCache = 128;

template <class S>
class BackwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr bool converts = !std::is_same_v<S, C>;

  const Shape& s;
  const Plan& plan;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;

  const int64_t units, Hs, Ps, Is;    // vectors of units; H, P, I rounded up to vectors
  const int64_t x_width, h_width, m_width;  // row lengths of the chunk's copies, cache-set friendly
  int64_t row_begin, row_step, rows;
  Share mine;
  int64_t capacity;                   // rows a chunk can hold

  // Shared by all threads.
  C *dh, *dc, *dm, *zeros, *dz, *x, *h, *panel_ih, *panel_hh, *db;
  C *squashed, *dh_projected, *panel_hr;
  C *sum_ih, *sum_hh, *sum_hr;        // the gradients' sums where S is not C
  // This thread's own.
  const C** a_row;
  int64_t* row_index;

 public:
  BackwardRun(const Shape& s, const Plan& plan, const Backward& a, int thread, int threads,
              SpinBarrier& barrier)
      : s(s), plan(plan), a(a), thread(thread), threads(threads), barrier(barrier),
        units(ceil_div(s.H, L)), Hs(units * L), Ps(ceil_div(s.P, L) * L),
        Is(ceil_div(s.I, L) * L), x_width(spread(Is)), h_width(spread(Ps)), m_width(spread(Hs)) {
    row_begin = plan.by_rows ? thread : 0;
    row_step = plan.by_rows ? threads : 1;
    rows = ceil_div(s.B - row_begin, row_step);
    mine = plan.by_rows ? Share{0, units} : share(units, thread, threads);
    capacity = min(plan.chunk, s.T) * s.B;
  }

  int64_t place(char* base) {
    Carver take(base);
    dh = take.array<C>(s.B * Ps);
    dc = take.array<C>(s.B * Hs);
    dm = take.array<C>(s.projected ? s.B * Hs : 0);
    zeros = take.array<C>(max(Ps, Hs));
    dz = take.array<C>(units * capacity * W);
    x = take.array<C>(capacity * x_width);
    h = take.array<C>(capacity * h_width);
    panel_ih = take.array<C>(units * W * Is);
    panel_hh = take.array<C>(units * W * Ps);
    db = take.array<C>(units * W);
    squashed = take.array<C>(s.projected ? capacity * m_width : 0);
    dh_projected = take.array<C>(s.projected ? capacity * h_width : 0);
    panel_hr = take.array<C>(s.projected ? s.P * Hs : 0);
    sum_ih = take.array<C>(converts ? 4 * s.H * s.I : 0);
    sum_hh = take.array<C>(converts ? 4 * s.H * s.P : 0);
    sum_hr = take.array<C>(converts && s.projected ? s.P * s.H : 0);
    for (int i = 0; i < threads; ++i) {
      auto own_rows = take.array<const C*>(s.B);
      auto own_index = take.array<int64_t>(s.B);
      if (i == thread) a_row = own_rows, row_index = own_index;
    }
    return take.used();
  }

  void run() {
    if constexpr (!converts) {
      sum_ih = static_cast<C*>(a.grad_weight_ih);
      sum_hh = static_cast<C*>(a.grad_weight_hh);
      sum_hr = static_cast<C*>(a.grad_weight_hr);
    }
    prepare();
    barrier.wait();
    bool first_chunk = true;
    for (int64_t last = s.T; last > 0; last -= plan.chunk) {
      const int64_t first = max<int64_t>(last - plan.chunk, 0);
      int64_t n = 0;
      for (int64_t step = last - 1; step >= first; --step) n += run_step(time_of(step), n);
      barrier.wait();
      add_weight_gradients(n, first_chunk);
      if (a.grad_input != nullptr) input_gradients(last - 1, first);
      first_chunk = false;
      barrier.wait();
    }
    finish();
  }

 private:
  // An odd number of cache lines per row spreads a column over all the cache's sets.
  static int64_t spread(int64_t width) {
    const int64_t line = 64 / static_cast<int64_t>(sizeof(C));
    const int64_t lines = ceil_div(width, line);
    return (lines | 1) * line;
  }
  int64_t time_of(int64_t step) const { return s.reverse ? s.T - 1 - step : step; }
  int64_t row(int64_t j) const { return row_begin + j * row_step; }
  int64_t alive(int64_t t) const {
    const int64_t n = s.active[t] - row_begin;
    return n <= 0 ? 0 : ceil_div(n, row_step);
  }
  int64_t index(int64_t t, int64_t r) const { return s.step_row[t] + s.order[r] * s.row_stride; }
  C* dz_at(int64_t u, int64_t n) const { return dz + (u * capacity + n) * W; }

  // ---- before the last step ------------------------------------------------------------------------

  void prepare() {
    const Share packed = share(units, thread, threads);
    for (int64_t u = packed.begin; u < packed.end; ++u) {
      if (a.grad_input != nullptr)
        pack_columns(panel_ih, static_cast<const S*>(a.weight_ih), u, s.I, Is);
      pack_columns(panel_hh, static_cast<const S*>(a.weight_hh), u, s.P, Ps);
      for (int64_t i = u * W; i < (u + 1) * W; ++i) db[i] = 0;
    }
    if (s.projected) pack_projection();
    if (thread == 0)
      for (int64_t i = 0; i < max(Ps, Hs); ++i) zeros[i] = 0;
    for (int64_t r = thread; r < s.B; r += threads) {
      load_gradient(dh + r * Ps, static_cast<const S*>(a.grad_hy), r, s.P, Ps);
      load_gradient(dc + r * Hs, static_cast<const S*>(a.grad_cy), r, s.H, Hs);
    }
  }

  void load_gradient(C* to, const S* from, int64_t r, int64_t width, int64_t padded) {
    for (int64_t i = 0; i < padded; i += L)
      store(to + i, from == nullptr ? Vec<C>{}
                                    : load_n(from + s.order[r] * width + i,
                                             static_cast<int>(width - i)));
  }

  // panel[column vector][u][gate][lane][L columns]: dz times it runs over gates of all units.
  void pack_columns(C* panel, const S* weight, int64_t u, int64_t N, int64_t padded) {
    for (int g = 0; g < 4; ++g)
      for (int l = 0; l < L; ++l) {
        const int64_t unit = u * L + l, k = u * W + g * L + l;
        for (int64_t i = 0; i < padded; i += L) {
          Vec<C> v{};
          if (unit < s.H)
            v = load_n(weight + (g * s.H + unit) * N + i, static_cast<int>(N - i));
          store(panel + (i * units * 4 + k) * L, v);
        }
      }
  }

  // panel_hr[vector of units][P][lane]
  void pack_projection() {
    const S* weight = static_cast<const S*>(a.weight_hr);
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u)
      for (int64_t p = 0; p < s.P; ++p)
        store(panel_hr + (u * s.P + p) * L,
              load_n(weight + p * s.H + u * L, static_cast<int>(s.H - u * L)));
  }

  // ---- one step --------------------------------------------------------------------------------------

  int64_t run_step(int64_t t, int64_t n) {
    const int64_t count = alive(t);
    for (int64_t j = 0; j < count; ++j) row_index[j] = index(t, row(j));
    if (s.projected) unproject(t, count, n);
    for (int64_t u = mine.begin; u < mine.end; ++u)
      for (int64_t j = 0; j < count; ++j) differentiate_cell(t, j, u, n);
    copy_operands(t, n);
    if (!plan.by_rows) barrier.wait();
    const Share columns = plan.by_rows ? Share{0, Ps / L} : mine;
    for_column_blocks(columns, [&](auto block, int64_t v) {
      hidden_gradient<decltype(block)::value>(t, n, count, v);
    });
    return s.active[t];
  }

  // dm = (grad_output + dh) weight_hr, and keeps the left factor for weight_hr's gradient.
  void unproject(int64_t t, int64_t count, int64_t n) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = row(j);
      C* total = dh_projected + (n + r) * h_width;
      for (int64_t i = 0; i < Ps; i += L)
        store(total + i, load(dh + r * Ps + i) + arriving(a.grad_output, t, j, s.P, i));
      a_row[j] = total;
    }
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      for (int64_t u = 0; u < units; ++u) {
        Vec<C> acc[R][1] = {};
        tile_multiply<R, 1, C>(s.P, a_row + start, 1, panel_hr + u * s.P * L, L, L, acc);
        for (int r = 0; r < R; ++r) store(dm + row(start + r) * Hs + u * L, acc[r][0]);
      }
    });
  }

  // A vector of an optional gradient of a sequence tensor at (t, row j), or zero.
  SEQMEM_INLINE Vec<C> arriving(const void* grad, int64_t, int64_t j, int64_t width, int64_t at) {
    if (grad == nullptr) return Vec<C>{};
    return load_n(static_cast<const S*>(grad) + row_index[j] * width + at,
                  static_cast<int>(min<int64_t>(L, width - at)));
  }

  // i, f, o: d pre = d gate * gate (1 - gate); g: d pre = d gate * (1 - gate^2).
  SEQMEM_INLINE void differentiate_cell(int64_t t, int64_t j, int64_t u, int64_t n) {
    const int64_t r = row(j), at = u * L;
    const int lanes = static_cast<int>(min<int64_t>(L, s.H - at));
    const S* gates = static_cast<const S*>(a.gates) + row_index[j] * 4 * s.H + at;
    const Vec<C> i = load_n(gates, lanes), f = load_n(gates + s.H, lanes);
    const Vec<C> g = load_n(gates + 2 * s.H, lanes), o = load_n(gates + 3 * s.H, lanes);
    const Vec<C> squashed_cell =
        tanh<C>(load_n(static_cast<const S*>(a.cells) + row_index[j] * s.H + at, lanes));
    const Vec<C> dm_total = s.projected ? load(dm + r * Hs + at)
                                        : load(dh + r * Ps + at) +
                                              arriving(a.grad_output, t, j, s.H, at);
    const Vec<C> dc_total = load(dc + r * Hs + at) + arriving(a.grad_cells, t, j, s.H, at) +
                            dm_total * o * (C(1) - squashed_cell * squashed_cell);
    const bool cut = is_cut(s, t, r);
    Vec<C> d_i = dc_total * g, d_f = dc_total * previous_cell(t, r, at, lanes, cut);
    Vec<C> d_g = dc_total * i, d_o = dm_total * squashed_cell;
    if (a.grad_gates != nullptr) {
      const S* extra = static_cast<const S*>(a.grad_gates) + row_index[j] * 4 * s.H + at;
      d_i += load_n(extra, lanes);
      d_f += load_n(extra + s.H, lanes);
      d_g += load_n(extra + 2 * s.H, lanes);
      d_o += load_n(extra + 3 * s.H, lanes);
    }
    C* out = dz_at(u, n + r);
    store(out, d_i * i * (C(1) - i));
    store(out + L, d_f * f * (C(1) - f));
    store(out + 2 * L, d_g * (C(1) - g * g));
    store(out + 3 * L, d_o * o * (C(1) - o));
    store(dc + r * Hs + at, cut ? Vec<C>{} : dc_total * f);
    if (s.projected) store(squashed + (n + r) * m_width + at, o * squashed_cell);
  }

  SEQMEM_INLINE Vec<C> previous_cell(int64_t t, int64_t r, int64_t at, int lanes, bool cut) {
    if (cut) return Vec<C>{};
    const S* from = previous(static_cast<const S*>(a.cells), static_cast<const S*>(a.cx), t, r, s.H);
    return from == nullptr ? Vec<C>{} : load_n(from + at, lanes);
  }

  // Row r's state before time t: in the sequence tensor, or the initial one (null if zero).
  const S* previous(const S* sequence, const S* initial, int64_t t, int64_t r, int64_t width) {
    const bool begins = s.reverse ? r >= s.active[t + 1] : t == 0;
    if (!begins) return sequence + index(s.reverse ? t + 1 : t - 1, r) * width;
    return initial == nullptr ? nullptr : initial + s.order[r] * width;
  }

  // This thread's share of the chunk's copies of x_t and h_{t-1}, zero beyond their widths.
  void copy_operands(int64_t t, int64_t n) {
    const Share some = share(s.active[t], thread, threads);
    if (a.grad_weight_ih == nullptr) return;
    for (int64_t r = some.begin; r < some.end; ++r) {
      copy_row(x + (n + r) * x_width, static_cast<const S*>(a.input) + index(t, r) * s.I, s.I, Is);
      const S* before = is_cut(s, t, r) ? nullptr
                                        : previous(static_cast<const S*>(a.output),
                                                   static_cast<const S*>(a.hx), t, r, s.P);
      copy_row(h + (n + r) * h_width, before, s.P, Ps);
    }
  }

  void copy_row(C* to, const S* from, int64_t width, int64_t padded) {
    for (int64_t i = 0; i < padded; i += L)
      store(to + i,
            from == nullptr ? Vec<C>{} : load_n(from + i, static_cast<int>(width - i)));
  }

  // Blocks of up to 4 vectors of columns.
  template <class F>
  SEQMEM_INLINE void for_column_blocks(Share columns, F&& f) {
    int64_t v = columns.begin;
    for (; v + 4 <= columns.end; v += 4) f(std::integral_constant<int, 4>{}, v);
    switch (columns.end - v) {
      case 3: f(std::integral_constant<int, 3>{}, v); break;
      case 2: f(std::integral_constant<int, 2>{}, v); break;
      case 1: f(std::integral_constant<int, 1>{}, v); break;
    }
  }

  // acc += dz[rows] times NV vectors of columns of a packed weight, over gates of all units.
  template <int R, int NV>
  SEQMEM_INLINE void multiply_dz(const int64_t (&n)[R], const C* panel, int64_t v,
                                 Vec<C> (&acc)[R][NV]) {
    const C* columns = panel + v * L * units * W;
    for (int64_t u = 0; u < units; ++u) {
      const C* from[R];
      for (int r = 0; r < R; ++r) from[r] = dz_at(u, n[r]);
      tile_multiply<R, NV, C>(W, from, 1, columns + u * W * L, units * W * L, L, acc);
    }
  }

  // dh of the step before.
  template <int NV>
  SEQMEM_INLINE void hidden_gradient(int64_t t, int64_t n, int64_t count, int64_t v) {
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      int64_t at[R];
      for (int r = 0; r < R; ++r) at[r] = n + row(start + r);
      Vec<C> acc[R][NV] = {};
      multiply_dz<R, NV>(at, panel_hh, v, acc);
      for (int r = 0; r < R; ++r) {
        const bool cut = is_cut(s, t, row(start + r));
        for (int i = 0; i < NV; ++i)
          store(dh + row(start + r) * Ps + (v + i) * L, cut ? Vec<C>{} : acc[r][i]);
      }
    });
  }

  // ---- one chunk ---------------------------------------------------------------------------------------

  void add_weight_gradients(int64_t n, bool first) {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      if (a.grad_bias != nullptr) add_bias_gradient(n, u);
      if (a.grad_weight_ih == nullptr) continue;
      for_column_blocks({0, Is / L}, [&](auto block, int64_t v) {
        add_outer<decltype(block)::value>(n, u, x, x_width, v, sum_ih, s.I, first);
      });
      for_column_blocks({0, Ps / L}, [&](auto block, int64_t v) {
        add_outer<decltype(block)::value>(n, u, h, h_width, v, sum_hh, s.P, first);
      });
    }
    if (a.grad_weight_hr != nullptr) add_projection_gradient(n, first);
  }

  void add_bias_gradient(int64_t n, int64_t u) {
    Vec<C> total[4];
    for (int g = 0; g < 4; ++g) total[g] = load(db + u * W + g * L);
    for (int64_t i = 0; i < n; ++i)
      for (int g = 0; g < 4; ++g) total[g] += load(dz_at(u, i) + g * L);
    for (int g = 0; g < 4; ++g) store(db + u * W + g * L, total[g]);
  }

  // sum[gate row][columns v..] += dz^T operand, for one vector of units.
  template <int NV>
  SEQMEM_INLINE void add_outer(int64_t n, int64_t u, const C* operand, int64_t width, int64_t v,
                               C* total, int64_t N, bool first) {
    const int64_t lanes = min<int64_t>(L, s.H - u * L);
    for (int64_t k = 0; k < max<int64_t>(n, 1); k += kRowsInCache) {
      const int64_t depth = min(kRowsInCache, n - k);
      const bool fresh = first && k == 0;
      for (int g = 0; g < 4; ++g) {
        for_row_blocks<C>(lanes, [&](auto block, int64_t start) {
          constexpr int R = decltype(block)::value;
          C* to = total + (g * s.H + u * L + start) * N + v * L;
          const C* from[R];
          for (int r = 0; r < R; ++r) from[r] = dz_at(u, k) + g * L + start + r;
          add_tile<R, NV>(depth, from, W, operand + k * width + v * L, width, to, N,
                          static_cast<int>(min<int64_t>(NV * L, N - v * L)), fresh);
        });
      }
    }
  }

  // to[r][..] = (fresh ? 0 : to[r][..]) + a^T b, columns of them at most.
  template <int R, int NV>
  SEQMEM_INLINE void add_tile(int64_t depth, const C* const* from, int64_t from_step, const C* b,
                              int64_t b_step, C* to, int64_t to_step, int columns, bool fresh) {
    Vec<C> acc[R][NV];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < NV; ++i)
        acc[r][i] = fresh ? Vec<C>{} : load_n(to + r * to_step + i * L, columns - i * L);
    tile_multiply<R, NV, C>(depth, from, from_step, b, L, b_step, acc);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < NV; ++i) store_n(to + r * to_step + i * L, acc[r][i], columns - i * L);
  }

  void add_projection_gradient(int64_t n, bool first) {
    const Share some = share(s.P, thread, threads);
    for_column_blocks({0, units}, [&](auto columns, int64_t v) {
      constexpr int NV = decltype(columns)::value;
      for_row_blocks<C>(some.end - some.begin, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const int64_t p = some.begin + start;
        const C* from[R];
        for (int r = 0; r < R; ++r) from[r] = dh_projected + p + r;
        add_tile<R, NV>(n, from, h_width, squashed + v * L, m_width, sum_hr + p * s.H + v * L, s.H,
                        static_cast<int>(min<int64_t>(NV * L, s.H - v * L)), first);
      });
    });
  }

  // grad_input of the chunk's steps, last to first.
  void input_gradients(int64_t last, int64_t first) {
    int64_t n = 0;
    for (int64_t step = last; step >= first; --step) {
      const int64_t t = time_of(step);
      const Share some = share(s.active[t], thread, threads);
      for_column_blocks({0, Is / L}, [&](auto columns, int64_t v) {
        constexpr int NV = decltype(columns)::value;
        for_row_blocks<C>(some.end - some.begin, [&](auto block, int64_t start) {
          constexpr int R = decltype(block)::value;
          int64_t at[R];
          for (int r = 0; r < R; ++r) at[r] = n + some.begin + start + r;
          Vec<C> acc[R][NV] = {};
          multiply_dz<R, NV>(at, panel_ih, v, acc);
          for (int r = 0; r < R; ++r) {
            S* to = static_cast<S*>(a.grad_input) + index(t, some.begin + start + r) * s.I;
            for (int i = 0; i < NV; ++i)
              store_n(to + (v + i) * L, acc[r][i], static_cast<int>(s.I - (v + i) * L));
          }
        });
      });
      n += s.active[t];
    }
  }

  // ---- after the first step ------------------------------------------------------------------------------

  void finish() {
    for (int64_t r = thread; r < s.B; r += threads) {
      if (a.grad_hx != nullptr)
        store_row(static_cast<S*>(a.grad_hx) + s.order[r] * s.P, dh + r * Ps, s.P);
      if (a.grad_cx != nullptr)
        store_row(static_cast<S*>(a.grad_cx) + s.order[r] * s.H, dc + r * Hs, s.H);
    }
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      const int64_t lanes = min<int64_t>(L, s.H - u * L);
      for (int g = 0; g < 4; ++g) {
        const int64_t at = g * s.H + u * L;
        if (a.grad_bias != nullptr)
          store_row(static_cast<S*>(a.grad_bias) + at, db + u * W + g * L, lanes);
        if (!converts || a.grad_weight_ih == nullptr) continue;
        store_row(static_cast<S*>(a.grad_weight_ih) + at * s.I, sum_ih + at * s.I, lanes * s.I);
        store_row(static_cast<S*>(a.grad_weight_hh) + at * s.P, sum_hh + at * s.P, lanes * s.P);
      }
    }
    if (converts && a.grad_weight_hr != nullptr) {
      const Share p = share(s.P, thread, threads);
      store_row(static_cast<S*>(a.grad_weight_hr) + p.begin * s.H, sum_hr + p.begin * s.H,
                (p.end - p.begin) * s.H);
    }
  }
};

int64_t workspace(Storage storage, const Shape& s, const Plan& plan, int threads) {
  return with_storage(storage, [&](auto tag) {
    SpinBarrier barrier(threads);
    return BackwardRun<decltype(tag)>(s, plan, Backward{}, 0, threads, barrier).place(nullptr);
  });
}

void run(Storage storage, const Shape& s, const Plan& plan, const Backward& a, int thread,
         int threads, SpinBarrier& barrier) {
  with_storage(storage, [&](auto tag) {
    BackwardRun<decltype(tag)> call(s, plan, a, thread, threads, barrier);
    call.place(static_cast<char*>(a.workspace));
    call.run();
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
extern const BackwardKernel backward_kernel;
const BackwardKernel backward_kernel = {workspace, run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::lstm
