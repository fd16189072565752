// Panels of CSR weights.

#include <algorithm>
#include <bit>
#include <cstring>

#include "sparse_panels.h"

namespace fastserve {
namespace {

constexpr int32_t kMaskRows = kPanel / kCsrVectors;  // rows that one mask tells of
constexpr int32_t kMaskAlignment = sizeof(uint64_t);

int32_t num_slices(const PackedWeight& w) { return w.num_activation_groups; }

int64_t align(int64_t n) { return (n + kMaskAlignment - 1) / kMaskAlignment * kMaskAlignment; }

// What a row has in a slice.
struct SliceRow {
  int32_t count = 0;
  uint8_t columns[kMaxCsrSlice];
  int8_t values[kMaxCsrSlice];
};

struct Slice {
  SliceRow rows[kPanel];
  CsrSlice head{};
  int64_t num_bytes = 0;

  Slice(const PackedWeight& dense, int32_t panel, int32_t index) {
    const uint8_t* data = dense.panels + panel * dense.panel_bytes;
    const int32_t begin = index * dense.activation_group_size;
    const int32_t end = std::min(dense.depth, begin + dense.activation_group_size);
    int64_t entries = 0, masks = 0;
    for (int32_t row = 0; row < panel_rows(dense, panel); ++row) {
      SliceRow& r = rows[row];
      for (int32_t column = begin; column < end; ++column) {
        const int32_t value = dense_value(dense, data, row, column);
        r.columns[r.count] = static_cast<uint8_t>(column - begin);
        r.values[r.count] = static_cast<int8_t>(value);
        r.count += value != 0;
      }
      uint8_t& steps = head.num_steps[row / kMaskRows];
      steps = std::max(steps, static_cast<uint8_t>((r.count + 3) / 4));
      entries += r.count;
    }
    for (uint8_t steps : head.num_steps) masks += steps;
    num_bytes = align(masks * static_cast<int64_t>(sizeof(uint64_t)) + 2 * entries);
  }
};

bool can_hold(const PackedWeight& w) {
  return is_integer(w.format) && w.offset == WeightOffset::none &&
         (w.activation_group_size == kMaxCsrSlice || w.activation_group_size == kMaxCsrSlice / 2);
}

void lay_out(PackedWeight* w) { w->scales_offset = num_slices(*w) * static_cast<int64_t>(sizeof(CsrSlice)); }

int64_t value_bytes(const PackedWeight& dense, const PackedWeight&, int32_t panel) {
  int64_t bytes = 0;
  for (int32_t index = 0; index < num_slices(dense); ++index) bytes += Slice(dense, panel, index).num_bytes;
  return bytes;
}

void write(const PackedWeight& dense, const PackedWeight& csr, int32_t panel, uint8_t* out) {
  int64_t start = csr.panel_bytes;
  for (int32_t index = 0; index < num_slices(dense); ++index) {
    Slice slice(dense, panel, index);
    slice.head.start = static_cast<uint32_t>(start);
    reinterpret_cast<CsrSlice*>(out)[index] = slice.head;
    auto* masks = reinterpret_cast<uint64_t*>(out + start);
    int32_t num_masks = 0;
    for (uint8_t steps : slice.head.num_steps) num_masks += steps;
    auto* entries = reinterpret_cast<uint8_t*>(masks + num_masks);
    for (int32_t v = 0; v < kCsrVectors; ++v)
      for (int32_t step = 0; step < slice.head.num_steps[v]; ++step, ++masks) {
        uint8_t columns[kPanel], values[kPanel];
        std::size_t count = 0;
        for (int32_t i = 0; i < kPanel; ++i) {
          const SliceRow& row = slice.rows[v * kMaskRows + i / 4];
          const int32_t entry = step * 4 + i % 4;
          if (entry >= row.count) continue;
          columns[count] = row.columns[entry];
          values[count++] = static_cast<uint8_t>(row.values[entry]);
          *masks |= uint64_t{1} << i;
        }
        std::memcpy(entries, columns, count);
        std::memcpy(entries + count, values, count);
        entries += 2 * count;
      }
    start += slice.num_bytes;
  }
}

int64_t read_bytes(const PackedWeight& w, const uint8_t* panel, int64_t num_bytes) {
  int64_t end = w.panel_bytes;
  if (num_bytes < end) return 0;
  for (int32_t index = 0; index < num_slices(w); ++index) {
    const CsrSlice& slice = reinterpret_cast<const CsrSlice*>(panel)[index];
    if (slice.start != end) return 0;
    int64_t masks = 0, entries = 0;
    for (uint8_t steps : slice.num_steps) masks += steps;
    end += masks * static_cast<int64_t>(sizeof(uint64_t));
    if (num_bytes < end) return 0;
    for (int64_t i = 0; i < masks; ++i)
      entries += std::popcount(reinterpret_cast<const uint64_t*>(panel + slice.start)[i]);
    end = align(end + 2 * entries);
  }
  return end;
}

}  // namespace

const SparsePanels& csr_panels() {
  static const SparsePanels form{can_hold, lay_out, value_bytes, write, read_bytes};
  return form;
}

}  // namespace fastserve
