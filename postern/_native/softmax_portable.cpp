// Softmax passes in plain C++, for processors without AVX2.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "softmax.h"

namespace postern {
namespace {
#include "simd_portable.h"
#include "simd_common.h"
#include "softmax_kernels.h"
}  // namespace

const SoftmaxKernels* const softmax_portable = kernels;

}  // namespace postern
