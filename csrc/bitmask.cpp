// Panels of bitmask weights.

#include <algorithm>
#include <bit>
#include <cstring>

#include "sparse_panels.h"

namespace fastserve {
namespace {

constexpr int32_t kColumnBytes = 64;  // that one mask tells of

// Byte i of a column of a panel: the value + 128, or (int4) + 8.
uint8_t byte_at(const PackedWeight& dense, const uint8_t* panel, int32_t column, int32_t i) {
  if (dense.format == WeightFormat::int8) return panel[int64_t{column} * kColumnBytes + i];
  const uint8_t both = panel[int64_t{column / 8} * kPanel * 4 + column % 4 * kColumnBytes + i];
  return column % 8 < 4 ? both & 15 : both >> 4;
}

// The values of a column that are not zero, and where they are. Rows that only fill the panel have none.
uint64_t gather(const PackedWeight& dense, int32_t panel, int32_t column, uint8_t* values) {
  const uint8_t* data = dense.panels + panel * dense.panel_bytes;
  const uint8_t zero = dense.format == WeightFormat::int8 ? 128 : 8;
  const int32_t num_rows = panel_rows(dense, panel);
  uint64_t mask = 0;
  for (int32_t i = 0; i < kColumnBytes; ++i) {
    const uint8_t value = byte_at(dense, data, column, i);
    if (value == zero || column % 4 * (kColumnBytes / 4) + i / 4 >= num_rows) continue;
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

int64_t run_bytes(uint64_t low_mask, uint64_t high_mask) {
  return std::max(std::popcount(low_mask), std::popcount(high_mask));
}

// Calls f(column, run) for the runs of a panel in order.
template <class Function>
void each_run(const PackedWeight& dense, int32_t panel, Function f) {
  const bool is_paired = dense.format == WeightFormat::int4;
  for (int32_t column = 0; column < dense.padded_depth; ++column) {
    if (is_paired && column % 8 >= 4) continue;
    Run run;
    run.masks[0] = gather(dense, panel, column, run.values);
    if (is_paired) {
      uint8_t high[kColumnBytes] = {};
      run.masks[1] = gather(dense, panel, column + 4, high);
      for (int32_t i = 0; i < kColumnBytes; ++i) run.values[i] |= static_cast<uint8_t>(high[i] << 4);
    }
    run.num_bytes = run_bytes(run.masks[0], run.masks[1]);
    f(column, run);
  }
}

int64_t align(int64_t n) { return (n + 7) / 8 * 8; }

// Columns of the block that begins at `begin`.
int32_t block_columns(const PackedWeight& w, int32_t begin) { return std::min(kBitmaskBlock, w.padded_depth - begin); }

bool can_hold(const PackedWeight& w) {
  return is_integer(w.format) && w.offset == WeightOffset::none && w.activation_group_size <= kMaxExpandedColumns;
}

void lay_out(PackedWeight* w) { w->scales_offset = 0; }

int64_t value_bytes(const PackedWeight& dense, const PackedWeight&, int32_t panel) {
  int64_t bytes = 0;
  each_run(dense, panel, [&](int32_t column, const Run& run) {
    if (column % kBitmaskBlock == 0) bytes = align(bytes) + block_columns(dense, column) * int64_t{sizeof(uint64_t)};
    bytes += run.num_bytes;
  });
  return bytes;
}

void write(const PackedWeight& dense, const PackedWeight& bitmask, int32_t panel, uint8_t* out) {
  uint64_t* masks = nullptr;
  int64_t at = bitmask.panel_bytes;
  each_run(dense, panel, [&](int32_t column, const Run& run) {
    if (column % kBitmaskBlock == 0) {
      masks = reinterpret_cast<uint64_t*>(out + align(at));
      at = align(at) + block_columns(dense, column) * int64_t{sizeof(uint64_t)};
    }
    masks[column % kBitmaskBlock] = run.masks[0];
    if (dense.format == WeightFormat::int4) masks[column % kBitmaskBlock + 4] = run.masks[1];
    std::memcpy(out + at, run.values, static_cast<std::size_t>(run.num_bytes));
    at += run.num_bytes;
  });
}

int64_t read_bytes(const PackedWeight& w, const uint8_t* panel, int64_t num_bytes) {
  int64_t end = w.panel_bytes;
  for (int32_t begin = 0; begin < w.padded_depth; begin += kBitmaskBlock) {
    const int32_t count = block_columns(w, begin);
    const int64_t start = align(end);
    end = start + count * int64_t{sizeof(uint64_t)};
    if (num_bytes < end) return 0;
    const auto* masks = reinterpret_cast<const uint64_t*>(panel + start);
    if (w.format == WeightFormat::int8) {
      for (int32_t i = 0; i < count; ++i) end += std::popcount(masks[i]);
    } else {
      for (int32_t first = 0; first < count; first += 8)
        for (int32_t i = first; i < first + 4; ++i) end += run_bytes(masks[i], masks[i + 4]);
    }
  }
  return end;
}

}  // namespace

const SparsePanels& bitmask_panels() {
  static const SparsePanels form{can_hold, lay_out, value_bytes, write, read_bytes};
  return form;
}

}  // namespace fastserve
