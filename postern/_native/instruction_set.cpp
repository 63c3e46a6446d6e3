#include "instruction_set.h"

#include <atomic>

#include "export.h"

#if defined(_M_X64)
#include <intrin.h>
#endif

namespace postern {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(_M_X64)
bool has_bits(int leaf, int index, unsigned bits) {
    int registers[4];
    __cpuidex(registers, leaf, 0);
    return (static_cast<unsigned>(registers[index]) & bits) == bits;
}
// The system must save the registers too: bits 1-2 of XCR0 for AVX, 5-7 for AVX-512.
bool saves(unsigned long long bits) { return has_bits(1, 2, 1u << 27) && (_xgetbv(0) & bits) == bits; }
bool has_avx2() { return saves(0x6) && has_bits(1, 2, 1u << 12 | 1u << 29) && has_bits(7, 1, 1u << 5); }
bool has_avx512() {
    return has_avx2() && saves(0xE6) && has_bits(7, 1, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31);
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

InstructionSet best() {
    if (is_supported(InstructionSet::avx512)) return InstructionSet::avx512;
    if (is_supported(InstructionSet::avx2)) return InstructionSet::avx2;
    return InstructionSet::portable;
}

std::atomic<InstructionSet>& chosen() {
    static std::atomic<InstructionSet> set{best()};
    return set;
}

}  // namespace

bool is_supported(InstructionSet set) {
    switch (set) {
        case InstructionSet::portable: return true;
        case InstructionSet::avx2: return has_avx2();
        case InstructionSet::avx512: return has_avx512();
    }
    return false;
}

InstructionSet instruction_set() { return chosen().load(std::memory_order_relaxed); }

bool choose_instruction_set(InstructionSet set) {
    if (!is_supported(set)) return false;
    chosen().store(set, std::memory_order_relaxed);
    return true;
}

}  // namespace postern

POSTERN_EXPORT int postern_instruction_set() { return static_cast<int>(postern::instruction_set()); }

POSTERN_EXPORT int postern_choose_instruction_set(int set) {
    return postern::choose_instruction_set(static_cast<postern::InstructionSet>(set));
}
