#include "busy.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>

namespace seqmem {
namespace {

constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond;
// Longer than a thread that sleeps takes to wake up, shorter than a scheduler's time slice.
constexpr int64_t kWindow = 200 * kMicrosecond;
// Fewer threads are used for the first pause, then all are tried; a stall soon after a pause makes
// the next one longer, so that trying costs little where the machine stays busy. Soon is measured
// by what stalls take: rare ones cost less than a pause would, and begin none.
constexpr int64_t kFirstPause = 20 * kMillisecond, kLongestPause = 2000 * kMillisecond;
constexpr int64_t kLonger = 4, kSoon = 16;  // stalls

std::atomic<int64_t> pause_end{0};  // 0: never paused, which costs calls nothing
std::atomic<int64_t> pause_length{0};
std::atomic<int64_t> stall_begin{0}, stall_end{0};  // the last one
std::atomic<int> threads_in_pause{1};

int64_t read(clockid_t clock) {
  timespec time;
  if (clock_gettime(clock, &time) != 0) return 0;
  return int64_t(time.tv_sec) * 1000 * kMillisecond + time.tv_nsec;
}

// A stall that began at `begin` and is not over. May be told of again, by other threads as well.
void note_stall(int64_t begin, int64_t now, int running) {
  int64_t end = pause_end.load(std::memory_order_relaxed);
  const int64_t last_end = stall_end.exchange(now, std::memory_order_relaxed);
  if (now < end || begin < last_end) return;  // told before
  const int64_t last_begin = stall_begin.exchange(begin, std::memory_order_relaxed);
  const int64_t cost = std::max(now - begin, last_end - last_begin);
  const bool soon = begin - std::max(last_end, end) < kSoon * cost;
  const int64_t last = pause_length.load(std::memory_order_relaxed);
  const int64_t length = !soon       ? 0
                         : last == 0 ? kFirstPause
                                     : std::min(kLonger * last, kLongestPause);
  pause_length.store(length, std::memory_order_relaxed);
  if (!soon || !pause_end.compare_exchange_strong(end, now + length)) return;
  threads_in_pause.store(std::max(running, 1), std::memory_order_relaxed);
}

}  // namespace

int threads_left_by_others(int threads) {
  const int64_t end = pause_end.load(std::memory_order_relaxed);
  if (end == 0 || read(CLOCK_MONOTONIC) >= end) return threads;
  return std::min(threads, threads_in_pause.load(std::memory_order_relaxed));
}

void TeamClocks::add(int thread) {
  clockid_t clock;
  if (thread < kMost && pthread_getcpuclockid(pthread_self(), &clock) == 0)
    ids_[thread].store(clock, std::memory_order_release);
}

StallWatch::StallWatch(const TeamClocks& clocks, int threads)
    : clocks_(clocks),
      threads_(threads),
      watched_(std::min(threads, TeamClocks::kMost)),
      begin_(read(CLOCK_MONOTONIC)),
      since_(begin_),
      self_(read(CLOCK_THREAD_CPUTIME_ID)) {}

void StallWatch::read_clocks(int64_t now) {
  since_ = now;
  self_ = read(CLOCK_THREAD_CPUTIME_ID);
  has_read_ = true;
  for (int i = 0; i < watched_; ++i) {
    const int clock = clocks_.clock(i);
    ran_[i] = clock == 0 ? 0 : read(clock);
  }
}

void StallWatch::look() {
  const int64_t now = read(CLOCK_MONOTONIC), window = now - since_;
  if (window < kWindow) return;
  int stalled = read(CLOCK_THREAD_CPUTIME_ID) - self_ < window / 2;  // this thread
  for (int i = 0; has_read_ && i < watched_; ++i) {
    const int clock = clocks_.clock(i);
    const bool came = clock != 0, came_meanwhile = came && ran_[i] == 0;
    if (!came || (!came_meanwhile && read(clock) - ran_[i] < window / 2)) ++stalled;
  }
  if (stalled > 0) note_stall(begin_, now, threads_ - stalled);
  read_clocks(now);
}

}  // namespace seqmem
