// How products, attention and norms use the cores of a process: a team of threads, the caller and helpers of its own.
//
// XLA's pool sleeps between any two operations, and to wake a thread takes as long as many a product. Helpers look for work
// for kPatience before they sleep: in a step the next product begins within microseconds.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace blitzjax {

constexpr auto kPatience = std::chrono::microseconds(200);
constexpr int kPauses = 256;  // before others who want the core are let by each time
constexpr int64_t kMostMembers = 64;

class Team {
 public:
  explicit Team(int64_t members) : members_(std::clamp<int64_t>(members, 1, kMostMembers)) {
    for (int64_t helper = 1; helper < members_; ++helper) std::thread([this, helper] { Help(helper); }).detach();
  }

  // Calls run(0), ..., run(tasks - 1) and returns when all have returned. False, and nothing done, if the team is at work.
  template <typename Run>
  bool Do(int64_t tasks, const Run& run) {
    const std::unique_lock<std::mutex> held(busy_, std::try_to_lock);
    if (!held) return false;
    run_ = [](const void* run, int64_t task) { (*static_cast<const Run*>(run))(task); };
    with_ = &run;
    left_.store(tasks, std::memory_order_relaxed);
    for (int64_t m = 0; m < members_; ++m)
      shares_[m].range.store(Range(tasks * m / members_, tasks * (m + 1) / members_), std::memory_order_release);
    rounds_.fetch_add(1);
    if (asleep_.load()) {
      const std::lock_guard<std::mutex> held(sleep_);
      wake_.notify_all();
    }
    Work(0);
    for (int waits = 0; left_.load(std::memory_order_acquire);) ++waits < kPauses ? _mm_pause() : std::this_thread::yield();
    return true;
  }

 private:
  // Tasks [first, last) that nobody has begun, in one word.
  static uint64_t Range(uint64_t first, uint64_t last) { return first << 32 | last; }

  // A member's share lies side by side, as it reads ahead; who is through goes on with those of others.
  void Work(int64_t member) {
    for (int64_t m = 0; m < members_; ++m) {
      std::atomic<uint64_t>& range = shares_[(member + m) % members_].range;
      for (uint64_t seen = range.load(std::memory_order_acquire); seen >> 32 < (seen & 0xffffffff);) {
        if (!range.compare_exchange_weak(seen, seen + Range(1, 0), std::memory_order_acq_rel)) continue;
        run_(with_, seen >> 32);  // what they are cannot change before this task is done
        left_.fetch_sub(1, std::memory_order_release);
        seen = range.load(std::memory_order_acquire);
      }
    }
  }

  void Help(int64_t member) {
    for (uint64_t seen = 0;;) {
      const auto until = std::chrono::steady_clock::now() + kPatience;
      for (int waits = 0; rounds_.load(std::memory_order_acquire) == seen; ++waits) {
        if (waits < kPauses) {
          _mm_pause();
        } else if (std::chrono::steady_clock::now() < until) {
          std::this_thread::yield();
        } else {
          std::unique_lock<std::mutex> held(sleep_);
          asleep_.fetch_add(1);
          wake_.wait(held, [&] { return rounds_.load() != seen; });
          asleep_.fetch_sub(1);
        }
      }
      seen = rounds_.load(std::memory_order_acquire);
      Work(member);
    }
  }

  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };

  const int64_t members_;
  std::mutex busy_;
  void (*run_)(const void*, int64_t) = nullptr;
  const void* with_ = nullptr;
  Share shares_[kMostMembers];
  alignas(64) std::atomic<int64_t> left_{0};
  alignas(64) std::atomic<uint64_t> rounds_{0};
  std::atomic<int64_t> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// The process's, of as many members as XLA uses cores. Its threads never end.
inline Team& TheTeam(const xla::ffi::ThreadPool& pool) {
  static auto* const team = new Team(pool.num_threads());
  return *team;
}

// Calls run(0), ..., run(tasks - 1), by the team unless others have it, and returns when all have returned.
template <typename Run>
void InParallel(const xla::ffi::ThreadPool& pool, int64_t tasks, const Run& run) {
  if (tasks > 1 && TheTeam(pool).Do(tasks, run)) return;
  for (int64_t task = 0; task < tasks; ++task) run(task);
}

}  // namespace blitzjax
