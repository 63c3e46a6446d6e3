// The inner loop of convolutions of which each input runs chosen filters on chosen channels. One table for each
// instruction set that has vectors; plain C++ would be slower than a library's convolution of everything.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace postern {

// What becomes of a sum: shift and residual are added, and the activation clamps.
struct Finish {
    const float* residual;  // of the output's shape; null for none
    float low, high;
};

// A few filters at a few vectors of outputs. A place is an index into a plane, a channel of the input laid out so that
// what one tap of the filter sees of neighbouring outputs lies side by side.
struct FilterTile {
    const float* const* weights;     // of each filter: [all channels, taps]
    const float* shifts;             // likewise
    const std::size_t* offsets;      // of each filter's outputs, and residuals
    const std::uint32_t* channels;   // those that are on, as the weights number them
    const float* planes;             // of the channels that are on: [channel_count, plane_size]
    std::size_t filters, vectors, channel_count, taps, plane_size;
    const std::size_t* tap_offsets;  // [taps], from an output's place to what the tap sees
    const std::size_t* places;       // [vectors], of each vector's first output
    const std::size_t* pixels;       // likewise, in the output; `scattered` where not all lie side by side
    Finish finish;
    float* output;
    float* sums;                     // [filters, vectors, width], of the vectors that are scattered
};
constexpr std::size_t scattered = ~std::size_t{0};

struct FilteredConvKernels {
    std::size_t width;                             // outputs of a vector
    std::size_t filters_at_once, vectors_at_once;  // the most of a tile
    void (*multiply)(const FilterTile& tile);
    // Sums of one filter at outputs that lie side by side, from an offset on.
    void (*write)(const float* sums, float shift, const Finish& finish, float* output, std::size_t offset,
                  std::size_t count);
};

#if defined(__x86_64__) || defined(_M_X64)
#define POSTERN_X86 1
extern const FilteredConvKernels filtered_conv_avx512;
extern const FilteredConvKernels filtered_conv_avx2;
#endif

}  // namespace postern
