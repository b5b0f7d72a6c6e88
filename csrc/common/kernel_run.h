// What a kernel's class (Entry, kernel_util.h) is constructed from. A kernel derives its class from
// KernelRun and inherits the constructor; all else is initialised where it is declared.
#pragma once

#include "isa.h"

namespace seqmem {
namespace {

// One thread's place in a call.
template <class Shape, class Plan>
struct ThreadOf {
  const Shape& s;
  const Plan& plan;
  const int thread, threads;
  SpinBarrier& barrier;
};

// Thread is a ThreadOf, or derived from one.
template <class Arguments, class Thread>
struct KernelRun : Thread {
  const Arguments& a;

  template <class Shape, class Plan>
  KernelRun(const Shape& s, const Plan& plan, const Arguments& a, int thread, int threads,
            SpinBarrier& barrier)
      : Thread{ThreadOf<Shape, Plan>{s, plan, thread, threads, barrier}}, a(a) {}
};

}  // namespace
}  // namespace seqmem
