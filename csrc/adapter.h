// Low-rank matrices that adapters add to the weights of a plan, by slot, and which rows of a step have which.
#pragma once

#include <cstdint>
#include <vector>

#include "step.h"
#include "weight.h"

namespace fastserve {

// What the adapters of all slots make of the result y of one weight [rows, depth], for some ranges of its rows:
// factor * y + shift + up * (down * x). The matrices are borrowed, of floats, and changed between steps only.
class AdapterTable {
 public:
  // Rows of the weight from `first_row` on get `up` times columns of what `down` gives from `first_rank` on. Where there
  // are factors and shifts, there is one of each for each row.
  struct Part {
    int32_t first_row, first_rank;
    const Weight* up;
    std::vector<float> factors, shifts;
  };
  struct Slot {
    const Weight* down = nullptr;  // null: nothing is added
    std::vector<Part> parts;
  };

  // `max_ranks`: rows of `down` at the most.
  AdapterTable(int32_t num_slots, int32_t rows, int32_t depth, int32_t max_ranks);
  // Throws std::invalid_argument where there is no such slot, or the matrices do not fit the weight.
  void set(int32_t slot, const Weight& down, std::vector<Part> parts);
  void clear(int32_t slot);

  const Slot& at(int32_t slot) const { return slots_[static_cast<std::size_t>(slot)]; }
  int32_t num_slots() const { return static_cast<int32_t>(slots_.size()); }
  int32_t rows() const { return rows_; }
  int32_t depth() const { return depth_; }
  int32_t max_ranks() const { return max_ranks_; }

 private:
  Slot& checked(int32_t slot);

  std::vector<Slot> slots_;
  int32_t rows_, depth_, max_ranks_;
};

// Rows [begin, end) that have the adapter of one slot, at most kRowBlock.
struct AdapterRun {
  int32_t slot, begin, end;
};

// Those of each kind of rows of one step, in order; rows without an adapter are in none.
struct AdapterRuns {
  std::vector<AdapterRun> tokens, outputs, sequences;

  const std::vector<AdapterRun>& of(Rows rows) const {
    return rows == Rows::tokens ? tokens : rows == Rows::outputs ? outputs : sequences;
  }
};

// Replaces `runs`.
void find_adapter_runs(const Batch& batch, AdapterRuns* runs);

}  // namespace fastserve
