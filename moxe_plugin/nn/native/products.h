// What callers tell of products; see products.py for what is computed.

#pragma once

#include <cstdint>

namespace moxe {

// Rows of a panel, to add seldom: up to which inner dimension a result is complete at once, or
// up to twice as many pairs of bfloat16.
constexpr int64_t kMaxDepth = 1152;

// Which half of a square matrix is all that there is of it: of the result the lower one, of the
// left factor the lower or the upper one. Beyond the diagonal, panels that it cuts are computed
// nevertheless, and left factors read, which are 0 there. Read as a number by products.py.
enum class Triangle : int64_t { kNone, kLowerResult, kLowerLeft, kUpperLeft };

// `count` products (m,k) @ (k,n); strides are in numbers. Read as 15 int64 by products.py.
struct ProductNumbers {
  int64_t count, m, n, k;
  const char* lhs;
  int64_t lhs_next, lhs_row, lhs_col;
  const char* rhs;
  int64_t rhs_next, rhs_row, rhs_col;
  char* out;
  int64_t out_next, out_row;
};
static_assert(sizeof(ProductNumbers) == 15 * sizeof(int64_t), "a product is 15 numbers");

// Bits that tell how products treat bfloat16: floats are rounded to it, and what is, is multiplied
// as floats, not as pairs. Read as numbers by products.py.
constexpr int kRounds = 1, kWidens = 2;

// moxe_multiply of products.cpp.
using Multiply = int (*)(int64_t num_products, const ProductNumbers* products,
                         const Triangle* triangles, int rounding, int halves, int adds,
                         int num_streamed, int num_threads);

}  // namespace moxe
