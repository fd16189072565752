// Compiled once per instruction set, with that set's flags and one of
//   FASTSERVE_ISA_PORTABLE, FASTSERVE_ISA_AVX2, FASTSERVE_ISA_AVXVNNI, FASTSERVE_ISA_AVX512VNNI,
//   FASTSERVE_ISA_AVX512VBMI2, FASTSERVE_ISA_NEONDOT
// Everything lives in a namespace of the set's own, and nothing of the C++ library is included.

#include "kernel.h"

#include <math.h>
#include <string.h>

#if defined(FASTSERVE_ISA_AVX512VBMI2)
#define FASTSERVE_ISA_AVX512VNNI  // all of it but expanding
#define FASTSERVE_ISA_NAMESPACE isa_avx512vbmi2
#define FASTSERVE_ISA_TABLE avx512vbmi2_kernels
#define FASTSERVE_ISA_NAME "avx512vbmi2"
#define FASTSERVE_ISA_BASE avx512vnni_kernels
#include <immintrin.h>
#elif defined(FASTSERVE_ISA_AVX512VNNI)
#define FASTSERVE_ISA_NAMESPACE isa_avx512vnni
#define FASTSERVE_ISA_TABLE avx512vnni_kernels
#define FASTSERVE_ISA_NAME "avx512vnni"
#include <immintrin.h>
#elif defined(FASTSERVE_ISA_AVXVNNI)
#define FASTSERVE_ISA_AVX2  // all of it but the dot product
#define FASTSERVE_ISA_NAMESPACE isa_avxvnni
#define FASTSERVE_ISA_TABLE avxvnni_kernels
#define FASTSERVE_ISA_NAME "avxvnni"
#define FASTSERVE_ISA_BASE avx2_kernels
#include <immintrin.h>
#elif defined(FASTSERVE_ISA_AVX2)
#define FASTSERVE_ISA_NAMESPACE isa_avx2
#define FASTSERVE_ISA_TABLE avx2_kernels
#define FASTSERVE_ISA_NAME "avx2"
#include <immintrin.h>
#elif defined(FASTSERVE_ISA_NEONDOT)
#define FASTSERVE_ISA_NAMESPACE isa_neondot
#define FASTSERVE_ISA_TABLE neondot_kernels
#define FASTSERVE_ISA_NAME "neondot"
#include <arm_neon.h>
#else
#define FASTSERVE_ISA_NAMESPACE isa_portable
#define FASTSERVE_ISA_TABLE portable_kernels
#define FASTSERVE_ISA_NAME "portable"
#endif

namespace fastserve {
namespace FASTSERVE_ISA_NAMESPACE {

#include "vec.h"

#include "elementary.h"

#include "sparse.h"

#include "csr.h"

#include "linear.h"

#include "peak.h"

#if !defined(FASTSERVE_ISA_BASE)

#include "rowwise.h"

#include "convert.h"

#include "attention.h"

static const Kernels kTable = {
    FASTSERVE_ISA_NAME,
    embedding,
    linear,
    quantize_row,
    rms_norm,
    layer_norm,
    add,
    rope,
    store_kv,
    attention,
    merge_attention,
    activation,
    gated_activation,
    soft_cap,
    scale,
    l2_normalize,
    decode_row,
    pack_row,
    pack_blocks,
    read_memory,
    dot_products,
    multiply_adds,
};

static const Kernels* table() { return &kTable; }

#else

// The set's own instructions are of use to these alone; the rest would be the same code again.
static const Kernels* table() {
  static const Kernels derived = [] {
    Kernels kernels = *FASTSERVE_ISA_BASE();
    kernels.name = FASTSERVE_ISA_NAME;
    kernels.embedding = embedding;
    kernels.linear = linear;
    kernels.read_memory = read_memory;
    kernels.dot_products = dot_products;
    kernels.multiply_adds = multiply_adds;
    return kernels;
  }();
  return &derived;
}

#endif

}  // namespace FASTSERVE_ISA_NAMESPACE

const Kernels* FASTSERVE_ISA_TABLE() { return FASTSERVE_ISA_NAMESPACE::table(); }

}  // namespace fastserve
