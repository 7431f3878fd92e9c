// Blocks of rows of a causal square, as causal_squares.py cuts them.

#pragma once

#include "integers.h"

#include <algorithm>

namespace moxe {

// Where the block of row t ends, of a square of `len` rows in equal blocks of up to `block`.
inline int64_t end_of_block(int64_t t, int64_t len, int64_t block) {
  const int64_t size = divide_up(len, divide_up(len, block));
  return std::min(len, (t / size + 1) * size);
}

}  // namespace moxe
