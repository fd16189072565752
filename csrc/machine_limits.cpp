#include "machine_limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "memory.h"

#if defined(FASTSERVE_X86)
#include <emmintrin.h>
#endif

namespace fastserve {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int64_t kReadTileBytes = int64_t{1} << 18;
constexpr int64_t kMinReadBytes = int64_t{1} << 20;
constexpr int64_t kPassBytes = int64_t{1} << 26;  // a pass reads smaller sets several times

// Equal tiles in one stage. A run is timed from outside: within a job of several stages, a thread that was off its core
// sees two of them end at once.
class TiledJob : public Job {
 public:
  explicit TiledJob(int num_tiles) : num_tiles_(num_tiles) {}
  int num_stages() const override { return 1; }
  int num_tiles(int) const override { return num_tiles_; }

  double time(ThreadPool& pool) {
    const Clock::time_point start = Clock::now();
    pool.run(*this);
    return seconds_since(start);
  }

 private:
  int num_tiles_;
};

// Memory that was never written is one page of zeros, however much of it is read.
class FillJob : public TiledJob {
 public:
  FillJob(float* memory, int num_tiles) : TiledJob(num_tiles), memory_(memory) {}
  void run_tile(int, int tile, int) override {
    constexpr int64_t count = kReadTileBytes / sizeof(float);
    std::fill_n(memory_ + tile * count, count, 1.0f);
  }

 private:
  float* memory_;
};

class ReadJob : public TiledJob {
 public:
  ReadJob(const Kernels& kernels, ReadKind kind, const float* memory, int tiles_of_set, int repeats)
      : TiledJob(tiles_of_set * repeats),
        kernels_(kernels),
        kind_(kind),
        memory_(memory),
        tiles_of_set_(tiles_of_set) {}
  void run_tile(int, int tile, int) override {
    constexpr int64_t count = kReadTileBytes / sizeof(float);
    sink_ = kernels_.read_memory(kind_, memory_ + tile % tiles_of_set_ * count, count);
  }

 private:
  const Kernels& kernels_;
  ReadKind kind_;
  const float* memory_;
  int tiles_of_set_;
  std::atomic<float> sink_{0};
};

class ArithmeticJob : public TiledJob {
 public:
  ArithmeticJob(const Kernels& kernels, bool is_float, int num_threads)
      : TiledJob(num_threads * 4), kernels_(kernels), is_float_(is_float) {}
  void run_tile(int, int, int) override {
    constexpr int64_t iterations = 20000;
    alignas(64) static constexpr int8_t bytes[64] = {1, -2, 3, -4, 5, -6, 7, -8};
    alignas(64) static constexpr float floats[16] = {1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8};
    float result = 0;
    operations_ += is_float_ ? kernels_.multiply_adds(iterations, floats, &result)
                             : kernels_.dot_products(iterations, bytes, &result);
    sink_ = result;
  }
  double operations() const { return static_cast<double>(operations_.load()); }

 private:
  const Kernels& kernels_;
  bool is_float_;
  std::atomic<float> sink_{0};
  std::atomic<int64_t> operations_{0};
};

double measure_arithmetic(const Kernels& kernels, ThreadPool& pool, bool is_float, double seconds) {
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    ArithmeticJob job(kernels, is_float, pool.num_threads());
    const double time = job.time(pool);
    best = std::max(best, job.operations() / time);
  } while (seconds_since(start) < seconds);
  return best;
}

}  // namespace

std::vector<double> measure_read(const Kernels& kernels, ThreadPool& pool, int64_t working_set_bytes, double seconds) {
  if (working_set_bytes < kMinReadBytes) throw std::invalid_argument("a working set has at least 1 MiB");
  const int num_tiles = static_cast<int>(working_set_bytes / kReadTileBytes);
  const int64_t set_bytes = num_tiles * kReadTileBytes;
  const int repeats = static_cast<int>(std::max<int64_t>(1, kPassBytes / set_bytes));
  const AlignedArray<float> memory = allocate<float>(static_cast<std::size_t>(set_bytes) / sizeof(float));
  FillJob(memory.get(), num_tiles).time(pool);
  std::vector<double> best(kNumReadKinds, 0);
  const Clock::time_point start = Clock::now();
  do {
    for (std::size_t kind = 0; kind < kNumReadKinds; ++kind) {
      ReadJob job(kernels, static_cast<ReadKind>(kind), memory.get(), num_tiles, repeats);
      best[kind] = std::max(best[kind], static_cast<double>(set_bytes) * repeats / job.time(pool));
    }
  } while (seconds_since(start) < seconds);
  return best;
}

double measure_dot_products(const Kernels& kernels, ThreadPool& pool, double seconds) {
  return measure_arithmetic(kernels, pool, false, seconds);
}

double measure_multiply_adds(const Kernels& kernels, ThreadPool& pool, double seconds) {
  return measure_arithmetic(kernels, pool, true, seconds);
}

void evict(const uint8_t* data, int64_t num_bytes) {
#if defined(FASTSERVE_X86)
  for (int64_t at = 0; at < num_bytes; at += kAlignment) _mm_clflush(data + at);
  _mm_mfence();
#elif defined(__aarch64__) && defined(__GNUC__)
  for (int64_t at = 0; at < num_bytes; at += kAlignment) __asm__ volatile("dc civac, %0" ::"r"(data + at) : "memory");
  __asm__ volatile("dsb ish" ::: "memory");
#else
  (void)data, (void)num_bytes;
#endif
}

}  // namespace fastserve
