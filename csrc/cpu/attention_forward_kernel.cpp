// Attention forward. A block of query rows goes through scores, softmax and the product with the
// values while its score rows are in the second-level cache; the weights are written once.
#include "attention_common.h"

namespace seqmem::attention {
namespace {

template <class C>
constexpr C kInfinity = std::is_same_v<C, float> ? C(__builtin_inff()) : C(__builtin_inf());

constexpr double kMaskedScore = -1e9;

// A block of score rows and what turns products into scores.
template <class C>
struct ScoreBlock {
  int64_t rows, keys;  // keys: how many are visible to some row of the block
  int64_t D;
  int64_t first_query;  // of the block
  bool causal;
  MaskKind kind;
  MaskRows<C> mask;
  const C* query[kMostRows];  // scaled
  C* scores;                  // [rows, stride]
  int64_t stride;
  Vec<C> most[kMostRows];  // running maxima of the lanes

  // Masks one vector of scores, from key `at`, and keeps its maximum.
  SEQMEM_INLINE void finish(int64_t r, int64_t at, Vec<C> x) {
    const int n = static_cast<int>(min<int64_t>(keys - at, kLanes<C>));
    if (kind == MaskKind::Allowed) {
      x = allowed_lanes<C>(mask.allowed[r] + at, n) ? x : splat(C(kMaskedScore));
    } else if (kind == MaskKind::Added) {
      x += load_n(mask.added[r] + at, n);
    }
    int64_t last = keys;
    if (causal) last = min(last, first_query + r + 1);
    if (at + kLanes<C> > last) {
      using I = typename std::remove_reference_t<decltype(lane_numbers<C>()[0])>;
      const IntVec<C> beyond = lane_numbers<C>() >= static_cast<I>(max<int64_t>(last - at, 0));
      x = beyond ? splat(-kInfinity<C>) : x;
    }
    most[r] = x > most[r] ? x : most[r];
    store(scores + r * stride + at, x);
  }
};

// Scores from keys packed by pack_lanes; total_keys is how many were packed.
template <class C>
void packed_scores(ScoreBlock<C>& b, const C* panels, int64_t total_keys) {
  constexpr int L = kLanes<C>;
  for (int64_t first = 0; first < b.keys; first += 4 * L) {
    const C* panel = panels + first * b.D;
    const int64_t step = L * min<int64_t>(4, ceil_div(total_keys - first, L));
    with_vectors(min<int64_t>(4, ceil_div(b.keys - first, L)), [&](auto constant) {
      constexpr int V = decltype(constant)::value;
      for_row_blocks<C>(b.rows, [&](auto block, int64_t start) {
        constexpr int R = decltype(block)::value;
        Vec<C> acc[R][V] = {};
        tile_multiply<R, V, C>(b.D, b.query + start, 1, panel, L, step, acc);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) SEQMEM_UNROLL
        for (int v = 0; v < V; ++v) b.finish(start + r, first + v * L, acc[r][v]);
      });
    });
  }
}

// Scores from keys as they lie, contiguous in their features.
template <class S, class C = compute_t<S>>
void direct_scores(ScoreBlock<C>& b, const Rows<S>& key) {
  constexpr int L = kLanes<C>;
  for (int64_t first = 0; first < b.keys; first += L) {
    for_row_blocks<C>(b.rows, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      C lanes[R][(L + 3) / 4 * 4];
      for (int64_t l = 0; l < L; l += 4) {
        const S* from[4];
        SEQMEM_UNROLL
        for (int i = 0; i < 4; ++i) from[i] = key.row(min(first + l + i, b.keys - 1));
        Vec<C> sums[R][4] = {};
        tile_dot<R, 4, C, S>(b.D, b.query + start, from, sums);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) store_sums4<C>(lanes[r] + l, sums[r]);
      }
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) b.finish(start + r, first, load(lanes[r]));
    });
  }
}

// scores -> e^(score - most) in place; returns the row's sum. What lies too low for a normal
// number becomes zero: denormals would cost several times the arithmetic.
template <class C>
C exponentials(C* row, int64_t n, Vec<C> most_lanes) {
  constexpr int L = kLanes<C>;
  C most = most_lanes[0];
  for (int i = 1; i < L; ++i) most = most_lanes[i] > most ? most_lanes[i] : most;
  Vec<C> total[4] = {};
  for (int64_t i = 0; i < n; i += 4 * L) {
    Vec<C> x[4];
    ExpParts<C> e[4];
    SEQMEM_UNROLL
    for (int v = 0; v < 4; ++v) x[v] = load(row + i + v * L) - most;
    exp_parts<4, C>(x, e);
    SEQMEM_UNROLL
    for (int v = 0; v < 4; ++v) {
      Vec<C> y = e[v].power + e[v].power * e[v].fraction;
      y = x[v] < -ExpConstants<C>::limit ? Vec<C>{} : y;
      if (i + v * L < n) {
        total[v] += y;
        store(row + i + v * L, y);
      }
    }
  }
  return sum<C>((total[0] + total[1]) + (total[2] + total[3]));
}

template <class S>
class ForwardRun {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  const Shape& s;
  const Plan& plan;
  const Forward& a;
  const int64_t block, stride;
  const int64_t Dp, Dvp;
  const bool values_direct;

  C *panels, *columns, *queries, *scores, *out, *mask_buffer;

 public:
  ForwardRun(const Shape& s, const Plan& plan, const Forward& a)
      : s(s),
        plan(plan),
        a(a),
        block(block_rows<C>(s.Tq, s.Tk, 1)),
        stride(row_stride<C>(s.Tk)),
        Dp(padded<C>(s.D)),
        Dvp(padded<C>(s.Dv)),
        values_direct(!plan.pack && std::is_same_v<S, C> && a.value.columns == 1 && s.Dv == Dvp) {}

  int64_t place(char* base, int thread, int threads) {
    Carver take(base);
    for (int i = 0; i < threads; ++i) {
      C* own_panels = take.array<C>(plan.pack ? padded<C>(s.Tk) * s.D : 0);
      C* own_columns = take.array<C>(values_direct ? 0 : s.Tk * Dvp);
      C* own_queries = take.array<C>(block * Dp);
      C* own_scores = take.array<C>(block * stride);
      C* own_out = take.array<C>(block * Dvp);
      C* own_mask = take.array<C>(copies_mask<S>(s, a.mask) ? block * stride : 0);
      if (i != thread) continue;
      panels = own_panels, columns = own_columns, queries = own_queries, scores = own_scores;
      out = own_out, mask_buffer = own_mask;
    }
    return take.used();
  }

  void run() {
    int64_t held = -1;  // the batch whose keys and values are packed
    Task task;
    while (take_task(s, plan, block, task)) {
      if (task.n != held) pack(held = task.n);
      for (int64_t i = task.begin; i < task.end; i += block)
        run_block(task.n, i, min(block, task.end - i));
    }
  }

 private:
  void pack(int64_t n) {
    if (plan.pack) pack_lanes<S>(panels, Rows<S>(a.key, n), s.Tk, s.D);
    if (!values_direct) pack_columns<S>(columns, Rows<S>(a.value, n), s.Tk, s.Dv);
  }

  void run_block(int64_t n, int64_t i, int64_t rows) {
    ScoreBlock<C> b;
    b.rows = rows, b.keys = visible_keys(s, i + rows), b.D = s.D, b.first_query = i;
    b.causal = s.causal, b.kind = s.mask, b.scores = scores, b.stride = stride;
    if (s.mask != MaskKind::None)
      mask_rows<S>(b.mask, a.mask, s.mask, n, i, rows, b.keys, mask_buffer, stride);
    const Rows<S> query(a.query, n);
    for (int64_t r = 0; r < rows; ++r) {
      copy_row<S>(queries + r * Dp, query.row(i + r), query.columns, s.D, C(s.scale));
      b.query[r] = queries + r * Dp;
      b.most[r] = splat(-kInfinity<C>);
    }
    if (plan.pack) {
      packed_scores(b, panels, s.Tk);
    } else {
      direct_scores<S>(b, Rows<S>(a.key, n));
    }
    C inverse[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      C* row = scores + r * stride;
      inverse[r] = C(1) / exponentials<C>(row, b.keys, b.most[r]);
      write_weights(static_cast<S*>(a.weights) + ((n * s.Tq + i + r) * s.Tk), row, b.keys,
                    inverse[r]);
    }
    Columns<C> value = {columns, 0, s.Tk};
    if constexpr (std::is_same_v<S, C>)
      if (values_direct) value = {Rows<S>(a.value, n).data, a.value.rows, 0};
    multiply_rows<C>(rows, b.keys, Dvp, scores, stride, value, out, Dvp);
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * Dvp;
      for (int64_t j = 0; j < Dvp; j += L) store(row + j, inverse[r] * load(row + j));
      store_row(static_cast<S*>(a.output) + (n * s.Tq + i + r) * s.Dv, row, s.Dv);
    }
  }

  void write_weights(S* to, const C* row, int64_t keys, C inverse) {
    int64_t j = 0;
    for (; j + L <= keys; j += L) store(to + j, inverse * load(row + j));
    if (j < keys) store_n(to + j, inverse * load(row + j), static_cast<int>(keys - j));
    // Beyond the diagonal: zero, or NaN where the whole row is.
    const Vec<C> rest = splat(inverse * C(0));
    for (j = keys; j < s.Tk; j += L)
      store_n(to + j, rest, static_cast<int>(min<int64_t>(L, s.Tk - j)));
  }
};

int64_t workspace(Storage storage, const Shape& s, const Plan& plan, const Forward& a,
                  int threads) {
  return with_storage(storage, [&](auto tag) {
    return ForwardRun<decltype(tag)>(s, plan, a).place(nullptr, 0, threads);
  });
}

void run(Storage storage, const Shape& s, const Plan& plan, const Forward& a, int thread,
         int threads) {
  with_storage(storage, [&](auto tag) {
    ForwardRun<decltype(tag)> call(s, plan, a);
    call.place(static_cast<char*>(a.workspace), thread, threads);
    call.run();
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
extern const ForwardKernel forward_kernel;
const ForwardKernel forward_kernel = {workspace, run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::attention
