// One step of a plan, as its calls see it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention_schedule.h"
#include "kernels/kernel.h"
#include "memory.h"

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
  const int32_t* adapter_slots = nullptr;  // null: no sequence has an adapter
  // Of decoders that read sources; else null.
  int32_t source_table_width = 0;
  const int32_t* source_lengths = nullptr;
  const int32_t* source_block_tables = nullptr;
};

// Some rows that a thread takes through a chain of calls, and its own memory for what only these read and write.
struct Strip {
  uint8_t* memory;
  int32_t first_row;
  bool has_whole_sequences;

  bool holds(const Matrix& m) const { return m.is_in_strips() && (has_whole_sequences || !m.needs_whole_sequences); }
};

struct AdapterRuns;

// What every call of a step reads.
struct Step {
  const Kernels& kernels;
  uint8_t* arena;
  const Batch& batch;
  const std::vector<int32_t>& token_types;  // [tokens]
  const AttentionSchedule& attention;
  const AttentionSchedule& source_attention;
  float* attention_partials;  // [num_partials() of the attention that runs][num_heads][partial_floats]
  const AdapterRuns* adapter_runs;
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

// Rotary tables: cosines and sines [positions][dim / 2].
struct RopeTables {
  using Table = std::shared_ptr<const std::vector<float>>;

  Table cosines, sines;
  int32_t dim = 0;  // 0: none
};

// How attention makes its scores, and which keys a row sees. The bias is added by distance, which is key position - query
// position: [num_heads][bias_stride(max_context)], from distance 1 - max_context on.
struct AttentionScores {
  float scale;
  int32_t keys_before = kAllKeys, keys_after = 0;
  float soft_cap = 0;  // 0: none
  RopeTables::Table bias = nullptr;
  int32_t first_key = 0;  // slots before it are empty

  static int32_t bias_stride(int32_t max_context) { return 2 * max_context - 1 + kBiasPadding; }
};

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

}  // namespace fastserve
