// Decoding in plain C++, for processors without AVX2.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "decoding.h"

namespace postern {
namespace {
#include "simd_portable.h"
#include "simd_common.h"
#include "decoding_kernels.h"
}  // namespace

const DecodingKernels* const decoding_portable = kernels;

}  // namespace postern
