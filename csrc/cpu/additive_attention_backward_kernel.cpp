// Additive attention backward: tanh is computed again, so that nothing larger than a block of
// scores' gradients exists. With ds the gradient of the scores and t = tanh(q_i + k_j):
//   dq_i = v sum_j ds_ij (1 - t^2),  dk_j = v sum_i ds_ij (1 - t^2),  dv = sum_ij ds_ij t.
//
// A unit of work is a group of a batch row's queries; sums over units are taken in their order
// after all are done, so that the number of threads does not show.
#include "additive_attention_common.h"

namespace seqmem::additive_attention {
namespace {

template <class S>
class BackwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kRows = 16;  // queries of a block
  static constexpr int kTogether = 4;   // queries that share a pass over the keys

  const Shape& s;
  const Backward& a;
  const int64_t units, As, Ks, Ds;  // units of work; A, Tk and Dv as whole vectors
  const int64_t panels;             // vectors of keys
  const bool tries_factors;
  const bool through_scores;  // whether anything behind the scores is wanted

  // Shared by all threads: what each unit adds up.
  C *part_key = nullptr, *part_value = nullptr, *part_weight = nullptr;
  // This thread's own.
  C *weight = nullptr, *key_copy = nullptr, *value_copy = nullptr, *query_copy = nullptr;
  C *output_copy = nullptr, *dquery = nullptr, *ds = nullptr, *weights = nullptr;
  // Where tanh comes from factors: these, and sums whose lanes are keys still to be added up.
  C *key_factors = nullptr, *query_high = nullptr, *query_low = nullptr, *query_pairs = nullptr;
  C *dkey_lanes = nullptr, *dquery_lanes = nullptr, *dweight_lanes = nullptr;
  Matrix<C> key, value, query, doutput;

 public:
  BackwardRun(const Shape& s, const Backward& a)
      : s(s),
        a(a),
        units(s.B * s.groups),
        As(padded<C>(s.A)),
        Ks(padded<C>(s.Tk)),
        Ds(padded<C>(s.Dv)),
        panels(Ks / L),
        tries_factors(worth_factors<C>(s)),
        through_scores(a.grad_query != nullptr || a.grad_key != nullptr ||
                       a.grad_score_weight != nullptr) {}

  // Places all buffers; returns the bytes used. Called with a null base to size them. A unit that
  // is a whole batch row adds up in its thread's own memory.
  int64_t place(char* base, int thread, int threads) {
    Carver take(base);
    const int64_t parts = s.groups > 1 ? units : threads;
    part_key = take.array<C>(parts * s.Tk * As);
    part_value = take.array<C>(parts * s.Tk * Ds);
    part_weight = take.array<C>(max<int64_t>(units, 1) * As);  // without units, the sum is zero
    for (int i = 0; i < threads; ++i) {
      C* own_weight = take.array<C>(As);
      C* own_key = take.array<C>(s.Tk * As);
      C* own_value = take.array<C>(s.Tk * Ds);
      C* own_query = take.array<C>(kRows * As);
      C* own_output = take.array<C>(kRows * Ds);
      C* own_dquery = take.array<C>(kRows * As);
      C* own_ds = take.array<C>(kRows * Ks);
      C* own_weights = take.array<C>(kRows * Ks);
      const int64_t factored = tries_factors ? L * s.A : 0;
      C* own_factors = take.array<C>(panels * factored * 2);
      C* own_high = take.array<C>(tries_factors ? kRows * As : 0);
      C* own_low = take.array<C>(tries_factors ? kRows * As : 0);
      C* own_pairs = take.array<C>(tries_factors ? kTogether * s.A * 2 : 0);
      C* own_dkey_lanes = take.array<C>(panels * factored);
      C* own_dquery_lanes = take.array<C>(kTogether * factored);
      C* own_dweight_lanes = take.array<C>(factored);
      if (i != thread) continue;
      key_factors = own_factors, query_high = own_high, query_low = own_low;
      query_pairs = own_pairs;
      dkey_lanes = own_dkey_lanes, dquery_lanes = own_dquery_lanes;
      dweight_lanes = own_dweight_lanes;
      weight = own_weight, key_copy = own_key, value_copy = own_value, query_copy = own_query;
      output_copy = own_output, dquery = own_dquery, ds = own_ds, weights = own_weights;
    }
    return take.used();
  }

  void run(int thread, int threads, SpinBarrier& barrier) {
    copy_rows(static_cast<const S*>(a.score_weight), 1, s.A, weight, As);
    const Share mine = share(units, thread, threads);
    int64_t current = -1;
    bool factors = false;
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t b = unit / s.groups, group = unit % s.groups;
      if (b != current) {
        factors = through_scores && factor_keys(b);
        key = {};
        value = matrix(a.value, s.value_of[b], s.Tk, s.Dv, value_copy);
        current = b;
      }
      const int64_t part = s.groups > 1 ? unit : thread;
      run_unit(b, factors, s.Tq * group / s.groups, s.Tq * (group + 1) / s.groups,
               part_key + part * s.Tk * As, part_value + part * s.Tk * Ds, part_weight + unit * As);
      if (s.groups == 1) store_sums(b, part_key + part * s.Tk * As, part_value + part * s.Tk * Ds);
    }
    barrier.wait();
    if (s.groups > 1) {
      const Share rows = share(s.B, thread, threads);
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        C* keys = part_key + b * s.groups * s.Tk * As;
        C* values = part_value + b * s.groups * s.Tk * Ds;
        if (a.grad_key != nullptr) add_up(keys, s.groups, s.Tk * As);
        if (a.grad_value != nullptr) add_up(values, s.groups, s.Tk * Ds);
        store_sums(b, keys, values);
      }
    }
    if (thread == 0 && a.grad_score_weight != nullptr) {
      if (units == 0) fill(part_weight, As, C(0));
      add_up(part_weight, units, As);
      store_row(static_cast<S*>(a.grad_score_weight), part_weight, s.A);
    }
  }

 private:
  static Matrix<C> matrix(const void* all, int64_t index, int64_t rows, int64_t width, C* copy) {
    return as_rows(static_cast<const S*>(all) + index * rows * width, rows, width, copy);
  }

  bool factor_keys([[maybe_unused]] int64_t b) {
    if constexpr (std::is_same_v<C, float>)
      if (tries_factors)
        return pack_keys(static_cast<const S*>(a.key) + s.key_of[b] * s.Tk * s.A, s.Tk, panels * L,
                         s.A, key_factors);
    return false;
  }

  // The first of `parts` arrays becomes the sum of all.
  static void add_up(C* first, int64_t parts, int64_t n) {
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t i = 0; i < n; i += L)
        store(first + i, load(first + i) + load(first + p * n + i));
  }

  void store_sums(int64_t b, C* keys, const C* values) {
    for (int64_t j = 0; j < s.Tk; ++j) {
      if (a.grad_key != nullptr) {
        scale(keys + j * As);
        store_row(static_cast<S*>(a.grad_key) + (b * s.Tk + j) * s.A, keys + j * As, s.A);
      }
      if (a.grad_value != nullptr)
        store_row(static_cast<S*>(a.grad_value) + (b * s.Tk + j) * s.Dv, values + j * Ds, s.Dv);
    }
  }

  void scale(C* row) {
    for (int64_t v = 0; v < As; v += L) store(row + v, load(row + v) * load(weight + v));
  }

  void run_unit(int64_t b, bool factors, int64_t begin, int64_t end, C* dkey, C* dvalue,
                C* dweight) {
    fill(dkey, s.Tk * As, C(0));
    fill(dvalue, s.Tk * Ds, C(0));
    fill(dweight, As, C(0));
    if (factors) {
      fill(dkey_lanes, panels * L * s.A, C(0));
      fill(dweight_lanes, L * s.A, C(0));
    }
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = min(kRows, end - first), at = b * s.Tq + first;
      copy_rows(static_cast<const S*>(a.weights) + at * s.Tk, count, s.Tk, weights, Ks);
      if (a.grad_output != nullptr) {
        doutput =
            as_rows(static_cast<const S*>(a.grad_output) + at * s.Dv, count, s.Dv, output_copy);
        if (a.grad_value != nullptr) add_values(count, dvalue);
      }
      if (!through_scores && a.grad_scores == nullptr) continue;
      multiply_values(count);
      for (int64_t i = 0; i < count; ++i) finish_scores(b, first + i, i);
      if (!through_scores) continue;
      query = as_rows(static_cast<const S*>(a.query) + (s.query_of[b] * s.Tq + first) * s.A, count,
                      s.A, query_copy);
      if (!factors || !slopes_by_factors(count)) slopes_of_block(b, count, dkey, dweight);
      if (a.grad_query == nullptr) continue;
      for (int64_t i = 0; i < count; ++i) {
        scale(dquery + i * As);
        store_row(static_cast<S*>(a.grad_query) + (at + i) * s.A, dquery + i * As, s.A);
      }
    }
    if constexpr (std::is_same_v<C, float>)
      if (factors) add_lanes(dkey, dweight);
  }

  // dvalue += weights^T doutput, over the block's queries.
  void add_values(int64_t count, C* dvalue) {
    for_row_blocks<C>(s.Tk, [&](auto block, int64_t j) {
      constexpr int R = decltype(block)::value;
      int64_t d = 0;
      for (; d + 4 * L <= Ds; d += 4 * L) add_value_tile<R, 4>(count, j, d, dvalue);
      for (; d < Ds; d += L) add_value_tile<R, 1>(count, j, d, dvalue);
    });
  }

  template <int R, int NV>
  SEQMEM_INLINE void add_value_tile(int64_t count, int64_t j, int64_t d, C* dvalue) {
    const C* columns[R];
    Vec<C> acc[R][NV];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      columns[r] = weights + j + r;
      SEQMEM_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = load(dvalue + (j + r) * Ds + d + v * L);
    }
    tile_multiply<R, NV, C>(count, columns, Ks, doutput.data + d, L, doutput.stride, acc);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) store(dvalue + (j + r) * Ds + d + v * L, acc[r][v]);
  }

  // ds = doutput value^T, the gradient of the weights so far.
  void multiply_values(int64_t count) {
    if (a.grad_output == nullptr) return fill(ds, count * Ks, C(0));
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      const C* rows[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) rows[r] = doutput.row(start + r);
      for (int64_t j = 0; j < s.Tk; j += 4) {
        const int64_t n = min<int64_t>(4, s.Tk - j);
        const C* columns[4];
        for (int64_t i = 0; i < 4; ++i) columns[i] = value.row(j + min(i, n - 1));
        Vec<C> acc[R][4];
        start_sums(acc);
        tile_dot<R, 4, C, C>(Ds, rows, columns, acc);
        for (int r = 0; r < R; ++r) {
          C sums[4];
          store_sums4<C>(sums, acc[r]);
          for (int64_t i = 0; i < n; ++i) ds[(start + r) * Ks + j + i] = sums[i];
        }
      }
    });
  }

  // From the gradient of the weights to that of the scores: ds = w (dw - sum_j w dw).
  void finish_scores(int64_t b, int64_t i, int64_t local) {
    C* row = ds + local * Ks;
    const C* w = weights + local * Ks;
    const int64_t at = (b * s.Tq + i) * s.Tk;
    fill(row + s.Tk, Ks - s.Tk, C(0));
    const S* more =
        a.grad_weights == nullptr ? nullptr : static_cast<const S*>(a.grad_weights) + at;
    Vec<C> total{};
    for (int64_t j = 0; j < Ks; j += L) {
      Vec<C> x = load(row + j);
      if (more != nullptr) x += load_n(more + j, static_cast<int>(s.Tk - j));
      total += load(w + j) * x;
      store(row + j, x);
    }
    const C mean = sum<C>(total);
    for (int64_t j = 0; j < Ks; j += L) store(row + j, load(w + j) * (load(row + j) - mean));
    if (a.keep != nullptr) {
      const bool* keep = mask_row(s, a.keep, b, i);
      for (int64_t j = 0; j < s.Tk; ++j) row[j] = keep[j] ? row[j] : C(0);
    }
    if (a.grad_scores != nullptr) store_row(static_cast<S*>(a.grad_scores) + at, row, s.Tk);
  }

  // ---- through tanh, keys in lanes
  // -------------------------------------------------------------------------------

  // dquery of a block, and what it adds to the lanes' sums. False where a query is too large for
  // it.
  bool slopes_by_factors([[maybe_unused]] int64_t count) {
    if constexpr (std::is_same_v<C, float>) {
      if (!split_queries(query, count, As, query_high, query_low)) return false;
      int64_t i = 0;
      for (; i + kTogether <= count; i += kTogether) factored_slopes<kTogether>(i);
      for (; i < count; ++i) factored_slopes<1>(i);
      return true;
    }
    return false;
  }

  // With r = 1 / (E + 1), tanh is (E - 1) r and its slope 4 r (1 - r); the 4 comes at the end.
  // Everything a feature needs lies together, so that one index finds it all.
  template <int R>
  SEQMEM_INLINE void factored_slopes(int64_t start) {
    const int64_t A = s.A;
    float *const pairs = query_pairs, *const dq = dquery_lanes, *const dw = dweight_lanes;
    for (int64_t f = 0; f < A; ++f) {
      for (int r = 0; r < R; ++r) {
        pairs[(f * R + r) * 2] = query_high[(start + r) * As + f];
        pairs[(f * R + r) * 2 + 1] = query_low[(start + r) * As + f];
      }
    }
    fill(dq, A * R * L, C(0));
    for (int64_t panel = 0; panel < panels; ++panel) {
      Vec<float> g[R];
      IntVec<float> busy{};  // else masked, or too little weight to count
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        g[r] = load(ds + (start + r) * Ks + panel * L);
        busy |= g[r] != 0.0f;
      }
      if (none(busy)) continue;
      const float* const keys = key_factors + panel * L * A * 2;
      float* const dk = dkey_lanes + panel * L * A;
      for (int64_t f = 0; f < A; ++f) {
        const Factor k = {load(keys + f * 2 * L), load(keys + f * 2 * L + L)};
        Vec<float> dk_sum = load(dk + f * L), dw_sum = load(dw + f * L);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          const float* q = pairs + (f * R + r) * 2;
          float* to = dq + (f * R + r) * L;
          const Vec<float> m = product_less_one({splat(q[0]), splat(q[1])}, k);
          const Vec<float> ratio = 1.0f / (m + 2.0f);
          const Vec<float> slope = g[r] * (ratio - ratio * ratio);
          dw_sum += g[r] * (m * ratio);
          dk_sum += slope;
          store(to, load(to) + slope);
        }
        store(dk + f * L, dk_sum);
        store(dw + f * L, dw_sum);
      }
    }
    for (int64_t f = 0; f < A; ++f)
      for (int r = 0; r < R; ++r)
        dquery[(start + r) * As + f] = 4 * sum<float>(load(dq + (f * R + r) * L));
    for (int r = 0; r < R; ++r) fill(dquery + (start + r) * As + A, As - A, C(0));
  }

  // The lanes' sums of a unit join those of its blocks that went without factors.
  void add_lanes(C* dkey, C* dweight) {
    for (int64_t f = 0; f < s.A; ++f) dweight[f] += sum<float>(load(dweight_lanes + f * L));
    for (int64_t j = 0; j < s.Tk; j += L) {
      const int64_t keys = min<int64_t>(L, s.Tk - j);
      for (int64_t f = 0; f < s.A; f += L) {
        Vec<float> square[L] = {};
        const int64_t n = min<int64_t>(L, s.A - f);
        for (int64_t i = 0; i < n; ++i) square[i] = load(dkey_lanes + (j * s.A) + (f + i) * L);
        transpose<float>(square);
        for (int64_t i = 0; i < keys; ++i) {
          C* row = dkey + (j + i) * As + f;
          store(row, load(row) + 4.0f * square[i]);
        }
      }
    }
  }

  // ---- through tanh, features in lanes
  // ---------------------------------------------------------------------------

  void slopes_of_block(int64_t b, int64_t count, C* dkey, C* dweight) {
    if (key.data == nullptr) key = matrix(a.key, s.key_of[b], s.Tk, s.A, key_copy);
    fill(dquery, count * As, C(0));
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) slopes<kTogether>(i, dkey, dweight);
    for (; i < count; ++i) slopes<1>(i, dkey, dweight);
  }

  // For R queries and all keys.
  template <int R>
  SEQMEM_INLINE void slopes(int64_t start, C* dkey, C* dweight) {
    const C *q[R], *g[R];
    C* dq[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      q[r] = query.row(start + r);
      g[r] = ds + (start + r) * Ks;
      dq[r] = dquery + (start + r) * As;
    }
    for (int64_t j = 0; j < s.Tk; ++j) {
      bool idle = true;  // masked, or too little weight to count
      Vec<C> gradient[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        idle &= g[r][j] == 0;
        gradient[r] = splat(g[r][j]);
      }
      if (idle) continue;
      const C* k = key.row(j);
      C* dk = dkey + j * As;
      for (int64_t v = 0; v < As; v += L) {
        const Vec<C> x = load(k + v);
        Vec<C> dk_sum = load(dk + v), dw_sum = load(dweight + v);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec<C> t = squash(load(q[r] + v) + x);
          const Vec<C> gt = gradient[r] * t;
          const Vec<C> slope = gradient[r] - gt * t;
          dw_sum += gt;
          dk_sum += slope;
          store(dq[r] + v, load(dq[r] + v) + slope);
        }
        store(dk + v, dk_sum);
        store(dweight + v, dw_sum);
      }
    }
  }
};

int64_t workspace(Storage storage, const Shape& s, int threads) {
  return with_storage(storage, [&](auto tag) {
    return BackwardRun<decltype(tag)>(s, Backward{}).place(nullptr, 0, threads);
  });
}

void run(Storage storage, const Shape& s, const Backward& a, int thread, int threads,
         SpinBarrier& barrier) {
  with_storage(storage, [&](auto tag) {
    BackwardRun<decltype(tag)> call(s, a);
    call.place(static_cast<char*>(a.workspace), thread, threads);
    call.run(thread, threads, barrier);
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
const BackwardKernel backward_kernel = {workspace, run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::additive_attention
