#include "step_job.h"

#include <algorithm>
#include <numeric>

namespace fastserve {

StepJob::StepJob(const std::vector<std::unique_ptr<Call>>& calls, const StageSchedule& schedule, const Step& step,
                 const Sampling& sampling, const ThreadMemory& memory, std::vector<CallProfile>* profile)
    : calls_(calls), schedule_(schedule), step_(step), sampling_(sampling), memory_(memory), profile_(profile) {
  if (!profile_) return;
  seconds_.assign(calls_.size() * static_cast<std::size_t>(memory.num_threads), 0.0);
  stage_start_ = Clock::now();
}

int StepJob::num_tiles(int stage) const {
  if (is_sampling(stage)) return sampling_.batch->num_rows;
  return at(stage).has_strips() ? at(stage).num_strips : call(at(stage).first_call).num_tiles(step_);
}

void StepJob::run_tile(int stage, int tile, int thread) {
  if (is_sampling(stage))
    sample_row(step_.row(*sampling_.logits, tile), sampling_.logits->width, sampling_.batch->row(tile),
               sampling_.scratch[static_cast<std::size_t>(thread)], sampling_.results[tile]);
  else if (at(stage).has_strips()) run_strip(at(stage), tile, thread);
  else call(at(stage).first_call).run_tile(step_, tile, scratch(thread));
}

void StepJob::run_strip(const Stage& stage, int index, int thread) {
  const RowRange rows = schedule_.strip(stage, index);
  const Strip strip{memory_.strips + thread * memory_.strip_bytes, rows.begin, stage.has_whole_sequences};
  Step step = step_;
  step.strip = &strip;
  for (int c = stage.first_call; c < stage.end_call; ++c) {
    const Clock::time_point start = profile_ ? Clock::now() : Clock::time_point{};
    static_cast<const StripCall&>(call(c)).run_rows(step, rows.begin, rows.end, scratch(thread));
    if (profile_)
      seconds_[static_cast<std::size_t>(c * memory_.num_threads + thread)] +=
          std::chrono::duration<double>(Clock::now() - start).count();
  }
}

void StepJob::stage_done(int stage) {
  if (!profile_) return;
  const double seconds = std::chrono::duration<double>(Clock::now() - stage_start_).count();
  if (is_sampling(stage)) {
    add_to_profile(static_cast<int>(calls_.size()), seconds, {});
  } else if (at(stage).has_strips()) {
    const double whole = seconds_of(at(stage).first_call, at(stage).end_call);
    for (int c = at(stage).first_call; c < at(stage).end_call; ++c)
      add_to_profile(c, seconds * seconds_of(c, c + 1) / std::max(whole, 1e-9), call(c).cost(step_));
  } else {
    add_to_profile(at(stage).first_call, seconds, call(at(stage).first_call).cost(step_));
  }
  stage_start_ = Clock::now();
}

// Of strips of this step, over all threads.
double StepJob::seconds_of(int first_call, int end_call) const {
  const auto begin = seconds_.begin() + first_call * memory_.num_threads;
  return std::accumulate(begin, begin + (end_call - first_call) * memory_.num_threads, 0.0);
}

void StepJob::add_to_profile(int index, double seconds, const Cost& cost) {
  CallProfile& p = (*profile_)[static_cast<std::size_t>(index)];
  p.num_runs += 1;
  p.seconds += seconds;
  p.cost.bytes += cost.bytes;
  p.cost.operations += cost.operations;
}

}  // namespace fastserve
