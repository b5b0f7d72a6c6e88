// Keeps csrc/cuda from registering its ops at the CUDA key.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY_FRAGMENT
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_FRAGMENT(ns, m) [[maybe_unused]] static void not_defined(torch::Library& m)
#define TORCH_LIBRARY_IMPL(ns, key, m) \
  [[maybe_unused]] static void not_registered(torch::Library& m)
