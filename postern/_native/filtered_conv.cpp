// A convolution of which each input runs the filters that are on, on the channels that are on (the inference of Fire
// Together Wire Together, arXiv 2110.08232): its time follows the multiply-adds that are left.
//
// The channels that are on are copied into planes, padded and, for strides, split by phase, so that what one tap of a
// filter sees of neighbouring outputs lies side by side. Then a few filters at a time are summed at a few vectors of
// outputs.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "export.h"
#include "filtered_conv.h"
#include "instruction_set.h"
#include "threads.h"

namespace postern {
namespace {

const FilteredConvKernels* filtered_conv_kernels() {
#ifdef POSTERN_X86
    if (instruction_set() == InstructionSet::avx512) return &filtered_conv_avx512;
    if (instruction_set() == InstructionSet::avx2) return &filtered_conv_avx2;
#endif
    return nullptr;
}

// In the order of the C interface.
struct Sizes {
    std::int64_t batch, channels, height, width, filters, rows, columns;
    std::int64_t kernel_height, kernel_width, stride_down, stride_across, padding_down, padding_across;
    std::int64_t dilation_down, dilation_across, is_depthwise;
};

struct Operands {
    const float* input;                // [batch, channels, height, width]
    const unsigned char* channels_on;  // [batch, channels]; null where all are on
    const unsigned char* filters_on;   // [batch, filters]
    const float* weight;               // [filters, channels, kernel height, kernel width], depth-wise with one channel
    const float* shift;                // [filters]
    float* output;                     // [batch, filters, rows, columns]; filters that are off are 0
    Finish finish;
};

// Neighbouring outputs that are summed together.
struct Stretch {
    std::size_t place;        // of the first, in a plane
    std::size_t row, column;  // likewise, among the outputs
    std::size_t count;        // of places, outputs or not: columns beyond the last belong to no output
};

std::size_t divided_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// Where things lie in a plane: the same for all inputs.
class Geometry {
public:
    std::size_t phases, plane_rows, pitch, taps;
    std::vector<std::size_t> phase_rows, phase_columns;  // [phases], of the input, before padding
    std::vector<std::size_t> tap_offsets;
    std::vector<Stretch> stretches;

    Geometry(const Sizes& sizes, std::size_t width) : sizes_(sizes), width_(width) {
        const auto rows = static_cast<std::size_t>(sizes.rows), columns = static_cast<std::size_t>(sizes.columns);
        const auto down = static_cast<std::size_t>(sizes.stride_down);
        const auto across = static_cast<std::size_t>(sizes.stride_across);
        const auto reach_down = static_cast<std::size_t>((sizes.kernel_height - 1) * sizes.dilation_down);
        const auto reach_across = static_cast<std::size_t>((sizes.kernel_width - 1) * sizes.dilation_across);
        plane_rows = rows + reach_down / down;
        pitch = columns + reach_across / across;
        taps = static_cast<std::size_t>(sizes.kernel_height * sizes.kernel_width);
        for (std::size_t i = 0; i < static_cast<std::size_t>(sizes.kernel_height); ++i)
            for (std::size_t j = 0; j < static_cast<std::size_t>(sizes.kernel_width); ++j) {
                const std::size_t row = i * static_cast<std::size_t>(sizes.dilation_down);
                const std::size_t column = j * static_cast<std::size_t>(sizes.dilation_across);
                const std::size_t phase = phase_of(row % down, column % across);
                tap_offsets.push_back((phase * plane_rows + row / down) * pitch + column / across);
            }
        phases = phase_rows.size();
        // Whole planes in a row, the columns between the rows of outputs among them, or each row by itself: whichever
        // takes fewer vectors.
        const std::size_t in_a_row = (rows - 1) * pitch + columns;
        if (divided_up(in_a_row, width) < rows * divided_up(columns, width)) {
            for (std::size_t place = 0; place < in_a_row; place += width)
                stretches.push_back({place, place / pitch, place % pitch, std::min(width, in_a_row - place)});
        } else {
            for (std::size_t row = 0; row < rows; ++row)
                for (std::size_t column = 0; column < columns; column += width)
                    stretches.push_back({row * pitch + column, row, column, std::min(width, columns - column)});
        }
    }

    // Where a stretch begins in the output, if it fills a vector and all of it lies side by side there.
    std::size_t pixel_of(const Stretch& stretch) const {
        const auto columns = static_cast<std::size_t>(sizes_.columns);
        const bool is_one_run = pitch == columns || stretch.column + stretch.count <= columns;
        return is_one_run && stretch.count == width_ ? stretch.row * columns + stretch.column : scattered;
    }

    std::size_t plane_size() const { return phases * plane_rows * pitch; }

    // One channel of the input, padded, phase by phase.
    void lay_out(const float* channel, float* plane) const {
        const std::int64_t width = sizes_.width, across = sizes_.stride_across;
        for (std::size_t phase = 0; phase < phases; ++phase) {
            const std::int64_t left = static_cast<std::int64_t>(phase_columns[phase]) - sizes_.padding_across;
            // columns [begin, end) see the input: 0 <= left + column * across < width
            const std::int64_t limit = static_cast<std::int64_t>(pitch);
            const std::int64_t begin = std::min(limit, left < 0 ? (-left + across - 1) / across : 0);
            const std::int64_t end = std::max(
                begin, std::min(limit, left < width ? (width - left + across - 1) / across : std::int64_t{0}));
            for (std::size_t row = 0; row < plane_rows; ++row, plane += pitch) {
                const std::int64_t from = static_cast<std::int64_t>(phase_rows[phase]) - sizes_.padding_down +
                                          static_cast<std::int64_t>(row) * sizes_.stride_down;
                if (from < 0 || from >= sizes_.height) {
                    std::fill(plane, plane + pitch, 0.0f);
                    continue;
                }
                const float* source = channel + from * width + left;
                std::fill(plane, plane + begin, 0.0f);
                if (across == 1) {
                    std::copy(source + begin, source + end, plane + begin);
                } else {
                    for (std::int64_t column = begin; column < end; ++column) plane[column] = source[column * across];
                }
                std::fill(plane + end, plane + pitch, 0.0f);
            }
        }
    }

private:
    std::size_t phase_of(std::size_t row, std::size_t column) {
        for (std::size_t phase = 0; phase < phase_rows.size(); ++phase)
            if (phase_rows[phase] == row && phase_columns[phase] == column) return phase;
        phase_rows.push_back(row);
        phase_columns.push_back(column);
        return phase_rows.size() - 1;
    }

    const Sizes sizes_;
    const std::size_t width_;
};

class FilteredConv {
public:
    FilteredConv(const FilteredConvKernels& kernels, const Sizes& sizes, const Operands& operands)
        : kernels_(kernels), sizes_(sizes), operands_(operands), geometry_(sizes, kernels.width) {}

    // Returns how many pairs of a filter and a channel have run, of all inputs.
    std::int64_t run(int threads) const {
        const auto batch = static_cast<std::size_t>(sizes_.batch);
        std::vector<std::int64_t> pairs(batch);
        if (batch >= 2 * static_cast<std::size_t>(std::max(threads, 1))) {
            parallel_for(batch, threads, [&](std::size_t n) { pairs[n] = run_one(n, 1); });
        } else {
            for (std::size_t n = 0; n < batch; ++n) pairs[n] = run_one(n, threads);
        }
        std::int64_t total = 0;
        for (const std::int64_t each : pairs) total += each;
        return total;
    }

private:
    static std::vector<std::uint32_t> list(const unsigned char* on, std::int64_t count) {
        std::vector<std::uint32_t> found;
        for (std::int64_t k = 0; k < count; ++k)
            if (on == nullptr || on[k]) found.push_back(static_cast<std::uint32_t>(k));
        return found;
    }

    // A tile is a few of the parts into which `count` things are divided as evenly as can be.
    static std::size_t bound(std::size_t part, std::size_t parts, std::size_t count) { return part * count / parts; }

    std::int64_t run_one(std::size_t n, int threads) const {
        const auto size = static_cast<std::size_t>(sizes_.channels), out = static_cast<std::size_t>(sizes_.filters);
        const unsigned char* filters_on = operands_.filters_on + n * out;
        const unsigned char* channels_on = operands_.channels_on ? operands_.channels_on + n * size : nullptr;
        const std::vector<std::uint32_t> filters = list(filters_on, sizes_.filters);
        std::vector<std::uint32_t> channels;
        if (!sizes_.is_depthwise) {
            channels = list(channels_on, sizes_.channels);
        } else {  // of a filter that is on, where that is on
            for (const std::uint32_t f : filters)
                if (channels_on == nullptr || channels_on[f]) channels.push_back(f);
        }

        const std::size_t plane_size = geometry_.plane_size();
        const std::size_t laid_out = channels.size() * plane_size;
        const std::unique_ptr<float[]> planes(new float[laid_out + kernels_.width]);
        std::fill(planes.get() + laid_out, planes.get() + laid_out + kernels_.width, 0.0f);
        const std::size_t pixels = static_cast<std::size_t>(sizes_.height * sizes_.width);
        const float* input = operands_.input + n * size * pixels;
        parallel_for(channels.size(), threads, [&](std::size_t k) {
            geometry_.lay_out(input + channels[k] * pixels, planes.get() + k * plane_size);
        });

        for (std::size_t f = 0; f < out; ++f)
            if (!filters_on[f]) std::fill(output_of(n, f), output_of(n, f + 1), 0.0f);
        if (sizes_.is_depthwise) {
            run_depthwise(n, filters, channels, planes.get(), threads);
            return static_cast<std::int64_t>(channels.size());
        }
        const std::size_t blocks = divided_up(filters.size(), kernels_.filters_at_once);
        const std::size_t tiles = divided_up(geometry_.stretches.size(), kernels_.vectors_at_once);
        // Either what a tile sees of the input stays in the cache, and weights stream past it, or a block's weights do
        // and the input streams: whichever reads less from memory.
        const std::size_t weights = filters.size() * channels.size() * geometry_.taps;
        const bool tiles_stay = tiles * weights + laid_out < blocks * laid_out + weights;
        parallel_for(blocks * tiles, threads, [&](std::size_t index) {
            const std::size_t block = tiles_stay ? index % blocks : index / tiles;
            const std::size_t tile = tiles_stay ? index / blocks : index % tiles;
            const std::size_t first = bound(block, blocks, filters.size());
            const std::size_t last = bound(block + 1, blocks, filters.size());
            run_tile(n, filters.data() + first, last - first, channels.data(), channels.size(), planes.get(), tile,
                     tiles);
        });
        return static_cast<std::int64_t>(filters.size() * channels.size());
    }

    void run_depthwise(std::size_t n, const std::vector<std::uint32_t>& filters,
                       const std::vector<std::uint32_t>& channels, const float* planes, int threads) const {
        const std::size_t tiles = divided_up(geometry_.stretches.size(), kernels_.vectors_at_once);
        static constexpr std::uint32_t only = 0;
        parallel_for(filters.size(), threads, [&](std::size_t index) {
            const std::uint32_t* filter = &filters[index];
            const auto found = std::lower_bound(channels.begin(), channels.end(), *filter);
            const bool is_on = found != channels.end() && *found == *filter;
            const float* plane = planes + static_cast<std::size_t>(found - channels.begin()) * geometry_.plane_size();
            for (std::size_t tile = 0; tile < tiles; ++tile) run_tile(n, filter, 1, &only, is_on, plane, tile, tiles);
        });
    }

    void run_tile(std::size_t n, const std::uint32_t* filters, std::size_t count, const std::uint32_t* channels,
                  std::size_t channel_count, const float* planes, std::size_t tile, std::size_t tiles) const {
        const std::size_t first = bound(tile, tiles, geometry_.stretches.size());
        const std::size_t vectors = bound(tile + 1, tiles, geometry_.stretches.size()) - first;
        const std::size_t inputs = sizes_.is_depthwise ? 1 : static_cast<std::size_t>(sizes_.channels);
        const float* weights[most_filters];
        float shifts[most_filters];
        std::size_t offsets[most_filters], places[most_vectors], pixels[most_vectors];
        float sums[most_filters * most_vectors * most_width];
        for (std::size_t f = 0; f < count; ++f) {
            weights[f] = operands_.weight + filters[f] * inputs * geometry_.taps;
            shifts[f] = operands_.shift[filters[f]];
            offsets[f] = static_cast<std::size_t>(output_of(n, filters[f]) - operands_.output);
        }
        for (std::size_t v = 0; v < vectors; ++v) {
            places[v] = geometry_.stretches[first + v].place;
            pixels[v] = geometry_.pixel_of(geometry_.stretches[first + v]);
        }
        kernels_.multiply({weights, shifts, offsets, channels, planes, count, vectors, channel_count, geometry_.taps,
                           geometry_.plane_size(), geometry_.tap_offsets.data(), places, pixels, operands_.finish,
                           operands_.output, sums});
        for (std::size_t v = 0; v < vectors; ++v) {
            if (pixels[v] != scattered) continue;
            for (std::size_t f = 0; f < count; ++f)
                write(shifts[f], offsets[f], geometry_.stretches[first + v], sums + (f * vectors + v) * kernels_.width);
        }
    }

    // Row by row, without what belongs to no output.
    void write(float shift, std::size_t offset, const Stretch& stretch, const float* sums) const {
        const auto columns = static_cast<std::size_t>(sizes_.columns);
        std::size_t row = stretch.row, column = stretch.column;
        for (std::size_t k = 0; k < stretch.count; k += geometry_.pitch - column, column = 0, ++row) {
            if (column >= columns) continue;
            kernels_.write(sums + k, shift, operands_.finish, operands_.output, offset + row * columns + column,
                           std::min(columns - column, stretch.count - k));
        }
    }

    float* output_of(std::size_t n, std::size_t filter) const {
        const auto pixels = static_cast<std::size_t>(sizes_.rows * sizes_.columns);
        return operands_.output + (n * static_cast<std::size_t>(sizes_.filters) + filter) * pixels;
    }

    // Of any instruction set.
    static constexpr std::size_t most_filters = 6, most_vectors = 4, most_width = 16;

    const FilteredConvKernels& kernels_;
    const Sizes sizes_;
    const Operands operands_;
    const Geometry geometry_;
};

}  // namespace
}  // namespace postern

// Writes the output [batch, filters, rows, columns]: for filters that are on the convolution over the channels that are
// on, plus shift and residual, clamped to [low, high]; else 0. All arrays are dense float32, masks are bytes; the sizes
// are those of `Sizes`, with an output of at least one pixel. Returns how many pairs of a filter and a channel have
// run, -1 where memory ran out, -2 where the chosen instructions have no vectors.
POSTERN_EXPORT std::int64_t postern_filtered_conv(const float* input, const unsigned char* channels_on,
                                                  const unsigned char* filters_on, const float* weight,
                                                  const float* shift, const float* residual, float* output,
                                                  const std::int64_t* sizes, float low, float high, int threads) {
    using namespace postern;
    const FilteredConvKernels* kernels = filtered_conv_kernels();
    if (kernels == nullptr) return -2;
    try {
        Sizes own;
        std::memcpy(&own, sizes, sizeof own);
        const Operands operands{input, channels_on, filters_on, weight, shift, output, {residual, low, high}};
        return FilteredConv(*kernels, own, operands).run(threads);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}
