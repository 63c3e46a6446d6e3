// The inner loops of decoding with few queries: attention over one stretch of keys, and flat matrix products over one
// panel of weights. One table of functions for each instruction set and storage format.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace postern {

// Query heads that share one head of keys and values, and a stretch of these. Strides count elements.
struct KeyChunk {
    const float* query;  // [groups, head_dim], dense and scaled
    const void* key;     // [keys, head_dim]
    const void* value;   // [keys, value_dim]
    const unsigned char* mask;  // [groups, keys], 0 where a key may not be attended to; null where all may
    std::size_t groups, keys, head_dim, value_dim;
    std::ptrdiff_t key_stride, value_stride, mask_group_stride, mask_key_stride;
};

// What a chunk contributes to the row of each query head: sums of exp(logit - origin), with and without the values.
struct Partial {
    float* numerator;      // [groups, value_dim]
    double* denominator;   // [groups]
    float* origin;         // [groups], the greatest logit; of the synchronised form only
    unsigned char* leaves;  // [groups], whether a logit leaves the range; of the unified form only
};

// The constant that the unified form subtracts, and what it admits of logit - phi where it is asked to look.
struct Range {
    float phi;
    bool is_checked;
    float low, high;  // exclusive
};

struct DecodingKernels {
    void (*attend_synchronised)(const KeyChunk& chunk, const Range& range, const Partial& partial);
    void (*attend_unified)(const KeyChunk& chunk, const Range& range, const Partial& partial);
    // out [rows, panel] = x [inner, rows]^T * weights [inner, panel]
    void (*multiply_panel)(const float* x, const void* weights, float* out, std::size_t rows, std::size_t inner);
};

// Columns of the weights that lie side by side: `postern.attention.flat_linear` packs them so.
constexpr std::size_t panel_width = 32;
// Rows of a flat product that share one pass over the weights.
constexpr std::size_t flat_rows = 8;

// Tables by Format, without float64.
#if defined(__x86_64__) || defined(_M_X64)
#define POSTERN_X86 1
extern const DecodingKernels* const decoding_avx512;
extern const DecodingKernels* const decoding_avx2;
#endif
extern const DecodingKernels* const decoding_portable;

// Those of the instruction set that is chosen; there are none for float64.
const DecodingKernels& decoding_kernels(Format format);

}  // namespace postern
