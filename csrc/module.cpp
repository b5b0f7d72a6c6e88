// The Python module seqmem_fast._C: what was built, and what runs. Importing it registers the ops.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>
#include <vector>

#define SEQMEM_STRING_(x) #x
#define SEQMEM_STRING(x) SEQMEM_STRING_(x)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::vector<std::string> compiled_isas() {
  return {
      "baseline",
#if defined(SEQMEM_WITH_AVX2)
      "avx2",
#endif
#if defined(SEQMEM_WITH_AVX512)
      "avx512",
#endif
  };
}

// The kernels' ISA: what ATen found, which honours ATEN_CPU_CAPABILITY, as far as compiled in.
std::string cpu_capability() {
  const std::string found = at::get_cpu_capability();
#if defined(SEQMEM_WITH_AVX512)
  if (found == "AVX512") return "avx512";
#endif
#if defined(SEQMEM_WITH_AVX2)
  if (found == "AVX512" || found == "AVX2") return "avx2";
#endif
  return "baseline";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SEQMEM_STRING(SEQMEM_VERSION);
  info["compiler"] = compiler();
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["torch"] = TORCH_VERSION;
  info["isas"] = compiled_isas();
#if defined(SEQMEM_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of seqmem_fast; its ops are reached as torch.ops.seqmem.*";
  m.def("build_info", &build_info, "What this module was built from, and for which processors.");
  m.def("cpu_capability", &cpu_capability, "The ISA whose kernels run: baseline, avx2 or avx512.");
}
