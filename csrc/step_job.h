// Runs one step on a thread pool: the stages of its schedule, then the sampling of its output rows.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sample.h"
#include "stage_schedule.h"
#include "step.h"
#include "threads.h"

namespace fastserve {

// What a call has done since profiling began.
struct CallProfile {
  const char* name;
  std::string shape;
  int64_t num_runs = 0;
  double seconds = 0;
  Cost cost;
};

// Memory that each thread has for itself.
struct ThreadMemory {
  float* scratch;
  int64_t scratch_floats;
  uint8_t* strips;
  int64_t strip_bytes;
  int num_threads;
};

// What is sampled, from which logits, with which memory of each thread, and where the results go.
struct Sampling {
  const SampleBatch* batch;  // null: nothing is
  const Matrix* logits;
  std::vector<SampleScratch>& scratch;
  SampleResult* results;
};

class StepJob : public Job {
 public:
  // `profile` has an element for each call, then one for the sampling; or is null. Everything is borrowed.
  StepJob(const std::vector<std::unique_ptr<Call>>& calls, const StageSchedule& schedule, const Step& step,
          const Sampling& sampling, const ThreadMemory& memory, std::vector<CallProfile>* profile);

  int num_stages() const override { return static_cast<int>(schedule_.stages.size()) + (sampling_.batch ? 1 : 0); }
  int num_tiles(int stage) const override;
  void run_tile(int stage, int tile, int thread) override;
  void stage_done(int stage) override;

 private:
  using Clock = std::chrono::steady_clock;

  bool is_sampling(int stage) const { return stage == static_cast<int>(schedule_.stages.size()); }
  const Stage& at(int stage) const { return schedule_.stages[static_cast<std::size_t>(stage)]; }
  const Call& call(int index) const { return *calls_[static_cast<std::size_t>(index)]; }
  float* scratch(int thread) const { return memory_.scratch + thread * memory_.scratch_floats; }
  void run_strip(const Stage& stage, int index, int thread);
  double seconds_of(int first_call, int end_call) const;
  void add_to_profile(int index, double seconds, const Cost& cost);

  const std::vector<std::unique_ptr<Call>>& calls_;
  const StageSchedule& schedule_;
  const Step& step_;
  Sampling sampling_;
  ThreadMemory memory_;
  std::vector<CallProfile>* profile_;
  std::vector<double> seconds_;  // [calls][threads]: where a stage is several calls
  Clock::time_point stage_start_;
};

}  // namespace fastserve
