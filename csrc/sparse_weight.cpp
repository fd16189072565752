#include "sparse_weight.h"

#include <stdexcept>
#include <vector>

#include "sparse_panels.h"

namespace fastserve {
namespace {

const SparsePanels& forms_of(WeightStorage storage) {
  return storage == WeightStorage::bitmask ? bitmask_panels() : csr_panels();
}

int32_t num_panels(const PackedWeight& w) { return (w.rows + kPanel - 1) / kPanel; }

int64_t align(int64_t n) {
  return static_cast<int64_t>(round_up(static_cast<std::size_t>(n), static_cast<std::size_t>(kAlignment)));
}

// Calls f(panel) for every panel.
template <class Function>
class PanelJob : public Job {
 public:
  PanelJob(const PackedWeight& w, Function f) : num_panels_(num_panels(w)), f_(f) {}
  int num_stages() const override { return 1; }
  int num_tiles(int) const override { return num_panels_; }
  void run_tile(int, int panel, int) override { f_(panel); }

 private:
  int num_panels_;
  Function f_;
};

template <class Function>
void each_panel(const PackedWeight& w, ThreadPool& pool, Function f) {
  PanelJob<Function> job(w, f);
  pool.run(job);
}

// Zeros of a whole panel, its padded columns too, by comparing bytes: every model's matrices are counted.
int64_t zeros_of_panel(const PackedWeight& dense, const uint8_t* panel) {
  int64_t zeros = 0;
  if (dense.format == WeightFormat::int8) {
    for (int64_t at = 0; at < dense.scales_offset; ++at) zeros += panel[at] == 128;
  } else {
    for (int64_t at = 0; at < dense.scales_offset; ++at) zeros += ((panel[at] & 15) == 8) + (panel[at] >> 4 == 8);
  }
  return zeros - static_cast<int64_t>(dense.padded_depth - dense.depth) * kPanel;
}

int64_t zeros_of_rows(const PackedWeight& dense, const uint8_t* panel, int32_t num_rows) {
  int64_t zeros = 0;
  for (int32_t row = 0; row < num_rows; ++row)
    for (int32_t column = 0; column < dense.depth; ++column) zeros += dense_value(dense, panel, row, column) == 0;
  return zeros;
}

}  // namespace

bool can_be_stored(const PackedWeight& w, WeightStorage storage) {
  return storage == WeightStorage::dense || forms_of(storage).can_hold(w);
}

double share_of_zeros(const PackedWeight& dense, ThreadPool& pool) {
  if (!is_integer(dense.format) || dense.offset != WeightOffset::none) return 0;
  std::vector<int64_t> zeros(static_cast<std::size_t>(num_panels(dense)));
  each_panel(dense, pool, [&](int32_t panel) {
    const uint8_t* data = dense.panels + panel * dense.panel_bytes;
    const int32_t num_rows = panel_rows(dense, panel);
    zeros[static_cast<std::size_t>(panel)] =
        num_rows == kPanel ? zeros_of_panel(dense, data) : zeros_of_rows(dense, data, num_rows);
  });
  int64_t total = 0;
  for (int64_t count : zeros) total += count;
  return static_cast<double>(total) / (static_cast<double>(dense.rows) * dense.depth);
}

PackedWeight describe_sparse(const PackedWeight& dense, WeightStorage storage) {
  PackedWeight w = dense;
  w.storage = storage;
  forms_of(storage).lay_out(&w);
  w.panel_bytes = w.offsets_offset = w.scales_offset + dense.panel_bytes - dense.scales_offset;
  w.panels = nullptr;
  return w;
}

Panels make_sparse(const PackedWeight& dense, const PackedWeight& sparse, ThreadPool& pool) {
  const SparsePanels& form = forms_of(sparse.storage);
  const auto count = static_cast<std::size_t>(num_panels(dense));
  std::vector<int64_t> starts(count + 1);
  each_panel(dense, pool, [&](int32_t panel) {
    starts[static_cast<std::size_t>(panel) + 1] = align(sparse.panel_bytes + form.value_bytes(dense, sparse, panel));
  });
  starts[0] = align(static_cast<int64_t>(starts.size() * sizeof(int64_t)));
  for (std::size_t panel = 0; panel < count; ++panel) starts[panel + 1] += starts[panel];
  const int64_t num_bytes = starts[count] + kExpandSlack;
  Panels panels{allocate<uint8_t>(static_cast<std::size_t>(num_bytes)), num_bytes};
  std::memcpy(panels.data.get(), starts.data(), starts.size() * sizeof(int64_t));
  each_panel(dense, pool, [&](int32_t panel) {
    uint8_t* out = panels.data.get() + starts[static_cast<std::size_t>(panel)];
    std::memcpy(out + sparse.scales_offset, dense.panels + panel * dense.panel_bytes + dense.scales_offset,
                static_cast<std::size_t>(sparse.panel_bytes - sparse.scales_offset));
    form.write(dense, sparse, panel, out);
  });
  return panels;
}

int64_t sparse_bytes(const PackedWeight& sparse, const uint8_t* panels, int64_t num_bytes) {
  const auto count = static_cast<std::size_t>(num_panels(sparse));
  std::vector<int64_t> starts(count + 1);
  const int64_t first = align(static_cast<int64_t>(starts.size() * sizeof(int64_t)));
  if (num_bytes < first + kExpandSlack) return 0;
  std::memcpy(starts.data(), panels, starts.size() * sizeof(int64_t));
  if (starts[0] != first) return 0;
  for (std::size_t panel = 0; panel < count; ++panel) {
    const int64_t left = num_bytes - kExpandSlack - starts[panel];
    const int64_t said = forms_of(sparse.storage).read_bytes(sparse, panels + starts[panel], left);
    if (said == 0 || starts[panel + 1] != starts[panel] + align(said) || align(said) > left) return 0;
  }
  return starts[count] + kExpandSlack;
}

}  // namespace fastserve
