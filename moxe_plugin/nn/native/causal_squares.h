// Rows of causal squares, as causal_squares.py multiplies them.

#pragma once

#include "integers.h"

#include <algorithm>

namespace moxe {

// How many numbers of a row products read beyond the diagonal: what panels of rows cut of it.
constexpr int64_t kBeyondDiagonal = 16;

// Writes 0 where row t, of a square of `len` rows, is read beyond the diagonal.
template <typename T>
inline void clear_beyond_diagonal(T* row, int64_t t, int64_t len) {
  std::fill(row + t + 1, row + std::min(len, t + 1 + kBeyondDiagonal), T(0));
}

}  // namespace moxe
