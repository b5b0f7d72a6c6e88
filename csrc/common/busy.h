// Fewer threads for a while where other programs keep ours from running. A team waits for its last
// thread: where one has lost its core, a call of microseconds takes a time slice or several, that
// is milliseconds. A thread that waits long looks how much processor time its team got meanwhile;
// the calls after that use as many threads as ran. Bits never depend on the number of threads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace seqmem {

// How many of `threads` to use now.
int threads_left_by_others(int threads);

// The processor clocks of a team's threads.
class TeamClocks {
 public:
  // Called by each thread of the team, with its own number.
  void add(int thread);
  int clock(int thread) const { return ids_[thread].load(std::memory_order_acquire); }

  static constexpr int kMost = 64;  // the rest of a larger team is not looked at

 private:
  std::array<std::atomic<int>, kMost> ids_{};  // 0: has not come yet
};

// Watches a team from the moment that one of its threads begins a long wait.
class StallWatch {
 public:
  StallWatch(const TeamClocks& clocks, int threads);
  // Called again and again while the thread waits, and at the end.
  void look();

 private:
  void read_clocks(int64_t now);

  const TeamClocks& clocks_;
  const int threads_, watched_;
  const int64_t begin_;
  int64_t since_, self_;  // the last window's begin, the waiting thread's processor time then
  bool has_read_ = false;
  std::array<int64_t, TeamClocks::kMost> ran_;  // the others', once read: it is not for nothing
};

}  // namespace seqmem
