// The parameters' gradients of the whole-sequence NTM: pre-activations' gradients and operands of a
// chunk of steps are kept, and then multiplied at once by all threads, each its own rows of every
// weight.
#pragma once

#include "ntm_common.h"

namespace seqmem::ntm {
namespace {

template <class C>
class WeightGradients {
  static constexpr int L = kLanes<C>;
  static constexpr int64_t kChunkBytes = 8 << 20, kDepth = 128;

  const Shape& s;
  const Backward& a;
  const Layout<C>& at;
  const int thread, threads;

 public:
  const int64_t chunk;  // steps
  const bool wanted;

  WeightGradients(const Shape& s, const Backward& a, const Layout<C>& at, int thread, int threads)
      : s(s),
        a(a),
        at(at),
        thread(thread),
        threads(threads),
        chunk(steps_at_once()),
        wanted(a.grad_controller != nullptr) {}

  void place(Carver& take) {
    sums = take.array<C>(sums_at(s.layers));
    sums_head = take.array<C>(s.P * at.Cs);
    dz = take.array<C>(s.layers * chunk * s.B * at.gates_stride());
    operands = take.array<C>(operands_at(s.layers));
    dp = take.array<C>(chunk * s.B * at.Ps);
    tops = take.array<C>(chunk * s.B * at.Cs);
  }

  // Rows of a chunk's buffers: what step t of row b leaves there.
  C* dz_of(int64_t l, int64_t t, int64_t b) const {
    return dz + (l * chunk * s.B + place_of(t, b)) * at.gates_stride();
  }
  C* dp_of(int64_t t, int64_t b) const { return dp + place_of(t, b) * at.Ps; }

  // A row's operand of layer l; `hidden` and what is read only where there are such.
  void keep_operand(int64_t l, int64_t t, int64_t b, const C* hidden, const C* below,
                    const C* reads) const {
    C* to = operand_of(l, t, b);
    if (l > 0) {
      copy(hidden, to, at.recurrent());
      copy(below, to + at.recurrent(), s.C);
    } else {
      copy(below, to, s.I);
      copy(reads, to + s.I, at.R);
      copy(hidden, to + at.below(0), at.recurrent());
    }
    close(to, at.K(l));
  }
  void keep_top(int64_t t, int64_t b, const C* from) const {
    C* to = tops + place_of(t, b) * at.Cs;
    copy(from, to, s.C);
    close(to, s.C);
  }
  // A row that has ended has no gradients in this step.
  void keep_nothing(int64_t t, int64_t b) const {
    for (int64_t l = 0; l < s.layers; ++l) {
      zero(dz_of(l, t, b), at.gates());
      zero(operand_of(l, t, b), at.operand(l));
    }
    zero(dp_of(t, b), s.P);
    zero(tops + place_of(t, b) * at.Cs, at.Cs);
  }

  void clear() const {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(at.gates(), thread, threads);
      zero(sums + sums_at(l) + mine.begin * at.operand(l), (mine.end - mine.begin) * at.operand(l));
    }
    const Share mine = share(s.P, thread, threads);
    zero(sums_head + mine.begin * at.Cs, (mine.end - mine.begin) * at.Cs);
  }

  // The first n rows of the chunk's buffers.
  void add(int64_t n) const {
    for (int64_t l = 0; l < s.layers; ++l)
      add_outer(n, dz + l * chunk * s.B * at.gates_stride(), at.gates_stride(), at.gates(),
                operands + operands_at(l), at.operand(l), ceil_div(at.K(l) + 1, L),
                sums + sums_at(l));
    add_outer(n, dp, at.Ps, s.P, tops, at.Cs, ceil_div(s.C + 1, L), sums_head);
  }

  void store() const {
    for (int64_t l = 0; l < s.layers; ++l) {
      const Share mine = share(at.gates(), thread, threads);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        const C* from = sums + sums_at(l) + j * at.operand(l);
        copy(from + at.at_below(l), out(at.weight_ih(l)) + j * at.below(l), at.below(l));
        out(at.bias(l))[j] = from[at.K(l)];
        if (!s.lstm) continue;
        copy(from + at.at_hidden(l), out(at.weight_hh(l)) + j * s.C, s.C);
        out(at.bias(l) + 1)[j] = from[at.K(l)];
      }
    }
    const Share mine = share(s.P, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      copy<C>(sums_head + j * at.Cs, static_cast<C*>(a.grad_head_weight) + j * s.C, s.C);
      static_cast<C*>(a.grad_head_bias)[j] = sums_head[j * at.Cs + s.C];
    }
  }

 private:
  C *sums, *sums_head;           // [gates or P][operand], the bias behind each row
  C *dz, *operands, *dp, *tops;  // of a chunk

  // Whole segments, so many that a chunk's buffers stay near the cache.
  int64_t steps_at_once() const {
    int64_t step = at.Ps + at.Cs + at.operand(0) + (s.layers - 1) * at.operand(1);
    step = (step + s.layers * at.gates_stride()) * max<int64_t>(s.B, 1) * sizeof(C);
    const int64_t segments = max<int64_t>(1, kChunkBytes / step / s.segment);
    return min(segments, max<int64_t>(1, ceil_div(s.T, s.segment))) * s.segment;
  }
  int64_t place_of(int64_t t, int64_t b) const { return t % chunk * s.B + b; }
  int64_t sums_at(int64_t l) const {
    return at.layer(l, at.gates() * at.operand(0), at.gates() * at.operand(1));
  }
  int64_t operands_at(int64_t l) const {
    return at.layer(l, chunk * s.B * at.operand(0), chunk * s.B * at.operand(1));
  }
  C* operand_of(int64_t l, int64_t t, int64_t b) const {
    return operands + operands_at(l) + place_of(t, b) * at.operand(l);
  }
  C* out(int64_t i) const { return static_cast<C*>(a.grad_controller[i]); }

  // A one behind an operand, whose gradient is the bias', and zeros up to a whole vector.
  static void close(C* operand, int64_t n) {
    operand[n] = 1;
    for (int64_t i = n + 1; i % L != 0; ++i) operand[i] = 0;
  }

  // total[j][.] += sum over n rows of from[.][j] b[.], with rows of total as wide as those of b.
  void add_outer(int64_t n, const C* from, int64_t from_step, int64_t outputs, const C* b,
                 int64_t step, int64_t vectors, C* total) const {
    const Share mine = share(outputs, thread, threads);
    for (int64_t k = 0; k < n; k += kDepth) {
      const int64_t depth = min(kDepth, n - k);
      // Panels outside: one of b stays in the first cache while all rows of total pass by.
      for_panels(vectors, [&](auto columns, int64_t v) {
        constexpr int NV = decltype(columns)::value;
        for_row_blocks<C, kTileRowsBy<C, NV>>(
            mine.end - mine.begin, [&](auto block, int64_t start) {
              constexpr int R = decltype(block)::value;
              const C* column[R];
              C* to[R];
              Vec<C> acc[R][NV];
              SEQMEM_UNROLL
              for (int r = 0; r < R; ++r) {
                column[r] = from + k * from_step + mine.begin + start + r;
                to[r] = total + (mine.begin + start + r) * step + v * L;
                SEQMEM_UNROLL
                for (int i = 0; i < NV; ++i) acc[r][i] = load(to[r] + i * L);
              }
              tile_multiply<R, NV, C>(depth, column, from_step, b + k * step + v * L, L, step, acc);
              SEQMEM_UNROLL
              for (int r = 0; r < R; ++r) SEQMEM_UNROLL
              for (int i = 0; i < NV; ++i) seqmem::store(to[r] + i * L, acc[r][i]);
            });
      });
    }
  }
};

}  // namespace
}  // namespace seqmem::ntm
