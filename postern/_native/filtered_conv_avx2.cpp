// Filtered convolutions compiled for AVX2, whatever the compiler's own target is; chosen at run time.
#include "filtered_conv.h"

#ifdef POSTERN_X86

// Every standard header comes before the pragma: an inline function of the library compiled for AVX2 could be picked by
// the linker for the whole program.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace postern {
namespace {
#include "simd_avx2.h"
#include "simd_common.h"
#include "filtered_conv_kernels.h"
}  // namespace

const FilteredConvKernels filtered_conv_avx2 = kernels;

}  // namespace postern

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
