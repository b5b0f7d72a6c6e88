// Attention forward. Threads take tasks, parts of a batch's queries, and go through each in blocks
// of at most 24 queries, so few that their score rows stay in the L2 cache:
//   once a batch  keys [Tk, D] packed into panels [D][4 L keys], where many queries use them;
//                 values [Tk, Dv] packed into panels [Tk][4 L columns], unless they may be read
//                 where they are stored (`values_in_place`)
//   pass 1  scores[rows, Tk] = (scale query) key^T     a panel, or L keys, in L1 for all the rows
//   pass 2  scores -> e^(score - highest), masked; their sums
//   pass 3  weights[rows, Tk] = scores / sum, stored; past the caches where they are large
//   pass 4  output[rows, Dv] = (scores value) / sum    128 rows of a panel in L1 for all the rows
// Entmax takes a row to weights of sum 1 in pass 2. Its values are copied to rows [Tk, Dv]: pass 4
// adds up those that a row has a weight for, where these are few.
#include "../common/past_caches.h"
#include "attention_common.h"
#include "attention_softmax.h"
#include "attention_sparse_rows.h"

namespace seqmem::attention {
namespace {

constexpr int64_t kBlockBytes = 192 << 10;
constexpr int64_t kMaxForwardRows = 24;    // of a block
constexpr int64_t kPastCaches = 8 << 20;   // bytes of weights from which on they bypass the caches
constexpr int64_t kRowsWorthPacking = 64;  // with fewer queries, values are read in place
constexpr int64_t kKeysInPlace = 128;      // whose values are multiplied at once where in place

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

// scores[r][j] = query[r] . key j, from keys that are contiguous in their features; queries are
// `query_stride` apart, score rows `stride`.
template <class S, class C = compute_t<S>>
void score_in_place(int64_t rows, int64_t keys, int64_t width, const C* query, int64_t query_stride,
                    const Rows<S>& key, C* scores, int64_t stride) {
  constexpr int L = kLanes<C>;
  const bool tail = width > L && width % L != 0;
  const int64_t D = tail ? width / L * L : width;
  for (int64_t first = 0; first < keys; first += L) {
    for_row_blocks<C>(rows, [&](auto block, int64_t start) {
      constexpr int R = decltype(block)::value;
      const C* q[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) q[r] = query + (start + r) * query_stride;
      for (int64_t l = 0; l < L; l += 4) {
        const S* from[4];
        SEQMEM_UNROLL
        for (int i = 0; i < 4; ++i) from[i] = key.row(min(first + l + i, keys - 1));
        Vec<C> sums[R][4];
        start_sums(sums);
        tile_dot<R, 4, C, S>(D, q, from, sums);
        if (tail) tail_dot<R, 4, C, S>(width, q, from, sums);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r)
          store_sums4<C>(scores + (start + r) * stride + first + l, sums[r]);
      }
    });
  }
}

// acc[r][v] += sum_k a[r][k] b[k * stride + v * L], but the last vector is b[k * stride + last].
// Few accumulators would wait for each other: there H steps have separate sums.
template <int R, int V, class C>
SEQMEM_INLINE void tile_in_place(int64_t K, const C* const* a, const C* b, int64_t last,
                                 int64_t stride, Vec<C> (&acc)[R][V]) {
  constexpr int L = kLanes<C>;
  constexpr int H = R * V <= 3 ? 4 : R * V <= 6 ? 2 : 1;
  Vec<C> partial[H][R][V] = {};
  SEQMEM_UNROLL
  for (int h = 0; h < H; ++h) SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int v = 0; v < V; ++v) {
    if (h == 0) partial[0][r][v] = acc[r][v];
    opaque(partial[h][r][v]);
  }
  auto one = [&](int64_t k, int h) __attribute__((always_inline)) {
    Vec<C> x[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) x[r] = splat(a[r][k]);
    SEQMEM_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vec<C> w = load(b + k * stride + (v == V - 1 ? last : v * L));
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) partial[h][r][v] += x[r] * w;
    }
  };
  int64_t k = 0;
  for (; k + H <= K; k += H) SEQMEM_UNROLL
  for (int h = 0; h < H; ++h) one(k + h, h);
  for (; k < K; ++k) one(k, 0);
  SEQMEM_UNROLL
  for (int r = 0; r < R; ++r) SEQMEM_UNROLL
  for (int v = 0; v < V; ++v) {
    acc[r][v] = partial[0][r][v];
    SEQMEM_UNROLL
    for (int h = 1; h < H; ++h) acc[r][v] += partial[h][r][v];
  }
}

// out[r] = sum_k a[r][k] b[k] for `rows` rows, with b read in place, `width` >= L columns: the last
// vector of its rows ends where the row ends, and overlaps the one before. In `out` they do not.
template <class C>
void multiply_in_place(int64_t rows, int64_t K, int64_t width, const C* a, int64_t a_stride,
                       const C* b, int64_t b_stride, C* out, int64_t out_stride) {
  constexpr int L = kLanes<C>;
  // Rows of b wider than a tile must still be in the L1 cache for their next tile.
  const int64_t chunk = width <= 4 * L ? K : kKeysInPlace;
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t n = min(chunk, K - k);
    // Tiles as even as they can be: one vector alone would wait for its sums.
    int64_t tiles = ceil_div(width, 4 * L), vectors = 0;
    for (int64_t first = 0; first < width; first += vectors * L, --tiles) {
      vectors = ceil_div(ceil_div(width - first, L), tiles);
      for_count<4>(vectors, [&](auto constant) {
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
          tile_in_place<R, V, C>(n, from, b + k * b_stride + first, last, b_stride, acc);
          SEQMEM_UNROLL
          for (int r = 0; r < R; ++r) SEQMEM_UNROLL
          for (int v = 0; v < V; ++v) store(to + r * out_stride + v * L, acc[r][v]);
        });
      });
    }
  }
}

template <class S>
class ForwardRun : KernelRun<Forward, ThreadOf<Shape, Plan>> {
  using C = compute_t<S>;
  static constexpr int L = kLanes<C>;

  // Query rows of a block; stride of score rows
  const int64_t block = block_rows<C>(s.Tq, s.Tk, 1, kBlockBytes, kMaxForwardRows);
  const int64_t stride = score_stride<C>(s.Tk), D_pad = padded<C>(s.D), Dv_pad = padded<C>(s.Dv);
  const bool sparse = s.alpha != 1;  // entmax
  const bool values_in_place = !sparse && std::is_same_v<S, C> && a.value.columns == 1 &&
                               s.Dv >= L && !(s.Tq >= kRowsWorthPacking && s.Dv % (4 * L) == 0);
  const bool past_caches = s.N * s.Tq * s.Tk * int64_t(sizeof(S)) >= kPastCaches && s.Tk % L == 0 &&
                           reinterpret_cast<uintptr_t>(a.weights) % sizeof(Vec<C>) == 0;

  C *key_panels, *value_panels, *value_rows;
  C *queries, *scores, *out;  // of a block: [block, D_pad], [block, stride], [block, Dv_pad]
  C* mask_copy;               // [block, stride]
  char* line_buffer;          // for entmax of a row
  int64_t* at;                // keys that have a weight
  C* kept;                    // their weights
  int64_t weights;            // of a block that are not zero

 public:
  using KernelRun<Forward, ThreadOf<Shape, Plan>>::KernelRun;

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      key_panels = take.array<C>(plan.pack ? padded<C>(s.Tk) * s.D : 0);
      value_panels = take.array<C>(values_in_place || sparse ? 0 : s.Tk * Dv_pad);
      value_rows = take.array<C>(sparse ? s.Tk * Dv_pad : 0);
      queries = take.array<C>(block * D_pad);
      scores = take.array<C>(block * stride);
      out = take.array<C>(block * Dv_pad);
      mask_copy = take.array<C>(copies_mask<S>(s, a.mask) ? block * stride : 0);
      line_buffer = take.array<char>(sparse ? line_bytes(stride) : 0);
      at = take.array<int64_t>(sparse ? filled<C>(s.Tk) : 0);
      kept = take.array<C>(sparse ? filled<C>(s.Tk) : 0);
    });
    return take.used();
  }

  void run() {
    int64_t packed = -1;  // the batch whose keys and values the panels hold
    Task task;
    while (take_task(s, plan, block, task)) {
      if (task.n != packed) pack(packed = task.n);
      for (int64_t i = task.begin; i < task.end; i += block)
        run_block(task.n, i, min(block, task.end - i));
    }
    if (past_caches) settle_stores();
  }

 private:
  void pack(int64_t n) {
    if (plan.pack) pack_lanes<S>(key_panels, Rows<S>(a.key, n), s.Tk, s.D);
    if (sparse) return copy_rows<S>(value_rows, Rows<S>(a.value, n), s.Tk, s.Dv, C(1));
    if (!values_in_place) pack_columns<S>(value_panels, Rows<S>(a.value, n), s.Tk, s.Dv);
  }

  void run_block(int64_t n, int64_t i, int64_t rows) {
    const int64_t keys = visible_keys(s, i + rows);
    MaskRows<C> mask;
    if (s.mask != MaskKind::None)
      mask_rows<S>(mask, a.mask, s.mask, n, i, rows, keys, mask_copy, stride);
    const Rows<S> query(a.query, n), key(a.key, n);
    for (int64_t r = 0; r < rows; ++r)
      copy_row<S>(queries + r * D_pad, query.row(i + r), query.columns, s.D, C(s.scale));
    if (plan.pack) {
      multiply_packed_lanes(rows, keys, s.D, queries, D_pad, key_panels, s.Tk, scores, stride);
    } else {
      score_in_place<S>(rows, keys, s.D, queries, D_pad, key, scores, stride);
    }
    C inverse[kMaxRows];
    weights = 0;
    for (int64_t r = 0; r < rows; ++r) {
      C* row = scores + r * stride;
      inverse[r] = normalise(row, keys, masked_row(i, r, row, keys, mask));
      write_weights(static_cast<S*>(a.weights) + ((n * s.Tq + i + r) * s.Tk), row, keys,
                    inverse[r]);
    }
    if (sparse) {
      multiply_values(rows, keys);
    } else if (values_in_place) {
      if constexpr (std::is_same_v<S, C>)
        multiply_in_place<C>(rows, keys, s.Dv, scores, stride, Rows<S>(a.value, n).data,
                             a.value.rows, out, Dv_pad);
    } else {
      multiply_packed_columns(rows, keys, Dv_pad, scores, stride, value_panels, s.Tk, out, Dv_pad);
    }
    for (int64_t r = 0; r < rows; ++r) {
      C* row = out + r * Dv_pad;
      S* to = static_cast<S*>(a.output) + (n * s.Tq + i + r) * s.Dv;
      if (values_in_place) {  // the last vector first, which ends where the row ends
        store(to + s.Dv - L, inverse[r] * load(row + Dv_pad - L));
        for (int64_t j = 0; j + L <= s.Dv; j += L) store(to + j, inverse[r] * load(row + j));
      } else {
        store_scaled(to, row, s.Dv, inverse[r]);
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

  // Masked scores -> weights that still have to be multiplied by what it returns.
  C normalise(C* row, int64_t keys, C highest) {
    if (!sparse) return C(1) / exponentials<C>(row, keys, highest);
    weights += entmax_row(row, keys, highest, s.alpha, line_buffer, stride);
    return row[0] == row[0] ? C(1) : row[0];
  }

  void multiply_values(int64_t rows, int64_t keys) {
    if (weights * kKeysPerWeight > rows * keys)
      return multiply_in_place<C>(rows, keys, Dv_pad, scores, stride, value_rows, Dv_pad, out,
                                  Dv_pad);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = find_weights(scores + r * stride, keys, at, kept);
      gather_sum(n, at, kept, value_rows, Dv_pad, out + r * Dv_pad);
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

}  // namespace

const Kernel<Forward, Shape, Plan> SEQMEM_ISA::forward_kernel =
    Entry<ForwardRun, Types::All, Forward, Shape, Plan>::table;

}  // namespace seqmem::attention
