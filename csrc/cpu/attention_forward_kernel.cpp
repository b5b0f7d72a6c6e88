// Attention forward. A block of query rows goes through scores, softmax and the product with the
// values while its score rows are in the second-level cache; the weights are written once.
#include "../common/past_caches.h"
#include "attention_common.h"
#include "attention_softmax.h"

namespace seqmem::attention {
namespace {

constexpr int64_t kBlockBytes = 192 << 10;
constexpr int64_t kMostForwardRows = 24;   // of a block
constexpr int64_t kPastCaches = 8 << 20;   // bytes of weights that are written past the caches
constexpr int64_t kRowsWorthPacking = 64;  // below, values are read where they lie
constexpr int64_t kKeysInPlace = 128;      // whose values are gone through at once where they lie

// A block of query rows on its way to scores.
template <class C>
struct Block {
  int64_t rows, keys;  // keys: how many are visible to some row of the block
  int64_t D;
  const C* query[kMostRows];  // scaled
  C* scores;                  // [rows, stride]
  int64_t stride;
};

// Scores from keys packed by pack_lanes; total_keys is how many were packed.
template <class C>
void packed_scores(const Block<C>& b, const C* panels, int64_t total_keys) {
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
        for (int v = 0; v < V; ++v)
          store(b.scores + (start + r) * b.stride + first + v * L, acc[r][v]);
      });
    });
  }
}

// sums[r][w] += a[r] . b[w] over the last D % L features, by vectors that end where the rows end:
// the features before them, already in the sums, are zeroed on both sides.
template <int R, int W, class C, class S>
SEQMEM_INLINE void tail_dot(int64_t D, const C* const* a, const S* const* b, Vec<C> (&sums)[R][W]) {
  constexpr int L = kLanes<C>;
  const IntVec<C> rest = lane_numbers<C>() >= static_cast<int>(L - D % L);
  Vec<C> x[R];
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) x[r] = rest ? load(a[r] + D - L) : Vec<C>{};
  SEQMEM_UNROLL
  for (int w = 0; w < W; ++w) {
    const Vec<C> y = rest ? load(b[w] + D - L) : Vec<C>{};
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) sums[r][w] += x[r] * y;
  }
}

// Scores from keys as they lie, contiguous in their features.
template <class S, class C = compute_t<S>>
void direct_scores(const Block<C>& b, const Rows<S>& key) {
  constexpr int L = kLanes<C>;
  const bool tail = b.D > L && b.D % L != 0;
  const int64_t D = tail ? b.D / L * L : b.D;
  for (int64_t first = 0; first < b.keys; first += L) {
    for_row_blocks<C>(b.rows, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      for (int64_t l = 0; l < L; l += 4) {
        const S* from[4];
        SEQMEM_UNROLL
        for (int i = 0; i < 4; ++i) from[i] = key.row(min(first + l + i, b.keys - 1));
        Vec<C> sums[R][4];
        start_sums(sums);
        tile_dot<R, 4, C, S>(D, b.query + start, from, sums);
        if (tail) tail_dot<R, 4, C, S>(b.D, b.query + start, from, sums);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r)
          store_sums4<C>(b.scores + (start + r) * b.stride + first + l, sums[r]);
      }
    });
  }
}

// acc[r][v] += sum_k a[r][k] b[k * step + v * L], the last vector from `last` on instead. Few
// accumulators would wait for each other: there several steps are summed apart.
template <int R, int V, class C>
SEQMEM_INLINE void tile_in_place(int64_t K, const C* const* a, const C* b, int64_t last,
                                 int64_t step, Vec<C> (&acc)[R][V]) {
  constexpr int L = kLanes<C>;
  constexpr int H = R * V <= 3 ? 4 : R * V <= 6 ? 2 : 1;
  Vec<C> apart[H][R][V] = {};
  SEQMEM_UNROLL
  for (int h = 0; h < H; ++h) SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int v = 0; v < V; ++v) {
    if (h == 0) apart[0][r][v] = acc[r][v];
    opaque(apart[h][r][v]);
  }
  auto one = [&](int64_t k, int h) __attribute__((always_inline)) {
    Vec<C> x[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) x[r] = splat(a[r][k]);
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vec<C> w = load(b + k * step + (v == V - 1 ? last : v * L));
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) apart[h][r][v] += x[r] * w;
    }
  };
  int64_t k = 0;
  for (; k + H <= K; k += H) SEQMEM_UNROLL
  for (int h = 0; h < H; ++h) one(k + h, h);
  for (; k < K; ++k) one(k, 0);
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int v = 0; v < V; ++v) {
    acc[r][v] = apart[0][r][v];
    SEQMEM_UNROLL
    for (int h = 1; h < H; ++h) acc[r][v] += apart[h][r][v];
  }
}

// As multiply_rows, b as it lies, `width` >= L columns: the last vector of a row ends where the row
// ends, and overlaps the one before. In `out` the vectors lie one after the other, apart.
template <class C>
void multiply_in_place(int64_t rows, int64_t K, int64_t width, const C* a, int64_t a_stride,
                       const C* b, int64_t step, C* out, int64_t out_stride) {
  constexpr int L = kLanes<C>;
  // Rows of more than one tile shall still be in the first-level cache for their next tile.
  const int64_t chunk = width <= 4 * L ? K : kKeysInPlace;
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t n = min(chunk, K - k);
    // Tiles as even as they can be: one vector alone would wait for its sums.
    int64_t tiles = ceil_div(width, 4 * L), vectors = 0;
    for (int64_t first = 0; first < width; first += vectors * L, --tiles) {
      vectors = ceil_div(ceil_div(width - first, L), tiles);
      with_vectors(vectors, [&](auto constant) {
        constexpr int V = decltype(constant)::value;
        const int64_t last = min<int64_t>((V - 1) * L, width - first - L);
        for_row_blocks<C>(rows, [&](auto block, int64_t start) {
          constexpr int R = decltype(block)::value;
          const C* from[R];
          Vec<C> acc[R][V] = {};
          C* to = out + start * out_stride + first;
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) {
            from[r] = a + (start + r) * a_stride + k;
            SEQMEM_UNROLL
            for (int v = 0; v < V; ++v)
              if (k > 0) acc[r][v] = load(to + r * out_stride + v * L);
          }
          tile_in_place<R, V, C>(n, from, b + k * step + first, last, step, acc);
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int v = 0; v < V; ++v) store(to + r * out_stride + v * L, acc[r][v]);
        });
      });
    }
  }
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
  const bool values_direct, past_caches;

  C *panels = nullptr, *columns = nullptr, *queries = nullptr, *scores = nullptr, *out = nullptr,
    *mask_buffer = nullptr;

 public:
  ForwardRun(const Shape& s, const Plan& plan, const Forward& a)
      : s(s),
        plan(plan),
        a(a),
        block(block_rows<C>(s.Tq, s.Tk, 1, kBlockBytes, kMostForwardRows)),
        stride(row_stride<C>(s.Tk)),
        Dp(padded<C>(s.D)),
        Dvp(padded<C>(s.Dv)),
        values_direct(std::is_same_v<S, C> && a.value.columns == 1 && s.Dv >= L &&
                      !(s.Tq >= kRowsWorthPacking && s.Dv % (4 * L) == 0)),
        past_caches(s.N * s.Tq * s.Tk * int64_t(sizeof(S)) >= kPastCaches && s.Tk % L == 0 &&
                    reinterpret_cast<uintptr_t>(a.weights) % sizeof(Vec<C>) == 0) {}

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
    if (past_caches) settle_stores();
  }

 private:
  void pack(int64_t n) {
    if (plan.pack) pack_lanes<S>(panels, Rows<S>(a.key, n), s.Tk, s.D);
    if (!values_direct) pack_columns<S>(columns, Rows<S>(a.value, n), s.Tk, s.Dv);
  }

  void run_block(int64_t n, int64_t i, int64_t rows) {
    Block<C> b;
    b.rows = rows, b.keys = visible_keys(s, i + rows), b.D = s.D, b.scores = scores;
    b.stride = stride;
    MaskRows<C> mask;
    if (s.mask != MaskKind::None)
      mask_rows<S>(mask, a.mask, s.mask, n, i, rows, b.keys, mask_buffer, stride);
    const Rows<S> query(a.query, n);
    for (int64_t r = 0; r < rows; ++r) {
      copy_row<S>(queries + r * Dp, query.row(i + r), query.columns, s.D, C(s.scale));
      b.query[r] = queries + r * Dp;
    }
    if (plan.pack) {
      packed_scores(b, panels, s.Tk);
    } else {
      direct_scores<S>(b, Rows<S>(a.key, n));
    }
    C inverse[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      C* row = scores + r * stride;
      inverse[r] = C(1) / exponentials<C>(row, b.keys, masked_row(i, r, row, b.keys, mask));
      write_weights(static_cast<S*>(a.weights) + ((n * s.Tq + i + r) * s.Tk), row, b.keys,
                    inverse[r]);
    }
    if (values_direct) {
      if constexpr (std::is_same_v<S, C>)
        multiply_in_place<C>(rows, b.keys, s.Dv, scores, stride, Rows<S>(a.value, n).data,
                             a.value.rows, out, Dvp);
    } else {
      multiply_rows<C>(rows, b.keys, Dvp, scores, stride, columns, s.Tk, out, Dvp);
    }
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * Dvp;
      S* to = static_cast<S*>(a.output) + (n * s.Tq + i + r) * s.Dv;
      if (values_direct) {  // the last vector first, which ends where the row ends
        store(to + s.Dv - L, inverse[r] * load(row + Dvp - L));
        for (int64_t j = 0; j + L <= s.Dv; j += L) store(to + j, inverse[r] * load(row + j));
      } else {
        for (int64_t j = 0; j < Dvp; j += L) store(row + j, inverse[r] * load(row + j));
        store_row(to, row, s.Dv);
      }
    }
  }

  // The masked row's maximum.
  C masked_row(int64_t i, int64_t r, C* row, int64_t keys, const MaskRows<C>& mask) {
    const int64_t last = s.causal ? min(keys, i + r + 1) : keys;
    switch (s.mask) {
      case MaskKind::Allowed:
        return mask_row<C, MaskKind::Allowed>(row, keys, last, mask.allowed[r], nullptr);
      case MaskKind::Added:
        return mask_row<C, MaskKind::Added>(row, keys, last, nullptr, mask.added[r]);
      default: return mask_row<C, MaskKind::None>(row, keys, last, nullptr, nullptr);
    }
  }

  void write_weights(S* to, const C* row, int64_t keys, C inverse) {
    int64_t j = 0;
    if (past_caches)
      for (; j + L <= keys; j += L) store_past_caches(to + j, inverse * load(row + j));
    for (; j + L <= keys; j += L) store(to + j, inverse * load(row + j));
    if (j < keys && j > 0) {
      store(to + keys - L, inverse * load(row + keys - L));
    } else if (j < keys) {
      store_n(to, inverse * load(row), static_cast<int>(keys));
    }
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
const ForwardKernel forward_kernel = {workspace, run};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::attention
