// Closes what "simd_target_avx512.h" or "simd_target_avx2.h" has opened.
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
