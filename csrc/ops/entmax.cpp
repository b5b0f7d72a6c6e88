// Entmax: schemas, checks, the CPU and Meta keys. Arguments are described in
// seqmem_fast/ops/entmax.py.
#include <ATen/OpMathType.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../common/check.h"
#include "../common/dispatch.h"
#include "../common/kept_blocks.h"
#include "../common/op.h"
#include "../common/operand.h"
#include "../common/team.h"
#include "../cpu/entmax_kernel.h"

namespace seqmem::entmax {
namespace {

using at::Tensor;
using Mask = std::array<bool, 2>;

constexpr char kName[] = "seqmem::entmax", kBackwardName[] = "seqmem::entmax_backward";
using ForwardOp = Op<kName, Tensor(In, Maybe, double, int64_t)>;
using BackwardOp = Op<kBackwardName, Tensors<2>(In, In, Maybe, double, int64_t, In, Mask)>;

struct Inputs {
  In input;
  Maybe alpha;
  double power;
  int64_t dim;
};

struct GradOutput {
  In grad_output;
};

struct BackwardInputs : GradOutput, Inputs {
  In output;
  Mask output_mask;
};

// ---- checks

bool in_range(double alpha) { return 1 < alpha && alpha <= 2; }

// One alpha for each row: [.., 1, ..], or with fewer leading dimensions. A GPU is not waited for. A
// NaN, as of weights that have diverged, makes its rows NaN.
template <class Int>
void check_alpha(const Check<Int>& check, const Inputs& in, int64_t dim) {
  if (!in.alpha.has_value()) {
    TORCH_CHECK_VALUE(in_range(in.power), check.op(), ": expected alpha in 1 < alpha <= 2, got ",
                      in.power);
    return;
  }
  const Tensor& alpha = *in.alpha;
  check.same_kind("alpha", alpha);
  const int64_t missing = in.input.dim() - alpha.dim();
  bool fits = missing >= 0;
  for (int64_t i = 0; fits && i < alpha.dim(); ++i) {
    const Int size = check.size(alpha, i);
    fits = size == 1 || (missing + i != dim && size == check.size(in.input, missing + i));
  }
  TORCH_CHECK_VALUE(fits, check.op(), ": expected alpha that broadcasts to input's shape ",
                    in.input.sym_sizes(), " with one element along dim ", dim, ", got ",
                    alpha.sym_sizes());
  if (!alpha.is_cpu()) return;
  const Tensor values = alpha.to(at::kDouble).contiguous();
  const double* first = values.const_data_ptr<double>();
  for (const double* a = first; a < first + values.numel(); ++a)
    TORCH_CHECK_VALUE(in_range(*a) || *a != *a, check.op(),
                      ": expected alpha in 1 < alpha <= 2, got ", *a);
}

// The dimension, counted from the front.
template <class Int>
int64_t check_inputs(const Check<Int>& check, const Inputs& in) {
  check.floating_input();
  const int64_t dims = in.input.dim();
  TORCH_CHECK_VALUE(dims > 0, check.op(), ": expected input with a dimension, got shape []");
  TORCH_CHECK_VALUE(-dims <= in.dim && in.dim < dims, check.op(), ": expected dim in ", -dims, "..",
                    dims - 1, ", got ", in.dim);
  const int64_t dim = in.dim < 0 ? in.dim + dims : in.dim;
  check_alpha(check, in, dim);
  return dim;
}

template <class Int>
int64_t check(const Inputs& in) {
  return check_inputs(Check<Int>(kName, in.input), in);
}

template <class Int>
void same_shape(const Check<Int>& check, const char* name, const Tensor& t, const Tensor& input) {
  check.same_kind(name, t);
  TORCH_CHECK_VALUE(t.sym_sizes() == input.sym_sizes(), check.op(), ": expected ", name,
                    " of shape ", input.sym_sizes(), ", got ", t.sym_sizes());
}

template <class Int>
int64_t check_backward(const BackwardInputs& in) {
  const Check<Int> check(kBackwardName, in.input);
  const int64_t dim = check_inputs(check, in);
  same_shape(check, "grad_output", in.grad_output, in.input);
  same_shape(check, "output", in.output, in.input);
  return dim;
}

// ---- how a call is run

// Estimates in nanoseconds of one core; they only decide how many threads are worth waking.
constexpr double kPerRow = 40, kPerElement = 0.6, kCallWorthSharing = 40e3;

int threads_for(const Shape& s) {
  const double cost = s.rows * (kPerRow + kPerElement * s.K);
  return static_cast<int>(std::clamp<double>(cost / kCallWorthSharing, 1, available_threads()));
}

// Rows of `dim`, one after the other.
Tensor rows_of(const Tensor& t, int64_t dim) { return t.movedim(dim, -1).contiguous(); }

// Laid out by rows, seen in input's order of dimensions.
template <class Int>
Tensor allocate(const Tensor& input, int64_t dim) {
  return result_like<Int>(input.movedim(dim, -1), input.options()).movedim(-1, dim);
}

// The call's alphas by row, in the kernels' arithmetic.
struct Alphas {
  Tensor values;  // double [rows]; undefined where all rows share one
  Shape shape;

  Alphas(const Inputs& in, int64_t dim) {
    const int64_t K = in.input.size(dim);
    shape = {.rows = K > 0 ? in.input.numel() / K : 0, .K = K, .alpha = in.power};
    if (in.alpha.has_value())
      values = by_row(*in.alpha, in.input, dim).to(at::kDouble).contiguous();
  }
  const double* data() const {
    return values.defined() ? values.const_data_ptr<double>() : nullptr;
  }

  // A tensor that broadcasts to input along all dimensions but `dim`, with an element a row.
  static Tensor by_row(const Tensor& t, const Tensor& input, int64_t dim) {
    auto sizes = input.sizes().vec();
    sizes[dim] = 1;
    return t.expand(sizes).movedim(dim, -1);
  }
};

Tensor forward_cpu(const Inputs& in) {
  const int64_t dim = check<int64_t>(in);
  const Tensor out = allocate<int64_t>(in.input, dim), input = rows_of(in.input, dim);
  const Alphas alphas(in, dim);
  const Forward arguments = {.input = input.const_data_ptr(),
                             .alpha = alphas.data(),
                             .output = out.mutable_data_ptr(),
                             .workspace = nullptr};
  launch(SEQMEM_CHOOSE(forward_kernel), threads_for(alphas.shape), arguments, storage_of(input),
         alphas.shape);
  return out;
}

Tensor forward_meta(const Inputs& in) {
  return allocate<c10::SymInt>(in.input, check<c10::SymInt>(in));
}

// Sums in the order of the rows, so that they do not depend on the number of threads.
Tensor sum_to(const Tensor& alpha, const Tensor& by_row, const Tensor& input, int64_t dim) {
  const Tensor sums = at::zeros(alpha.sizes(), alpha.options().dtype(at::kDouble));
  const Tensor places = at::arange(alpha.numel(), at::kLong).view(alpha.sizes());
  const Tensor of_row = Alphas::by_row(places, input, dim).contiguous();
  const int64_t* to = of_row.const_data_ptr<int64_t>();
  const double* from = by_row.const_data_ptr<double>();
  double* sum = sums.mutable_data_ptr<double>();
  for (int64_t row = 0; row < by_row.numel(); ++row) sum[to[row]] += from[row];
  return sums.to(alpha.scalar_type());
}

bool of_alpha_wanted(const BackwardInputs& in) { return in.output_mask[1] && in.alpha.has_value(); }

template <class Int>
Tensors<2> allocate_gradients(const BackwardInputs& in, int64_t dim) {
  const auto options = in.input.options();
  return {in.output_mask[0] ? allocate<Int>(in.input, dim) : at::empty({0}, options),
          of_alpha_wanted(in) ? at::empty_symint(in.alpha->sym_sizes(), options)
                              : at::empty({0}, options)};
}

Tensors<2> backward_cpu(const BackwardInputs& in) {
  const int64_t dim = check_backward<int64_t>(in);
  const bool of_alpha = of_alpha_wanted(in);
  Tensors<2> out = allocate_gradients<int64_t>(in, dim);
  auto& [grad_input, grad_alpha] = out;
  const Alphas alphas(in, dim);
  // Of alpha's gradient alone.
  const Tensor input = of_alpha ? rows_of(in.input, dim) : Tensor();
  const Tensor output = rows_of(in.output, dim);
  const Tensor grad_output = rows_of(in.grad_output, dim);
  Tensor by_row;
  if (of_alpha) by_row = at::zeros({alphas.shape.rows}, in.input.options().dtype(at::kDouble));
  const Backward arguments = {
      .grad_output = grad_output.const_data_ptr(),
      .input = const_data(input),
      .output = output.const_data_ptr(),
      .alpha = alphas.data(),
      .grad_input = in.output_mask[0] ? grad_input.mutable_data_ptr() : nullptr,
      .grad_alpha = of_alpha ? by_row.mutable_data_ptr<double>() : nullptr,
      .workspace = nullptr};
  launch(SEQMEM_CHOOSE(backward_kernel), threads_for(alphas.shape), arguments, storage_of(in.input),
         alphas.shape);
  if (of_alpha) grad_alpha = sum_to(*in.alpha, by_row, in.input, dim);
  return out;
}

Tensors<2> backward_meta(const BackwardInputs& in) {
  return allocate_gradients<c10::SymInt>(in, check_backward<c10::SymInt>(in));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqmem, m) {
  ForwardOp::define<check<c10::SymInt>, forward_cpu, forward_meta>(
      m, "(Tensor input, Tensor? alpha, float power, int dim) -> Tensor output");
  BackwardOp::define<check_backward<c10::SymInt>, backward_cpu, backward_meta>(
      m,
      "(Tensor grad_output, Tensor input, Tensor? alpha, float power, int dim, Tensor output, "
      "bool[2] output_mask) -> (Tensor grad_input, Tensor grad_alpha)");
}

}  // namespace seqmem::entmax
