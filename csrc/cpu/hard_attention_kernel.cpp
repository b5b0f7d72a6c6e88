// Hard attention. For each row of K logits, which stays in L1:
//   pass 1  x = logits - highest
//   pass 2  e = e^x, with total = sum e and the sum of e x, which gives the entropy H
//   forward   the action at which the cumulative sum of e passes uniform * total; log_prob and H
//   backward  grad_logits = by_log_prob (onehot - p) - by_entropy p (log p + H), p = e / total
#include "hard_attention_kernel.h"

#include "../common/gemm.h"
#include "../common/kernel_util.h"

namespace seqmem::hard_attention {
namespace {

SEQMEM_INLINE float logarithm(float x) { return __builtin_logf(x); }
SEQMEM_INLINE double logarithm(double x) { return __builtin_log(x); }

template <class S>
class Run {
  using C = compute_t<S>;
  static constexpr int64_t L = kLanes<C>;

  const int64_t K, padded;
  const C infinity = C(1) / C(0);
  C *x, *e;  // a row's logits less the highest, -inf beyond K; and their exponentials

 public:
  Run(const Shape& s, void* workspace, int thread)
      : K(s.K), padded(ceil_div(s.K, L) * L), x(nullptr), e(nullptr) {
    Carver take(static_cast<char*>(workspace) + (workspace ? thread * bytes(s) : 0));
    x = take.array<C>(padded);
    e = take.array<C>(padded);
  }

  static int64_t bytes(const Shape& s) {
    Carver take(nullptr);
    take.array<C>(ceil_div(s.K, L) * L);
    take.array<C>(ceil_div(s.K, L) * L);
    return take.used();
  }

  void forward(const Forward& a, int64_t row) {
    const Sums sums = read_row(static_cast<const S*>(a.logits) + row * K);
    if (a.uniform != nullptr)
      a.action[row] = choose(static_cast<const C*>(a.uniform)[row] * sums.total);
    put(a, a.log_prob, row, x[a.action[row]] - sums.log_total);
    put(a, a.entropy, row, sums.entropy);
  }

  void backward(const Backward& a, int64_t row) {
    const Sums sums = read_row(static_cast<const S*>(a.logits) + row * K);
    const C by_log_prob = static_cast<const C*>(a.by_log_prob)[row];
    const C by_entropy = static_cast<const C*>(a.by_entropy)[row];
    S* to = static_cast<S*>(a.grad_logits) + row * K;
    const C inverse = C(1) / sums.total;
    e[a.action[row]] -= sums.total;  // softmax - onehot, both times the total
    auto gradient = [&](int64_t i) {
      const Vec<C> v = load(x + i);
      // p (log p + H), which is 0 where p is: there x may be -inf. p is computed again, for e no
      // longer holds the action's.
      const Vec<C> log_p = v - sums.log_total;
      Vec<C> p = exponential(v) * inverse;
      p = p * (p == C(0) ? Vec<C>{} : log_p + sums.entropy);
      return -by_log_prob * (load(e + i) * inverse) - by_entropy * p;
    };
    for (int64_t i = 0; i < K; i += L) {
      const Vec<C> g = by_entropy == 0 ? -by_log_prob * (load(e + i) * inverse) : gradient(i);
      store_n(to + i, g, static_cast<int>(min(L, K - i)));
    }
  }

 private:
  struct Sums {
    C total, log_total, entropy;
  };

  static void put(const Forward& a, void* to, int64_t row, C value) {
    if (a.wide) {
      static_cast<C*>(to)[row] = value;
    } else {
      store_n(static_cast<S*>(to) + row, splat(value), 1);
    }
  }

  // e^x for x <= 0: zero below the smallest normal number, and NaN stays NaN.
  static SEQMEM_INLINE Vec<C> exponential(Vec<C> v) {
    constexpr C limit = ExpConstants<C>::limit;
    const Vec<C> argument[1] = {v < -limit ? splat<C>(-limit) : v};
    ExpParts<C> parts[1];
    exp_parts<1, C>(argument, parts);
    return v < -limit ? Vec<C>{} : parts[0].power + parts[0].power * parts[0].fraction;
  }

  Sums read_row(const S* logits) {
    Vec<C> highest = splat<C>(-infinity);
    for (int64_t i = 0; i < padded; i += L) {
      const int n = static_cast<int>(min(L, K - i));
      Vec<C> v = load_n(logits + i, n);
      for (int64_t l = n; l < L; ++l) v[l] = -infinity;
      store(x + i, v);
      highest = v > highest ? v : highest;
    }
    C top = highest[0];
    for (int64_t l = 1; l < L; ++l) top = highest[l] > top ? highest[l] : top;

    Vec<C> totals = {}, moments = {};
    for (int64_t i = 0; i < padded; i += L) {
      const Vec<C> v = load(x + i) - top, p = exponential(v);
      store(x + i, v);
      store(e + i, p);
      totals += p;
      moments += p == C(0) ? Vec<C>{} : p * v;
    }
    const C total = lane_sum<C>(totals), log_total = logarithm(total);
    return {total, log_total, log_total - lane_sum<C>(moments) / total};
  }

  // The first action at which the cumulative sum passes `target`; if by rounding none does, the
  // last whose probability is not zero. Never one of probability zero; 0 in a row of NaN.
  int64_t choose(C target) const {
    C before = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < padded; i += L) {
      const C here = lane_sum<C>(load(e + i));
      const bool passes = before + here > target;
      if (!passes && i + L < padded) {
        if (here > 0) last = i;
        before += here;
        continue;
      }
      C sum_so_far = before;
      int64_t chosen = -1;
      for (int64_t j = i; j < min(i + L, K); ++j) {
        sum_so_far += e[j];
        if (!(e[j] > 0)) continue;
        chosen = j;
        if (sum_so_far > target) return j;
      }
      if (chosen >= 0) return chosen;
    }
    for (int64_t j = min(last + L, K) - 1; j > last; --j)
      if (e[j] > 0) return j;
    return last;
  }
};

template <class Arguments>
int64_t workspace(Storage storage, const Shape& s, const Arguments&, int threads) {
  return with_storage(storage, [&](auto tag) { return threads * Run<decltype(tag)>::bytes(s); });
}

void forward(Storage storage, const Shape& s, const Forward& a, int thread, int threads,
             SpinBarrier&) {
  with_storage(storage, [&](auto tag) {
    Run<decltype(tag)> run(s, a.workspace, thread);
    const Share mine = share(s.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) run.forward(a, row);
    return int64_t(0);
  });
}

void backward(Storage storage, const Shape& s, const Backward& a, int thread, int threads,
              SpinBarrier&) {
  with_storage(storage, [&](auto tag) {
    Run<decltype(tag)> run(s, a.workspace, thread);
    const Share mine = share(s.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) run.backward(a, row);
    return int64_t(0);
  });
}

}  // namespace

namespace SEQMEM_ISA {
const Kernel<Forward, Shape> forward_kernel = {workspace<Forward>, forward};
const Kernel<Backward, Shape> backward_kernel = {workspace<Backward>, backward};
}  // namespace SEQMEM_ISA

}  // namespace seqmem::hard_attention
