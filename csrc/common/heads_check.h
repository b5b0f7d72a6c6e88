// The checks of attention over heads: q [B, Hq, Tq, D], k [B, Hk, Tk, D], v [B, Hk, Tk, Dv].
#pragma once

#include "check.h"
#include "op.h"

namespace seqmem {

using Scale = std::optional<double>;

struct HeadInputs {
  In q, k, v;
};
// How scores become weights.
struct WeightInputs {
  Scale scale;
  double alpha;  // 1: softmax, else entmax's
  double dropout;
  Maybe seed;
};
template <class Inputs>
struct ForwardOf : Inputs {
  bool need_weights;
};
// Where all weights are one tensor.
struct WeightGradients {
  Maybe grad_output, grad_weights;
};
template <class Inputs>
struct BackwardOf : WeightGradients, Inputs {
  In weights;
  std::array<bool, 3> output_mask;
};

template <class Int>
struct HeadSizes {
  Int B, Hq, Hk, Tq, Tk, D, Dv;
};

template <class Int>
HeadSizes<Int> check_heads(const Check<Int>& check, In q, In k, In v) {
  check.floating_input();
  check.dims("q", q, 4);
  check.same_kind("k", k);
  check.dims("k", k, 4);
  check.same_kind("v", v);
  check.dims("v", v, 4);
  const HeadSizes<Int> s = {check.size(q, 0), check.size(q, 1), check.size(k, 1), check.size(q, 2),
                            check.size(k, 2), check.size(q, 3), check.size(v, 3)};
  TORCH_CHECK_VALUE(s.D > 0, check.op(), ": expected q with at least one feature, got shape ",
                    q.sym_sizes());
  TORCH_CHECK_VALUE(s.Hk > 0, check.op(), ": expected k with at least one head, got shape ",
                    k.sym_sizes());
  check.shape("k", k, {s.B, s.Hk, s.Tk, s.D});
  check.shape("v", v, {s.B, s.Hk, s.Tk, s.Dv});
  TORCH_CHECK_VALUE(s.Hq % s.Hk == 0, check.op(), ": expected q with a multiple of k's ", s.Hk,
                    " heads, got ", s.Hq, " (shape ", q.sym_sizes(), ")");
  return s;
}

template <class Int>
void check_weighing(const Check<Int>& check, const WeightInputs& in) {
  const auto& [scale, alpha, dropout, seed] = in;
  TORCH_CHECK_VALUE(alpha >= 1 && alpha <= 2, check.op(), ": expected alpha in 1..2, got ", alpha);
  TORCH_CHECK_VALUE(dropout >= 0 && dropout <= 1, check.op(), ": expected dropout in 0..1, got ",
                    dropout);
  TORCH_CHECK_VALUE(dropout == 0 || seed.has_value(), check.op(),
                    ": expected a seed with dropout, got None");
  if (seed.has_value()) check.typed("seed", *seed, at::kLong, {Int(1)});
}

// How many lists a tensor [1 or B, 1 or Hq, ...] of lists has along its first two dimensions.
template <class Int>
std::array<Int, 2> lists_of(const Check<Int>& check, In t, const HeadSizes<Int>& s) {
  auto either = [&](int64_t d, const Int& size) { return check.size(t, d) == 1 ? Int(1) : size; };
  return {either(0, s.B), either(1, s.Hq)};
}

// Integers for each row, or for each query.
template <class Int>
void check_bound(const Check<Int>& check, const char* name, Maybe t, const HeadSizes<Int>& s) {
  if (!t.has_value()) return;
  check.strided(name, *t);
  TORCH_CHECK_TYPE(t->scalar_type() == at::kLong || t->scalar_type() == at::kInt, check.op(),
                   ": expected ", name, " of dtype int64 or int32, got ", t->scalar_type());
  check.same_device(name, *t);
  if (t->dim() == 2) {
    check.shape(name, *t, {s.B, s.Tq});
  } else {
    check.shape(name, *t, {s.B});
  }
}

}  // namespace seqmem
