// How the calls of one step are cut into stages, and the rows that go through chains of calls into strips.
#pragma once

#include <cstdint>
#include <vector>

namespace fastserve {

struct Batch;

// Consecutive calls of a plan that strips of at most so many rows may go through together.
struct Chain {
  int first_call, end_call;
  int32_t strip_rows;
};

// Those whose strips are any rows, and those whose strips are whole sequences, with chains of any rows within.
struct Chains {
  std::vector<Chain> of_rows, of_sequences;
};

// Rows [begin, end) of a step.
struct RowRange {
  int32_t begin, end;

  int32_t size() const { return end - begin; }
};

// A single call, whose own tiles they are; or, with strips, a chain of calls whose every tile is a strip.
struct Stage {
  int first_call, end_call;
  int first_strip = 0, num_strips = 0;
  bool has_whole_sequences = false;

  bool has_strips() const { return num_strips > 0; }
};

struct StageSchedule {
  std::vector<Stage> stages;
  std::vector<RowRange> strips;  // of all stages

  const RowRange& strip(const Stage& stage, int index) const {
    return strips[static_cast<std::size_t>(stage.first_strip + index)];
  }
};

// Strips for each thread, at the least: one that is taken off its core holds the others up by no more than a strip.
constexpr int32_t kLeastStripsPerThread = 4;
// Rows of a strip: fewer gain less from the nearness of what they write than they lose by reading weights again.
constexpr int32_t kLeastStripRows = 32;
// Strips begin at multiples of so many rows, so that few register tiles are less than full.
constexpr int32_t kStripAlignment = 4;

// Replaces `schedule`. Results do not depend on it.
void schedule_stages(const Batch& batch, const Chains& chains, int num_calls, int num_threads, StageSchedule* schedule);

}  // namespace fastserve
