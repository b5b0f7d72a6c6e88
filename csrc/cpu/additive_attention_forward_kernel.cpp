// Additive attention forward. The threads share out blocks of 16 queries; for each block
//   pass 1  scores[16, Tk] = sum_a weight_a tanh(query_a + key_a)
//             from factors: tiles of 2 queries and 2 L keys, key factors [Tk, A, 2] in L2;
//             else a query and 4 keys at once, features in lanes
//   pass 2  scores = softmax over the keys of (scores, masked or biased); stored as weights
//   pass 3  output[16, Dv] = scores value, a panel [Tk, 4 L] of value at a time in L1
// The scores of a block stay in L1 or L2, and nothing larger than a block of scores is ever stored
// but the weights themselves.
#include "../common/softmax.h"
#include "additive_attention_common.h"

namespace seqmem::additive_attention {
namespace {

constexpr int kTile = 2;  // queries, and vectors of keys, of a tile of factors

template <class S>
class ForwardRun : Operands<S> {
  using Base = Operands<S>;
  using Base::L, Base::kBlockRows, Base::s, Base::A_pad, Base::Dv_pad, Base::key_panels;
  using Base::weight, Base::query, Base::key, Base::value, Base::mask_row;
  using typename Base::C;
  static constexpr C kMasked = C(-1e9);

  const Forward& a;
  const int thread, threads;
  const int64_t scores_stride;

  C *scores, *output_block;  // [kBlockRows, scores_stride], [kBlockRows, Dv_pad]

 public:
  ForwardRun(const Shape& s, const Forward& a, int thread, int threads, SpinBarrier&)
      : Base(s, a, ceil_div(s.Tk, kTile * L) * kTile),
        a(a),
        thread(thread),
        threads(threads),
        scores_stride(key_panels * L) {}

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(thread, threads, [&] {
      Base::place(take);
      scores = take.array<C>(kBlockRows * scores_stride);
      output_block = take.array<C>(kBlockRows * Dv_pad);
    });
    return take.used();
  }

  void run() {
    this->read_weight();
    const int64_t blocks = ceil_div(s.Tq, kBlockRows);  // of a batch row
    const Share mine = share(s.B * blocks, thread, threads);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t b = unit / blocks, first = unit % blocks * kBlockRows;
      this->read_row(b, true);
      run_block(b, first, min(kBlockRows, s.Tq - first));
    }
  }

 private:
  void run_block(int64_t b, int64_t first, int64_t count) {
    this->read_queries(first, count);
    if (this->read_query_factors(count)) {
      score_by_factors(first, count);
    } else {
      this->read_keys();
      for (int64_t i = 0; i < count; ++i)
        score_row(query + i * A_pad, mask_row(a.keep, first + i), scores_of(i));
    }
    for (int64_t i = 0; i < count; ++i) {
      C* row = scores_of(i);
      if (const bool* keep = mask_row(a.keep, first + i))
        for (int64_t j = 0; j < s.Tk; ++j) row[j] = keep[j] ? row[j] : kMasked;
      if (const S* bias = mask_row(static_cast<const S*>(a.bias), first + i)) add_bias(row, bias);
      softmax<1>(row, s.Tk);
      store_row(static_cast<S*>(a.weights) + (b * s.Tq + first + i) * s.Tk, row, s.Tk);
    }
    matrix_multiply<false>(count, s.Tk, Dv_pad, scores, scores_stride, value, Dv_pad, output_block,
                           false);
    for (int64_t i = 0; i < count; ++i)
      store_row(static_cast<S*>(a.output) + (b * s.Tq + first + i) * s.Dv,
                output_block + i * Dv_pad, s.Dv);
  }

  C* scores_of(int64_t i) const { return scores + i * scores_stride; }

  static bool any(const bool* keep, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= keep[i];
    return found;
  }

  // The scores of a block, keys in lanes; tiles that are masked as a whole are left out.
  void score_by_factors([[maybe_unused]] int64_t first, [[maybe_unused]] int64_t count) {
    if constexpr (kHasFactors<C>) {
      for (int64_t panel = 0; panel < key_panels; panel += kTile) {
        const int64_t j = panel * L, n = min<int64_t>(kTile * L, s.Tk - j);
        for (int64_t i = 0; i < count; i += kTile) {
          for_count<kTile>(min<int64_t>(kTile, count - i), [&](auto rows) {
            bool kept = a.keep == nullptr;
            for (int64_t r = 0; r < rows.value && !kept; ++r)
              kept = any(mask_row(a.keep, first + i + r) + j, n);
            if (kept) score_tile<rows.value>(i, panel);
          });
        }
      }
    }
  }

  template <int R>
  SEQMEM_INLINE void score_tile(int64_t i, int64_t panel) {
    Vec<float> acc[R][kTile];
    start_sums(acc);
    const int64_t panel_size = L * s.A * 2;
    const float* keys = this->key_factors + panel * panel_size;
    for (int64_t f = 0; f < s.A; ++f) {
      const Vec<float> w = splat(weight[f]);
      Factor k[kTile];
      SEQMEM_UNROLL
      for (int p = 0; p < kTile; ++p)
        k[p] = {load(keys + p * panel_size + f * 2 * L),
                load(keys + p * panel_size + f * 2 * L + L)};
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t offset = (i + r) * A_pad + f;
        const Factor q = {splat(this->query_high[offset]), splat(this->query_low[offset])};
        SEQMEM_UNROLL
        for (int p = 0; p < kTile; ++p) {
          const Vec<float> m = product_minus_one(q, k[p]);
          acc[r][p] += w * (m / (m + 2.0f));
        }
      }
    }
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) SEQMEM_UNROLL
    for (int p = 0; p < kTile; ++p) store(scores_of(i + r) + (panel + p) * L, acc[r][p]);
  }

  // row[j] = weight . tanh(q + key_j), four keys at a time; fours that are all masked are left out.
  SEQMEM_INLINE void score_row(const C* q, const bool* keep, C* row) {
    for (int64_t j = 0; j < s.Tk; j += 4) {
      const int64_t n = min<int64_t>(4, s.Tk - j);
      if (keep != nullptr && !any(keep + j, n)) continue;
      const C* k[4];
      for (int64_t i = 0; i < 4; ++i) k[i] = key + (j + min(i, n - 1)) * A_pad;
      Vec<C> acc[4];
      start_sums(acc);
      for (int64_t v = 0; v < A_pad; v += L) {
        const Vec<C> x = load(q + v), w = load(weight + v);
        SEQMEM_UNROLL
        for (int i = 0; i < 4; ++i) acc[i] += w * rational_tanh(x + load(k[i] + v));
      }
      C sums[4];
      store_sums4<C>(sums, acc);
      for (int64_t i = 0; i < n; ++i) row[j + i] = sums[i];
    }
  }

  void add_bias(C* row, const S* bias) {
    for (int64_t j = 0; j < s.Tk; j += L) {
      const int n = static_cast<int>(s.Tk - j);
      store_n(row + j, load_n(row + j, n) + load_n(bias + j, n), n);
    }
  }
};

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = Entry<ForwardRun, Types::All, Forward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::additive_attention
