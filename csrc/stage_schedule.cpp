#include "stage_schedule.h"

#include <algorithm>
#include <cstddef>

#include "step.h"

namespace fastserve {
namespace {

// Strips of whole sequences are taken where the busiest thread gets at most so much more than its share of the rows.
constexpr double kMostUneven = 1.2;

// A thread by itself has nobody to hold up.
int32_t least_strips(int num_threads) { return num_threads > 1 ? kLeastStripsPerThread * num_threads : 1; }

// Strips of any rows: as many for each thread, of about equal height.
void add_strips(int32_t rows, const Chain& chain, int num_threads, StageSchedule* schedule) {
  const int32_t least = std::max(least_strips(num_threads), (rows + chain.strip_rows - 1) / chain.strip_rows);
  const int32_t count = (least + num_threads - 1) / num_threads * num_threads;
  const int64_t pieces = (rows + kStripAlignment - 1) / kStripAlignment;
  const auto begin = [&](int32_t strip) {
    return std::min(rows, static_cast<int32_t>(pieces * strip / count) * kStripAlignment);
  };
  for (int32_t strip = 0; strip < count; ++strip) schedule->strips.push_back({begin(strip), begin(strip + 1)});
}

// Adds strips of whole sequences, longest first; whether they are worth it.
bool add_sequence_strips(const Batch& batch, const Chains& chains, int num_threads, StageSchedule* schedule) {
  if (chains.of_sequences.empty() || chains.of_rows.empty()) return false;
  std::vector<RowRange>& strips = schedule->strips;
  const int32_t least = least_strips(num_threads);
  int32_t wanted = std::max(kLeastStripRows, std::min(batch.num_tokens / least, chains.of_rows.front().strip_rows));
  for (const Chain& chain : chains.of_sequences) wanted = std::min(wanted, chain.strip_rows);
  for (int32_t s = 0; s < batch.num_sequences; ++s) {
    const RowRange rows{batch.sequence_starts[s], batch.sequence_starts[s + 1]};
    for (const Chain& chain : chains.of_sequences)
      if (rows.size() > chain.strip_rows) return false;
    if (s > 0 && rows.end - strips.back().begin <= wanted) strips.back().end = rows.end;
    else strips.push_back(rows);
  }
  if (static_cast<int32_t>(strips.size()) < least) return false;
  std::stable_sort(strips.begin(), strips.end(),
                   [](const RowRange& a, const RowRange& b) { return a.size() > b.size(); });
  std::vector<int32_t> rows_of_threads(static_cast<std::size_t>(num_threads), 0);
  for (const RowRange& rows : strips)
    *std::min_element(rows_of_threads.begin(), rows_of_threads.end()) += rows.size();
  const double share = static_cast<double>(batch.num_tokens) / num_threads;
  return *std::max_element(rows_of_threads.begin(), rows_of_threads.end()) <= kMostUneven * share;
}

}  // namespace

void schedule_stages(const Batch& batch, const Chains& chains, int num_calls, int num_threads,
                     StageSchedule* schedule) {
  schedule->stages.clear();
  schedule->strips.clear();
  const bool has_sequence_strips = add_sequence_strips(batch, chains, num_threads, schedule);
  if (!has_sequence_strips) schedule->strips.clear();
  const bool has_strips = has_sequence_strips || batch.num_tokens >= kLeastStripRows * least_strips(num_threads);
  const std::vector<Chain>& taken = has_sequence_strips ? chains.of_sequences : chains.of_rows;
  for (int call = 0; call < num_calls; call = schedule->stages.back().end_call) {
    const auto chain = std::find_if(taken.begin(), taken.end(), [&](const Chain& c) {
      return has_strips && c.first_call == call && c.end_call > call;
    });
    if (chain == taken.end()) {
      schedule->stages.push_back({call, call + 1});
      continue;
    }
    const auto first = has_sequence_strips ? 0 : static_cast<int>(schedule->strips.size());
    if (!has_sequence_strips) add_strips(batch.num_tokens, *chain, num_threads, schedule);
    const int count = static_cast<int>(schedule->strips.size()) - first;
    schedule->stages.push_back({call, chain->end_call, first, count, has_sequence_strips});
  }
}

}  // namespace fastserve
