// What comes after a product.
#pragma once

namespace postern {

// The codes of the C interface.
enum class Activation : int { identity = 0, relu = 1, silu = 2, gelu = 3 };

}  // namespace postern
