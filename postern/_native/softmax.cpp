// Softmax over the rows of a matrix: which passes run, over which stretches, on how many threads.
#include "softmax.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "export.h"
#include "instruction_set.h"
#include "threads.h"

#ifdef POSTERN_X86
#include <xmmintrin.h>
#endif

namespace postern {
namespace {

// Codes in the C interface; `postern._native` passes the same numbers.
enum class Algorithm : int {
    two_pass = 0,
    three_pass_recompute = 1,
    three_pass_reload = 2,
    online = 3,
    blocked = 4,
};

// A row is cut into stretches of this many elements, whatever the number of threads, and their sums are added in
// order: a result never depends on how many threads computed it.
constexpr std::size_t stretch = 16384;
// Rows of fewer stretches are not worth two threads, which take some microseconds to meet between passes.
constexpr std::size_t least_stretches_to_share = 4;
// Pairs are exact while |n| is below 2^21; the margin keeps what was raised to the lowest exponent without weight.
constexpr double greatest_exponent = 2097152.0 - 2048.0;

// A row of so many bytes and its exponentials fit into the second-level cache.
constexpr std::size_t waiting_bytes = std::size_t{1} << 18;

// A block's elements are still in the first-level cache when its maximum is known.
constexpr std::size_t block = 2048;

// This thread's memory for the exponentials of a row.
void* waiting_room() {
    struct alignas(64) Line {
        unsigned char bytes[64];
    };
    thread_local std::vector<Line> room(waiting_bytes / sizeof(Line));
    return room.data();
}

// Streaming stores reach memory in any order: a thread that has made some lets them arrive before it says it is done.
void finish_streaming() {
#ifdef POSTERN_X86
    _mm_sfence();
#endif
}

struct Matrix {
    const SoftmaxKernels& kernels;
    Algorithm algorithm;
    bool is_log;
    bool streams;
    std::size_t columns;
    std::size_t element_size;

    const void* at(const void* row, std::size_t column) const {
        return static_cast<const char*>(row) + column * element_size;
    }
    void* at(void* row, std::size_t column) const { return static_cast<char*>(row) + column * element_size; }

    // body(first column, number of columns, index of the stretch).
    template <class Body>
    void for_stretches(int threads, Body&& body) const {
        const std::size_t count = num_stretches();
        parallel_for(count, threads, [&](std::size_t index) {
            const std::size_t first = index * stretch;
            body(first, std::min(stretch, columns - first), index);
        });
    }
    // The same from the end, where the previous pass has left the row in the caches.
    template <class Body>
    void for_stretches_backwards(int threads, Body&& body) const {
        const std::size_t count = num_stretches();
        parallel_for(count, threads, [&](std::size_t reversed) {
            const std::size_t first = (count - 1 - reversed) * stretch;
            body(first, std::min(stretch, columns - first));
            if (streams && threads > 1) finish_streaming();
        });
    }
    std::size_t num_stretches() const { return (columns + stretch - 1) / stretch; }
};

bool is_exact(Total total) { return std::fabs(total.exponent) <= greatest_exponent; }

Total add(const std::vector<Total>& parts) {
    Total sum{0, -std::numeric_limits<double>::infinity()};
    for (const Total& part : parts) {
        if (!(part.exponent <= greatest_exponent)) return part;
        sum.exponent = std::max(sum.exponent, part.exponent);
    }
    for (const Total& part : parts)
        sum.mantissa += std::ldexp(part.mantissa, static_cast<int>(part.exponent - sum.exponent));
    return sum;
}

double add(const std::vector<double>& parts) {
    double sum = 0;
    for (const double part : parts) sum += part;
    return sum;
}

Shifted add(const std::vector<Shifted>& parts) {
    Shifted sum{0, -std::numeric_limits<double>::infinity()};
    for (const Shifted& part : parts) sum.max = std::max(sum.max, part.max);
    for (const Shifted& part : parts) sum.sum += part.sum * std::exp(part.max - sum.max);
    return sum;
}

double greatest(const std::vector<double>& parts) { return *std::max_element(parts.begin(), parts.end()); }

// combine(pass(first column, number of columns) of each stretch, in order).
template <class Part, class Pass>
Part collect(const Matrix& matrix, int threads, Part (*combine)(const std::vector<Part>&), Pass&& pass) {
    if (matrix.columns <= stretch) return pass(std::size_t{0}, matrix.columns);
    std::vector<Part> parts(matrix.num_stretches());
    matrix.for_stretches(threads, [&](std::size_t first, std::size_t size, std::size_t index) {
        parts[index] = pass(first, size);
    });
    return combine(parts);
}

double find_maximum(const Matrix& matrix, const void* x, int threads) {
    return collect<double>(matrix, threads, greatest, [&](std::size_t first, std::size_t size) {
        return matrix.kernels.find_maximum(matrix.at(x, first), size);
    });
}

Shifted sum_shifted(const Matrix& matrix, const void* x, int threads) {
    const double max = find_maximum(matrix, x, threads);
    const double sum = collect<double>(matrix, threads, add, [&](std::size_t first, std::size_t size) {
        return matrix.kernels.sum_shifted(matrix.at(x, first), size, max);
    });
    return {sum, max};
}

void subtract(const Matrix& matrix, const void* x, void* y, double high, double low, int threads) {
    matrix.for_stretches_backwards(threads, [&](std::size_t first, std::size_t size) {
        matrix.kernels.subtract(matrix.at(x, first), matrix.at(y, first), size, high, low, matrix.streams);
    });
}

void write_shifted(const Matrix& matrix, const void* x, void* y, Shifted total, int threads) {
    if (matrix.is_log) return subtract(matrix, x, y, total.max, std::log(total.sum), threads);
    matrix.for_stretches_backwards(threads, [&](std::size_t first, std::size_t size) {
        matrix.kernels.write_shifted(matrix.at(x, first), matrix.at(y, first), size, total.max, total.sum,
                                     matrix.streams);
    });
}

void three_pass_recompute(const Matrix& matrix, const void* x, void* y, int threads) {
    write_shifted(matrix, x, y, sum_shifted(matrix, x, threads), threads);
}

void three_pass_reload(const Matrix& matrix, const void* x, void* y, int threads) {
    const double max = find_maximum(matrix, x, threads);
    const double sum = collect<double>(matrix, threads, add, [&](std::size_t first, std::size_t size) {
        return matrix.kernels.store_shifted(matrix.at(x, first), matrix.at(y, first), size, max, matrix.streams);
    });
    matrix.for_stretches_backwards(threads, [&](std::size_t first, std::size_t size) {
        matrix.kernels.divide(matrix.at(y, first), matrix.at(y, first), size, sum, false);
    });
}

// Rows for `blocked`: of 16-bit elements the kept exponentials would be rounded, and longer rows are shared by threads.
bool can_wait(const Matrix& matrix) {
    return !matrix.is_log && matrix.element_size >= sizeof(float) &&
           matrix.columns * matrix.element_size <= waiting_bytes &&
           matrix.columns < least_stretches_to_share * stretch;
}

// One sweep over the row, each exponential once: a block subtracts the greatest element so far, and is scaled to the
// greatest of all when the sum is known. Where the result bypasses the caches, the exponentials wait inside them.
void blocked(const Matrix& matrix, const void* x, void* y) {
    if (matrix.columns <= block && !matrix.streams) return three_pass_reload(matrix, x, y, 1);
    void* const kept = matrix.streams ? waiting_room() : y;
    double maxima[waiting_bytes / sizeof(float) / block + 1];
    const std::size_t count = (matrix.columns + block - 1) / block;
    double sum = 0;
    double max = -std::numeric_limits<float>::max();  // no infinity is subtracted from another
    for (std::size_t index = 0; index < count; ++index) {
        const std::size_t first = index * block, size = std::min(block, matrix.columns - first);
        const double before = max;
        max = std::max(matrix.kernels.find_maximum(matrix.at(x, first), size), max);
        maxima[index] = max;
        sum = sum * std::exp(before - max) +
              matrix.kernels.store_shifted(matrix.at(x, first), matrix.at(kept, first), size, max, false);
    }
    for (std::size_t index = count; index-- > 0;) {
        const std::size_t first = index * block, size = std::min(block, matrix.columns - first);
        matrix.kernels.divide(matrix.at(kept, first), matrix.at(y, first), size, sum * std::exp(max - maxima[index]),
                              matrix.streams);
    }
}

void online(const Matrix& matrix, const void* x, void* y, int threads) {
    const Shifted total = collect<Shifted>(matrix, threads, add, [&](std::size_t first, std::size_t size) {
        return matrix.kernels.sum_online(matrix.at(x, first), size);
    });
    // The running maximum starts at the lowest number, so a row of -inf is left to the algorithm that starts at -inf.
    if (total.sum > 0 || std::isnan(total.sum)) write_shifted(matrix, x, y, total, threads);
    else three_pass_recompute(matrix, x, y, threads);
}

void write_pairs(const Matrix& matrix, const void* x, void* y, Total total, int threads) {
    if (!is_exact(total)) return three_pass_recompute(matrix, x, y, threads);
    if (matrix.is_log) {
        // n * ln(2) in two parts, the first of which is exact: ln2_high has 32 bits and n 21.
        constexpr double ln2_high = 0x1.62e42feep-1;
        constexpr double ln2_low = 0x1.a39ef35793c76p-33;
        return subtract(matrix, x, y, total.exponent * ln2_high,
                        std::log(total.mantissa) + total.exponent * ln2_low, threads);
    }
    matrix.for_stretches_backwards(threads, [&](std::size_t first, std::size_t size) {
        matrix.kernels.write_pairs(matrix.at(x, first), matrix.at(y, first), size, total, matrix.streams);
    });
}

void two_pass(const Matrix& matrix, const void* x, void* y, int threads) {
    const Total total = collect<Total>(matrix, threads, add, [&](std::size_t first, std::size_t size) {
        return matrix.kernels.sum_pairs(matrix.at(x, first), size);
    });
    write_pairs(matrix, x, y, total, threads);
}

void softmax_row(const Matrix& matrix, const void* x, void* y, int threads) {
    switch (matrix.algorithm) {
        case Algorithm::two_pass: return two_pass(matrix, x, y, threads);
        case Algorithm::three_pass_reload:
            if (!matrix.is_log) return three_pass_reload(matrix, x, y, threads);
            [[fallthrough]];
        case Algorithm::blocked:
            if (can_wait(matrix)) return blocked(matrix, x, y);
            [[fallthrough]];
        case Algorithm::three_pass_recompute: return three_pass_recompute(matrix, x, y, threads);
        case Algorithm::online: return online(matrix, x, y, threads);
    }
}

void gradient_row(const Matrix& matrix, const void* g, const void* y, void* out, int threads) {
    const SoftmaxKernels& kernels = matrix.kernels;
    const double total = collect<double>(matrix, threads, add, [&](std::size_t first, std::size_t size) {
        return matrix.is_log ? kernels.sum(matrix.at(g, first), size)
                             : kernels.dot(matrix.at(g, first), matrix.at(y, first), size);
    });
    const auto write = matrix.is_log ? kernels.write_log_gradient : kernels.write_gradient;
    matrix.for_stretches_backwards(threads, [&](std::size_t first, std::size_t size) {
        write(matrix.at(g, first), matrix.at(y, first), matrix.at(out, first), size, total, matrix.streams);
    });
}

const SoftmaxKernels& kernels_for(Format format) {
    const int index = static_cast<int>(format);
#ifdef POSTERN_X86
    if (instruction_set() == InstructionSet::avx512) return softmax_avx512[index];
    if (instruction_set() == InstructionSet::avx2) return softmax_avx2[index];
#endif
    return softmax_portable[index];
}

// Few long rows are shared out stretch by stretch, one row after the other; else each thread takes whole rows.
// body(row, threads that the row may use).
template <class Body>
void for_rows(std::size_t rows, std::size_t columns, int threads, Body&& body) {
    const bool shares_rows =
        columns >= least_stretches_to_share * stretch && rows < 4 * static_cast<std::size_t>(threads);
    if (shares_rows) {
        for (std::size_t row = 0; row < rows; ++row) body(row, threads);
        return finish_streaming();
    }
    const std::size_t rows_at_once = std::max<std::size_t>(1, stretch / columns);
    const std::size_t count = (rows + rows_at_once - 1) / rows_at_once;
    parallel_for(count, threads, [&](std::size_t index) {
        const std::size_t end = std::min(rows, (index + 1) * rows_at_once);
        for (std::size_t row = index * rows_at_once; row < end; ++row) body(row, 1);
        finish_streaming();
    });
}

}  // namespace
}  // namespace postern

// Softmax of each row of x [rows, columns], whose rows are `stride` elements apart, into the dense y.
// Returns 0, or 1 where memory ran out.
POSTERN_EXPORT int postern_softmax(int algorithm, int is_log, int format, const void* x, void* y, std::int64_t rows,
                                   std::int64_t columns, std::int64_t stride, int threads, int streams) {
    using namespace postern;
    try {
        const Format stored = static_cast<Format>(format);
        const std::size_t size = size_of(stored);
        const Matrix matrix{kernels_for(stored), static_cast<Algorithm>(algorithm), is_log != 0, streams != 0,
                            static_cast<std::size_t>(columns), size};
        for_rows(static_cast<std::size_t>(rows), matrix.columns, threads, [&](std::size_t row, int row_threads) {
            softmax_row(matrix, matrix.at(x, row * static_cast<std::size_t>(stride)),
                        matrix.at(y, row * matrix.columns), row_threads);
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Gradient with respect to x of each row, from the gradient g with respect to y, y and all three being dense.
// Returns 0, or 1 where memory ran out.
POSTERN_EXPORT int postern_softmax_gradient(int is_log, int format, const void* g, const void* y, void* out,
                                            std::int64_t rows, std::int64_t columns, int threads, int streams) {
    using namespace postern;
    try {
        const Format stored = static_cast<Format>(format);
        const Matrix matrix{kernels_for(stored), Algorithm::two_pass, is_log != 0, streams != 0,
                            static_cast<std::size_t>(columns), size_of(stored)};
        for_rows(static_cast<std::size_t>(rows), matrix.columns, threads, [&](std::size_t row, int row_threads) {
            const std::size_t first = row * matrix.columns;
            gradient_row(matrix, matrix.at(g, first), matrix.at(y, first), matrix.at(out, first), row_threads);
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
