// What follows in a source file is compiled for AVX-512, whatever the compiler's own target is, until
// "simd_target_end.h". Every standard header comes before the pragma: an inline function of the library compiled for
// AVX-512 could be picked by the linker for the whole program.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx2")
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC warns of the undefined operands inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
