// What the norms of moxe_plugin.nn.native share: the mean and deviation of the channels of a
// head, and blocks of rows.

#pragma once

#include "vector_math.h"

#include <cmath>
#include <vector>

namespace moxe {

// Rows of an expert that a thread takes at a time.
struct RowBlock {
  int64_t expert, begin, end;
};

// Blocks of up to 32 rows, whatever the number of threads. counts: rows of each expert.
inline std::vector<RowBlock> cut_rows(int64_t experts, const int64_t* counts) {
  constexpr int64_t block_rows = 32;
  std::vector<RowBlock> blocks;
  int64_t row = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t end = row + counts[expert];
    for (; row < end; row = blocks.back().end)
      blocks.push_back({expert, row, std::min(row + block_rows, end)});
  }
  return blocks;
}

// stats: the mean, and 1 / sqrt(variance + eps).
template <typename T>
void find_stats(const T* x, int64_t dim, double eps, T* stats) {
  Vec<T> sums(0);
  for_each_vector<T>(0, dim, [&](int64_t i, int64_t n) { sums = sums + load(x + i, n); });
  const T mean = sum(sums) / dim;

  // What is left of the mean is that of the differences, as sums are rounded.
  Vec<T> diffs(0), squares(0);
  double rest = 0, rest_of_squares = 0;
  for_each_vector<T>(0, dim, [&](int64_t i, int64_t n) {
    if (n == Vec<T>::size()) {
      const Vec<T> diff = Vec<T>::loadu(x + i) - Vec<T>(mean);
      diffs = diffs + diff;
      squares = at::vec::fmadd(diff, diff, squares);
    } else {
      for (int64_t j = i; j < i + n; ++j) {
        const double diff = x[j] - mean;
        rest += diff;
        rest_of_squares += diff * diff;
      }
    }
  });
  const double left = (sum(diffs) + rest) / dim;
  const double square = (sum(squares) + rest_of_squares) / dim;

  stats[0] = mean + left;
  stats[1] = 1 / std::sqrt(square - left * left + eps);
}

}  // namespace moxe
