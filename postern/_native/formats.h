// Storage formats of tensor elements, and their conversion to float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace postern {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

// Codes of the formats in the C interface; `postern._native` passes the same numbers.
enum class Format : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

inline std::size_t size_of(Format format) {
    switch (format) {
        case Format::float64: return 8;
        case Format::float32: return 4;
        default: return 2;
    }
}

}  // namespace postern
