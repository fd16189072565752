#include "adapter.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "refuse.h"

namespace fastserve {
namespace {

constexpr int32_t kNoAdapter = -1;

void check_floats(const Weight& weight) {
  if (is_integer(weight.packed().format)) refuse("matrices of adapters are floats");
}

void add_rows(int32_t slot, int32_t begin, int32_t end, std::vector<AdapterRun>* runs) {
  if (slot == kNoAdapter) return;
  while (begin < end) {
    const bool is_next = !runs->empty() && runs->back().slot == slot && runs->back().end == begin &&
                         runs->back().end - runs->back().begin < kRowBlock;
    if (!is_next) runs->push_back({slot, begin, begin});
    AdapterRun& run = runs->back();
    run.end = begin = std::min(end, run.begin + kRowBlock);
  }
}

}  // namespace

AdapterTable::AdapterTable(int32_t num_slots, int32_t rows, int32_t depth, int32_t max_ranks)
    : rows_(rows), depth_(depth), max_ranks_(max_ranks) {
  check_range("adapter slots", num_slots, 1, INT16_MAX);
  slots_.resize(static_cast<std::size_t>(num_slots));
}

void AdapterTable::set(int32_t slot, const Weight& down, std::vector<Part> parts) {
  Slot& s = checked(slot);
  check_floats(down);
  const int32_t ranks = down.packed().rows;
  check_equal("columns of an adapter", down.packed().depth, depth_);
  check_range("ranks of an adapter", ranks, 1, max_ranks_);
  for (const Part& part : parts) {
    const PackedWeight& up = part.up->packed();
    check_floats(*part.up);
    check_range("first row of an adapter's part", part.first_row, 0, rows_ - up.rows);
    check_range("first rank of an adapter's part", part.first_rank, 0, ranks - up.depth);
    check_equal("shifts of an adapter's part", static_cast<int64_t>(part.shifts.size()),
                static_cast<int64_t>(part.factors.size()));
    if (!part.factors.empty())
      check_equal("factors of an adapter's part", static_cast<int64_t>(part.factors.size()), up.rows);
  }
  s = {&down, std::move(parts)};
}

void AdapterTable::clear(int32_t slot) { checked(slot) = {}; }

AdapterTable::Slot& AdapterTable::checked(int32_t slot) {
  check_range("adapter slot", slot, 0, num_slots() - 1);
  return slots_[static_cast<std::size_t>(slot)];
}

void find_adapter_runs(const Batch& batch, AdapterRuns* runs) {
  runs->tokens.clear(), runs->outputs.clear(), runs->sequences.clear();
  if (!batch.adapter_slots) return;
  for (int32_t s = 0; s < batch.num_sequences; ++s) {
    add_rows(batch.adapter_slots[s], batch.sequence_starts[s], batch.sequence_starts[s + 1], &runs->tokens);
    add_rows(batch.adapter_slots[s], s, s + 1, &runs->sequences);
  }
  const int32_t* ends = batch.sequence_starts + 1;
  for (int32_t i = 0; i < batch.num_outputs; ++i) {
    const auto s = std::upper_bound(ends, ends + batch.num_sequences, batch.output_rows[i]) - ends;
    add_rows(batch.adapter_slots[s], i, i + 1, &runs->outputs);
  }
}

}  // namespace fastserve
