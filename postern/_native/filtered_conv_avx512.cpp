// Filtered convolutions compiled for AVX-512, whatever the compiler's own target is; chosen at run time.
#include "filtered_conv.h"

#ifdef POSTERN_X86

#include "simd_target_avx512.h"

namespace postern {
namespace {
#include "simd_avx512.h"
#include "simd_common.h"
#include "filtered_conv_kernels.h"
}  // namespace

const FilteredConvKernels filtered_conv_avx512 = kernels;

}  // namespace postern

#include "simd_target_end.h"

#endif
