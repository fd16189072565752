// One panel of each sparse storage at a time (kernels/kernel.h: WeightStorage), made from a dense one.
#pragma once

#include "kernels/kernel.h"

namespace fastserve {

struct SparsePanels {
  // Whether the kernels have this form of a weight that is dense.
  bool (*can_hold)(const PackedWeight& dense);
  // Where scales lie and how long a panel is without its values.
  void (*lay_out)(PackedWeight* sparse);
  // Bytes that the values of a panel take.
  int64_t (*value_bytes)(const PackedWeight& dense, const PackedWeight& sparse, int32_t panel);
  // Writes everything but the scales.
  void (*write)(const PackedWeight& dense, const PackedWeight& sparse, int32_t panel, uint8_t* out);
  // Bytes that a panel at `panel`, of which `num_bytes` can be read, says that it has without padding at its end; 0
  // where it is none: whoever reads so many stays within it.
  int64_t (*read_bytes)(const PackedWeight& sparse, const uint8_t* panel, int64_t num_bytes);
};

const SparsePanels& bitmask_panels();
const SparsePanels& csr_panels();

// Rows of a panel that are not padding.
inline int32_t panel_rows(const PackedWeight& w, int32_t panel) {
  const int32_t left = w.rows - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

// The integer in a row and column of a dense panel.
inline int32_t dense_value(const PackedWeight& dense, const uint8_t* panel, int32_t row, int32_t column) {
  if (dense.format == WeightFormat::int8)
    return panel[static_cast<int64_t>(column / 4) * kPanel * 4 + row * 4 + column % 4] - 128;
  const uint8_t both = panel[static_cast<int64_t>(column / 8) * kPanel * 4 + row * 4 + column % 4];
  return (column % 8 < 4 ? both & 15 : both >> 4) - 8;
}

}  // namespace fastserve
