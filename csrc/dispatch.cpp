#include "dispatch.h"

#include <stdexcept>

#if defined(FASTSERVE_X86) && defined(_MSC_VER)
#include <intrin.h>
#elif defined(FASTSERVE_X86)
#include <cpuid.h>
#elif defined(FASTSERVE_NEONDOT) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastserve {
namespace {

struct Isa {
  const Kernels* kernels;
  bool is_runnable;
};

#if defined(FASTSERVE_X86)
struct CpuidRegisters {
  unsigned eax, ebx, ecx, edx;
};

CpuidRegisters cpuid(unsigned leaf, unsigned subleaf) {
  CpuidRegisters r{};
#if defined(_MSC_VER)
  int regs[4];
  __cpuidex(regs, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {unsigned(regs[0]), unsigned(regs[1]), unsigned(regs[2]), unsigned(regs[3])};
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Register state that the operating system saves (XCR0): bits 1-2 are SSE and AVX, 5-7 AVX-512.
unsigned long long saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

struct CpuFeatures {
  bool avx2 = false, avxvnni = false, avx512vnni = false, avx512vbmi2 = false;
};

// Bits of CPUID leaves 1 and 7: Intel SDM volume 2A, table 3-8.
CpuFeatures detect() {
  CpuFeatures found;
  const CpuidRegisters one = cpuid(1, 0);
  const bool has_xgetbv = one.ecx >> 27 & 1, has_fma = one.ecx >> 12 & 1, has_f16c = one.ecx >> 29 & 1;
  if (!has_xgetbv) return found;
  const unsigned long long state = saved_state();
  const CpuidRegisters seven = cpuid(7, 0);
  found.avx2 = (state & 0x6) == 0x6 && has_fma && has_f16c && (seven.ebx >> 5 & 1);
  const bool f = seven.ebx >> 16 & 1, dq = seven.ebx >> 17 & 1, bw = seven.ebx >> 30 & 1, vl = seven.ebx >> 31 & 1;
  const bool vnni = seven.ecx >> 11 & 1;
  found.avxvnni = found.avx2 && seven.eax >= 1 && (cpuid(7, 1).eax >> 4 & 1);
  found.avx512vnni = found.avx2 && (state & 0xe6) == 0xe6 && f && dq && bw && vl && vnni;
  found.avx512vbmi2 = found.avx512vnni && (seven.ecx >> 1 & 1) && (seven.ecx >> 6 & 1);
  return found;
}
#endif

#if defined(FASTSERVE_NEONDOT)
bool has_neon_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, Linux: Documentation/arch/arm64/elf_hwcaps.rst
  return getauxval(AT_HWCAP) & kAsimdDp;
#else
  return true;  // every 64-bit ARM that Apple sells computers with
#endif
}
#endif

// Best first.
std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
#if defined(FASTSERVE_X86)
  static const CpuFeatures cpu = detect();
  isas.push_back({avx512vbmi2_kernels(), cpu.avx512vbmi2});
  isas.push_back({avx512vnni_kernels(), cpu.avx512vnni});
#if defined(FASTSERVE_AVXVNNI)
  isas.push_back({avxvnni_kernels(), cpu.avxvnni});
#endif
  isas.push_back({avx2_kernels(), cpu.avx2});
#endif
#if defined(FASTSERVE_NEONDOT)
  isas.push_back({neondot_kernels(), has_neon_dot_product()});
#endif
  isas.push_back({portable_kernels(), true});
  return isas;
}

}  // namespace

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : compiled_isas())
    if (isa.is_runnable) names.emplace_back(isa.kernels->name);
  return names;
}

const Kernels& choose_kernels(const std::string& name) {
  std::string compiled;
  for (const Isa& isa : compiled_isas()) {
    if (name.empty() && isa.is_runnable) return *isa.kernels;
    if (name == isa.kernels->name) {
      if (!isa.is_runnable) throw std::invalid_argument("this CPU lacks the instruction set '" + name + "'");
      return *isa.kernels;
    }
    compiled += (compiled.empty() ? "" : ", ") + std::string(isa.kernels->name);
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; compiled in: " + compiled);
}

}  // namespace fastserve
