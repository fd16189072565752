#include "bitmask.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace fastserve {
namespace {

constexpr int32_t kColumnBytes = 64;  // that one mask tells of

std::size_t num_panels(const PackedWeight& w) { return round_up(static_cast<std::size_t>(w.rows), kPanel) / kPanel; }

// Byte i of a column of a panel: the value + 128, or (int4) + 8.
uint8_t value_at(const PackedWeight& dense, const uint8_t* panel, int32_t column, int32_t i) {
  if (dense.format == WeightFormat::int8) return panel[int64_t{column} * kColumnBytes + i];
  const uint8_t both = panel[int64_t{column / 8} * kPanel * 4 + column % 4 * kColumnBytes + i];
  return column % 8 < 4 ? both & 15 : both >> 4;
}

// The values of a column that are not zero, and where they are. Rows that only fill the panel have none.
uint64_t gather(const PackedWeight& dense, int64_t panel, int32_t column, uint8_t* values) {
  const uint8_t* data = dense.panels + panel * dense.panel_bytes;
  const uint8_t zero = dense.format == WeightFormat::int8 ? 128 : 8;
  uint64_t mask = 0;
  for (int32_t i = 0; i < kColumnBytes; ++i) {
    const int64_t row = panel * kPanel + column % 4 * (kColumnBytes / 4) + i / 4;
    const uint8_t value = value_at(dense, data, column, i);
    if (value == zero || row >= dense.rows) continue;
    *values++ = value;
    mask |= uint64_t{1} << i;
  }
  return mask;
}

// Values that lie together: of an int8 column, or of an int4 column and of the one four after it.
struct Run {
  uint64_t masks[2] = {};
  uint8_t values[kColumnBytes] = {};
  int64_t num_bytes = 0;
};

// Calls f(column, run) for the runs of a panel in order.
template <class Function>
void each_run(const PackedWeight& dense, int64_t panel, Function f) {
  const bool is_paired = dense.format == WeightFormat::int4;
  for (int32_t column = 0; column < dense.padded_depth; ++column) {
    if (is_paired && column % 8 >= 4) continue;
    Run run;
    run.masks[0] = gather(dense, panel, column, run.values);
    run.num_bytes = std::popcount(run.masks[0]);
    if (is_paired) {
      uint8_t high[kColumnBytes] = {};
      run.masks[1] = gather(dense, panel, column + 4, high);
      for (int32_t i = 0; i < kColumnBytes; ++i) run.values[i] |= static_cast<uint8_t>(high[i] << 4);
      run.num_bytes = std::max<int64_t>(run.num_bytes, std::popcount(run.masks[1]));
    }
    f(column, run);
  }
}

// Does something with every panel.
class PanelJob : public Job {
 public:
  explicit PanelJob(const PackedWeight& dense) : dense_(dense) {}
  int num_stages() const override { return 1; }
  int num_tiles(int) const override { return static_cast<int>(num_panels(dense_)); }

 protected:
  const PackedWeight& dense_;
};

struct Count {
  int64_t values = 0;
  int64_t bytes = 0;  // that they take
};

class CountJob : public PanelJob {
 public:
  explicit CountJob(const PackedWeight& dense) : PanelJob(dense), counts(num_panels(dense)) {}
  void run_tile(int, int panel, int) override {
    Count& count = counts[static_cast<std::size_t>(panel)];
    each_run(dense_, panel, [&](int32_t, const Run& run) {
      count.values += std::popcount(run.masks[0]) + std::popcount(run.masks[1]);
      count.bytes += run.num_bytes;
    });
  }

  std::vector<Count> counts;
};

class WriteJob : public PanelJob {
 public:
  WriteJob(const PackedWeight& dense, const PackedWeight& bitmask, uint8_t* panels)
      : PanelJob(dense), bitmask_(bitmask), panels_(panels) {}
  void run_tile(int, int panel, int) override {
    uint8_t* out = panels_ + reinterpret_cast<const int64_t*>(panels_)[panel];
    auto* masks = reinterpret_cast<uint64_t*>(out);
    std::memcpy(out + bitmask_.scales_offset, dense_.panels + panel * dense_.panel_bytes + dense_.scales_offset,
                static_cast<std::size_t>(bitmask_.panel_bytes - bitmask_.scales_offset));
    out += bitmask_.panel_bytes;
    each_run(dense_, panel, [&](int32_t column, const Run& run) {
      masks[column] = run.masks[0];
      if (dense_.format == WeightFormat::int4) masks[column + 4] = run.masks[1];
      std::memcpy(out, run.values, static_cast<std::size_t>(run.num_bytes));
      out += run.num_bytes;
    });
  }

 private:
  const PackedWeight& bitmask_;
  uint8_t* panels_;
};

}  // namespace

bool can_be_bitmask(const PackedWeight& w) {
  return is_integer(w.format) && w.offset == WeightOffset::none && w.activation_group_size <= kMaxExpandedColumns;
}

double share_of_zeros(const PackedWeight& dense, ThreadPool& pool) {
  CountJob job(dense);
  pool.run(job);
  int64_t values = 0;
  for (const Count& count : job.counts) values += count.values;
  return 1.0 - static_cast<double>(values) / (static_cast<double>(dense.rows) * dense.depth);
}

PackedWeight describe_bitmask(const PackedWeight& dense) {
  PackedWeight w = dense;
  w.storage = WeightStorage::bitmask;
  w.scales_offset = w.padded_depth * static_cast<int64_t>(sizeof(uint64_t));
  w.panel_bytes = w.offsets_offset = w.scales_offset + dense.panel_bytes - dense.scales_offset;
  w.panels = nullptr;
  return w;
}

Panels make_bitmask(const PackedWeight& dense, const PackedWeight& bitmask, ThreadPool& pool) {
  CountJob count(dense);
  pool.run(count);
  std::vector<int64_t> starts;
  auto end = static_cast<int64_t>(round_up((count.counts.size() + 1) * sizeof(int64_t), kAlignment));
  for (const Count& panel : count.counts) {
    starts.push_back(end);
    end += static_cast<int64_t>(round_up(static_cast<std::size_t>(bitmask.panel_bytes + panel.bytes), kAlignment));
  }
  starts.push_back(end);
  Panels panels{allocate<uint8_t>(static_cast<std::size_t>(end + kExpandSlack)), end + kExpandSlack};
  std::memcpy(panels.data.get(), starts.data(), starts.size() * sizeof(int64_t));
  WriteJob write(dense, bitmask, panels.data.get());
  pool.run(write);
  return panels;
}

int64_t bitmask_bytes(const PackedWeight& bitmask, const uint8_t* panels, int64_t num_bytes) {
  const std::size_t count = num_panels(bitmask);
  std::vector<int64_t> starts(count + 1);
  auto end = static_cast<int64_t>(round_up(starts.size() * sizeof(int64_t), kAlignment));
  if (num_bytes < end) return 0;
  std::memcpy(starts.data(), panels, starts.size() * sizeof(int64_t));
  if (starts[0] != end) return 0;
  for (std::size_t panel = 0; panel < count; ++panel)
    if (starts[panel + 1] < starts[panel] + bitmask.panel_bytes) return 0;
  return starts[count] + kExpandSlack;
}

}  // namespace fastserve
