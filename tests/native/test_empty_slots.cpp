// A decoder whose sequences begin after slots that are empty: nobody sees these, whatever is in them, and rows have the
// embeddings of their own positions. Without Python, so that it runs under emulators and sanitizers.
//
//   test_empty_slots [ISA ...]: fails where a named instruction set does not run here.

#include <algorithm>
#include <string>
#include <vector>

#include "plan.h"
#include "small_plan.h"

namespace fastserve::test {
namespace {

// Queries, keys and values of tokens and positions; one layer of attention, and nothing else.
class Decoder {
 public:
  Decoder(const Kernels& kernels, int threads, int first_key, int keys_before)
      : first_key_(first_key),
        keys_before_(keys_before),
        pool_(threads),
        kv_(1, kMaxSequences * kSequenceBlocks, kHeads, kHeadDim, KvFormat::f32),
        table_values_(random_vector(kVocab * kRow, 3)),
        position_values_(random_vector(kMaxContext * kRow, 4)),
        table_(pack_weight(kFloatScheme, table_values_, kVocab, kRow, kernels, pool_)),
        positions_(pack_weight(kFloatScheme, position_values_, kMaxContext, kRow, kernels, pool_)),
        plan_(4 * kMaxTokens * (3 * kRow + kWidth), limits(), kernels, pool_) {
    const std::vector<uint8_t> not_numbers(static_cast<std::size_t>(kv_.block_bytes()), 0xff);
    for (int32_t block = 0; block < kv_.num_blocks(); ++block) kv_.write_block(block, not_numbers.data());
    plan_.embedding(IdSource::token_ids, table_, rows_at(0));
    plan_.embedding(IdSource::positions, positions_, rows_at(1), -first_key);
    plan_.add(rows_at(0), rows_at(1), rows_at(2));
    plan_.attention(part(0), part(1), part(2), kv_, 0, {kScale, keys_before, 0, 0, nullptr, first_key}, out());
  }

  // Their tokens come after all that ran before.
  std::vector<float> run(const Sequences& sequences) {
    plan_.run(sequences.batch(), nullptr, nullptr, nullptr);
    return {plan_.data(out()), plan_.data(out()) + sequences.token_ids.size() * kWidth};
  }

  // By sequence, position and head, of the tables alone; `past` has what ran before.
  std::vector<double> expect(const std::vector<Sequences>& past, const Sequences& sequences) const {
    std::vector<double> results;
    for (std::size_t s = 0; s < sequences.lengths.size(); ++s) {
      std::vector<std::vector<float>> rows;  // queries, keys and values of positions from the first key on
      for (const Sequences& before : past) add_rows(before, s, &rows);
      const std::size_t num_past = rows.size();
      add_rows(sequences, s, &rows);
      for (std::size_t r = num_past; r < rows.size(); ++r)
        for (int head = 0; head < kHeads; ++head) {
          std::vector<Seen> seen;
          for (std::size_t t = 0; t <= r; ++t)
            if (static_cast<int64_t>(r - t) <= keys_before_)
              seen.push_back({rows[t].data() + kWidth + head * kHeadDim,
                              rows[t].data() + 2 * kWidth + head * kHeadDim});
          for (double value : attend(rows[r].data() + head * kHeadDim, seen, kScale)) results.push_back(value);
        }
    }
    return results;
  }

 private:
  static constexpr int kRow = 3 * kWidth;
  static constexpr float kScale = 0.25f;

  static PlanLimits limits() {
    return {kMaxTokens, kMaxTokens, kMaxSequences, kMaxSequences * kSequenceBlocks, kMaxContext, kVocab, 1, false};
  }
  static Matrix rows_at(int64_t index) { return {4 * index * kMaxTokens * kRow, kRow, kRow, Rows::tokens}; }
  static Matrix part(int64_t index) {
    return {rows_at(2).offset_bytes + 4 * index * kWidth, kRow, kWidth, Rows::tokens};
  }
  static Matrix out() { return {rows_at(3).offset_bytes, kWidth, kWidth, Rows::tokens}; }

  void add_rows(const Sequences& sequences, std::size_t s, std::vector<std::vector<float>>* rows) const {
    for (int32_t row = sequences.starts[s]; row < sequences.starts[s + 1]; ++row) {
      const auto at = static_cast<std::size_t>(row);
      const float* token = table_values_.data() + sequences.token_ids[at] * kRow;
      const float* position = position_values_.data() + (sequences.positions[at] - first_key_) * kRow;
      std::vector<float> sum(kRow);
      std::transform(token, token + kRow, position, sum.begin(), [](float x, float y) { return x + y; });
      rows->push_back(sum);
    }
  }

  int first_key_;
  int64_t keys_before_;
  ThreadPool pool_;
  KvPool kv_;
  std::vector<float> table_values_, position_values_;
  Weight table_, positions_;
  Plan plan_;
};

// A prompt in chunks, then a token each (cut by keys, where threads would idle).
void test_steps(const Kernels& kernels, int first_key, int keys_before) {
  const std::vector<Sequences> steps{Sequences({1, 1, 1}, first_key), Sequences({60, 60, 60}, first_key + 1),
                                     Sequences({200, 200, 200}, first_key + 61), Sequences({1, 1, 1}, first_key + 261),
                                     Sequences({1, 1, 1}, first_key + 262)};
  std::vector<std::vector<float>> first;
  for (int threads : {1, 2, 8}) {
    Decoder decoder(kernels, threads, first_key, keys_before);
    std::vector<Sequences> past;
    for (const Sequences& step : steps) {
      const std::string where = std::string(kernels.name) + " after " + std::to_string(first_key) +
                                " empty slots, window " + std::to_string(keys_before) + ", threads " +
                                std::to_string(threads) + ", step " + std::to_string(past.size());
      const std::vector<float> results = decoder.run(step);
      expect_close(results, decoder.expect(past, step), 1e-5, where);
      if (first.size() == past.size()) first.push_back(results);
      expect_same(results, first[past.size()], where);
      past.push_back(step);
    }
  }
}

void test_refusals(const Kernels& kernels) {
  const std::string where = kernels.name;
  expect_refused([&] { Decoder(kernels, 1, kMaxContext, kAllKeys); }, where + ": no key is ever seen");
  expect_refused([&] { Decoder(kernels, 1, -1, kAllKeys); }, where + ": a key before the first");
  Decoder decoder(kernels, 1, 12, kAllKeys);
  expect_refused([&] { decoder.run(Sequences({5}, 11)); }, where + ": a row lies in an empty slot");
  expect_same(decoder.run(Sequences({5}, 12)), Decoder(kernels, 1, 12, kAllKeys).run(Sequences({5}, 12)), where);
}

void test_all(const Kernels& kernels) {
  for (int first_key : {0, 1, 12, 31, 40})
    for (int keys_before : {25, int(kAllKeys)}) test_steps(kernels, first_key, keys_before);
  test_refusals(kernels);
}

}  // namespace
}  // namespace fastserve::test

int main(int argc, char** argv) {
  using namespace fastserve;
  test::for_each_isa(argc, argv, test::test_all);
  return test::finish("empty slots");
}
