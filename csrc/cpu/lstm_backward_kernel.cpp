// LSTM backward over a whole sequence.
//
// Time runs backwards in chunks. Within a chunk each step turns dh, dc into dz (the gradient of
// the gates' pre-activations), kept as [row][vector of units][gate][lane], and dz into the dh of
// the step before. Then the chunk's share of the weights' and the input's gradients is one matrix
// product each, while dz is still in cache.
#include "../common/gemm.h"
#include "lstm_common.h"
#include "lstm_kernel.h"

namespace seqmem::lstm {
namespace {

// Rows multiplied at once in the weights' gradients: both operands' slices fit the first cache.
constexpr int64_t kDepth = 128;
// Gates summed over at once where dz meets a weight.
constexpr int64_t kSlice = 512;

template <class S>
class BackwardRun : Walk {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int W = 4 * L;
  static constexpr bool converts = !std::is_same_v<S, C>;

  const Plan& plan;
  const Backward& a;
  const int thread, threads;
  SpinBarrier& barrier;

  const int64_t units, Hs, Ps, Is;  // vectors of units; H, P, I rounded up to vectors
  // Row lengths of dz and the chunk's copies: see spread().
  const int64_t z_width, x_width, h_width, m_width;
  const bool packs;  // weights are copied; they must be where lanes or types differ
  Share mine;
  int64_t capacity;  // rows a chunk can hold

  // Shared by all threads.
  C *dh, *dc, *dm, *zeros, *dz, *x, *h, *panel_ih, *panel_hh, *db;
  C *squashed, *dh_projected, *panel_hr;
  C *sum_ih, *sum_hh, *sum_hr;  // the gradients' sums where S is not C
  int64_t* chunk_row;           // row indices of the chunk
  // This thread's own.
  C* dx;
  const C** a_row;
  int64_t* row_index;

 public:
  BackwardRun(const Shape& s, const Plan& plan, const Backward& a, int thread, int threads,
              SpinBarrier& barrier)
      : Walk(s, plan, thread, threads),
        plan(plan),
        a(a),
        thread(thread),
        threads(threads),
        barrier(barrier),
        units(ceil_div(s.H, L)),
        Hs(units * L),
        Ps(ceil_div(s.P, L) * L),
        Is(ceil_div(s.I, L) * L),
        z_width(spread(units * W)),
        x_width(spread(Is)),
        h_width(spread(Ps)),
        m_width(spread(Hs)),
        packs(plan.pack || converts || s.I % L != 0 || s.P % L != 0) {
    // Whole groups of 4 vectors: they are the columns of packed weights as well.
    mine = plan.by_rows ? Share{0, units} : share(ceil_div(units, 4), thread, threads);
    if (!plan.by_rows) mine = {mine.begin * 4, min(mine.end * 4, units)};
    capacity = min(plan.chunk, s.T) * s.B;
  }

  int64_t place(char* base) {
    Carver take(base);
    dh = take.array<C>(s.B * Ps);
    dc = take.array<C>(s.B * Hs);
    dm = take.array<C>(s.projected ? s.B * Hs : 0);
    zeros = take.array<C>(max(Ps, Hs));
    dz = take.array<C>(capacity * z_width);
    x = take.array<C>(capacity * x_width);
    h = take.array<C>(capacity * h_width);
    panel_ih = take.array<C>(packs ? units * W * Is : 0);
    panel_hh = take.array<C>(packs ? units * W * Ps : 0);
    db = take.array<C>(units * W);
    squashed = take.array<C>(s.projected ? capacity * m_width : 0);
    dh_projected = take.array<C>(s.projected ? capacity * h_width : 0);
    panel_hr = take.array<C>(s.projected ? s.P * Hs : 0);
    sum_ih = take.array<C>(converts ? 4 * s.H * s.I : 0);
    sum_hh = take.array<C>(converts ? 4 * s.H * s.P : 0);
    sum_hr = take.array<C>(converts && s.projected ? s.P * s.H : 0);
    chunk_row = take.array<int64_t>(capacity);
    for (int i = 0; i < threads; ++i) {
      auto own_dx = take.array<C>((capacity / threads + 1) * W);
      auto own_rows = take.array<const C*>(s.B);
      auto own_index = take.array<int64_t>(s.B);
      if (i == thread) dx = own_dx, a_row = own_rows, row_index = own_index;
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
      for (int64_t step = last - 1; step >= first; --step) n += run_step(step, n);
      barrier.wait();
      add_weight_gradients(n, first_chunk);
      if (a.grad_input != nullptr) input_gradients(n);
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
  C* dz_at(int64_t u, int64_t n) const { return dz + n * z_width + u * W; }

  // ---- before the last step
  // ------------------------------------------------------------------------

  void prepare() {
    const Share packed = share(units, thread, threads);
    for (int64_t u = packed.begin; u < packed.end; ++u) {
      for (int64_t i = u * W; i < (u + 1) * W; ++i) db[i] = 0;
      if (!packs) continue;
      if (a.grad_input != nullptr)
        pack_columns(panel_ih, static_cast<const S*>(a.weight_ih), u, s.I, Is);
      pack_columns(panel_hh, static_cast<const S*>(a.weight_hh), u, s.P, Ps);
    }
    if (s.projected) pack_projection();
    if (thread == 0)
      for (int64_t i = 0; i < max(Ps, Hs); ++i) zeros[i] = 0;
    for (int64_t r = thread; r < s.B; r += threads) {
      copy_padded(dh + r * Ps, at_row(static_cast<const S*>(a.grad_hy), s.order[r] * s.P), s.P, Ps);
      copy_padded(dc + r * Hs, at_row(static_cast<const S*>(a.grad_cy), s.order[r] * s.H), s.H, Hs);
    }
  }

  // panel[group of 4 vectors of columns][u][gate][lane][column]; the last group may be narrower.
  // dz times it runs over the gates of all units.
  void pack_columns(C* panel, const S* weight, int64_t u, int64_t N, int64_t padded) {
    for (int64_t i = 0; i < padded; i += W) {
      const int64_t width = min<int64_t>(W, padded - i);
      C* to = panel + i * units * W + u * W * width;
      SEQMEM_UNROLL
      for (int g = 0; g < 4; ++g)
        for (int64_t l = 0; l < L; ++l, to += width) {
          const int64_t unit = u * L + l;
          const S* from = weight + (g * s.H + unit) * N + i;
          for (int64_t j = 0; j < width; j += L)
            store(to + j, unit < s.H ? load_n(from + j, static_cast<int>(N - i - j)) : Vec<C>{});
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

  // ---- one step
  // --------------------------------------------------------------------------------------

  int64_t run_step(int64_t step, int64_t n) {
    const int64_t t = time_of(step);
    const int64_t count = alive(t);
    for (int64_t j = 0; j < count; ++j) row_index[j] = index(t, row(j));
    if (s.projected) unproject(count, n);
    for (int64_t j = 0; j < count; ++j)  // along a row, as memory is fetched ahead
      for (int64_t u = mine.begin; u < mine.end; ++u) differentiate_cell(t, j, u, n);
    copy_operands(t, n);
    if (step == 0 && a.grad_hx == nullptr) return s.active[t];
    if (!plan.by_rows) barrier.wait();
    const Share columns = plan.by_rows ? Share{0, Ps / L} : mine;
    const auto multiply = [&](auto block, int64_t v) {
      hidden_gradient<decltype(block)::value>(t, n, count, v);
    };
    const int64_t whole = (columns.end - columns.begin) / 4, rest = columns.begin + 4 * whole;
    for (int64_t i = 0; i < whole; ++i)
      multiply(std::integral_constant<int, 4>{}, columns.begin + 4 * zigzag(step, i, whole));
    for_column_blocks({rest, columns.end}, multiply);
    return s.active[t];
  }

  // dm = (grad_output + dh) weight_hr, and keeps the left factor for weight_hr's gradient.
  void unproject(int64_t count, int64_t n) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = row(j);
      C* total = dh_projected + (n + r) * h_width;
      for (int64_t i = 0; i < Ps; i += L)
        store(total + i,
              load(dh + r * Ps + i) + arriving(a.grad_output, a.grad_output_step, j, s.P, i));
      a_row[j] = total;
    }
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      for (int64_t u = 0; u < units; ++u) {
        Vec<C> acc[R][1];
        start_sums(acc);
        tile_multiply<R, 1, C>(s.P, a_row + start, 1, panel_hr + u * s.P * L, L, L, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) store(dm + row(start + r) * Hs + u * L, acc[r][0]);
      }
    });
  }

  // A vector of an optional gradient of a sequence tensor at (t, row j), or zero.
  SEQMEM_INLINE Vec<C> arriving(const void* grad, int64_t step, int64_t j, int64_t width,
                                int64_t at) {
    if (grad == nullptr) return Vec<C>{};
    return load_n(static_cast<const S*>(grad) + row_index[j] * step + at,
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
    const Vec<C> dm_total =
        s.projected
            ? load(dm + r * Hs + at)
            : load(dh + r * Ps + at) + arriving(a.grad_output, a.grad_output_step, j, s.H, at);
    const Vec<C> dc_total = load(dc + r * Hs + at) + arriving(a.grad_cells, s.H, j, s.H, at) +
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
    const S* from =
        previous(static_cast<const S*>(a.cells), static_cast<const S*>(a.cx), t, r, s.H);
    return from == nullptr ? Vec<C>{} : load_n(from + at, lanes);
  }

  // Row r's state before time t: in the sequence tensor, or the initial one (null if zero).
  const S* previous(const S* sequence, const S* initial, int64_t t, int64_t r, int64_t width) {
    const bool begins = s.reverse ? r >= s.active[t + 1] : t == 0;
    if (!begins) return sequence + index(s.reverse ? t + 1 : t - 1, r) * width;
    return initial == nullptr ? nullptr : initial + s.order[r] * width;
  }

  // This thread's share of the chunk's copies of x_t and h_{t-1}, zero beyond their widths, and
  // of the places they came from.
  void copy_operands(int64_t t, int64_t n) {
    const Share some = share(s.active[t], thread, threads);
    for (int64_t r = some.begin; r < some.end; ++r) {
      chunk_row[n + r] = index(t, r);
      if (a.grad_weight_ih == nullptr) continue;
      copy_padded(x + (n + r) * x_width, static_cast<const S*>(a.input) + index(t, r) * s.I, s.I,
                  Is);
      const S* before = is_cut(s, t, r) ? nullptr
                                        : previous(static_cast<const S*>(a.output),
                                                   static_cast<const S*>(a.hx), t, r, s.P);
      copy_padded(h + (n + r) * h_width, before, s.P, Ps);
    }
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

  // result[j][..] = dz[row_of(j)] times NV vectors of columns of a packed weight, for
  // count rows; the sum over all gates is formed in slices whose weights stay in the second cache.
  template <int NV, class RowOf>
  SEQMEM_INLINE void multiply_dz(int64_t count, RowOf row_of, const C* panel, const void* weight,
                                 int64_t N, int64_t v, C* result, int64_t result_step) {
    const C* columns = panel + v * L * units * W;
    for (int64_t slice = 0; slice < units; slice += kSlice / W) {
      const int64_t end = min<int64_t>(slice + kSlice / W, units);
      for_row_blocks<C>(count, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        Vec<C> acc[R][NV];
        start_sums(acc);
        int64_t n[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          n[r] = row_of(start + r);
          if (slice == 0) continue;
          SEQMEM_UNROLL
          for (int i = 0; i < NV; ++i) acc[r][i] = load(result + (start + r) * result_step + i * L);
        }
        const C* from[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) from[r] = dz_at(slice, n[r]);
        if (packs) {
          tile_multiply<R, NV, C>((end - slice) * W, from, 1, columns + slice * W * NV * L, L,
                                  NV * L, acc);
        } else {
          for (int64_t u = slice; u < end; ++u)
            multiply_unpacked<R, NV>(from, u, static_cast<const C*>(weight) + v * L, N, acc);
        }
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int i = 0; i < NV; ++i) store(result + (start + r) * result_step + i * L, acc[r][i]);
      });
    }
  }

  // One vector of units' gates times NV vectors of columns of a weight as it lies.
  template <int R, int NV>
  SEQMEM_INLINE void multiply_unpacked(const C* (&from)[R], int64_t u, const void* weight,
                                       int64_t N, Vec<C> (&acc)[R][NV]) {
    const int64_t lanes = min<int64_t>(L, s.H - u * L);
    for (int g = 0; g < 4; ++g) {
      const C* b = static_cast<const C*>(weight) + (g * s.H + u * L) * N;
      tile_multiply<R, NV, C>(lanes, from, 1, b, L, N, acc);
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) from[r] += L;
    }
  }

  // dh of the step before.
  template <int NV>
  SEQMEM_INLINE void hidden_gradient(int64_t t, int64_t n, int64_t count, int64_t v) {
    C* to = dh + row_begin * Ps + v * L;
    multiply_dz<NV>(
        count, [&](int64_t j) { return n + row(j); }, panel_hh, a.weight_hh, s.P, v, to,
        row_step * Ps);
    if (s.reset == nullptr) return;
    for (int64_t j = 0; j < count; ++j)
      if (is_cut(s, t, row(j)))
        for (int i = 0; i < NV; ++i) store(to + j * row_step * Ps + i * L, Vec<C>{});
  }

  // ---- one chunk
  // ---------------------------------------------------------------------------------------

  void add_weight_gradients(int64_t n, bool first) {
    const Share some = share(units, thread, threads);
    for (int64_t u = some.begin; u < some.end; ++u) {
      if (a.grad_bias != nullptr) add_bias_gradient(n, u);
      if (a.grad_weight_ih == nullptr) continue;
      add_outer(n, u, x, x_width, sum_ih, s.I, first);
      add_outer(n, u, h, h_width, sum_hh, s.P, first);
    }
    if (a.grad_weight_hr != nullptr) add_projection_gradient(n, first);
  }

  void add_bias_gradient(int64_t n, int64_t u) {
    Vec<C> total[4];
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) total[g] = load(db + u * W + g * L);
    for (int64_t i = 0; i < n; ++i) SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) total[g] += load(dz_at(u, i) + g * L);
    SEQMEM_UNROLL
    for (int g = 0; g < 4; ++g) store(db + u * W + g * L, total[g]);
  }

  // total[gate row][column] += dz^T operand, for one vector of units.
  void add_outer(int64_t n, int64_t u, const C* operand, int64_t width, C* total, int64_t N,
                 bool first) {
    const int64_t lanes = min<int64_t>(L, s.H - u * L);
    const C* from[W];
    C* to[W];
    for (int64_t i = 0; i < 4 * lanes; ++i) {
      const int64_t g = i / lanes, l = i % lanes;
      from[i] = dz_at(u, 0) + g * L + l;
      to[i] = total + (g * s.H + u * L + l) * N;
    }
    for (int64_t k = 0; k == 0 || k < n; k += kDepth) {
      for_column_blocks({0, ceil_div(N, L)}, [&](auto columns, int64_t v) {
        constexpr int NV = decltype(columns)::value;
        const int width_here = static_cast<int>(min<int64_t>(NV * L, N - v * L));
        for_row_blocks<C>(4 * lanes, [&](auto block, int64_t start) {
          constexpr int R = decltype(block)::value;
          const C* from_here[R];
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) from_here[r] = from[start + r] + k * z_width;
          add_tile<R, NV>(min(kDepth, n - k), from_here, z_width, operand + k * width + v * L,
                          width, to + start, v * L, width_here, first && k == 0);
        });
      });
    }
  }

  // to[r][at..] = (fresh ? 0 : to[r][at..]) + a^T b, so many columns of them at most.
  template <int R, int NV>
  SEQMEM_INLINE void add_tile(int64_t depth, const C* const* from, int64_t from_step, const C* b,
                              int64_t b_step, C* const* to, int64_t at, int columns, bool fresh) {
    Vec<C> acc[R][NV];
    start_sums(acc);
    // The sums of many chunks lie far away: they are fetched while the product is formed.
    if (!fresh) SEQMEM_UNROLL
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < NV * L; i += 64 / static_cast<int>(sizeof(C)))
        __builtin_prefetch(to[r] + at + i, 1);
    tile_multiply<R, NV, C>(depth, from, from_step, b, L, b_step, acc);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int i = 0; i < NV; ++i) {
      C* p = to[r] + at + i * L;
      if (!fresh) acc[r][i] += load_n(p, columns - i * L);
      store_n(p, acc[r][i], columns - i * L);
    }
  }

  void add_projection_gradient(int64_t n, bool first) {
    const Share some = share(s.P, thread, threads);
    for_column_blocks({0, units}, [&](auto columns, int64_t v) {
      constexpr int NV = decltype(columns)::value;
      for_row_blocks<C>(some.end - some.begin, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        const int64_t p = some.begin + start;
        const C* from[R];
        C* to[R];
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          from[r] = dh_projected + p + r;
          to[r] = sum_hr + (p + r) * s.H;
        }
        add_tile<R, NV>(n, from, h_width, squashed + v * L, m_width, to, v * L,
                        static_cast<int>(min<int64_t>(NV * L, s.H - v * L)), first);
      });
    });
  }

  void input_gradients(int64_t n) {
    const Share some = share(n, thread, threads);
    for_column_blocks({0, Is / L}, [&](auto columns, int64_t v) {
      constexpr int NV = decltype(columns)::value;
      multiply_dz<NV>(
          some.end - some.begin, [&](int64_t j) { return some.begin + j; }, panel_ih, a.weight_ih,
          s.I, v, dx, W);
      const int width = static_cast<int>(min<int64_t>(NV * L, s.I - v * L));
      for (int64_t j = some.begin; j < some.end; ++j)
        store_row(static_cast<S*>(a.grad_input) + chunk_row[j] * s.I + v * L,
                  dx + (j - some.begin) * W, width);
    });
  }

  // ---- after the first step
  // ------------------------------------------------------------------------------

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
      SEQMEM_UNROLL
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

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Backward, Shape, Plan> backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape, Plan>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::lstm
