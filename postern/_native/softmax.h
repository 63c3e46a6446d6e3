// Softmax passes over one stretch of a row: one table of functions for each instruction set and storage format.
#pragma once

#include <cstddef>

#include "formats.h"

namespace postern {

// A sum of exponentials, mantissa * 2^exponent.
struct Total {
    double mantissa;
    double exponent;
};

// A sum of exponentials relative to their maximum: sum * e^max.
struct Shifted {
    double sum;
    double max;
};

struct SoftmaxKernels {
    Total (*sum_pairs)(const void* x, std::size_t size);
    void (*write_pairs)(const void* x, void* y, std::size_t size, Total total, bool streams);
    double (*find_maximum)(const void* x, std::size_t size);
    double (*sum_shifted)(const void* x, std::size_t size, double max);
    double (*store_shifted)(const void* x, void* y, std::size_t size, double max, bool streams);
    void (*write_shifted)(const void* x, void* y, std::size_t size, double max, double sum, bool streams);
    void (*divide)(const void* x, void* y, std::size_t size, double sum, bool streams);
    Shifted (*sum_online)(const void* x, std::size_t size);
    void (*subtract)(const void* x, void* y, std::size_t size, double high, double low, bool streams);
    double (*dot)(const void* g, const void* y, std::size_t size);
    void (*write_gradient)(const void* g, const void* y, void* out, std::size_t size, double inner, bool streams);
    double (*sum)(const void* g, std::size_t size);
    void (*write_log_gradient)(const void* g, const void* y, void* out, std::size_t size, double total, bool streams);
};

// Tables by Format.
#if defined(__x86_64__) || defined(_M_X64)
#define POSTERN_X86 1
extern const SoftmaxKernels* const softmax_avx512;
extern const SoftmaxKernels* const softmax_avx2;
#endif
extern const SoftmaxKernels* const softmax_portable;

}  // namespace postern
