// Split-KV attention of single queries: chunks of the keys in parallel, then one sum a row; with the chunks' own maxima
// (synchronised) or with one constant in their place (unified, FlashDecoding++, arXiv 2311.01282), where rows that
// leave the safe range are computed again with maxima.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "decoding.h"
#include "export.h"
#include "instruction_set.h"
#include "threads.h"

namespace postern {

const DecodingKernels& decoding_kernels(Format format) {
    const int index = static_cast<int>(format);
#ifdef POSTERN_X86
    if (instruction_set() == InstructionSet::avx512) return decoding_avx512[index];
    if (instruction_set() == InstructionSet::avx2) return decoding_avx2[index];
#endif
    return decoding_portable[index];
}

namespace {

// Codes in the C interface; `postern.attention._decoding_kernels` passes the same numbers.
enum class Scheme : int { synchronised = 0, unified = 1 };

// Sizes, and strides in elements, in the order of the C interface.
struct Layout {
    std::int64_t batch, kv_heads, groups, keys, head_dim, value_dim, splits;
    std::int64_t key_batch, key_head, key_time;
    std::int64_t value_batch, value_head, value_time;
    std::int64_t mask_batch, mask_head, mask_time;
};

struct Limits {
    double phi, low, high;               // of logits; infinite where they are not looked at
    double least_total, greatest_total;  // of the denominator
};

struct Decoding {
    const DecodingKernels& kernels;
    Layout layout;
    Range range;
    Limits limits;
    std::size_t element_size;
    const float* query;
    const char* key;
    const char* value;
    const unsigned char* mask;
    float* out;
    unsigned char* recomputed;
    std::vector<float> numerators, origins;
    std::vector<double> denominators;
    std::vector<unsigned char> leaves;

    std::size_t units() const { return static_cast<std::size_t>(layout.batch * layout.kv_heads); }
    std::size_t groups() const { return static_cast<std::size_t>(layout.groups); }
    std::size_t splits() const { return static_cast<std::size_t>(layout.splits); }
    std::size_t dim() const { return static_cast<std::size_t>(layout.value_dim); }

    void allocate() {
        const std::size_t partials = units() * splits() * groups();
        numerators.resize(partials * dim());
        origins.resize(partials);
        denominators.resize(partials);
        leaves.resize(partials);
    }

    // Place of a partial result: unit, split, group.
    std::size_t at(std::size_t unit, std::size_t split, std::size_t group) const {
        return (unit * splits() + split) * groups() + group;
    }

    void attend(std::size_t unit, std::size_t split, std::size_t group, std::size_t groups_at_once, Scheme scheme) {
        const std::int64_t batch = static_cast<std::int64_t>(unit) / layout.kv_heads;
        const std::int64_t head = static_cast<std::int64_t>(unit) % layout.kv_heads;
        const std::int64_t first = layout.keys * static_cast<std::int64_t>(split) / layout.splits;
        const std::int64_t last = layout.keys * (static_cast<std::int64_t>(split) + 1) / layout.splits;
        const std::int64_t query_head = head * layout.groups + static_cast<std::int64_t>(group);
        const auto bytes = static_cast<std::int64_t>(element_size);
        const KeyChunk chunk{
            query + (batch * layout.kv_heads * layout.groups + query_head) * layout.head_dim,
            key + (batch * layout.key_batch + head * layout.key_head + first * layout.key_time) * bytes,
            value + (batch * layout.value_batch + head * layout.value_head + first * layout.value_time) * bytes,
            mask ? mask + batch * layout.mask_batch + query_head * layout.mask_head + first * layout.mask_time : nullptr,
            groups_at_once,
            static_cast<std::size_t>(last - first),
            static_cast<std::size_t>(layout.head_dim),
            dim(),
            static_cast<std::ptrdiff_t>(layout.key_time),
            static_cast<std::ptrdiff_t>(layout.value_time),
            static_cast<std::ptrdiff_t>(layout.mask_head),
            static_cast<std::ptrdiff_t>(layout.mask_time),
        };
        const std::size_t place = at(unit, split, group);
        const Partial partial{&numerators[place * dim()], &denominators[place], &origins[place], &leaves[place]};
        (scheme == Scheme::unified ? kernels.attend_unified : kernels.attend_synchronised)(chunk, range, partial);
    }

    float* row(std::size_t unit, std::size_t group) const { return out + (unit * groups() + group) * dim(); }

    // Whether the row is safe; else what it holds does not count.
    bool combine_unified(std::size_t unit, std::size_t group) const {
        double total = 0;
        float* sum = row(unit, group);
        std::fill(sum, sum + dim(), 0.0f);
        for (std::size_t split = 0; split < splits(); ++split) {
            const std::size_t place = at(unit, split, group);
            if (leaves[place]) return false;
            total += denominators[place];
            for (std::size_t d = 0; d < dim(); ++d) sum[d] += numerators[place * dim() + d];
        }
        if (!(total >= limits.least_total && total <= limits.greatest_total)) return false;
        scale_row(sum, 1 / total);
        return is_finite(sum);
    }

    void scale_row(float* sum, double factor) const {
        const float narrow = static_cast<float>(factor);
        for (std::size_t d = 0; d < dim(); ++d) sum[d] *= narrow;
    }

    // By the bits, which the compiler sees through: the exponent of infinities and NaN is all ones.
    bool is_finite(const float* sum) const {
        constexpr std::uint32_t exponent = 0x7F800000;
        std::uint32_t found = 0;
        for (std::size_t d = 0; d < dim(); ++d) {
            std::uint32_t bits;
            std::memcpy(&bits, sum + d, sizeof bits);
            found |= (bits & exponent) == exponent;
        }
        return !found;
    }

    // Whether any key had weight; a row that may attend to nothing is 0.
    bool combine_synchronised(std::size_t unit, std::size_t group) const {
        float greatest = std::numeric_limits<float>::lowest();
        for (std::size_t split = 0; split < splits(); ++split)
            greatest = std::max(greatest, origins[at(unit, split, group)]);
        double total = 0;
        float* sum = row(unit, group);
        std::fill(sum, sum + dim(), 0.0f);
        for (std::size_t split = 0; split < splits(); ++split) {
            const std::size_t place = at(unit, split, group);
            const double factor = std::exp(static_cast<double>(origins[place]) - greatest);
            total += factor * denominators[place];
            const float narrow = static_cast<float>(factor);
            for (std::size_t d = 0; d < dim(); ++d) sum[d] += narrow * numerators[place * dim() + d];
        }
        if (total == 0) return false;
        scale_row(sum, 1 / total);
        return true;
    }

    void run(Scheme scheme, int threads) {
        parallel_for(units() * splits(), threads,
                     [&](std::size_t index) { attend(index / splits(), index % splits(), 0, groups(), scheme); });
        std::vector<std::size_t> unsafe;
        for (std::size_t index = 0; index < units() * groups(); ++index) {
            const std::size_t unit = index / groups(), group = index % groups();
            recomputed[index] = 0;
            if (scheme == Scheme::synchronised) combine_synchronised(unit, group);
            else if (!combine_unified(unit, group)) unsafe.push_back(index);
        }
        if (unsafe.empty()) return;
        parallel_for(unsafe.size() * splits(), threads, [&](std::size_t index) {
            const std::size_t which = unsafe[index / splits()];
            attend(which / groups(), index % splits(), which % groups(), 1, Scheme::synchronised);
        });
        for (const std::size_t index : unsafe)
            recomputed[index] = combine_synchronised(index / groups(), index % groups());
    }
};

}  // namespace
}  // namespace postern

// Attention of one query a sequence and head. The query is dense float32 [batch, heads, head_dim] and scaled; keys and
// values have the format, and their last dimension is dense; the mask has bytes, or is null. Writes dense float32
// out [batch, heads, value_dim], and whether each row was computed again, recomputed [batch, heads].
// Returns 0, or 1 where memory ran out.
POSTERN_EXPORT int postern_decode_attention(int scheme, int format, const void* query, const void* key,
                                            const void* value, const void* mask, void* out, void* recomputed,
                                            const std::int64_t* layout, const double* limits, int threads) {
    using namespace postern;
    try {
        const Format stored = static_cast<Format>(format);
        const Layout sizes{layout[0],  layout[1],  layout[2],  layout[3],  layout[4],  layout[5],  layout[6],  layout[7],
                           layout[8],  layout[9],  layout[10], layout[11], layout[12], layout[13], layout[14], layout[15]};
        const Limits bounds{limits[0], limits[1], limits[2], limits[3], limits[4]};
        const Range range{static_cast<float>(bounds.phi), std::isfinite(bounds.low) || std::isfinite(bounds.high),
                          static_cast<float>(bounds.low), static_cast<float>(bounds.high)};
        Decoding decoding{decoding_kernels(stored),
                          sizes,
                          range,
                          bounds,
                          size_of(stored),
                          static_cast<const float*>(query),
                          static_cast<const char*>(key),
                          static_cast<const char*>(value),
                          static_cast<const unsigned char*>(mask),
                          static_cast<float*>(out),
                          static_cast<unsigned char*>(recomputed),
                          {},
                          {},
                          {},
                          {}};
        decoding.allocate();
        decoding.run(static_cast<Scheme>(scheme), threads);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
