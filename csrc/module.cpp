// The Python module seqmem_fast._C: what was built, and what runs. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "common/bf16_in_use.h"
#include "common/team.h"

#define SEQMEM_STRING_(x) #x
#define SEQMEM_STRING(x) SEQMEM_STRING_(x)

namespace seqmem::attention {
void bind(pybind11::module_& m);
}
namespace seqmem::lstm {
void bind(pybind11::module_& m);
}
namespace seqmem::ntm {
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

std::vector<std::string> compiled_bf16() {
  std::vector<std::string> names;
  const auto add = [&](const seqmem::Bf16Build* build, const char* name) {
    if (build != nullptr)
      names.push_back(build->emulated ? name + std::string(", emulated") : name);
  };
  add(&seqmem::amx::bf16_build, "amx");
  add(&seqmem::avx512_bf16::bf16_build, "avx512_bf16");
  return names;
}

std::string bf16_in_use() {
  switch (seqmem::bf16_in_use()) {
    case seqmem::Bf16::Tiles: return "amx";
    case seqmem::Bf16::DotProducts: return "avx512_bf16";
    case seqmem::Bf16::Float32: break;
  }
  return "float32";
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
  info["bf16"] = compiled_bf16();
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
  m.def("bf16_in_use", &bf16_in_use,
        "What bf16 runs on: amx (tiles), avx512_bf16 (dot products) or float32.");
  seqmem::attention::bind(m);
  seqmem::lstm::bind(m);
  seqmem::ntm::bind(m);
}
