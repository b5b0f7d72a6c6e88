// Calling a forward for the sake of its backward.
#pragma once

#include <tuple>
#include <utility>

namespace seqmem {

// Calls an op whose last argument says whether to return what its backward needs, with true for it.
template <class Op, class... Args>
auto call_saving(const Args&... args) {
  const auto all = std::tie(args...);
  auto call = [&]<size_t... k>(std::index_sequence<k...>) {
    return Op::call(std::get<k>(all)..., true);
  };
  return call(std::make_index_sequence<sizeof...(Args) - 1>());
}

}  // namespace seqmem
