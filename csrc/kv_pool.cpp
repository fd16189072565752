#include "kv_pool.h"

#include <cstring>

#include "refuse.h"

namespace fastserve {
namespace {

int64_t element_bytes(KvFormat format) { return format == KvFormat::f32 ? 4 : format == KvFormat::int8 ? 1 : 2; }

}  // namespace

KvPool::KvPool(int32_t num_layers, int32_t num_blocks, int32_t num_kv_heads, int32_t head_dim, KvFormat format)
    : num_layers_(num_layers), num_blocks_(num_blocks) {
  check_range("head_dim", head_dim, 1, kMaxHeadDim);
  const auto padded_head_dim = static_cast<int32_t>(round_up(static_cast<std::size_t>(head_dim), 16));
  const int64_t scale_bytes = format == KvFormat::int8 ? static_cast<int64_t>(sizeof(float)) : 0;
  const int64_t head_bytes = kBlock * (padded_head_dim * element_bytes(format) + scale_bytes);
  layout_ = {format, num_kv_heads, head_dim, padded_head_dim, head_bytes, num_kv_heads * head_bytes};
  layer_bytes_ = layout_.block_bytes * num_blocks;
  memory_ = allocate<uint8_t>(static_cast<std::size_t>(num_bytes()));
}

void KvPool::read_block(int32_t block, uint8_t* out) const {
  check_block("block", block);
  const auto bytes = static_cast<std::size_t>(layout_.block_bytes);
  for (int32_t i = 0; i < num_parts(); ++i) std::memcpy(out + i * layout_.block_bytes, part(i, block), bytes);
}

void KvPool::write_block(int32_t block, const uint8_t* data) {
  check_block("block", block);
  const auto bytes = static_cast<std::size_t>(layout_.block_bytes);
  for (int32_t i = 0; i < num_parts(); ++i) std::memcpy(part(i, block), data + i * layout_.block_bytes, bytes);
}

void KvPool::copy_block(int32_t source, int32_t target) {
  check_block("source", source);
  check_block("target", target);
  if (source == target) return;
  const auto bytes = static_cast<std::size_t>(layout_.block_bytes);
  for (int32_t i = 0; i < num_parts(); ++i) std::memcpy(part(i, target), part(i, source), bytes);
}

void KvPool::check_block(const char* what, int32_t block) const { check_range(what, block, 0, num_blocks_ - 1); }

}  // namespace fastserve
