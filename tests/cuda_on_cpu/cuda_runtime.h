#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

#define __device__
#define __global__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace cuda_on_cpu {

// The threads of a block, each with a stack of its own, one running at a time until it waits.
class Block {
 public:
  // Runs `kernel` in every thread; blockIdx has been set.
  void run(const std::function<void()>& kernel) {
    const unsigned count = blockDim.x * blockDim.y;
    threads_.resize(count);
    everyone_ = {count};
    warps_.assign((count + 31) / 32, {});
    for (unsigned t = 0; t < count; ++t) ++warps_[t / 32].size;
    kernel_ = &kernel;
    current_block = this;
    for (Thread& thread : threads_) start(thread);
    for (unsigned alive = count; alive > 0;) {
      bool moved = false;
      for (current_ = 0; current_ < count; ++current_) {
        Thread& thread = threads_[current_];
        if (thread.done || (thread.barrier && thread.barrier->passed == thread.round)) continue;
        threadIdx = dim3(current_ % blockDim.x, current_ / blockDim.x);
        resume(thread);
        moved = true;
        alive -= thread.done;
      }
      if (!moved) {
        std::fputs("cuda_on_cpu: threads wait for others that have left or wait elsewhere\n",
                   stderr);
        std::abort();
      }
    }
  }

  void sync_block() { wait(everyone_); }
  void sync_warp() { wait(warps_[current_ / 32]); }

  // The value that lane `lane` of this thread's warp gives; all lanes call it.
  template <class T>
  T exchange(const T& mine, unsigned lane) {
    // Two places in turn: no lane is two exchanges ahead of another.
    const unsigned place = ++threads_[current_].exchanges % 2;
    std::memcpy(threads_[current_].given[place], &mine, sizeof(T));
    sync_warp();
    T theirs;
    std::memcpy(&theirs, threads_[current_ / 32 * 32 + lane].given[place], sizeof(T));
    return theirs;
  }

  unsigned lane() const { return current_ % 32; }

  inline static Block* current_block = nullptr;

 private:
  struct Barrier {
    unsigned size = 0, arrived = 0, passed = 0;
  };
  struct Thread {
    ucontext_t context;  // of the first entry; later ones jump, which needs no system call
    jmp_buf jump;
    std::unique_ptr<char[]> stack;
    Barrier* barrier;
    unsigned round, exchanges;
    bool entered, done;
    char given[2][16];
  };
  static constexpr size_t kStack = 64 << 10;

  void start(Thread& thread) {
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.barrier = nullptr;
    thread.exchanges = 0;
    thread.entered = thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
  }

  void resume(Thread& thread) {
    if (_setjmp(scheduler_) != 0) return;
    if (thread.entered) _longjmp(thread.jump, 1);
    thread.entered = true;
    setcontext(&thread.context);
  }

  static void enter() {
    Block* block = current_block;
    (*block->kernel_)();
    block->threads_[block->current_].done = true;
    _longjmp(block->scheduler_, 1);
  }

  void wait(Barrier& barrier) {
    Thread& thread = threads_[current_];
    thread.barrier = &barrier;
    thread.round = barrier.passed;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.passed;
    }
    if (_setjmp(thread.jump) == 0) _longjmp(scheduler_, 1);
    thread.barrier = nullptr;
  }

  std::vector<Thread> threads_;
  Barrier everyone_;
  std::vector<Barrier> warps_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
  unsigned current_ = 0;
};

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::Block::current_block->sync_block(); }
inline void __syncwarp() { cuda_on_cpu::Block::current_block->sync_warp(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto* block = cuda_on_cpu::Block::current_block;
  return block->exchange(value, block->lane() ^ mask);
}
// `width` lanes from a multiple of it on are a group of their own.
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  auto* block = cuda_on_cpu::Block::current_block;
  return block->exchange(value, block->lane() / width * width + lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance, int width = 32) {
  auto* block = cuda_on_cpu::Block::current_block;
  const int lane = block->lane();
  return block->exchange(value, lane % width < distance ? lane : lane - distance);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  cuda_on_cpu::Block block;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      block.run([&] { kernel(arguments...); });
  return cudaSuccess;
}
