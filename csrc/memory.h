// Aligned memory that its owner frees, zeroed on first touch by the operating system where it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(_MSC_VER)
#include <malloc.h>
#endif

namespace fastserve {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

struct FreeAligned {
  void operator()(void* p) const {
#if defined(_MSC_VER)
    _aligned_free(p);
#else
    std::free(reinterpret_cast<void**>(p)[-1]);
#endif
  }
};

template <class T>
using AlignedArray = std::unique_ptr<T[], FreeAligned>;

// Says how the system is to back memory that nobody touched yet: by huge pages where it has them, and, where several
// NUMA nodes have memory, by all of them in turn. A hint.
void place_pages(void* begin, std::size_t bytes);

constexpr std::size_t kMinPlacedBytes = std::size_t{1} << 22;  // two huge pages: less lies in a heap with others

// `count` zeroed elements. calloc hands out fresh pages untouched, so memory that is never used costs nothing.
// Throws std::bad_alloc.
template <class T>
AlignedArray<T> allocate(std::size_t count) {
  static_assert(std::is_trivially_destructible_v<T>);
  const std::size_t bytes = count * sizeof(T);
#if defined(_MSC_VER)
  void* aligned = _aligned_malloc(bytes ? bytes : kAlignment, kAlignment);
  if (!aligned) throw std::bad_alloc();
  std::memset(aligned, 0, bytes);
#else
  void* raw = std::calloc(bytes + kAlignment + sizeof(void*), 1);
  if (!raw) throw std::bad_alloc();
  if (bytes >= kMinPlacedBytes) place_pages(raw, bytes);
  auto address = reinterpret_cast<std::uintptr_t>(raw) + sizeof(void*) + kAlignment - 1;
  void* aligned = reinterpret_cast<void*>(address / kAlignment * kAlignment);
  reinterpret_cast<void**>(aligned)[-1] = raw;
#endif
  return AlignedArray<T>(static_cast<T*>(aligned));
}

inline std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace fastserve
