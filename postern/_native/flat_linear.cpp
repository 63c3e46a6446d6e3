// Matrix products with a few rows: the weights lie in panels, so that they stream from memory once for up to eight
// rows, whose sums stay in registers (the flat products of FlashDecoding++, arXiv 2311.01282, on a processor).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "decoding.h"
#include "export.h"
#include "threads.h"

// out [rows, columns] = x [rows, inner] * W^T + bias, all dense float32 but W, which has the format and is packed as
// [ceil(columns / 32), inner, 32], filled up with zeros. The bias may be null. Returns 0, or 1 where memory ran out.
POSTERN_EXPORT int postern_flat_linear(int format, const void* x, const void* packed, const void* bias, void* out,
                                       std::int64_t rows, std::int64_t columns, std::int64_t inner, int threads) {
    using namespace postern;
    try {
        const Format stored = static_cast<Format>(format);
        const DecodingKernels& kernels = decoding_kernels(stored);
        const auto height = static_cast<std::size_t>(rows), width = static_cast<std::size_t>(columns);
        const auto depth = static_cast<std::size_t>(inner);
        const float* input = static_cast<const float*>(x);
        const float* offsets = static_cast<const float*>(bias);
        float* output = static_cast<float*>(out);
        // Rows of a block side by side: in place, rows of 4 KiB and more would fall on the same lines of the cache.
        std::vector<float> turned(height * depth);
        for (std::size_t first = 0; first < height; first += flat_rows) {
            const std::size_t count = std::min(flat_rows, height - first);
            float* block = turned.data() + first * depth;
            for (std::size_t row = 0; row < count; ++row)
                for (std::size_t k = 0; k < depth; ++k) block[k * count + row] = input[(first + row) * depth + k];
        }
        const std::size_t panels = (width + panel_width - 1) / panel_width;
        parallel_for(panels, threads, [&](std::size_t panel) {
            const char* weights = static_cast<const char*>(packed) + panel * depth * panel_width * size_of(stored);
            const std::size_t column = panel * panel_width;
            const std::size_t columns_here = std::min(panel_width, width - column);
            float sums[flat_rows * panel_width];
            for (std::size_t first = 0; first < height; first += flat_rows) {
                const std::size_t count = std::min(flat_rows, height - first);
                kernels.multiply_panel(turned.data() + first * depth, weights, sums, count, depth);
                for (std::size_t row = 0; row < count; ++row) {
                    float* target = output + (first + row) * width + column;
                    for (std::size_t n = 0; n < columns_here; ++n)
                        target[n] = sums[row * panel_width + n] + (offsets ? offsets[column + n] : 0.0f);
                }
            }
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
