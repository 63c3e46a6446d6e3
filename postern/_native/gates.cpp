// Gates: what is activated of one half of the columns times the other half, and the gradient of it, in one pass.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "export.h"
#include "gates.h"
#include "instruction_set.h"
#include "threads.h"

namespace postern {
namespace {

const GateKernels* gate_kernels() {
#ifdef POSTERN_X86
    if (instruction_set() == InstructionSet::avx512) return &gates_avx512;
    if (instruction_set() == InstructionSet::avx2) return &gates_avx2;
#endif
    return nullptr;
}

// Calls function(kernels, row, columns) for each row, in parallel where there are many numbers. Returns as
// the C interface.
template <class Function>
int for_rows(std::int64_t rows, std::int64_t columns, int threads, Function&& function) {
    constexpr std::size_t numbers_at_once = 8192;
    const GateKernels* kernels = gate_kernels();
    if (kernels == nullptr) return 2;
    const auto count = static_cast<std::size_t>(rows), size = static_cast<std::size_t>(columns);
    const std::size_t parts = std::clamp<std::size_t>(count * size / numbers_at_once, 1, std::max<std::size_t>(count, 1));
    try {
        parallel_for(parts, threads, [&](std::size_t part) {
            for (std::size_t row = part * count / parts; row < (part + 1) * count / parts; ++row)
                function(*kernels, row, size);
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace
}  // namespace postern

// act(gates) * values of gates and values side by side, input [rows, 2 columns] and output [rows, columns]. All
// numbers are dense float32. Returns 0, 1 where memory ran out, 2 where the chosen instructions have no vectors.
POSTERN_EXPORT int postern_gate(const float* input, float* output, std::int64_t rows, std::int64_t columns,
                                int activation, int threads) {
    using namespace postern;
    return for_rows(rows, columns, threads, [&](const GateKernels& kernels, std::size_t row, std::size_t size) {
        const float* gates = input + 2 * row * size;
        kernels.gate(gates, gates + size, output + row * size, size, static_cast<Activation>(activation));
    });
}

// The gradient of the input, from that of the output. Returns as above.
POSTERN_EXPORT int postern_gate_backward(const float* grad, const float* input, float* of_input, std::int64_t rows,
                                         std::int64_t columns, int activation, int threads) {
    using namespace postern;
    return for_rows(rows, columns, threads, [&](const GateKernels& kernels, std::size_t row, std::size_t size) {
        const float* gates = input + 2 * row * size;
        float* of_gates = of_input + 2 * row * size;
        kernels.gate_backward(grad + row * size, gates, gates + size, of_gates, of_gates + size, size,
                              static_cast<Activation>(activation));
    });
}
