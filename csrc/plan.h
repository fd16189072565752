// A compiled graph: a flat array of kernel calls over one arena, run a whole step at a time.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "adapter.h"
#include "attention_schedule.h"
#include "kernels/kernel.h"
#include "kv_pool.h"
#include "memory.h"
#include "sample.h"
#include "stage_schedule.h"
#include "step.h"
#include "step_job.h"
#include "threads.h"
#include "weight.h"

namespace fastserve {

// Capacities that a plan is made for.
struct PlanLimits {
  int32_t max_tokens;
  int32_t max_outputs;
  int32_t max_sequences;
  int32_t num_blocks;
  int32_t max_context;
  int32_t vocab_size;
  int32_t num_token_types;
  bool needs_whole_sequences;  // attention is bidirectional: a sequence comes in one batch
};

struct AttentionInputs;

// Builds up by one method an op, named as the op, then runs steps. Results of the ops that work row by row, and of
// attention, may be quantized matrices. Weights, tables and pools are borrowed: they outlive it.
class Plan {
 public:
  Plan(int64_t arena_bytes, const PlanLimits& limits, const Kernels& kernels, ThreadPool& pool);
  ~Plan();

  // Rows id + offset of the weight, times `scale`; the first one where that is less than 0.
  void embedding(IdSource ids, const Weight& weight, Matrix out, int32_t offset = 0, float scale = 1.0f);
  void linear(Matrix x, const Weight& weight, std::vector<float> bias, Matrix out);
  // Of rows with an adapter: out = down * x, and out += up * low.
  void adapter_down(Matrix x, const AdapterTable& table, Matrix out);
  void adapter_up(Matrix low, const AdapterTable& table, Matrix out);
  // `out` is quantized, by groups that make whole panels.
  void linear_activation(ActivationKind kind, Matrix x, const Weight& weight, std::vector<float> bias, Matrix out);
  // The same of two halves of the weight's rows, each whole panels: the gate, then what is gated.
  void linear_gated_activation(ActivationKind kind, Matrix x, const Weight& weight, std::vector<float> bias,
                               Matrix out);
  void quantize_rows(Matrix x, Matrix out);
  // As many columns as there are weights are normed by themselves.
  void rms_norm(Matrix x, std::vector<float> weight, float eps, Matrix out);
  void layer_norm(Matrix x, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out);
  void add(Matrix x, Matrix y, Matrix out);
  // out_sum of width 0: nobody reads the sum.
  void add_rms_norm(Matrix x, Matrix y, std::vector<float> weight, float eps, Matrix out_sum, Matrix out);
  void add_layer_norm(Matrix x, Matrix y, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out_sum,
                      Matrix out);
  void rope(Matrix x, RopeTables tables, int32_t head_dim, Matrix out);
  void attention(Matrix q, Matrix k, Matrix v, const KvPool& pool, int32_t layer, AttentionScores scores, Matrix out);
  // Attention of q and k turned by their positions.
  void rope_attention(Matrix q, Matrix k, Matrix v, RopeTables tables, const KvPool& pool, int32_t layer,
                      AttentionScores scores, Matrix out);
  // Keys and values of whole sequences, for a decoder's `cross_attention` of the same layer. Comes after all attention.
  void store_source(Matrix k, Matrix v, const KvPool& pool, int32_t layer);
  // Attention to all keys of each sequence's source. Batches must have sources.
  void cross_attention(Matrix q, const KvPool& pool, int32_t layer, float scale, Matrix out);
  void activation(ActivationKind kind, Matrix x, Matrix out);
  void gated_activation(ActivationKind kind, Matrix gate, Matrix up, Matrix out);
  // One of several weights a row: `experts` have as many gates, ups and downs. `logits` are a router's; `gathered`,
  // `inner` and `results` have a row for each of the `top_k` places of a row, and are for this op alone.
  struct Experts {
    std::vector<const Weight*> gates, ups, downs;
  };
  void mixture_of_experts(ActivationKind kind, Matrix x, Matrix logits, const Experts& experts, int32_t top_k,
                          bool normalized, Matrix gathered, Matrix inner, Matrix results, Matrix out);
  void soft_cap(Matrix x, float cap, Matrix out);
  void scale(Matrix x, float factor, Matrix out);
  void gather_rows(Matrix x, Matrix out);
  void pool(PoolKind kind, Matrix x, Matrix out);
  void l2_normalize(Matrix x, float eps, Matrix out);

  // What is added between these is a chain of calls that work row by row. Steps with many rows take it a strip of at
  // most `strip_rows` at a time, whose matrices have `strip_bytes` of memory of a thread's own: few enough for them to
  // stay in its cache.
  void start_chain(int32_t strip_rows, int64_t strip_bytes);
  void end_chain();
  // The same of calls that work sequence by sequence, and may have chains among them: where all sequences of a step have
  // at most `strip_rows`, and make as much work for all threads, its strips are whole sequences.
  void start_sequence_chain(int32_t strip_rows, int64_t strip_bytes);
  void end_sequence_chain();

  // Runs one step. With `sampling`, rows of `logits` are sampled into `results`, and used as scratch.
  // Throws std::invalid_argument where the batch is inconsistent or beyond the limits, before anything is written;
  // std::logic_error while another thread runs a step.
  void run(const Batch& batch, const SampleBatch* sampling, const Matrix* logits, SampleResult* results);

  // Whether so many rows of a matrix lie within the arena.
  bool holds(const Matrix& m, int64_t num_rows) const;
  const float* data(const Matrix& m) const { return reinterpret_cast<const float*>(arena_.get() + m.offset_bytes); }
  // Calls in order, then the sampling. Profiling costs two clock readings a call; starting it forgets what was.
  void start_profile();
  void stop_profile() { is_profiling_ = false; }
  const std::vector<CallProfile>& profile() const { return profile_; }

 private:
  void check(const Batch& batch) const;
  void check(const Matrix& m) const;
  void check_in_strip(const Matrix& m) const;
  void check_linear(const Matrix& x, const Weight& weight, const std::vector<float>& bias, int32_t columns) const;
  void check_expert_rows(const Matrix& places, int32_t top_k, const char* what, int32_t width) const;
  void check_experts(const std::vector<const Weight*>& weights, std::size_t count, const Matrix& x, int32_t rows) const;
  void check_whole_panels(const Matrix& out) const;
  void check(const RopeTables& tables) const;
  void check_adapters(const AdapterTable& table, const Matrix& low);
  void add_call(std::unique_ptr<Call> call);
  void check_pool(const KvPool& pool, int32_t layer) const;
  void check_keys(const AttentionInputs& inputs) const;
  void check_sources(const Batch& batch) const;
  void add_attention(const AttentionInputs& inputs, Matrix out);
  void reserve_strips(int32_t strip_rows, int64_t strip_bytes);

  PlanLimits limits_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  int64_t arena_bytes_;
  AlignedArray<uint8_t> arena_;
  std::vector<std::unique_ptr<Call>> calls_;
  std::vector<SampleScratch> sample_scratch_;  // one a thread
  AttentionShape attention_shape_;
  int32_t num_adapter_slots_ = 0;  // of all tables
  int32_t first_key_ = 0;          // no row lies before it
  bool reads_sources_ = false;
  int64_t partial_floats_ = 0;   // of the partial results of all heads of one row
  int64_t scratch_floats_ = 0;   // of a thread
  AlignedArray<float> scratch_;  // [threads][scratch_floats_]
  Chains chains_;
  bool is_in_chain_ = false, is_in_sequence_chain_ = false;
  int64_t strip_bytes_ = 0;        // the most of all chains
  AlignedArray<uint8_t> strips_;  // [threads][strip_bytes_]
  bool is_profiling_ = false;
  std::vector<CallProfile> profile_;
  std::mutex run_mutex_;
  // Kept from step to step for their memory.
  StageSchedule stages_;
  std::vector<int32_t> token_types_;
  AttentionSchedule attention_, source_attention_;
  AdapterRuns adapter_runs_;
  std::vector<float> attention_partials_;
};

}  // namespace fastserve
