// What the machine can do at most, measured on the runtime's own threads: what kernels are held against.
#pragma once

#include <vector>

#include "kernels/kernel.h"
#include "threads.h"

namespace fastserve {

constexpr int kNumReadKinds = 5;

// Bytes per second of reading a working set over and over, one number for each ReadKind: the fastest pass of those
// that fit `seconds`, and of one at the least. Throws std::bad_alloc; std::invalid_argument where the set is no MiB.
std::vector<double> measure_read(const Kernels& kernels, ThreadPool& pool, int64_t working_set_bytes, double seconds);

// Operations per second, a multiply-add being two: of dot products of bytes, and of float32. The fastest of many
// rounds of about a millisecond.
double measure_dot_products(const Kernels& kernels, ThreadPool& pool, double seconds);
double measure_multiply_adds(const Kernels& kernels, ThreadPool& pool, double seconds);

// Puts `num_bytes` of memory out of all caches, where the processor can: whoever reads them next waits for memory.
void evict(const uint8_t* data, int64_t num_bytes);

}  // namespace fastserve
