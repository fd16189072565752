// A persistent pool that runs a job's stages one after the other, each cut into small tiles that threads claim from
// an atomic counter. A thread that the system has taken off its core delays nothing but the tile it holds: the
// others finish the stage and go on without it, and it rejoins wherever they are.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastserve {

// Work in stages; a stage starts when every tile of the one before it is done.
class Job {
 public:
  virtual ~Job() = default;
  virtual int num_stages() const = 0;
  virtual int num_tiles(int stage) const = 0;
  // Called once for each tile, by any thread. `thread` < the pool's size tells scratch memory apart.
  virtual void run_tile(int stage, int tile, int thread) = 0;
  // Called once for each stage that has tiles, when all of them are done and before the next stage starts, by the
  // thread that did the last.
  virtual void stage_done(int) {}
};

class ThreadPool {
 public:
  // The calling thread is one of them. Throws std::system_error where the system does not give that many.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Returns when all stages are done. Jobs of several threads run one after the other.
  void run(Job& job);

 private:
  // Counters carry the number of the run they belong to in their upper half, so that a thread that wakes up late
  // cannot claim a tile of another run.
  struct alignas(64) Stage {
    std::atomic<uint64_t> next{0};                  // run << 32 | next tile to claim
    alignas(64) std::atomic<uint64_t> finished{0};  // run << 32 | tiles finished
    std::atomic<uint64_t> done{0};                  // run << 32 | all tiles, once stage_done is called; until then 0
    std::atomic<uint32_t> num_tiles{0};
  };
  static constexpr int kMaxStages = 4096;

  void stop();
  void run_stages(Job& job, int first_stage, int num_stages);
  void work(int thread);
  void walk(uint32_t run, int thread);
  bool claim(Stage& stage, uint32_t run, uint32_t* tile);
  void finish(Stage& stage, int stage_index, uint64_t all);
  bool wait_until_done(Stage& stage, uint32_t run);

  std::unique_ptr<Stage[]> stages_;
  std::atomic<int> num_stages_{0};
  int first_stage_ = 0;
  Job* job_ = nullptr;
  std::atomic<uint32_t> run_{0};
  std::mutex run_mutex_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};      // threads asleep in wait_until_done
  std::atomic<uint32_t> wakeups_{0};  // what they sleep on
  std::vector<std::thread> workers_;
};

}  // namespace fastserve
