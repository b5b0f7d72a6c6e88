// Additive attention forward: scores, softmax and the weighted sum of a block of queries at once,
// so that nothing larger than a block of scores exists.
#include "additive_attention_common.h"

namespace seqmem::additive_attention {
namespace {

template <class S>
class ForwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kRows = 16;  // queries of a block
  static constexpr C kMasked = C(-1e9);

  static constexpr int kTogether = 2;  // queries, and vectors of keys, that share a pass

  const Shape& s;
  const Forward& a;
  const int64_t blocks, As, Ks, Ds;  // blocks of a batch row; A, Tk and Dv as whole vectors
  const int64_t panels;              // vectors of keys, an even number
  const bool tries_factors;

  C *weight = nullptr, *key_copy = nullptr, *value_copy = nullptr, *query_copy = nullptr,
    *scores = nullptr, *key_factors = nullptr, *query_high = nullptr, *query_low = nullptr;
  Matrix<C> query, key, value;

 public:
  ForwardRun(const Shape& s, const Forward& a)
      : s(s),
        a(a),
        blocks(ceil_div(s.Tq, kRows)),
        As(padded<C>(s.A)),
        Ks(padded<C>(s.Tk)),
        Ds(padded<C>(s.Dv)),
        panels(ceil_div(s.Tk, kTogether * L) * kTogether),
        tries_factors(worth_factors<C>(s)) {}

  // Places one thread's buffers; returns the bytes used. Called with a null base to size them.
  int64_t place(char* base) {
    Carver take(base);
    weight = take.array<C>(As);
    key_copy = take.array<C>(s.Tk * As);
    value_copy = take.array<C>(s.Tk * Ds);
    query_copy = take.array<C>(kRows * As);
    scores = take.array<C>(kRows * panels * L);
    key_factors = take.array<C>(tries_factors ? panels * L * s.A * 2 : 0);
    query_high = take.array<C>(tries_factors ? kRows * As : 0);
    query_low = take.array<C>(tries_factors ? kRows * As : 0);
    return take.used();
  }

  void run(int thread, int threads) {
    copy_rows(static_cast<const S*>(a.score_weight), 1, s.A, weight, As);
    const Share mine = share(s.B * blocks, thread, threads);
    int64_t current = -1;
    bool factors = false;
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t b = unit / blocks, first = unit % blocks * kRows;
      if (b != current) {
        factors = factor_keys(b);
        key = {};
        value = matrix(a.value, s.value_of[b], s.Tk, s.Dv, value_copy);
        current = b;
      }
      run_block(b, first, min(kRows, s.Tq - first), factors);
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

  void run_block(int64_t b, int64_t first, int64_t count, bool factors) {
    const int64_t at = s.query_of[b] * s.Tq + first;
    query = as_rows(static_cast<const S*>(a.query) + at * s.A, count, s.A, query_copy);
    if (!factors || !score_by_factors(b, first, count)) {
      if (key.data == nullptr) key = matrix(a.key, s.key_of[b], s.Tk, s.A, key_copy);
      for (int64_t i = 0; i < count; ++i)
        score_row(query.row(i), mask_row(s, a.keep, b, first + i), scores_of(i));
    }
    for (int64_t i = 0; i < count; ++i) {
      C* row = scores_of(i);
      if (a.keep != nullptr) {
        const bool* keep = mask_row(s, a.keep, b, first + i);
        for (int64_t j = 0; j < s.Tk; ++j) row[j] = keep[j] ? row[j] : kMasked;
      }
      if (a.bias != nullptr)
        add_bias(row, mask_row(s, static_cast<const S*>(a.bias), b, first + i));
      softmax(row);
      store_row(static_cast<S*>(a.weights) + (b * s.Tq + first + i) * s.Tk, row, s.Tk);
    }
    weigh_values(static_cast<S*>(a.output) + (b * s.Tq + first) * s.Dv, count);
  }

  C* scores_of(int64_t i) const { return scores + i * panels * L; }

  // The scores of a block, keys in lanes; masked tiles cost nothing. False where a query is too
  // large for it.
  bool score_by_factors([[maybe_unused]] int64_t b, [[maybe_unused]] int64_t first,
                        [[maybe_unused]] int64_t count) {
    if constexpr (std::is_same_v<C, float>) {
      if (!split_queries(query, count, As, query_high, query_low)) return false;
      for (int64_t panel = 0; panel < panels; panel += kTogether) {
        const int64_t j = panel * L, n = min<int64_t>(kTogether * L, s.Tk - j);
        int64_t i = 0;
        for (; i < count; i += kTogether) {
          const int64_t rows = min<int64_t>(kTogether, count - i);
          bool kept = a.keep == nullptr;
          for (int64_t r = 0; r < rows && !kept; ++r)
            kept = any(mask_row(s, a.keep, b, first + i + r) + j, n);
          if (!kept) continue;
          if (rows == kTogether) {
            score_tile<kTogether>(i, panel);
          } else {
            score_tile<1>(i, panel);
          }
        }
      }
      return true;
    }
    return false;
  }

  template <int R>
  SEQMEM_INLINE void score_tile(int64_t i, int64_t panel) {
    Vec<float> acc[R][kTogether];
    start_sums(acc);
    const float* keys = key_factors + panel * L * s.A * 2;
    const int64_t next = L * s.A * 2;  // panel
    for (int64_t f = 0; f < s.A; ++f) {
      const Vec<float> w = splat(weight[f]);
      Factor k[kTogether];
      SEQMEM_UNROLL
      for (int p = 0; p < kTogether; ++p)
        k[p] = {load(keys + p * next + f * 2 * L), load(keys + p * next + f * 2 * L + L)};
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t at = (i + r) * As + f;
        const Factor q = {splat(query_high[at]), splat(query_low[at])};
        SEQMEM_UNROLL
        for (int p = 0; p < kTogether; ++p) {
          const Vec<float> m = product_less_one(q, k[p]);
          acc[r][p] += w * (m / (m + 2.0f));
        }
      }
    }
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int p = 0; p < kTogether; ++p) store(scores_of(i + r) + (panel + p) * L, acc[r][p]);
  }

  // row[j] = weight . tanh(q + key_j), four keys at a time; masked fours cost nothing.
  SEQMEM_INLINE void score_row(const C* q, const bool* keep, C* row) {
    for (int64_t j = 0; j < s.Tk; j += 4) {
      const int64_t n = min<int64_t>(4, s.Tk - j);
      if (keep != nullptr && !any(keep + j, n)) continue;
      const C* k[4];
      for (int64_t i = 0; i < 4; ++i) k[i] = key.row(j + min(i, n - 1));
      C sums[4];
      score_four(q, k, sums);
      for (int64_t i = 0; i < n; ++i) row[j + i] = sums[i];
    }
  }

  static bool any(const bool* keep, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= keep[i];
    return found;
  }

  SEQMEM_INLINE void score_four(const C* q, const C* const (&k)[4], C* sums) {
    Vec<C> acc[4];
    start_sums(acc);
    for (int64_t v = 0; v < As; v += L) {
      const Vec<C> x = load(q + v), w = load(weight + v);
      SEQMEM_UNROLL
      for (int i = 0; i < 4; ++i) acc[i] += w * squash(x + load(k[i] + v));
    }
    store_sums4<C>(sums, acc);
  }

  void add_bias(C* row, const S* bias) {
    for (int64_t j = 0; j < s.Tk; j += L) {
      const int n = static_cast<int>(s.Tk - j);
      store_n(row + j, load_n(row + j, n) + load_n(bias + j, n), n);
    }
  }

  // In place; what lies beyond Tk becomes zero.
  void softmax(C* row) {
    constexpr C kLimit = ExpConstants<C>::limit;
    fill(row + s.Tk, Ks - s.Tk, -C(__builtin_inf()));
    Vec<C> top = splat<C>(-C(__builtin_inf()));
    for (int64_t j = 0; j < Ks; j += L) {
      const Vec<C> x = load(row + j);
      top = x > top ? x : top;
    }
    C largest = top[0];
    for (int l = 1; l < L; ++l) largest = max(largest, top[l]);
    Vec<C> total{};
    for (int64_t j = 0; j < Ks; j += L) {
      const Vec<C> x[1] = {load(row + j) - largest};
      const Vec<C> inside[1] = {clamp<C>(x[0], kLimit)};
      ExpParts<C> e[1];
      exp_parts<1, C>(inside, e);
      // Below the limit lie what was masked, and else only denormals.
      const Vec<C> y = x[0] < -kLimit ? Vec<C>{} : e[0].power + e[0].power * e[0].fraction;
      total += y;
      store(row + j, y);
    }
    const C scale = 1 / sum<C>(total);
    for (int64_t j = 0; j < Ks; j += L) store(row + j, load(row + j) * scale);
  }

  // output = weights value, for the block's rows.
  void weigh_values(S* output, int64_t count) {
    for_row_blocks<C>(count, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      int64_t d = 0;
      for (; d + 4 * L <= Ds; d += 4 * L) weigh_tile<R, 4>(output, start, d);
      for (; d < Ds; d += L) weigh_tile<R, 1>(output, start, d);
    });
  }

  template <int R, int NV>
  SEQMEM_INLINE void weigh_tile(S* output, int64_t start, int64_t d) {
    const C* rows[R];
    Vec<C> acc[R][NV];
    start_sums(acc);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) rows[r] = scores_of(start + r);
    tile_multiply<R, NV, C>(s.Tk, rows, 1, value.data + d, L, value.stride, acc);
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = d + v * L;
      store_n(output + (start + r) * s.Dv + at, acc[r][v], static_cast<int>(s.Dv - at));
    }
  }
};

int64_t workspace(Storage storage, const Shape& s, int threads) {
  return with_storage(storage, [&](auto tag) {
    return threads * ForwardRun<decltype(tag)>(s, Forward{}).place(nullptr);
  });
}

void run(Storage storage, const Shape& s, const Forward& a, int thread, int threads) {
  with_storage(storage, [&](auto tag) {
    ForwardRun<decltype(tag)> call(s, a);
    char* base = static_cast<char*>(a.workspace);
    call.place(base + thread * call.place(nullptr));
    call.run(thread, threads);
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
const ForwardKernel forward_kernel = {workspace, run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::additive_attention
