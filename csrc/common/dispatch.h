// Chooses among the copies of a kernel that were compiled per ISA.
#pragma once

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

#include "isa.h"

namespace seqmem {

// The best ISA that was compiled in and that torch uses, which honours ATEN_CPU_CAPABILITY.
inline Isa isa_in_use() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
#ifdef SEQMEM_WITH_AVX512
    if (capability == "AVX512") return Isa::Avx512;
#endif
#ifdef SEQMEM_WITH_AVX2
    if (capability == "AVX2" || capability == "AVX512") return Isa::Avx2;
#endif
#ifndef SEQMEM_WITH_BASELINE
    TORCH_CHECK(false, "seqmem: built without kernels for this processor (torch uses ", capability,
                "): build without --isas");
#endif
    return Isa::Baseline;
  }();
  return isa;
}

template <class Kernel>
const Kernel& choose(const Kernel* baseline, const Kernel* avx2, const Kernel* avx512) {
  const Isa isa = isa_in_use();
  if (isa == Isa::Avx512) return *avx512;
  if (isa == Isa::Avx2) return *avx2;
  return *baseline;
}

}  // namespace seqmem

// The table of `kernel`, an object that each of the namespaces baseline, avx2, avx512 defines if
// the build includes that ISA.
#ifdef SEQMEM_WITH_BASELINE
#define SEQMEM_BASELINE_COPY(kernel) &baseline::kernel
#else
#define SEQMEM_BASELINE_COPY(kernel) nullptr
#endif
#ifdef SEQMEM_WITH_AVX2
#define SEQMEM_AVX2_COPY(kernel) &avx2::kernel
#else
#define SEQMEM_AVX2_COPY(kernel) nullptr
#endif
#ifdef SEQMEM_WITH_AVX512
#define SEQMEM_AVX512_COPY(kernel) &avx512::kernel
#else
#define SEQMEM_AVX512_COPY(kernel) nullptr
#endif
#define SEQMEM_CHOOSE(kernel)                                     \
  ::seqmem::choose<std::remove_cv_t<decltype(baseline::kernel)>>( \
      SEQMEM_BASELINE_COPY(kernel), SEQMEM_AVX2_COPY(kernel), SEQMEM_AVX512_COPY(kernel))
