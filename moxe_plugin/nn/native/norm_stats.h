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
void find_stats(const T* x, int64_t dim, double eps, Wide<T>* stats) {
  using W = Wide<T>;

  Vec<W> sums(0);
  for_each_vector<W>(0, dim, [&](int64_t i, int64_t n) { sums = sums + load(x + i, n); });
  const W mean = sum(sums) / dim;

  // What is left of the mean is that of the differences, as sums are rounded.
  Vec<W> diffs(0), squares(0);
  double rest = 0, rest_of_squares = 0;
  for_each_vector<W>(0, dim, [&](int64_t i, int64_t n) {
    if (n == Vec<W>::size()) {
      const Vec<W> diff = load(x + i, n) - Vec<W>(mean);
      diffs = diffs + diff;
      squares = at::vec::fmadd(diff, diff, squares);
    } else {
      for (int64_t j = i; j < i + n; ++j) {
        const double diff = static_cast<W>(x[j]) - mean;
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

// to: of each expert, the sum of the parts of its blocks, in their order, rounded once. Parts
// of `width` numbers lie `stride` apart.
template <typename T>
void sum_parts(const std::vector<RowBlock>& blocks, int64_t experts, int64_t width,
               const Wide<T>* parts, int64_t stride, T* to) {
  std::vector<Wide<T>> sums(width);
  auto block = blocks.begin();
  for (int64_t expert = 0; expert < experts; ++expert, to += width) {
    std::fill(sums.begin(), sums.end(), Wide<T>(0));
    for (; block != blocks.end() && block->expert == expert; ++block, parts += stride)
      for (int64_t i = 0; i < width; ++i) sums[i] += parts[i];
    std::copy(sums.begin(), sums.end(), to);
  }
}

}  // namespace moxe
