// What the tests of plans share: sizes, sequences, weights, and attention in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/kernel.h"
#include "step.h"
#include "threads.h"
#include "weight.h"

namespace fastserve::test {

constexpr int kVocab = 50, kHeads = 4, kHeadDim = 16, kWidth = kHeads * kHeadDim;
constexpr int kMaxTokens = 600, kMaxSequences = 24, kMaxContext = 320, kSequenceBlocks = kMaxContext / kBlock;
constexpr WeightScheme kFloatScheme{WeightFormat::f32, ScaleFormat::bf16, WeightOffset::none, 0, 0};

// As many tokens of each sequence as are said, from one position on.
struct Sequences {
  std::vector<int32_t> token_ids, positions, starts{0}, lengths, block_tables, output_rows;

  explicit Sequences(const std::vector<int>& numbers_of_tokens, int first_position = 0) {
    Random random(static_cast<unsigned>(9 + first_position));
    for (int num_tokens : numbers_of_tokens) {
      for (int i = 0; i < num_tokens; ++i) {
        token_ids.push_back(random.below(kVocab));
        positions.push_back(first_position + i);
      }
      starts.push_back(static_cast<int32_t>(token_ids.size()));
      lengths.push_back(first_position + num_tokens);
      for (int block = 0; block < kSequenceBlocks; ++block)
        block_tables.push_back(block * kMaxSequences + static_cast<int>(lengths.size()) - 1);
      output_rows.push_back(starts.back() - 1);
    }
  }

  Batch batch() const {
    return {static_cast<int32_t>(token_ids.size()),
            static_cast<int32_t>(lengths.size()),
            static_cast<int32_t>(output_rows.size()),
            kSequenceBlocks,
            token_ids.data(),
            positions.data(),
            nullptr,
            starts.data(),
            lengths.data(),
            block_tables.data(),
            output_rows.data()};
  }
};

inline std::vector<float> random_vector(std::size_t count, unsigned seed) {
  Random random(seed);
  std::vector<float> values(count);
  random.fill(values);
  return values;
}

// Of values [rows, depth].
inline Weight pack_weight(const WeightScheme& scheme, const std::vector<float>& values, int rows, int depth,
                          const Kernels& kernels, ThreadPool& pool) {
  const StoredMatrix stored{StoredFormat::f32, reinterpret_cast<const uint8_t*>(values.data()),
                            static_cast<int64_t>(values.size() * sizeof(float)), rows, depth};
  return Weight({stored}, scheme, kernels, pool);
}

inline Weight make_weight(const WeightScheme& scheme, int rows, int depth, unsigned seed, const Kernels& kernels,
                          ThreadPool& pool) {
  return pack_weight(scheme, random_vector(static_cast<std::size_t>(rows * depth), seed), rows, depth, kernels, pool);
}

inline void expect_same(const std::vector<float>& actual, const std::vector<float>& expected, const std::string& what) {
  for (float value : expected) expect(std::isfinite(value), what + ": not finite");
  expect(actual.size() == expected.size() &&
             std::memcmp(actual.data(), expected.data(), expected.size() * sizeof(float)) == 0,
         what + " differs");
}

template <class Function>
void expect_refused(Function f, const std::string& what) {
  try {
    f();
  } catch (const std::invalid_argument&) {
    return;
  }
  fail(what);
}

// What a query sees of one position, in its head.
struct Seen {
  const float *key, *value;
};

// Attention of one query in one head of kHeadDim columns.
inline std::vector<double> attend(const float* query, const std::vector<Seen>& seen, float scale) {
  std::vector<double> sums(kHeadDim, 0.0);
  double total = 0;
  for (const Seen& s : seen) {
    double score = 0;
    for (int d = 0; d < kHeadDim; ++d) score += static_cast<double>(query[d]) * static_cast<double>(s.key[d]);
    const double weight = std::exp(score * static_cast<double>(scale));
    total += weight;
    for (int d = 0; d < kHeadDim; ++d)
      sums[static_cast<std::size_t>(d)] += weight * static_cast<double>(s.value[d]);
  }
  for (double& sum : sums) sum /= total;
  return sums;
}

}  // namespace fastserve::test
