// A compiled graph: a flat array of kernel calls over one arena, run a whole step at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention_schedule.h"
#include "kernels/kernel.h"
#include "memory.h"
#include "sample.h"
#include "threads.h"
#include "weight.h"

namespace fastserve {

enum class Rows : int32_t { tokens, outputs, sequences };
enum class IdSource : int32_t { token_ids, positions, token_types };
enum class PoolKind : int32_t { mean, first, last };

// A value of the graph: a strided matrix in the arena, of float32 or quantized (kernel.h: QuantizedRows). Where nobody
// reads it outside of its chain, it has a place in the memory of a strip as well: of any rows, or only of strips of whole
// sequences.
struct Matrix {
  static constexpr int32_t kFloats = -1;
  static constexpr int64_t kArenaOnly = -1;

  int64_t offset_bytes;
  int32_t stride;  // floats from one row to the next
  int32_t width;
  Rows rows;
  int32_t group_size = kFloats;  // quantized: columns that share a scale; 0: all of them
  int64_t strip_offset_bytes = kArenaOnly;
  bool needs_whole_sequences = false;

  bool is_in_strips() const { return strip_offset_bytes != kArenaOnly; }
  bool is_quantized() const { return group_size != kFloats; }
};

// Where the parts of a row of quantized activations lie. `group_size` 0: one group.
struct QuantizedLayout {
  int32_t padded_depth;
  int32_t group_size;
  int64_t scales_offset;
  int64_t corrections_offset;
  int64_t row_bytes;

  QuantizedLayout(int32_t depth, int32_t group_size)
      : padded_depth(static_cast<int32_t>(round_up(static_cast<std::size_t>(depth), kDepthAlignment))),
        group_size(group_size > 0 ? group_size : std::max(padded_depth, 1)) {
    const int64_t num_groups = (padded_depth + this->group_size - 1) / this->group_size;
    scales_offset = static_cast<int64_t>(round_up(static_cast<std::size_t>(padded_depth), 64));
    corrections_offset = scales_offset + 4 * num_groups;
    row_bytes = static_cast<int64_t>(round_up(static_cast<std::size_t>(corrections_offset + 4 * num_groups), 64));
  }
  explicit QuantizedLayout(const Matrix& m) : QuantizedLayout(m.width, m.group_size) {}
};

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

// One step's batch; fields as in fastserve.types.Batch. The pointers are borrowed.
struct Batch {
  int32_t num_tokens;
  int32_t num_sequences;
  int32_t num_outputs;
  int32_t block_table_width;
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* token_types;  // null: all zero
  const int32_t* sequence_starts;
  const int32_t* context_lengths;
  const int32_t* block_tables;
  const int32_t* output_rows;
};

// Some rows that a thread takes through a chain of calls, and its own memory for what only these read and write.
struct Strip {
  uint8_t* memory;
  int32_t first_row;
  bool has_whole_sequences;

  bool holds(const Matrix& m) const { return m.is_in_strips() && (has_whole_sequences || !m.needs_whole_sequences); }
};

// What every call of a step reads.
struct Step {
  const Kernels& kernels;
  uint8_t* arena;
  const Batch& batch;
  const std::vector<int32_t>& token_types;  // [tokens]
  const AttentionSchedule& attention;
  float* attention_partials;  // [attention.num_partials()][num_heads][partial_floats]
  const Strip* strip = nullptr;

  float* row(const Matrix& m, int64_t r) const {
    if (strip && strip->holds(m))
      return reinterpret_cast<float*>(strip->memory + m.strip_offset_bytes) + (r - strip->first_row) * m.stride;
    return reinterpret_cast<float*>(arena + m.offset_bytes) + r * m.stride;
  }
  int32_t num_rows(Rows rows) const {
    return rows == Rows::tokens ? batch.num_tokens : rows == Rows::outputs ? batch.num_outputs : batch.num_sequences;
  }
};

struct AttentionInputs;

// What a call has to do at the least: the memory that it reads and writes, and its multiplications and additions.
struct Cost {
  int64_t bytes = 0;
  int64_t operations = 0;
};

// One kernel call of a plan, cut into tiles.
class Call {
 public:
  virtual ~Call() = default;
  virtual const char* name() const = 0;             // of the op
  virtual std::string shape() const { return ""; }  // what tells calls of one op apart in a profile
  virtual Cost cost(const Step& step) const = 0;
  virtual int num_tiles(const Step& step) const = 0;
  // Floats of scratch memory that a tile needs.
  virtual int64_t scratch_floats() const { return 0; }
  virtual void run_tile(const Step& step, int tile, float* scratch) const = 0;
};

// A call that can be made for some rows alone: row r of its result reads, of what calls before it wrote, nothing but row
// r, or the rows of the same sequence.
class StripCall : public Call {
 public:
  virtual bool needs_whole_sequences() const { return false; }
  virtual Rows rows() const = 0;  // of its result: a chain's are all tokens
  virtual void run_rows(const Step& step, int32_t begin, int32_t end, float* scratch) const = 0;
};

// Consecutive calls of which each is a stage; or of a chain, when strips of rows go through all of them.
struct Stage {
  int first_call, end_call;
  int32_t strip_rows = 0;  // at most; 0: a single call, whose own tiles they are
  bool has_whole_sequences = false;

  bool has_strips() const { return strip_rows > 0; }
};

// Rows [begin, end) of a step.
struct RowRange {
  int32_t begin, end;

  int32_t size() const { return end - begin; }
};

// Rotary tables: cosines and sines [positions][dim / 2].
struct RopeTables {
  using Table = std::shared_ptr<const std::vector<float>>;

  Table cosines, sines;
  int32_t dim = 0;  // 0: none
};

// Keys and values of all layers in blocks of kBlock tokens (kernel.h: KvLayout).
class KvPool {
 public:
  KvPool(int32_t num_layers, int32_t num_blocks, int32_t num_kv_heads, int32_t head_dim, KvFormat format);

  uint8_t* keys(int32_t layer) const { return memory_.get() + 2 * layer * layer_bytes_; }
  uint8_t* values(int32_t layer) const { return keys(layer) + layer_bytes_; }
  const KvLayout& layout() const { return layout_; }
  int32_t num_layers() const { return num_layers_; }
  int32_t num_blocks() const { return num_blocks_; }
  int64_t num_bytes() const { return 2 * num_layers_ * layer_bytes_; }
  int64_t block_bytes() const { return 2 * num_layers_ * layout_.block_bytes; }  // over all layers

  // One block's keys and values of all layers, in the order keys, values, keys, ... of layer 0, 1, ...; `block_bytes`
  // of them. May run beside a step that has nothing to do with the block. Throws std::invalid_argument: no such block.
  void read_block(int32_t block, uint8_t* out) const;
  void write_block(int32_t block, const uint8_t* data);
  void copy_block(int32_t source, int32_t target);

 private:
  void check_block(const char* what, int32_t block) const;
  int32_t num_parts() const { return 2 * num_layers_; }
  uint8_t* part(int32_t index, int32_t block) const {
    return memory_.get() + index * layer_bytes_ + block * layout_.block_bytes;
  }

  int32_t num_layers_, num_blocks_;
  KvLayout layout_;
  int64_t layer_bytes_;
  AlignedArray<uint8_t> memory_;
};

// What a call has done since profiling began.
struct CallProfile {
  const char* name;
  std::string shape;
  int64_t num_runs = 0;
  double seconds = 0;
  Cost cost;
};

// Builds up by one method an op, named as the op, then runs steps. Results of the ops that work row by row, and of
// attention, may be quantized matrices. Weights and pools are borrowed: they outlive it.
class Plan {
 public:
  Plan(int64_t arena_bytes, const PlanLimits& limits, const Kernels& kernels, ThreadPool& pool);
  ~Plan();

  void embedding(IdSource ids, const Weight& weight, Matrix out);
  void linear(Matrix x, const Weight& weight, std::vector<float> bias, Matrix out);
  // `out` is quantized, by groups that make whole panels.
  void linear_activation(ActivationKind kind, Matrix x, const Weight& weight, std::vector<float> bias, Matrix out);
  // The same of two halves of the weight's rows, each whole panels: the gate, then what is gated.
  void linear_gated_activation(ActivationKind kind, Matrix x, const Weight& weight, std::vector<float> bias,
                               Matrix out);
  void quantize_rows(Matrix x, Matrix out);
  void rms_norm(Matrix x, std::vector<float> weight, float eps, Matrix out);
  void layer_norm(Matrix x, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out);
  void add(Matrix x, Matrix y, Matrix out);
  // out_sum of width 0: nobody reads the sum.
  void add_rms_norm(Matrix x, Matrix y, std::vector<float> weight, float eps, Matrix out_sum, Matrix out);
  void add_layer_norm(Matrix x, Matrix y, std::vector<float> weight, std::vector<float> bias, float eps, Matrix out_sum,
                      Matrix out);
  void rope(Matrix x, RopeTables tables, int32_t head_dim, Matrix out);
  void attention(Matrix q, Matrix k, Matrix v, const KvPool& pool, int32_t layer, float scale, bool causal, Matrix out);
  // Attention of q and k turned by their positions.
  void rope_attention(Matrix q, Matrix k, Matrix v, RopeTables tables, const KvPool& pool, int32_t layer, float scale,
                      bool causal, Matrix out);
  void activation(ActivationKind kind, Matrix x, Matrix out);
  void gated_activation(ActivationKind kind, Matrix gate, Matrix up, Matrix out);
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
  void check_whole_panels(const Matrix& out) const;
  void check(const RopeTables& tables) const;
  void add_call(std::unique_ptr<Call> call);
  void add_attention(const AttentionInputs& inputs, Matrix out);
  void reserve_strips(int32_t strip_rows, int64_t strip_bytes);
  bool choose_sequence_strips(const Batch& batch);
  void choose_stages(const Batch& batch);

  PlanLimits limits_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  int64_t arena_bytes_;
  AlignedArray<uint8_t> arena_;
  std::vector<std::unique_ptr<Call>> calls_;
  std::vector<SampleScratch> sample_scratch_;  // one a thread
  AttentionShape attention_shape_;
  int64_t partial_floats_ = 0;   // of the partial results of all heads of one row
  int64_t scratch_floats_ = 0;   // of a thread
  AlignedArray<float> scratch_;  // [threads][scratch_floats_]
  std::vector<Stage> chains_, sequence_chains_;
  bool is_in_chain_ = false, is_in_sequence_chain_ = false;
  int64_t strip_bytes_ = 0;        // the most of all chains
  AlignedArray<uint8_t> strips_;  // [threads][strip_bytes_]
  bool is_profiling_ = false;
  std::vector<CallProfile> profile_;
  std::mutex run_mutex_;
  // Kept from step to step for their memory.
  std::vector<Stage> stages_;
  std::vector<RowRange> sequence_strips_;
  std::vector<int32_t> token_types_;
  AttentionSchedule attention_;
  std::vector<float> attention_partials_;
};

}  // namespace fastserve
