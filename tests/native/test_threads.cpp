// The thread pool under far more threads than cores: late wake-ups, sleeps and claims of another run's tiles. Made to
// be run under ThreadSanitizer too.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "threads.h"

namespace fastserve::test {
namespace {

// Each stage adds what the stage before it left, so that a tile that runs early, late or twice changes the sums. The
// elements are not atomic: the pool alone orders them.
class ChainJob : public Job {
 public:
  ChainJob(int num_stages, int num_tiles) : num_tiles_(num_tiles), values_(std::size_t(num_stages)) {
    for (auto& stage : values_) stage.assign(std::size_t(num_tiles), 0);
  }
  int num_stages() const override { return static_cast<int>(values_.size()); }
  int num_tiles(int) const override { return num_tiles_; }
  void run_tile(int stage, int tile, int thread) override {
    if (thread > 0) has_helped.store(true, std::memory_order_relaxed);
    for (int i = 0; i < 300; ++i) work_.fetch_add(1, std::memory_order_relaxed);  // long enough to be joined
    int64_t sum = 1;
    if (stage > 0)
      for (int64_t value : values_[std::size_t(stage) - 1]) sum += value;
    values_[std::size_t(stage)][std::size_t(tile)] += sum;
  }
  void stage_done(int stage) override {
    in_order_ = in_order_ && stage == last_done_ + 1;
    last_done_ = stage;
  }

  static inline std::atomic<bool> has_helped{false};  // whether any thread but the calling one ran a tile

  bool is_right() const {
    int64_t expected = 0;
    for (const auto& stage : values_) {
      expected = 1 + expected * num_tiles_;
      for (int64_t value : stage)
        if (value != expected) return false;
    }
    return in_order_ && last_done_ == (num_tiles_ > 0 ? num_stages() - 1 : -1);
  }

 private:
  int num_tiles_;
  int last_done_ = -1;
  bool in_order_ = true;
  std::atomic<int> work_{0};
  std::vector<std::vector<int64_t>> values_;
};

void run_tiny_jobs(int num_threads, int num_runs) {
  ThreadPool pool(num_threads);
  for (int i = 0; i < num_runs; ++i) {
    ChainJob job(1 + i % 7, i % 5 == 4 ? 0 : 1 + i % 5);
    pool.run(job);
    if (!job.is_right())
      return fail(std::to_string(num_threads) + " threads: run " + std::to_string(i) + " lost or repeated a tile");
    if (i % 50 == 49) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that they sleep, and wake late
  }
}

// One tile for each thread, none of which ends before all have begun: threads that stay asleep are missed.
class MeetingJob : public Job {
 public:
  explicit MeetingJob(int num_threads) : num_threads_(num_threads) {}
  int num_stages() const override { return 1; }
  int num_tiles(int) const override { return num_threads_; }
  void run_tile(int, int, int) override {
    num_begun_.fetch_add(1);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (num_begun_.load() < num_threads_) {
      if (std::chrono::steady_clock::now() > deadline) return is_missed_.store(true);
      std::this_thread::yield();
    }
  }
  bool is_missed() const { return is_missed_.load(); }

 private:
  int num_threads_;
  std::atomic<int> num_begun_{0};
  std::atomic<bool> is_missed_{false};
};

void wake_sleepers(int num_threads) {
  ThreadPool pool(num_threads);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // far longer than they spin
    MeetingJob job(num_threads);
    pool.run(job);
    if (job.is_missed()) return fail(std::to_string(num_threads) + " threads: one slept through a run");
  }
}

}  // namespace
}  // namespace fastserve::test

int main() {
  using namespace fastserve::test;
  for (int num_threads : {1, 2, 3, 16}) run_tiny_jobs(num_threads, 3000);
  for (int i = 0; i < 100; ++i) run_tiny_jobs(8, i % 3);  // pools that end while their threads begin
  for (int num_threads : {2, 4}) wake_sleepers(num_threads);
  expect(ChainJob::has_helped.load(), "the pools' own threads ran nothing");
  return finish("threads");
}
