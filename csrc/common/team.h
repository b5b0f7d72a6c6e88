// Runs one function, or a kernel, on a team of threads that may meet at a barrier.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include "busy.h"
#include "isa.h"
#include "spin_barrier.h"
#include "workspace.h"

namespace seqmem {

// Threads a kernel may use here: all of torch's that other programs leave to it, or one inside
// somebody's parallel region.
inline int available_threads() {
  return at::in_parallel_region() ? 1 : threads_left_by_others(at::get_num_threads());
}

// Calls prepare(threads) on the calling thread, then f(thread, threads, barrier) on each of at
// most `wanted` threads. As many as OpenMP grants take part, so that the barrier never waits for
// a thread that did not come.
template <class Prepare, class F>
void run_team(int wanted, const Prepare& prepare, const F& f) {
  if (wanted <= 1 || omp_in_parallel()) {
    SpinBarrier alone(1);
    prepare(1);
    f(0, 1, alone);
    return;
  }
  TeamClocks clocks;
  SpinBarrier barrier(wanted, &clocks);
#pragma omp parallel num_threads(wanted)
  {
    const int thread = omp_get_thread_num(), granted = omp_get_num_threads();
    if (thread == 0) {
      prepare(granted);
      barrier.open(granted);
    } else {
      barrier.enter(thread);
    }
    f(thread, granted, barrier);
    barrier.wait();  // which notices a thread that does not get to run; OpenMP's own does not
  }
}

// Runs a kernel on at most `threads` threads, with the workspace that it asks for.
template <class Arguments, class... Shapes>
void launch(const Kernel<Arguments, Shapes...>& kernel, int threads, Arguments arguments,
            Storage storage, const Shapes&... shapes) {
  run_team(
      threads,
      [&](int granted) {
        arguments.workspace =
            Workspace::get(kernel.workspace(storage, shapes..., arguments, granted));
      },
      [&](int thread, int granted, SpinBarrier& barrier) {
        kernel.run(storage, shapes..., arguments, thread, granted, barrier);
      });
}

}  // namespace seqmem
