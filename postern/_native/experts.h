// The inner loop of a bank of experts: a few rows times a panel of one expert's weights, with what comes after the
// product. One table for each instruction set that has vectors; elsewhere a library's products are faster.
#pragma once

#include <cstddef>

#include "activations.h"
#include "formats.h"

namespace postern {

// Rows lie in chunks of features, [chunks, rows of a tile, chunk_pitch]: a tile reads them through one pointer, and the
// pitch keeps its rows off each other's lines of the cache.
constexpr std::size_t chunk_features = 256;
constexpr std::size_t chunk_pitch = chunk_features + 16;

// Rows times panels of a few columns. A panel's weights are packed, [depth, vectors], or lie in place.
struct ExpertTile {
    const float* rows;                       // in chunks
    std::size_t count, depth;                // of rows, and of the features that are summed over
    const float* weights;
    const float* biases;                     // of each vector; null for none
    std::size_t vector_pitch, weight_pitch;  // from vector to vector, also of biases, and in place to the next feature
    bool is_gated;                           // the first half of the vectors, activated, times the second
    Activation activation;
    float* const* outputs;                   // [count], each row's first column
    std::size_t columns;                     // of them, at most as many as the vectors have
    // In place, within one chunk of features and of outputs:
    std::size_t panels;                      // full ones, side by side
    float* sums;                             // [panels, count, vectors], of the features before
    bool is_first, is_last;                  // nothing comes before, and nothing after
};

struct ExpertKernels {
    std::size_t width;                     // columns of a vector
    std::size_t rows_at_once, vectors_at_once;
    // Copies full panels that lie side by side, [depth, weight_pitch], to [panels, depth, vectors].
    void (*pack)(const float* weights, std::size_t vector_pitch, std::size_t weight_pitch, bool is_gated,
                 std::size_t panels, std::size_t depth, float* packed);
    void (*multiply_packed)(const ExpertTile& tile);
    void (*multiply_in_place)(const ExpertTile& tile);
};

#if defined(__x86_64__) || defined(_M_X64)
#define POSTERN_X86 1
extern const ExpertKernels experts_avx512;
extern const ExpertKernels experts_avx2;
#endif

}  // namespace postern
