// Adapters of one weight against a reference in double precision: several slots in one step, parts with factors and
// shifts and without, in strips and out of them. Without Python, so that it runs under emulators and sanitizers.
//
//   test_adapters [ISA ...]: fails where a named instruction set does not run here.

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapter.h"
#include "plan.h"
#include "small_plan.h"

namespace fastserve::test {
namespace {

constexpr int kRows = 150, kMaxRanks = 70, kSlots = 3;  // no whole panels
constexpr int kStripRows = 48;

// Values that bfloat16 holds, and how they are packed.
struct Matrix2d {
  std::vector<float> values;
  Weight weight;

  Matrix2d(const WeightScheme& scheme, int rows, int depth, unsigned seed, const Kernels& kernels, ThreadPool& pool)
      : values(short_values(static_cast<std::size_t>(rows * depth), seed)),
        weight(pack_weight(scheme, values, rows, depth, kernels, pool)) {}

 private:
  static std::vector<float> short_values(std::size_t count, unsigned seed) {
    std::vector<float> values = random_vector(count, seed);
    for (float& value : values) value = std::round(value * 32) / 32;
    return values;
  }
};

struct Part {
  int first_row, num_rows, first_rank, num_ranks;
  bool rescales;
};

// What a slot holds.
struct Adapter {
  Matrix2d down;
  std::vector<Part> parts;
  std::vector<std::unique_ptr<Matrix2d>> ups;
  std::vector<std::vector<float>> factors, shifts;

  Adapter(const WeightScheme& scheme, int num_ranks, std::vector<Part> parts_of, unsigned seed, const Kernels& kernels,
          ThreadPool& pool)
      : down(scheme, num_ranks, kWidth, seed, kernels, pool), parts(std::move(parts_of)) {
    for (const Part& part : parts) {
      ups.push_back(std::make_unique<Matrix2d>(scheme, part.num_rows, part.num_ranks, ++seed, kernels, pool));
      const auto count = static_cast<std::size_t>(part.rescales ? part.num_rows : 0);
      factors.push_back(random_vector(count, ++seed));
      shifts.push_back(random_vector(count, ++seed));
    }
  }

  std::vector<AdapterTable::Part> table_parts() const {
    std::vector<AdapterTable::Part> found;
    for (std::size_t i = 0; i < parts.size(); ++i)
      found.push_back({parts[i].first_row, parts[i].first_rank, &ups[i]->weight, factors[i], shifts[i]});
    return found;
  }

  // y, adapted; y and the result [kRows], x [kWidth].
  std::vector<double> expect(const float* x, const float* y) const {
    std::vector<double> result(y, y + kRows);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const Part& part = parts[i];
      for (int row = 0; row < part.num_rows; ++row) {
        double added = 0;
        for (int rank = 0; rank < part.num_ranks; ++rank) {
          const float* to_rank = down.values.data() + (part.first_rank + rank) * kWidth;
          double low = 0;
          for (int d = 0; d < kWidth; ++d) low += double(to_rank[d]) * double(x[d]);
          added += low * double(ups[i]->values[static_cast<std::size_t>(row * part.num_ranks + rank)]);
        }
        double& out = result[static_cast<std::size_t>(part.first_row + row)];
        const auto at = static_cast<std::size_t>(row);
        if (part.rescales) out = double(factors[i][at]) * out + double(shifts[i][at]);
        out += added;
      }
    }
    return result;
  }
};

// Embedded tokens times a weight, whose rows have adapters: those of tokens, of outputs or of sequences.
class Model {
 public:
  Model(const Kernels& kernels, int threads, Rows rows, bool is_in_strips)
      : pool(threads),
        rows_(rows),
        table_(make_weight(kFloatScheme, kVocab, kWidth, 1, kernels, pool)),
        weight_(make_weight(kFloatScheme, kRows, kWidth, 2, kernels, pool)),
        adapters(kSlots, kRows, kWidth, kMaxRanks),
        plan_(kArenaBytes, limits(), kernels, pool) {
    Matrix low{kLowAt, kMaxRanks, kMaxRanks, rows}, y = out();
    if (is_in_strips) low.strip_offset_bytes = 0;
    const Matrix embedded{0, kWidth, kWidth, Rows::tokens};
    if (is_in_strips) plan_.start_chain(kStripRows, 4 * kMaxRanks * kStripRows);
    plan_.embedding(IdSource::token_ids, table_, embedded);
    if (rows == Rows::outputs) plan_.gather_rows(embedded, x());
    if (rows == Rows::sequences) plan_.pool(PoolKind::mean, embedded, x());
    plan_.linear(x(), weight_, {}, y);
    plan_.adapter_down(x(), adapters, low);
    plan_.adapter_up(low, adapters, y);
    if (is_in_strips) plan_.end_chain();
  }

  struct Rows2d {
    std::vector<float> x, y;  // [rows][kWidth], [rows][kRows]
  };
  Rows2d run(const Sequences& sequences, const std::vector<int32_t>& slots) {
    Batch batch = sequences.batch();
    batch.adapter_slots = slots.empty() ? nullptr : slots.data();
    plan_.run(batch, nullptr, nullptr, nullptr);
    const std::size_t count = sequences_of(sequences).size();
    return {{plan_.data(x()), plan_.data(x()) + count * kWidth},
            {plan_.data(out()), plan_.data(out()) + count * kRows}};
  }

  // Of each row, the sequence that it belongs to.
  std::vector<std::size_t> sequences_of(const Sequences& sequences) const {
    std::vector<std::size_t> found;
    for (std::size_t s = 0; s < sequences.lengths.size(); ++s)
      found.insert(found.end(), rows_ == Rows::tokens ? static_cast<std::size_t>(sequences.lengths[s]) : 1, s);
    return found;
  }

  ThreadPool pool;

 private:
  static constexpr int64_t kLowAt = int64_t{4} * kMaxTokens * 2 * kWidth;
  static constexpr int64_t kOutAt = kLowAt + int64_t{4} * kMaxTokens * kMaxRanks;
  static constexpr int64_t kArenaBytes = kOutAt + int64_t{4} * kMaxTokens * kRows;

  static PlanLimits limits() {
    return {kMaxTokens, kMaxTokens, kMaxSequences, kMaxSequences * kSequenceBlocks, kMaxContext, kVocab, 1, false};
  }
  Matrix x() const {
    return {rows_ == Rows::tokens ? 0 : int64_t{4} * kMaxTokens * kWidth, kWidth, kWidth, rows_};
  }
  Matrix out() const { return {kOutAt, kRows, kRows, rows_}; }

  Rows rows_;
  Weight table_, weight_;

 public:
  AdapterTable adapters;

 private:
  Plan plan_;
};

const std::vector<std::vector<int>>& batches() {
  static const std::vector<std::vector<int>> all{
      {1}, {3, 1, 7}, {64, 5, 41, 17, 1, 60, 33, 2, 50, 29, 64, 12, 48, 63, 20, 31, 7, 39}, {300, 2, 200}};
  return all;
}

// Slots 0 and 1; slot 2 is empty. Parts lie as those of weights that were made one: here and there, and of some ranks.
std::vector<std::unique_ptr<Adapter>> make_adapters(const WeightScheme& scheme, const Kernels& kernels,
                                                    ThreadPool& pool) {
  const std::vector<Part> of_all_ranks{{0, 70, 0, 64, true}, {70, 1, 64, 1, true}, {75, 75, 65, 5, true}};
  const std::vector<Part> of_three{{13, 64, 0, 3, false}, {80, 66, 1, 2, true}};
  std::vector<std::unique_ptr<Adapter>> made;
  made.push_back(std::make_unique<Adapter>(scheme, kMaxRanks, of_all_ranks, 100, kernels, pool));
  made.push_back(std::make_unique<Adapter>(scheme, 3, of_three, 200, kernels, pool));
  return made;
}

void test_rows(const Kernels& kernels, const WeightScheme& scheme, int threads, Rows rows, bool is_in_strips) {
  Model model(kernels, threads, rows, is_in_strips);
  const auto adapters = make_adapters(scheme, kernels, model.pool);
  for (std::size_t slot = 0; slot < adapters.size(); ++slot)
    model.adapters.set(static_cast<int32_t>(slot), adapters[slot]->down.weight, adapters[slot]->table_parts());
  for (const std::vector<int>& lengths : batches()) {
    const Sequences sequences(lengths);
    const std::string where = std::string(kernels.name) + " adapters, threads " + std::to_string(threads) + ", rows " +
                              std::to_string(int(rows)) + (is_in_strips ? " in strips" : "") + ", sequences " +
                              std::to_string(lengths.size());
    const Model::Rows2d plain = model.run(sequences, {});
    for (int first_slot : {0, 1, 2, 3}) {
      std::vector<int32_t> slots;
      for (std::size_t s = 0; s < lengths.size(); ++s)
        slots.push_back(static_cast<int32_t>((static_cast<std::size_t>(first_slot) + s / 2) % 4) - 1);
      const Model::Rows2d adapted = model.run(sequences, slots);
      expect_same(adapted.x, plain.x, where + ": inputs");
      const std::vector<std::size_t> of = model.sequences_of(sequences);
      for (std::size_t row = 0; row < of.size(); ++row) {
        const float *x = plain.x.data() + row * kWidth, *y = plain.y.data() + row * kRows;
        const std::vector<float> result(adapted.y.data() + row * kRows, adapted.y.data() + (row + 1) * kRows);
        const int32_t slot = slots[of[row]];
        const std::string at = where + ", row " + std::to_string(row) + " of slot " + std::to_string(slot);
        if (slot < 0 || slot == 2) expect_same(result, {y, y + kRows}, at);
        else expect_close(result, adapters[static_cast<std::size_t>(slot)]->expect(x, y), 4e-6, at);
      }
    }
  }
}

// What is set in place of another, and cleared, leaves nothing behind.
void test_changes(const Kernels& kernels) {
  const std::string where = std::string(kernels.name) + " adapters that change";
  Model model(kernels, 2, Rows::tokens, false);
  const auto adapters = make_adapters(kFloatScheme, kernels, model.pool);
  const Sequences sequences({9});
  const std::vector<float> plain = model.run(sequences, {0}).y;
  std::vector<std::vector<float>> results;
  for (const auto& adapter : {&adapters[0], &adapters[1], &adapters[0]}) {
    model.adapters.set(0, (*adapter)->down.weight, (*adapter)->table_parts());
    results.push_back(model.run(sequences, {0}).y);
  }
  expect_same(results[2], results[0], where);
  expect(results[1] != results[0] && results[0] != plain, where + ": nothing is adapted");
  model.adapters.clear(0);
  expect_same(model.run(sequences, {0}).y, plain, where + ": cleared");
}

void test_refusals(const Kernels& kernels) {
  Model model(kernels, 1, Rows::tokens, false);
  const auto adapters = make_adapters(kFloatScheme, kernels, model.pool);
  const Weight& down = adapters[0]->down.weight;
  const std::vector<AdapterTable::Part> good = adapters[0]->table_parts();
  const auto refuse = [&](const std::string& what, auto change) {
    std::vector<AdapterTable::Part> parts = good;
    change(parts[2]);
    expect_refused([&] { model.adapters.set(0, down, parts); }, std::string(kernels.name) + " adapter: " + what);
  };
  refuse("rows beyond the weight", [](AdapterTable::Part& part) { part.first_row += 1; });
  refuse("a row before the first", [](AdapterTable::Part& part) { part.first_row = -1; });
  refuse("ranks beyond the adapter's", [](AdapterTable::Part& part) { part.first_rank += 1; });
  refuse("a factor too few", [](AdapterTable::Part& part) { part.factors.pop_back(), part.shifts.pop_back(); });
  refuse("a factor too many", [](AdapterTable::Part& part) { part.factors.push_back(1), part.shifts.push_back(0); });
  refuse("factors without shifts", [](AdapterTable::Part& part) { part.shifts.clear(); });
  refuse("shifts without factors", [](AdapterTable::Part& part) { part.factors.clear(); });
  const std::vector<float> plain = model.run(Sequences({5}), {}).y;
  expect_same(model.run(Sequences({5}), {0}).y, plain, std::string(kernels.name) + ": what was refused is not there");
  const auto set = [&](int32_t slot) { model.adapters.set(slot, down, good); };
  expect_refused([&] { set(-1); }, "a slot before the first");
  expect_refused([&] { set(kSlots); }, "a slot too far");
  expect_refused([&] { model.run(Sequences({5}), {kSlots}); }, "a row of a slot too far");
}

void test_all(const Kernels& kernels) {
  const WeightScheme bf16{WeightFormat::bf16, ScaleFormat::bf16, WeightOffset::none, 0, 0};
  for (int threads : {1, 3}) {
    test_rows(kernels, kFloatScheme, threads, Rows::tokens, true);
    test_rows(kernels, bf16, threads, Rows::tokens, true);
    for (Rows rows : {Rows::tokens, Rows::outputs, Rows::sequences})
      test_rows(kernels, rows == Rows::outputs ? bf16 : kFloatScheme, threads, rows, false);
  }
  test_changes(kernels);
  test_refusals(kernels);
}

}  // namespace
}  // namespace fastserve::test

int main(int argc, char** argv) {
  using namespace fastserve;
  test::for_each_isa(argc, argv, test::test_all);
  return test::finish("adapters");
}
