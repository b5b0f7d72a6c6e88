// An op's plumbing, derived from its signature, which stands once as types and once with names:
//
//   constexpr char kName[] = "seqmem::scaled";
//   using Scaled = Op<kName, Tensors<1>(In, Maybe, double)>;
//   struct Inputs { In input; Maybe mask; double scale; };       // those arguments by name
//   template <class Int> Sizes<Int> check(const Inputs& in);     // refuses wrong ones
//   Tensors<1> forward_cpu(const Inputs& in);                    // calls check<int64_t>(in) first
//   Tensors<1> forward_meta(const Inputs& in);                   // calls check<c10::SymInt>(in)
//   TORCH_LIBRARY_FRAGMENT(seqmem, m) {
//     Scaled::define<check<c10::SymInt>, forward_cpu, forward_meta>(
//         m, "(Tensor input, Tensor? mask, float scale) -> Tensor output");
//   }
//
// defines seqmem::scaled and seqmem::check_scaled, which the CUDA key calls before it begins. A
// backward is an op of its own, `scaled_backward`, defined in the same way; a struct may inherit
// the arguments that it shares with another, in the signature's order. The derivative: autograd.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

namespace seqmem {

using OptionalTensor = std::optional<at::Tensor>;
using In = const at::Tensor&;
using Maybe = const OptionalTensor&;

// std::tuple of n tensors; of one, the tensor itself.
template <size_t n>
struct TensorsOf {
  using type = decltype(std::tuple_cat(std::array<at::Tensor, n>{}));
};
template <>
struct TensorsOf<1> {
  using type = at::Tensor;
};
template <size_t n>
using Tensors = typename TensorsOf<n>::type;

template <const char* name, class Signature>
struct Op;

template <const char* name, class Out, class... Args>
struct Op<name, Out(Args...)> {
  using Signature = Out(Args...);
  static constexpr const char* full_name = name;
  static constexpr size_t arguments = sizeof...(Args);

  // Through the dispatcher, which is asked for the op once.
  static Out call(Args... args) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Out(Args...)>();
    return op.call(args...);
  }

  // Defines the op and its check. The functions take the arguments as one struct; `schema` is that
  // of the op without its name.
  template <auto check_inputs, auto cpu, auto meta>
  static void define(torch::Library& m, const std::string& schema) {
    const std::string check = std::string("seqmem::check_") + (name + sizeof("seqmem::") - 1);
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    m.def((name + schema).c_str(), tags);
    m.def((check + schema.substr(0, schema.find(" -> ")) + " -> ()").c_str(), tags);
    implement<cpu>(m, c10::DispatchKey::CPU);
    implement<meta>(m, c10::DispatchKey::Meta);
    using c10::DispatchKey::CompositeExplicitAutograd;
    const auto check_only = TORCH_FN(without_result<check_inputs>);
    const auto refuse = TORCH_FN(unsupported<check_inputs>);
    m.impl(check.c_str(), torch::dispatch(CompositeExplicitAutograd, check_only));
    m.impl(name, torch::dispatch(CompositeExplicitAutograd, refuse));
    // Nested tensors are the one kind that the key above leaves out.
    m.impl(name, torch::dispatch(c10::DispatchKey::NestedTensorCPU, refuse));
  }

  // The op for one more key, as CUDA.
  template <auto f>
  static void implement(torch::Library& m, c10::DispatchKey key) {
    m.impl(name, torch::dispatch(key, TORCH_FN(as_struct<f>)));
  }

  template <auto f>
  static Out as_struct(Args... args) {
    return f({args...});
  }

 private:
  template <auto check_inputs>
  static void without_result(Args... args) {
    check_inputs({args...});
  }

  // Where no kernel exists (sparse, quantized, other devices): the check's error, or a plain one.
  template <auto check_inputs>
  static Out unsupported(Args... args) {
    check_inputs({args...});
    const at::Tensor* first = nullptr;
    auto find = [&](const auto& argument) {
      if constexpr (std::is_same_v<std::decay_t<decltype(argument)>, at::Tensor>)
        if (first == nullptr) first = &argument;
    };
    (find(args), ...);
    TORCH_CHECK_TYPE(false, name, ": expected tensors on cpu, cuda or meta, got ", first->device(),
                     " (layout ", first->layout(), ")");
  }
};

inline const at::Tensor* address(In t) { return &t; }
inline const at::Tensor* address(Maybe t) { return t.has_value() ? &*t : nullptr; }

// A backward's results on meta: shaped as the arguments, empty where not wanted or absent.
template <class First, class... Rest>
Tensors<1 + sizeof...(Rest)> gradients_like(const std::array<bool, 1 + sizeof...(Rest)>& wanted,
                                            const First& first, const Rest&... rest) {
  size_t k = 0;
  auto make = [&](const at::Tensor* like) {
    const bool is_wanted = wanted[k++] && like != nullptr;
    return is_wanted ? at::empty_symint(like->sym_sizes(), first.options())
                     : at::empty({0}, first.options());
  };
  return {make(address(first)), make(address(rest))...};
}

}  // namespace seqmem
