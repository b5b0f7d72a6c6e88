// The arguments of the LSTM with zoneout and layer normalisation, and their checks, the same for
// every device and grad mode.
#pragma once

#include <ATen/OpMathType.h>

#include "lstm_check.h"

namespace seqmem::lstm_regularized {

using at::Tensor;
using lstm::Biases;
using lstm::kAbsent;
using lstm::Layout;
using lstm::SequenceGradients;
using lstm::Sizes;
using lstm::Step;

inline constexpr char kName[] = "seqmem::lstm_regularized",
                      kBackwardName[] = "seqmem::lstm_regularized_backward";

// Gradients are asked for of: the input; the state; weights, biases and norms.
using Mask = std::array<bool, 3>;

using ForwardOp =
    Op<kName, Tensors<9>(In, Maybe, Maybe, In, In, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe,
                         double, double, Maybe, Maybe, Maybe, bool, bool, bool)>;
using BackwardOp =
    Op<kBackwardName,
       Tensors<11>(Maybe, Maybe, Maybe, Maybe, Maybe, In, Maybe, Maybe, In, In, Maybe, Maybe, Maybe,
                   Maybe, Maybe, Maybe, Maybe, double, double, Maybe, Maybe, Maybe, bool, bool, In,
                   In, In, Maybe, Maybe, Maybe, Maybe, Mask)>;

struct NormInputs {
  Maybe gain_ih, gain_hh, gain_c, shift_c;
};
struct ZoneoutInputs {
  Maybe seed;
  double zoneout_h, zoneout_c;
};
struct RowInputs {
  Maybe lengths, reset, batch_sizes;
  bool batch_first, reverse;
};
struct Inputs : Step, Biases, NormInputs, ZoneoutInputs, RowInputs {};
struct ForwardInputs : Inputs {
  bool return_gates;
};
struct Saved : lstm::Saved {
  Maybe normalized_ih, normalized_hh, normalized_c, scales;  // with norms
};
struct BackwardInputs : SequenceGradients, Inputs, Saved {
  Mask output_mask;
};

inline constexpr int64_t kNorms = 3;  // of a row

inline bool has_norms(const NormInputs& in) { return in.gain_ih.has_value(); }

// What lstm's checks and calls take; it refers to the inputs.
inline Layout layout_of(const RowInputs& in) {
  return {kAbsent, in.lengths, in.reset, in.batch_sizes};
}

template <class Int>
Sizes<Int> check_inputs(const Check<Int>& check, const Inputs& in) {
  const Sizes<Int> s = lstm::check_rows(check, in, in, layout_of(in), in.batch_first);
  check.operand("gain_ih", in.gain_ih, {s.H * 4});
  check.operand("gain_hh", in.gain_hh, {s.H * 4});
  check.operand("gain_c", in.gain_c, {s.H});
  check.operand("shift_c", in.shift_c, {s.H});
  check.together("gain_ih", has_norms(in), "gain_hh", in.gain_hh.has_value());
  check.together("gain_ih", has_norms(in), "gain_c", in.gain_c.has_value());
  check.together("gain_ih", has_norms(in), "shift_c", in.shift_c.has_value());
  auto check_share = [&](const char* name, double share) {
    TORCH_CHECK_VALUE(share >= 0 && share <= 1, check.op(), ": expected ", name, " in 0..1, got ",
                      share);
  };
  check_share("zoneout_h", in.zoneout_h);
  check_share("zoneout_c", in.zoneout_c);
  if (in.seed.has_value()) check.typed("seed", *in.seed, at::kLong, {Int(2)});
  return s;
}

template <class Int>
Sizes<Int> check(const ForwardInputs& in) {
  return check_inputs(Check<Int>(kName, in.input), in);
}

template <class Int>
Sizes<Int> check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.input);
  const Sizes<Int> s = check_inputs(check, in);
  const Layout layout = layout_of(in);
  lstm::check_gradients(check, s, in, in, layout, in.batch_first);
  auto shape = [&](const Int& width) { return lstm::rows_of(s, layout, in.batch_first, width); };
  auto rows = [&](const char* name, const auto& t, const Int& width) {
    check.operand(name, t, c10::ArrayRef<Int>(shape(width)));
  };
  const auto type = at::toOpMathType(in.input.scalar_type());
  rows("normalized_ih", in.normalized_ih, s.H * 4);
  rows("normalized_hh", in.normalized_hh, s.H * 4);
  rows("normalized_c", in.normalized_c, s.H);
  if (in.scales.has_value())
    check.typed("scales", *in.scales, type, c10::ArrayRef<Int>(shape(Int(kNorms))));
  check.together("gain_ih", has_norms(in), "normalized_ih", in.normalized_ih.has_value());
  check.together("gain_ih", has_norms(in), "normalized_hh", in.normalized_hh.has_value());
  check.together("gain_ih", has_norms(in), "normalized_c", in.normalized_c.has_value());
  check.together("gain_ih", has_norms(in), "scales", in.scales.has_value());
  return s;
}

}  // namespace seqmem::lstm_regularized
