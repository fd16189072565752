#include "sample.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

// Not for -ffast-math, which would reorder the sums and lose NaN. GCC vectorizes it with -fno-trapping-math.

namespace fastserve {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Passes over the vocabulary go by blocks, and within a block by lanes: lanes are what compilers turn into
// vectors without being allowed to reorder anything, so that the result does not depend on the vector width.
constexpr int32_t kBlock = 128;
constexpr int32_t kLanes = 16;

int32_t num_blocks(int32_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

int32_t block_end(int32_t block, int32_t vocab_size) { return std::min((block + 1) * kBlock, vocab_size); }

// exp(x) for x <= 0: 1 for 0, exactly 0 below -87.7, NaN for NaN; relative error below 2e-7. Polynomial and
// split of ln 2 from Cephes expf (S. Moshier, netlib.org/cephes). Not std::exp, which neither vectorizes nor
// agrees between C libraries.
inline float exp_nonpositive(float x) {
  x = x < -88.0f ? -88.0f : x;  // there the exponent is -127, whose bits below make the power 0
  // 1.5 * 2^23: the low bits of the sum are the rounded exponent.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float exponent = shifted - 12582912.0f;
  const float r = (x - exponent * 0.693359375f) + exponent * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Whether `a` ranks before `b`: higher logit first, then lower id.
bool ranks_before(const RankedLogit& a, const RankedLogit& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The greatest of `count` values, NaN ignored; -inf if there is none.
float max_of(const float* values, int32_t count) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -kInfinity);
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = std::max(lanes[lane], values[i + lane]);
  for (; i < count; ++i) lanes[0] = std::max(lanes[0], values[i]);  // which keeps its first argument for NaN
  return *std::max_element(lanes, lanes + kLanes);
}

double sum_of(const float* values, int32_t count) {
  float lanes[kLanes] = {};
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int32_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  for (int32_t lane = 0; i + lane < count; ++lane) lanes[lane] += values[i + lane];
  double sum = 0.0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// Fills block_maxima and returns the greatest logit.
float find_maxima(const float* logits, int32_t vocab_size, SampleScratch& scratch) {
  scratch.block_maxima.resize(num_blocks(vocab_size));
  for (int32_t block = 0; block < num_blocks(vocab_size); ++block) {
    const int32_t begin = block * kBlock;
    scratch.block_maxima[block] = max_of(logits + begin, block_end(block, vocab_size) - begin);
  }
  return max_of(scratch.block_maxima.data(), num_blocks(vocab_size));
}

// As find_maxima; logits of +inf become 0 and all others -inf, which is what softmax tends to as they grow.
float find_maxima_of_finite(float* logits, int32_t vocab_size, SampleScratch& scratch) {
  const float max = find_maxima(logits, vocab_size, scratch);
  if (max < kInfinity) return max;
  for (int32_t id = 0; id < vocab_size; ++id)
    if (!std::isnan(logits[id])) logits[id] = logits[id] == kInfinity ? 0.0f : -kInfinity;
  return find_maxima(logits, vocab_size, scratch);
}

double total_of_blocks(const SampleScratch& scratch) {
  double total = 0.0;
  for (double sum : scratch.block_sums) total += sum;
  return total;
}

// Fills weights with exp((logit - max) / temperature), the greatest of which is 1, and returns their sum.
double find_weights(const float* logits, int32_t vocab_size, float max, float temperature, SampleScratch& scratch) {
  scratch.weights.resize(vocab_size);
  scratch.block_sums.resize(num_blocks(vocab_size));
  for (int32_t block = 0; block < num_blocks(vocab_size); ++block) {
    const int32_t begin = block * kBlock, end = block_end(block, vocab_size);
    float* weights = scratch.weights.data();
    for (int32_t id = begin; id < end; ++id) weights[id] = exp_nonpositive((logits[id] - max) / temperature);
    scratch.block_sums[block] = sum_of(weights + begin, end - begin);
  }
  return total_of_blocks(scratch);
}

int32_t first_of_greatest(const float* logits, int32_t vocab_size, float max, const SampleScratch& scratch) {
  const auto& maxima = scratch.block_maxima;
  const auto block = static_cast<int32_t>(std::find(maxima.begin(), maxima.end(), max) - maxima.begin());
  const float* begin = logits + block * kBlock;
  return static_cast<int32_t>(std::find(begin, logits + block_end(block, vocab_size), max) - logits);
}

// Fills `ranked` with the first `count` of the vocabulary in the order of ranks_before, themselves in no
// order. 1 <= count <= vocab_size; block_maxima must be those of `logits`.
void select_top(const float* logits, int32_t vocab_size, int32_t count, SampleScratch& scratch) {
  auto& maxima = scratch.block_maxima;
  float bound = -kInfinity;
  if (count < num_blocks(vocab_size)) {
    // As many blocks reach the count-th greatest maximum, so at least as many logits do.
    scratch.ranked.clear();
    for (float max : maxima) scratch.ranked.push_back({max, 0});
    const auto nth = scratch.ranked.begin() + (count - 1);
    std::nth_element(scratch.ranked.begin(), nth, scratch.ranked.end(), ranks_before);
    bound = nth->logit;
  }
  scratch.ranked.clear();
  for (int32_t block = 0; block < num_blocks(vocab_size); ++block) {
    if (maxima[block] < bound) continue;
    for (int32_t id = block * kBlock; id < block_end(block, vocab_size); ++id)
      if (logits[id] >= bound) scratch.ranked.push_back({logits[id], id});
  }
  const auto nth = scratch.ranked.begin() + (count - 1);
  std::nth_element(scratch.ranked.begin(), nth, scratch.ranked.end(), ranks_before);
  scratch.ranked.resize(count);
}

// Writes the top log-probabilities; `log_total` is the logarithm of the sum of exp(logit).
void report_top(const float* logits, int32_t vocab_size, double log_total, int32_t num_logprobs, SampleScratch& scratch,
                SampleResult& result) {
  const int32_t count = std::min(num_logprobs, vocab_size);
  if (count == 0) return;
  select_top(logits, vocab_size, count, scratch);
  std::sort(scratch.ranked.begin(), scratch.ranked.end(), ranks_before);
  for (int32_t i = 0; i < count; ++i) {
    result.top_ids[i] = scratch.ranked[i].id;
    result.top_logprobs[i] = static_cast<float>(scratch.ranked[i].logit - log_total);
  }
}

// Applies penalties and biases in place, keeping the logits from before in `changed`. Tokens count once for
// repetition and presence, however often they occur.
void apply_penalties(float* logits, int32_t vocab_size, const SampleParams& params, SampleScratch& scratch) {
  auto& occurrences = scratch.occurrences;
  if (occurrences.size() < static_cast<size_t>(vocab_size)) occurrences.resize(vocab_size, Occurrence{});
  scratch.changed.clear();
  for (int32_t i = 0; i < params.history_length; ++i) {
    const int32_t id = params.history[i];
    if (!occurrences[id].seen) scratch.changed.push_back({logits[id], id});
    occurrences[id].seen = true;
    occurrences[id].completion_count += i >= params.history_prompt_length;
  }
  for (const RankedLogit& before : scratch.changed) {
    Occurrence& occurrence = occurrences[before.id];
    const float repetition = params.repetition_penalty;
    float logit = before.logit > 0.0f ? before.logit / repetition : before.logit * repetition;
    logit -= params.frequency_penalty * static_cast<float>(occurrence.completion_count);
    if (occurrence.completion_count > 0) logit -= params.presence_penalty;
    logits[before.id] = logit;
    occurrence = Occurrence{};
  }
  for (int32_t i = 0; i < params.num_biases; ++i) {
    const int32_t id = params.bias_ids[i];
    scratch.changed.push_back({logits[id], id});
    logits[id] += params.bias_values[i];
  }
}

// Tokens that may not come have no probability any more. Most words are all of one kind.
void apply_mask(float* logits, int32_t vocab_size, const uint32_t* mask) {
  for (int32_t begin = 0; begin < vocab_size; begin += 32) {
    const uint32_t word = mask[begin / 32];
    float* end = logits + std::min(begin + 32, vocab_size);
    if (word == 0) std::fill(logits + begin, end, -kInfinity);
    if (word == 0 || word == ~uint32_t{0}) continue;
    for (int32_t i = 0; logits + begin + i < end; ++i)
      if ((word >> i & 1u) == 0) logits[begin + i] = -kInfinity;
  }
}

// The first entry of an id holds what the model gave: later ones saw an earlier change.
float raw_logit(const float* logits, int32_t id, const SampleScratch& scratch) {
  for (const RankedLogit& before : scratch.changed)
    if (before.id == id) return before.logit;
  return logits[id];
}

// Zeroes the weights for which `is_kept(id)` is false and returns the sum of the others.
template <typename Predicate>
double keep_weights(int32_t vocab_size, SampleScratch& scratch, Predicate is_kept) {
  float* weights = scratch.weights.data();
  for (int32_t block = 0; block < num_blocks(vocab_size); ++block) {
    const int32_t begin = block * kBlock, end = block_end(block, vocab_size);
    for (int32_t id = begin; id < end; ++id) weights[id] = is_kept(id) ? weights[id] : 0.0f;
    scratch.block_sums[block] = sum_of(weights + begin, end - begin);
  }
  return total_of_blocks(scratch);
}

// Keeps the tokens up to `last` in the order of rank.
double keep_ranked(const float* logits, int32_t vocab_size, RankedLogit last, SampleScratch& scratch) {
  return keep_weights(vocab_size, scratch, [=](int32_t id) {
    return (logits[id] > last.logit) | ((logits[id] == last.logit) & (id <= last.id));
  });
}

// Keeps the tokens of at least `min_p` times the probability of the best, whose weight is 1.
double keep_probable(int32_t vocab_size, float min_p, SampleScratch& scratch) {
  const float* weights = scratch.weights.data();
  return keep_weights(vocab_size, scratch, [=](int32_t id) { return weights[id] >= min_p; });
}

RankedLogit last_of_top_k(const float* logits, int32_t vocab_size, int32_t top_k, SampleScratch& scratch) {
  select_top(logits, vocab_size, top_k, scratch);
  return *std::max_element(scratch.ranked.begin(), scratch.ranked.end(), ranks_before);
}

// The last token of the smallest set, in order of rank, whose weight reaches `top_p` of `total`.
RankedLogit last_of_top_p(const float* logits, int32_t vocab_size, float top_p, double total, SampleScratch& scratch) {
  const float* weights = scratch.weights.data();
  const double wanted = static_cast<double>(top_p) * total;
  // All tokens below this weight have together less than what may be left out.
  const double negligible = (total - wanted) / vocab_size;
  auto& ranked = scratch.ranked;
  ranked.clear();
  for (int32_t block = 0; block < num_blocks(vocab_size); ++block) {
    if (scratch.block_sums[block] < negligible) continue;
    for (int32_t id = block * kBlock; id < block_end(block, vocab_size); ++id)
      if (weights[id] >= negligible && weights[id] > 0.0f) ranked.push_back({logits[id], id});
  }
  // Bisect by partitioning instead of sorting: ranked[:low] is within the set, ranked[:high] reaches it.
  double mass = 0.0;  // of ranked[:low]
  size_t low = 0, high = ranked.size();
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(ranked.begin() + low, ranked.begin() + middle, ranked.begin() + high, ranks_before);
    double added = 0.0;
    for (size_t i = low; i < middle; ++i) added += weights[ranked[i].id];
    if (mass + added >= wanted) {
      high = middle;
    } else {
      mass += added;
      low = middle;
    }
  }
  return ranked[low];
}

// A double uniform in [0, 1), of 53 bits.
double uniform(uint64_t seed, uint64_t draw) {
  const uint32_t counter[4] = {static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32), 0, 0};
  const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t words[4];
  philox4x32(counter, key, words);
  const uint64_t bits = (static_cast<uint64_t>(words[1]) << 32 | words[0]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

// The first id at which the cumulative weight exceeds `target`; the last of any weight where rounding keeps
// it short.
int32_t find_cumulative(double target, int32_t vocab_size, const SampleScratch& scratch) {
  int32_t chosen_block = 0;
  double next = 0.0, cumulative = 0.0;  // weight up to the next block, and up to the chosen one
  for (int32_t block = 0; block < num_blocks(vocab_size) && next <= target; ++block) {
    if (scratch.block_sums[block] == 0.0) continue;
    chosen_block = block;
    cumulative = next;
    next += scratch.block_sums[block];
  }
  int32_t chosen_id = 0;
  const int32_t end = block_end(chosen_block, vocab_size);
  for (int32_t id = chosen_block * kBlock; id < end && cumulative <= target; ++id) {
    if (scratch.weights[id] == 0.0f) continue;
    chosen_id = id;
    cumulative += scratch.weights[id];
  }
  return chosen_id;
}

// Draws from softmax(logits / temperature) as the filters leave it.
int32_t draw_token(const float* logits, int32_t vocab_size, float max, const SampleParams& params,
                   SampleScratch& scratch) {
  double total = find_weights(logits, vocab_size, max, params.temperature, scratch);
  if (params.top_k > 0 && params.top_k < vocab_size) {
    const RankedLogit last = last_of_top_k(logits, vocab_size, params.top_k, scratch);
    total = keep_ranked(logits, vocab_size, last, scratch);
  }
  if (params.top_p < 1.0f) {
    const RankedLogit last = last_of_top_p(logits, vocab_size, params.top_p, total, scratch);
    total = keep_ranked(logits, vocab_size, last, scratch);
  }
  if (params.min_p > 0.0f) total = keep_probable(vocab_size, params.min_p, scratch);
  return find_cumulative(uniform(params.seed, params.draw) * total, vocab_size, scratch);
}

void check_range(const char* name, int32_t row, int32_t begin, int32_t end, int32_t length) {
  if (begin < 0 || end < begin || end > length)
    throw std::invalid_argument("row " + std::to_string(row) + " has the " + name + " range [" + std::to_string(begin) +
                                ", " + std::to_string(end) + ") of an array of length " + std::to_string(length));
}

void check_ids(const char* name, int32_t row, const int32_t* ids, int32_t count, int32_t vocab_size) {
  for (int32_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocab_size)
      throw std::invalid_argument("row " + std::to_string(row) + " has the " + name + " id " + std::to_string(ids[i]) +
                                  "; the vocabulary has " + std::to_string(vocab_size));
}

void check_mask(int32_t row, int32_t num_words, int32_t vocab_size) {
  if (num_words != 0 && num_words != (vocab_size + 31) / 32)
    throw std::invalid_argument("row " + std::to_string(row) + " has a mask of " + std::to_string(num_words) +
                                " words; the vocabulary has " + std::to_string(vocab_size) + " tokens");
}

}  // namespace

SampleParams SampleBatch::row(int32_t row_index) const {
  const int32_t r = row_index;
  SampleParams params{};
  params.temperature = temperature[r];
  params.top_k = top_k[r];
  params.top_p = top_p[r];
  params.min_p = min_p[r];
  params.presence_penalty = presence_penalty[r];
  params.frequency_penalty = frequency_penalty[r];
  params.repetition_penalty = repetition_penalty[r];
  params.seed = seeds[r];
  params.draw = draws[r];
  params.num_logprobs = num_logprobs[r];
  params.history = history_ids + history_starts[r];
  params.history_length = history_starts[r + 1] - history_starts[r];
  params.history_prompt_length = history_prompt_lengths[r];
  params.bias_ids = bias_ids + bias_starts[r];
  params.bias_values = bias_values + bias_starts[r];
  params.num_biases = bias_starts[r + 1] - bias_starts[r];
  params.mask = mask_starts[r] < mask_starts[r + 1] ? mask_words + mask_starts[r] : nullptr;
  return params;
}

void check_sample_batch(const SampleBatch& batch, int32_t vocab_size) {
  for (int32_t r = 0; r < batch.num_rows; ++r) {
    check_range("history", r, batch.history_starts[r], batch.history_starts[r + 1], batch.num_history_ids);
    check_range("bias", r, batch.bias_starts[r], batch.bias_starts[r + 1], batch.num_bias_ids);
    check_range("mask", r, batch.mask_starts[r], batch.mask_starts[r + 1], batch.num_mask_words);
    check_mask(r, batch.mask_starts[r + 1] - batch.mask_starts[r], vocab_size);
    const SampleParams params = batch.row(r);
    check_range("prompt", r, 0, params.history_prompt_length, params.history_length);
    check_range("logprobs", r, 0, params.num_logprobs, kMaxTopLogprobs);
    check_ids("history", r, params.history, params.history_length, vocab_size);
    check_ids("bias", r, params.bias_ids, params.num_biases, vocab_size);
  }
}

void SampleScratch::reserve(std::size_t vocab_size) {
  block_maxima.reserve(vocab_size);
  weights.reserve(vocab_size);
  block_sums.reserve(vocab_size);
  ranked.reserve(vocab_size);
  changed.reserve(2 * vocab_size);  // by penalties, then by biases
  occurrences.reserve(vocab_size);
}

void sample_row(float* logits, int32_t vocab_size, const SampleParams& params, SampleScratch& scratch,
                SampleResult& result) {
  assert(vocab_size > 0 && params.num_logprobs <= kMaxTopLogprobs);
  float max = find_maxima_of_finite(logits, vocab_size, scratch);
  const double total = find_weights(logits, vocab_size, max, 1.0f, scratch);
  result.ok = max > -kInfinity && !std::isnan(total);
  if (!result.ok) return;
  const double log_total = max + std::log(total);
  report_top(logits, vocab_size, log_total, params.num_logprobs, scratch, result);

  apply_penalties(logits, vocab_size, params, scratch);
  if (!scratch.changed.empty()) max = find_maxima_of_finite(logits, vocab_size, scratch);
  if (params.mask != nullptr) {
    apply_mask(logits, vocab_size, params.mask);
    max = find_maxima(logits, vocab_size, scratch);
    result.ok = max > -kInfinity;
    if (!result.ok) return;
  }
  result.token_id = params.temperature == 0.0f ? first_of_greatest(logits, vocab_size, max, scratch)
                                               : draw_token(logits, vocab_size, max, params, scratch);
  result.logprob = static_cast<float>(raw_logit(logits, result.token_id, scratch) - log_total);
}

void sample(float* logits, int32_t vocab_size, const SampleBatch& batch, SampleResult* results) {
  check_sample_batch(batch, vocab_size);
  SampleScratch scratch;
  for (int32_t r = 0; r < batch.num_rows; ++r)
    sample_row(logits + static_cast<int64_t>(r) * vocab_size, vocab_size, batch.row(r), scratch, results[r]);
}

void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  uint32_t k0 = key[0], k1 = key[1];
  std::copy(counter, counter + 4, words);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * words[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * words[2];
    words[0] = static_cast<uint32_t>(product1 >> 32) ^ words[1] ^ k0;
    words[1] = static_cast<uint32_t>(product1);
    words[2] = static_cast<uint32_t>(product0 >> 32) ^ words[3] ^ k1;
    words[3] = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;  // the golden ratio and sqrt(3) - 1, as the paper has them
    k1 += 0xBB67AE85;
  }
}

}  // namespace fastserve
