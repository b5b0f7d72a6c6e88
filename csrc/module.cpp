// The Python module seqmem_fast._C: what was built, and what runs. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "common/team.h"
#include "common/tiles_in_use.h"

#define SEQMEM_STRING_(x) #x
#define SEQMEM_STRING(x) SEQMEM_STRING_(x)

namespace seqmem::attention {
void bind(pybind11::module_& m);
}
namespace seqmem::lstm {
void bind(pybind11::module_& m);
}

namespace {

std::vector<std::string> compiled_isas() {
  return {
#if defined(SEQMEM_WITH_BASELINE)
      "baseline",
#endif
#if defined(SEQMEM_WITH_AVX2)
      "avx2",
#endif
#if defined(SEQMEM_WITH_AVX512)
      "avx512",
#endif
  };
}

std::string compiled_tiles() {
  if (&seqmem::amx::tiles_build == nullptr) return "none";
  return seqmem::amx::tiles_build.emulated ? "emulated" : "amx";
}

std::string cpu_capability() {
  switch (seqmem::isa_in_use()) {
    case seqmem::Isa::Avx512: return "avx512";
    case seqmem::Isa::Avx2: return "avx2";
    case seqmem::Isa::Baseline: break;
  }
  return "baseline";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SEQMEM_STRING(SEQMEM_VERSION);
#if defined(__clang__)
  info["compiler"] = __VERSION__;  // "Clang 14.0.6", with the vendor's name before it
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["torch"] = TORCH_VERSION;
  info["isas"] = compiled_isas();
  info["tiles"] = compiled_tiles();
#if defined(SEQMEM_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["openmp"] = _OPENMP;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of seqmem_fast; its ops are reached as torch.ops.seqmem.*";
  m.def("build_info", &build_info, "What this module was built from, and for which processors.");
  m.def("cpu_capability", &cpu_capability, "The ISA whose kernels run: baseline, avx2 or avx512.");
  m.def("available_threads", &seqmem::available_threads,
        "Threads that a call may use now: torch's, or fewer for a while after other programs kept "
        "one from running.");
  m.def("tiles_in_use", &seqmem::tiles_in_use, "Whether bf16 LSTMs run on tiles.");
  seqmem::attention::bind(m);
  seqmem::lstm::bind(m);
}
