// What follows in a source file is compiled for AVX2, whatever the compiler's own target is, until
// "simd_target_end.h". Every standard header comes before the pragma: an inline function of the library compiled for
// AVX2 could be picked by the linker for the whole program.
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
