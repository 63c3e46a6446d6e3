// Gates, act(g) * v. One table for each instruction set that has vectors; elsewhere a library's products are faster.
#pragma once

#include <cstddef>

#include "activations.h"
#include "formats.h"

namespace postern {

struct GateKernels {
    // act(gates) * values.
    void (*gate)(const float* gates, const float* values, float* output, std::size_t size, Activation activation);
    // Its gradients.
    void (*gate_backward)(const float* grad, const float* gates, const float* values, float* of_gates,
                          float* of_values, std::size_t size, Activation activation);
};

#if defined(__x86_64__) || defined(_M_X64)
#define POSTERN_X86 1
extern const GateKernels gates_avx512;
extern const GateKernels gates_avx2;
#endif

}  // namespace postern
