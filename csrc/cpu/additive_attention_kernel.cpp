// Additive attention forward. The threads share out blocks of 16 queries; for each block
//   pass 1  scores[16, Tk] = sum_a weight_a tanh(query_a + key_a)
//             from factors: tiles of 2 queries and 2 L keys, key factors [Tk, A, 2] in L2;
//             else a query and 4 keys at once, features in lanes
//   pass 2  scores = softmax over the keys of (scores, masked or biased); stored as weights
//   pass 3  output[16, Dv] = scores value, a panel [Tk, 4 L] of value at a time in L1
// The scores of a block stay in L1 or L2, and nothing larger than a block of scores is ever stored
// but the weights themselves.
//
// Backward. A unit of work is one of `groups` parts of a batch row's queries. With
// t = tanh(query + key), recomputed, and dw the gradient of the weights w:
//   for each unit, in blocks of 16 queries, ds in L1 or L2:
//     pass 1  dvalue[Tk, Dv] += w^T doutput
//     pass 2  dw[16, Tk] = doutput value^T + grad_weights; ds = w (dw - sum_j w_j dw_j)
//     pass 3  for each query i and key j, sums over what the names leave out:
//               dquery_i += ds_ij (1 - t^2),  dkey_j += ds_ij (1 - t^2),  dweight += ds_ij t
//             from factors: queries by fours, L keys in lanes; the sums keep their lanes separate
//             until the unit's end (dkey [Tk, A], in L2) or the four queries' end (dquery [4, A,
//             L]); else queries by fours, a key at a time, features in lanes
//   after all units: the sums of a batch row's groups, and of all units' dweight, in their order
//   whatever the number of threads; times weight, where the score had it
#include "../common/dot.h"
#include "../common/softmax.h"
#include "additive_attention_scores.h"

namespace seqmem::additive_attention {
namespace {

template <class S>
class ForwardRun : Operands<S> {
  using Base = Operands<S>;
  using Base::L, Base::kBlockRows, Base::s, Base::Dv_pad, Base::Tk_pad, Base::mask_row;
  using typename Base::C;
  static constexpr C kMasked = C(-1e9);

  const Forward& a;
  C *scores, *output_copy;  // [kBlockRows, Tk_pad], [kBlockRows, Dv_pad]

 public:
  ForwardRun(const Shape& s, const Forward& a, int thread, int threads, SpinBarrier&)
      : Base(s, a, Base::kTile, thread, threads), a(a) {}

  int64_t place(char* base) {
    Carver take(base);
    take.per_thread(this->thread, this->threads, [&] {
      Base::place(take);
      scores = take.array<C>(kBlockRows * Tk_pad);
      output_copy = take.array<C>(kBlockRows * Dv_pad);
    });
    return take.used();
  }

  void run() {
    this->read_weight();
    const int64_t blocks = ceil_div(s.Tq, kBlockRows);  // of a batch row
    const Share mine = share(s.B * blocks, this->thread, this->threads);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t b = unit / blocks, first = unit % blocks * kBlockRows;
      this->read_row(b, true);
      run_block(b, first, min(kBlockRows, s.Tq - first));
    }
  }

 private:
  void run_block(int64_t b, int64_t first, int64_t count) {
    this->score_block(first, count, scores);
    const int64_t start = b * s.Tq + first;
    for (int64_t i = 0; i < count; ++i) {
      C* row = scores + i * Tk_pad;
      if (const bool* keep = mask_row(a.keep, first + i))
        for (int64_t j = 0; j < s.Tk; ++j) row[j] = keep[j] ? row[j] : kMasked;
      if (const S* bias = mask_row(static_cast<const S*>(a.bias), first + i)) add_bias(row, bias);
      softmax<1>(row, s.Tk);
      store_row(static_cast<S*>(a.weights) + (start + i) * s.Tk, row, s.Tk);
    }
    S* output = static_cast<S*>(a.output) + start * s.Dv;
    C* product = output_copy;
    if constexpr (std::is_same_v<S, C>)
      if (s.Dv == Dv_pad) product = output;
    matrix_multiply<false>(count, s.Tk, Dv_pad, scores, Tk_pad, this->value, Dv_pad, product,
                           false);
    if (product != output_copy) return;
    for (int64_t i = 0; i < count; ++i) store_row(output + i * s.Dv, product + i * Dv_pad, s.Dv);
  }

  void add_bias(C* row, const S* bias) {
    for (int64_t j = 0; j < s.Tk; j += L) {
      const int n = static_cast<int>(s.Tk - j);
      store_n(row + j, load_n(row + j, n) + load_n(bias + j, n), n);
    }
  }
};

constexpr int kTogether = 4;  // queries that share a pass over the keys

template <class S>
class BackwardRun : Operands<S> {
  using Base = Operands<S>;
  using Base::L, Base::kBlockRows, Base::s, Base::A_pad, Base::Dv_pad, Base::Tk_pad;
  using Base::thread, Base::threads, Base::weight, Base::mask_row;
  using typename Base::C;

  const Backward& a;
  SpinBarrier& barrier;
  const int64_t units;
  const bool through_scores;  // whether anything behind the scores is wanted

  // Sums of a unit: dkey [Tk, A_pad], dvalue [Tk, Dv_pad], dweight [A_pad]. Those of all units are
  // kept and shared by the threads; but a unit that is a whole batch row needs dkey and dvalue no
  // longer than its thread takes.
  C *all_dkey, *all_dvalue, *all_dweight;
  // This thread's own.
  C *doutput_copy, *dquery, *ds, *w;
  // From factors: a query's pairs of high and low, and sums whose lanes are keys.
  C *query_pairs, *dkey_lanes, *dquery_lanes, *dweight_lanes;
  const C* doutput = nullptr;  // a block, [kBlockRows, Dv_pad]

 public:
  BackwardRun(const Shape& s, const Backward& a, int thread, int threads, SpinBarrier& barrier)
      : Base(s, a, 1, thread, threads),
        a(a),
        barrier(barrier),
        units(s.B * s.groups),
        through_scores(a.grad_query != nullptr || a.grad_key != nullptr ||
                       a.grad_score_weight != nullptr) {}

  int64_t place(char* base) {
    Carver take(base);
    const int64_t kept = s.groups > 1 ? units : threads;
    all_dkey = take.array<C>(kept * s.Tk * A_pad);
    all_dvalue = take.array<C>(kept * s.Tk * Dv_pad);
    all_dweight = take.array<C>(max<int64_t>(units, 1) * A_pad);  // without units, the sum is zero
    take.per_thread(thread, threads, [&] {
      Base::place(take);
      doutput_copy = take.array<C>(kBlockRows * Dv_pad);
      dquery = take.array<C>(kBlockRows * A_pad);
      ds = take.array<C>(kBlockRows * Tk_pad);
      w = take.array<C>(kBlockRows * Tk_pad);
      query_pairs = take.array<C>(kTogether * this->factor_width * 2);
      dkey_lanes = take.array<C>(Tk_pad * this->factor_width);
      dquery_lanes = take.array<C>(kTogether * L * this->factor_width);
      dweight_lanes = take.array<C>(L * this->factor_width);
    });
    return take.used();
  }

  void run() {
    this->read_weight();
    const Share mine = share(units, thread, threads);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t b = unit / s.groups, group = unit % s.groups;
      const int64_t slot = s.groups > 1 ? unit : thread;
      this->read_row(b, through_scores);
      run_unit(b, s.Tq * group / s.groups, s.Tq * (group + 1) / s.groups,
               all_dkey + slot * s.Tk * A_pad, all_dvalue + slot * s.Tk * Dv_pad,
               all_dweight + unit * A_pad);
      if (s.groups == 1) store_row_sums(b, slot);
    }
    barrier.wait();
    if (s.groups > 1) {
      const Share rows = share(s.B, thread, threads);
      for (int64_t b = rows.begin; b < rows.end; ++b) store_row_sums(b, b * s.groups);
    }
    if (thread == 0 && a.grad_score_weight != nullptr) {
      if (units == 0) fill(all_dweight, A_pad, C(0));
      add_up(all_dweight, units, A_pad);
      store_row(static_cast<S*>(a.grad_score_weight), all_dweight, s.A);
    }
  }

 private:
  // The first of `count` arrays becomes the sum of all.
  static void add_up(C* first, int64_t count, int64_t n) {
    for (int64_t k = 1; k < count; ++k)
      for (int64_t i = 0; i < n; i += L)
        store(first + i, load(first + i) + load(first + k * n + i));
  }

  // Stores a batch row's dkey and dvalue, the sums of its groups from the first one's slot on.
  void store_row_sums(int64_t b, int64_t slot) {
    C *dkey = all_dkey + slot * s.Tk * A_pad, *dvalue = all_dvalue + slot * s.Tk * Dv_pad;
    if (a.grad_key != nullptr) {
      add_up(dkey, s.groups, s.Tk * A_pad);
      for (int64_t j = 0; j < s.Tk; ++j)
        store_times_weight(a.grad_key, b * s.Tk + j, dkey + j * A_pad);
    }
    if (a.grad_value != nullptr) {
      add_up(dvalue, s.groups, s.Tk * Dv_pad);
      for (int64_t j = 0; j < s.Tk; ++j)
        store_row(static_cast<S*>(a.grad_value) + (b * s.Tk + j) * s.Dv, dvalue + j * Dv_pad, s.Dv);
    }
  }

  void store_times_weight(void* to, int64_t index, C* row) {
    for (int64_t v = 0; v < A_pad; v += L) store(row + v, load(row + v) * load(weight + v));
    store_row(static_cast<S*>(to) + index * s.A, row, s.A);
  }

  void run_unit(int64_t b, int64_t begin, int64_t end, C* dkey, C* dvalue, C* dweight) {
    fill(dkey, s.Tk * A_pad, C(0));
    fill(dvalue, s.Tk * Dv_pad, C(0));
    fill(dweight, A_pad, C(0));
    if (this->has_factors) {
      fill(dkey_lanes, Tk_pad * s.A, C(0));
      fill(dweight_lanes, L * s.A, C(0));
    }
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int64_t count = min(kBlockRows, end - first), row = b * s.Tq + first;
      for (int64_t i = 0; i < count; ++i)
        load_row(w + i * Tk_pad, static_cast<const S*>(a.weights) + (row + i) * s.Tk, s.Tk);
      if (a.grad_output != nullptr) {
        doutput = padded_rows(static_cast<const S*>(a.grad_output) + row * s.Dv, count, s.Dv,
                              doutput_copy);
        if (a.grad_value != nullptr)
          matrix_multiply<true>(s.Tk, count, Dv_pad, w, Tk_pad, doutput, Dv_pad, dvalue, true);
      }
      if (!through_scores && a.grad_scores == nullptr) continue;
      if (a.grad_output != nullptr) {
        dot(count, s.Tk, Dv_pad, doutput, Dv_pad, this->value, Dv_pad, ds, Tk_pad, false);
      } else {
        fill(ds, count * Tk_pad, C(0));
      }
      for (int64_t i = 0; i < count; ++i)
        finish_scores(row + i, mask_row(a.keep, first + i), ds + i * Tk_pad, w + i * Tk_pad);
      if (!through_scores) continue;
      if (this->read_queries(first, count)) {
        if constexpr (kHasFactors<C>)
          by_fours(count, [&](auto rows, int64_t i) { add_slopes_from_factors<rows.value>(i); });
      } else {
        fill(dquery, count * A_pad, C(0));
        by_fours(count, [&](auto rows, int64_t i) { add_slopes<rows.value>(i, dkey, dweight); });
      }
      if (a.grad_query == nullptr) continue;
      for (int64_t i = 0; i < count; ++i)
        store_times_weight(a.grad_query, row + i, dquery + i * A_pad);
    }
    if constexpr (kHasFactors<C>)
      if (this->has_factors) add_lanes(dkey, dweight);
  }

  // Calls f(constant, first query): by fours, then one by one, on which the sums' order depends.
  template <class F>
  static void by_fours(int64_t count, F&& f) {
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) f(std::integral_constant<int, kTogether>{}, i);
    for (; i < count; ++i) f(std::integral_constant<int, 1>{}, i);
  }

  // From the gradient of the weights to that of the scores: ds = w (dw - sum_j w_j dw_j).
  void finish_scores(int64_t row, const bool* keep, C* slope, const C* weights) {
    fill(slope + s.Tk, Tk_pad - s.Tk, C(0));
    const S* more = static_cast<const S*>(a.grad_weights);
    Vec<C> total{};
    for (int64_t j = 0; j < Tk_pad; j += L) {
      Vec<C> x = load(slope + j);
      if (more != nullptr) x += load_n(more + row * s.Tk + j, static_cast<int>(s.Tk - j));
      total += load(weights + j) * x;
      store(slope + j, x);
    }
    const C mean = lane_sum<C>(total);
    for (int64_t j = 0; j < Tk_pad; j += L)
      store(slope + j, load(weights + j) * (load(slope + j) - mean));
    if (keep != nullptr)
      for (int64_t j = 0; j < s.Tk; ++j) slope[j] = keep[j] ? slope[j] : C(0);
    if (a.grad_scores != nullptr)
      store_row(static_cast<S*>(a.grad_scores) + row * s.Tk, slope, s.Tk);
  }

  // Pass 3, keys in lanes: dquery of R queries, and what they add to the lanes' sums. With
  // r = 1 / (E + 1), tanh is (E - 1) r and its slope 4 r (1 - r); the 4 comes at the end. All that
  // a feature needs is stored together, so that one index finds it.
  template <int R>
  SEQMEM_INLINE void add_slopes_from_factors(int64_t start) {
    const int64_t A = s.A;
    float *const pairs = query_pairs, *const dq = dquery_lanes, *const dw = dweight_lanes;
    for (int64_t f = 0; f < A; ++f)
      for (int r = 0; r < R; ++r) {
        pairs[(f * R + r) * 2] = this->query_high[(start + r) * A_pad + f];
        pairs[(f * R + r) * 2 + 1] = this->query_low[(start + r) * A_pad + f];
      }
    fill(dq, A * R * L, C(0));
    for (int64_t panel = 0; panel < this->key_panels; ++panel) {
      Vec<float> g[R];
      IntVec<float> busy{};  // else masked, or of too little weight to count
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        g[r] = load(ds + (start + r) * Tk_pad + panel * L);
        busy |= g[r] != 0.0f;
      }
      if (none(busy)) continue;
      const float* const keys = this->key_factors + panel * L * A * 2;
      float* const dk = dkey_lanes + panel * L * A;
      for (int64_t f = 0; f < A; ++f) {
        const Factor k = load_factor(keys + f * 2 * L);
        Vec<float> dk_sum = load(dk + f * L), dw_sum = load(dw + f * L);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          const float* q = pairs + (f * R + r) * 2;
          float* to = dq + (f * R + r) * L;
          const Vec<float> m = product_minus_one({splat(q[0]), splat(q[1])}, k);
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
        dquery[(start + r) * A_pad + f] = 4 * lane_sum<float>(load(dq + (f * R + r) * L));
    for (int r = 0; r < R; ++r) fill(dquery + (start + r) * A_pad + A, A_pad - A, C(0));
  }

  // The lanes' sums of a unit are added to those of its blocks that went without factors.
  void add_lanes(C* dkey, C* dweight) {
    for (int64_t f = 0; f < s.A; ++f) dweight[f] += lane_sum<float>(load(dweight_lanes + f * L));
    for (int64_t j = 0; j < s.Tk; j += L)
      for (int64_t f = 0; f < s.A; f += L)
        transpose_block<float>(
            static_cast<int>(min<int64_t>(L, s.A - f)), static_cast<int>(min<int64_t>(L, s.Tk - j)),
            [&](int i) { return load(dkey_lanes + j * s.A + (f + i) * L); },
            [&](int i, Vec<float> x) {
              C* row = dkey + (j + i) * A_pad + f;
              store(row, load(row) + 4.0f * x);
            });
  }

  // Pass 3, features in lanes, for R queries and all keys.
  template <int R>
  SEQMEM_INLINE void add_slopes(int64_t start, C* dkey, C* dweight) {
    const C *q[R], *g[R];
    C* dq[R];
    SEQMEM_UNROLL
    for (int r = 0; r < R; ++r) {
      q[r] = this->query + (start + r) * A_pad;
      g[r] = ds + (start + r) * Tk_pad;
      dq[r] = dquery + (start + r) * A_pad;
    }
    for (int64_t j = 0; j < s.Tk; ++j) {
      bool idle = true;  // masked, or of too little weight to count
      Vec<C> gradient[R];
      SEQMEM_UNROLL
      for (int r = 0; r < R; ++r) {
        idle &= g[r][j] == 0;
        gradient[r] = splat(g[r][j]);
      }
      if (idle) continue;
      const C* k = this->key + j * A_pad;
      C* dk = dkey + j * A_pad;
      for (int64_t v = 0; v < A_pad; v += L) {
        const Vec<C> x = load(k + v);
        Vec<C> dk_sum = load(dk + v), dw_sum = load(dweight + v);
        SEQMEM_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec<C> t = rational_tanh(load(q[r] + v) + x);
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

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = Entry<ForwardRun, Types::All, Forward, Shape>::table;
const Kernel<Backward, Shape> backward_kernel =
    Entry<BackwardRun, Types::All, Backward, Shape>::table;
}  // namespace SEQMEM_ISA

}  // namespace seqmem::additive_attention
