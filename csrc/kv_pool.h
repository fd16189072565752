// Keys and values of all layers, in blocks.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"
#include "memory.h"

namespace fastserve {

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

}  // namespace fastserve
