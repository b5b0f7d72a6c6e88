#include "spin_barrier.h"

namespace seqmem {

void SpinBarrier::yield_while(int phase) {
  StallWatch watch(*clocks_, threads_);
  while (phase_.load(std::memory_order_acquire) == phase) {
    sched_yield();
    watch.look();
  }
}

}  // namespace seqmem
