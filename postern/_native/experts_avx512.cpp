// Banks of experts compiled for AVX-512, whatever the compiler's own target is; chosen at run time.
#include "experts.h"

#ifdef POSTERN_X86

#include "simd_target_avx512.h"

namespace postern {
namespace {
#include "simd_avx512.h"
#include "simd_common.h"
#include "activations_kernels.h"
#include "experts_kernels.h"
}  // namespace

const ExpertKernels experts_avx512 = kernels;

}  // namespace postern

#include "simd_target_end.h"

#endif
