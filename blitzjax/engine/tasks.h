// How a product uses the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

// Calls run(0), ..., run(tasks - 1) and returns when all have returned. Tasks are taken by whoever is free; the caller
// takes them too, so it never waits for one that nobody has begun. `run` is copied and may outlive the call unused.
template <typename Run>
void InParallel(xla::ffi::ThreadPool& pool, int64_t tasks, Run run) {
  struct Shared {
    Run run;
    const int64_t tasks;
    std::atomic<int64_t> next{0}, done{0};

    Shared(Run run, int64_t tasks) : run(std::move(run)), tasks(tasks) {}
    void Work() {
      for (int64_t task; (task = next.fetch_add(1)) < tasks; done.fetch_add(1, std::memory_order_release)) run(task);
    }
  };
  auto shared = std::make_shared<Shared>(std::move(run), tasks);
  for (int64_t helper = 1; helper < std::min<int64_t>(pool.num_threads(), tasks); ++helper)
    pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  while (shared->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}
