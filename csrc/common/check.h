// One wording for every argument error: "seqmem::op: expected X, got Y".
// ValueError for a value or a shape, TypeError for a dtype, device or layout.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <optional>
#include <sstream>

namespace seqmem {

// Checks of one call; Int is c10::SymInt where shapes may be symbolic (the Meta key).
template <class Int>
class Check {
 public:
  // `like` decides the dtype and device that all floating arguments must share; it is the
  // argument of the name given.
  Check(const char* op, const at::Tensor& like, const char* like_name = "input")
      : op_(op), like_(like), like_name_(like_name) {}

  void floating_input() const {
    strided(like_name_, like_);
    const auto type = like_.scalar_type();
    TORCH_CHECK_TYPE(
        type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
        op_, ": expected ", like_name_, " of dtype float32, float64, bfloat16 or float16, got ",
        type);
  }

  void dims(const char* name, const at::Tensor& t, int64_t expected) const {
    TORCH_CHECK_VALUE(t.dim() == expected, op_, ": expected ", name, " with ", expected,
                      " dimensions, got ", t.dim(), " (shape ", t.sym_sizes(), ")");
  }

  void shape(const char* name, const at::Tensor& t, c10::ArrayRef<Int> expected) const {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    int64_t i = 0;
    for (const Int& e : expected) {
      if (!same) break;
      same = size(t, i++) == e;
    }
    if (same) return;
    std::ostringstream wanted;
    const char* separator = "";
    for (const Int& e : expected) {
      wanted << separator << e;
      separator = ", ";
    }
    TORCH_CHECK_VALUE(false, op_, ": expected ", name, " of shape [", wanted.str(), "], got ",
                      t.sym_sizes());
  }

  // A floating argument: dtype, device and layout as input's, and the shape.
  void operand(const char* name, const at::Tensor& t, c10::ArrayRef<Int> expected) const {
    same_kind(name, t);
    shape(name, t, expected);
  }
  void operand(const char* name, const std::optional<at::Tensor>& t,
               c10::ArrayRef<Int> expected) const {
    if (t.has_value()) operand(name, *t, expected);
  }

  // An argument with a dtype of its own: a mask, an index, what a forward has saved.
  void typed(const char* name, const at::Tensor& t, at::ScalarType type) const {
    strided(name, t);
    TORCH_CHECK_TYPE(t.scalar_type() == type, op_, ": expected ", name, " of dtype ",
                     c10::getDtypeNames(type).first, ", got ", t.scalar_type());
    same_device(name, t);
  }
  void typed(const char* name, const at::Tensor& t, at::ScalarType type,
             c10::ArrayRef<Int> expected) const {
    typed(name, t, type);
    shape(name, t, expected);
  }

  void same_kind(const char* name, const at::Tensor& t) const {
    if (t.key_set() == like_.key_set() && t.dtype() == like_.dtype() &&
        t.device() == like_.device())
      return;  // the usual case, at once: input's layout has been checked
    strided(name, t);
    TORCH_CHECK_TYPE(t.scalar_type() == like_.scalar_type(), op_, ": expected ", name, " of ",
                     like_name_, "'s dtype ", like_.scalar_type(), ", got ", t.scalar_type());
    same_device(name, t);
  }

  void same_device(const char* name, const at::Tensor& t) const {
    TORCH_CHECK_TYPE(t.device() == like_.device(), op_, ": expected ", name, " on ", like_name_,
                     "'s device ", like_.device(), ", got ", t.device());
  }

  void strided(const char* name, const at::Tensor& t) const {
    TORCH_CHECK_TYPE(t.defined(), op_, ": expected ", name, " to be a tensor, got None");
    TORCH_CHECK_TYPE(t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested(), op_,
                     ": expected ", name, " to be a dense tensor, got ",
                     t.is_quantized() ? "a quantized one"
                     : t.is_nested()  ? "a nested one"
                                      : c10::str("layout ", t.layout()));
  }

  void together(const char* first, bool has_first, const char* second, bool has_second) const {
    TORCH_CHECK_VALUE(has_first == has_second, op_, ": expected ", first, " and ", second,
                      " both or neither, got only ", has_first ? first : second);
  }

  static Int size(const at::Tensor& t, int64_t i) {
    if constexpr (std::is_same_v<Int, int64_t>) {
      return t.size(i);
    } else {
      return t.sym_size(i);
    }
  }

  // How many of the `steps` each of B rows takes. What they hold is checked on the CPU alone: a GPU
  // would have to be waited for, and clamps them.
  void lengths(const std::optional<at::Tensor>& t, const Int& B, const Int& steps) const {
    if (!t.has_value()) return;
    strided("lengths", *t);
    TORCH_CHECK_TYPE(t->scalar_type() == at::kLong || t->scalar_type() == at::kInt, op_,
                     ": expected lengths of dtype int64 or int32, got ", t->scalar_type());
    if (!t->is_cpu()) same_device("lengths", *t);
    shape("lengths", *t, {B});
    if (!t->is_cpu()) return;
    const at::Tensor real = t->to(at::kLong).contiguous();
    const int64_t* length = real.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < real.numel(); ++b)
      TORCH_CHECK_VALUE(0 <= length[b] && length[b] <= steps, op_, ": expected lengths in 0..",
                        steps, ", got ", length[b], " for batch row ", b);
  }

  // Where a row starts anew: [rows, columns] are time and batch in the layout of the input.
  void reset(const std::optional<at::Tensor>& t, const Int& rows, const Int& columns) const {
    if (t.has_value()) typed("reset", *t, at::kBool, {rows, columns});
  }

  const char* op() const { return op_; }

 private:
  const char* op_;
  const at::Tensor& like_;
  const char* like_name_;
};

}  // namespace seqmem
