#include "threads.h"

#include <algorithm>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastserve {
namespace {

// How often to look before sleeping. Long enough to bridge the gaps between the steps, and the stages, of a running
// model; between stages short, so that the core is left to a thread that holds a tile and was taken off its own.
constexpr int kSpinsForRun = 4000;
constexpr int kSpinsForStage = 400;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#else
  std::this_thread::yield();
#endif
}

uint64_t tagged(uint32_t run, uint32_t count) { return static_cast<uint64_t>(run) << 32 | count; }
uint32_t run_of(uint64_t counter) { return static_cast<uint32_t>(counter >> 32); }

}  // namespace

ThreadPool::ThreadPool(int num_threads) : stages_(new Stage[kMaxStages]) {
  try {
    for (int thread = 1; thread < num_threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // a thread that is not joined would end the process
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true);
  run_.fetch_add(1);
  run_.notify_all();
  wakeups_.fetch_add(1);
  wakeups_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Job& job) {
  const std::lock_guard lock(run_mutex_);
  const int num_stages = job.num_stages();
  for (int first = 0; first < num_stages; first += kMaxStages)
    run_stages(job, first, std::min(kMaxStages, num_stages - first));
}

void ThreadPool::run_stages(Job& job, int first_stage, int num_stages) {
  const uint32_t run = run_.load(std::memory_order_relaxed) + 1;
  // Make late threads' claims fail before anything that they read changes.
  for (int s = 0; s < num_stages; ++s) {
    stages_[s].next.store(tagged(run, UINT32_MAX), std::memory_order_relaxed);
    stages_[s].finished.store(tagged(run, 0), std::memory_order_relaxed);
    stages_[s].done.store(tagged(run, 0), std::memory_order_relaxed);
    stages_[s].num_tiles.store(static_cast<uint32_t>(job.num_tiles(first_stage + s)), std::memory_order_release);
  }
  job_ = &job;
  first_stage_ = first_stage;
  num_stages_.store(num_stages, std::memory_order_relaxed);
  // A tile can be claimed from here on: `next` publishes all of the above.
  for (int s = 0; s < num_stages; ++s) stages_[s].next.store(tagged(run, 0), std::memory_order_release);
  run_.store(run, std::memory_order_release);
  run_.notify_all();
  walk(run, 0);
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpinsForRun && run_.load(std::memory_order_acquire) == seen; ++spin) pause();
    run_.wait(seen, std::memory_order_acquire);
    if (stopping_.load()) return;
    seen = run_.load(std::memory_order_acquire);
    walk(seen, thread);
  }
}

// Helps with every stage of one run until it, or the run, is over.
void ThreadPool::walk(uint32_t run, int thread) {
  const int num_stages = num_stages_.load(std::memory_order_relaxed);
  for (int s = 0; s < num_stages; ++s) {
    Stage& stage = stages_[s];
    uint32_t tile;
    while (claim(stage, run, &tile)) {
      job_->run_tile(first_stage_ + s, static_cast<int>(tile), thread);
      const uint64_t all = tagged(run, stage.num_tiles.load(std::memory_order_relaxed));
      if (stage.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == all) finish(stage, s, all);
    }
    if (!wait_until_done(stage, run)) return;
  }
}

// By the thread that did the stage's last tile: tells the job, then all who wait.
void ThreadPool::finish(Stage& stage, int stage_index, uint64_t all) {
  job_->stage_done(first_stage_ + stage_index);
  stage.done.store(all, std::memory_order_seq_cst);
  if (sleepers_.load() == 0) return;
  wakeups_.fetch_add(1);
  wakeups_.notify_all();
}

bool ThreadPool::claim(Stage& stage, uint32_t run, uint32_t* tile) {
  uint64_t next = stage.next.load(std::memory_order_acquire);
  do {
    *tile = static_cast<uint32_t>(next);
    if (run_of(next) != run || *tile >= stage.num_tiles.load(std::memory_order_acquire)) return false;
  } while (!stage.next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  return true;
}

// True once all tiles are done; false if the run ended meanwhile, so that the thread is late.
bool ThreadPool::wait_until_done(Stage& stage, uint32_t run) {
  const auto is_over = [&] {
    const uint64_t done = stage.done.load(std::memory_order_seq_cst);
    return run_of(done) != run || static_cast<uint32_t>(done) >= stage.num_tiles.load(std::memory_order_relaxed);
  };
  for (int spin = 0; spin < kSpinsForStage; ++spin) {
    if (is_over()) return run_of(stage.done.load(std::memory_order_acquire)) == run;
    pause();
  }
  sleepers_.fetch_add(1);
  for (;;) {
    const uint32_t wakeups = wakeups_.load();
    if (is_over()) break;
    wakeups_.wait(wakeups);
  }
  sleepers_.fetch_sub(1);
  return run_of(stage.done.load(std::memory_order_acquire)) == run;
}

}  // namespace fastserve
