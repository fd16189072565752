// Chooses the next token of each output row from its logits. One row's choice depends on that row alone:
// every sum has one fixed order, and its random number comes from a counter, so batch, threads and chunks
// cannot change it.
#pragma once

#include <cstdint>
#include <vector>

namespace fastserve {

inline constexpr int32_t kMaxTopLogprobs = 20;

// How one row is sampled; fields as in fastserve.types.SamplingParams. The pointers are borrowed.
struct SampleParams {
  float temperature;  // 0 is greedy
  int32_t top_k;      // 0 switches it off
  float top_p;        // 1 switches it off
  float min_p;        // 0 switches it off
  float presence_penalty;
  float frequency_penalty;
  float repetition_penalty;
  uint64_t seed;
  uint64_t draw;                  // index of the token within its completion
  int32_t num_logprobs;           // top log-probabilities wanted, at most kMaxTopLogprobs
  const int32_t* history;         // prompt, then completion so far
  int32_t history_length;         // ids in `history`
  int32_t history_prompt_length;  // how many of them belong to the prompt
  const int32_t* bias_ids;
  const float* bias_values;
  int32_t num_biases;
  const uint32_t* mask;  // bit i % 32 of word i / 32: whether token i may come; null: every one
};

// Log-probabilities are of the softmax over the row's logits as the model gave them: before penalties, biases
// and temperature, over the whole vocabulary.
struct SampleResult {
  bool ok;  // false where a logit is NaN or all that the mask allows are -inf: the rest is then undefined
  int32_t token_id;
  float logprob;
  int32_t top_ids[kMaxTopLogprobs];  // best first; valid up to min(num_logprobs, vocab_size)
  float top_logprobs[kMaxTopLogprobs];
};

struct RankedLogit {
  float logit;
  int32_t id;
};

struct Occurrence {
  bool seen;
  int32_t completion_count;
};

// Buffers that one thread reuses from row to row; they grow to the vocabulary and stay.
struct SampleScratch {
  std::vector<float> block_maxima;
  std::vector<float> weights;           // [vocab] unnormalized probabilities
  std::vector<double> block_sums;       // of weights
  std::vector<RankedLogit> ranked;      // candidates of a selection
  std::vector<RankedLogit> changed;     // logits before penalties and biases
  std::vector<Occurrence> occurrences;  // [vocab] all zero between rows

  // Takes what rows of this vocabulary need, so that sampling them cannot run out of memory.
  void reserve(std::size_t vocab_size);
};

// Arrays over the rows of one step, laid out as fastserve.types.SamplingBatch; borrowed.
struct SampleBatch {
  int32_t num_rows;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* presence_penalty;
  const float* frequency_penalty;
  const float* repetition_penalty;
  const uint64_t* seeds;
  const uint64_t* draws;
  const int32_t* num_logprobs;
  const int32_t* history_starts;  // [num_rows + 1]
  const int32_t* history_prompt_lengths;
  const int32_t* history_ids;
  int32_t num_history_ids;
  const int32_t* bias_starts;  // [num_rows + 1]
  const int32_t* bias_ids;
  const float* bias_values;
  int32_t num_bias_ids;
  const int32_t* mask_starts;  // [num_rows + 1]
  const uint32_t* mask_words;
  int32_t num_mask_words;

  SampleParams row(int32_t row_index) const;
};

// Throws std::invalid_argument, naming the row and the value, unless every range lies within its array, every
// id within the vocabulary, and every mask is one of it. Call it once a step: sample_row trusts its parameters.
void check_sample_batch(const SampleBatch& batch, int32_t vocab_size);

// Chooses a token of `logits` [vocab_size], which it uses as scratch.
//
// Order: repetition penalty, presence and frequency penalties, biases, mask, temperature, top-k, top-p over what
// top-k left, min-p relative to the most probable token; then the inverse of the cumulative distribution, in
// the order of ids, at a Philox4x32-10 uniform keyed by the seed with the draw as its counter. Equal logits
// rank by lower id. Logits of +inf share all of the probability among them.
void sample_row(float* logits, int32_t vocab_size, const SampleParams& params, SampleScratch& scratch,
                SampleResult& result);

// Checks the batch and samples its rows one after the other; `logits` [num_rows, vocab_size] is used as
// scratch. Throws std::domain_error for a row that is not `ok`.
void sample(float* logits, int32_t vocab_size, const SampleBatch& batch, SampleResult* results);

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four words from a
// counter of four and a key of two.
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);

}  // namespace fastserve
