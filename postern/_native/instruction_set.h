// Which instruction set the kernels use: the best that the processor has, unless one was chosen.
#pragma once

namespace postern {

// Codes in the C interface; `postern._native` passes the same numbers.
enum class InstructionSet : int { portable = 0, avx2 = 1, avx512 = 2 };

bool is_supported(InstructionSet set);
InstructionSet instruction_set();
// Whether it is supported, and so chosen.
bool choose_instruction_set(InstructionSet set);

}  // namespace postern
