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

// Sums in several parts, which do not wait for each other.
template <typename W>
struct PartSums {
  static constexpr int64_t num = 4;

  PartSums() {
    for (Vec<W>& part : parts) part = Vec<W>(W(0));
  }

  Vec<W> total() const { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }

  Vec<W> parts[num];
};

// Calls f(offset, part) for whole vectors of `dim` numbers, and returns the end of them.
template <typename W, typename F>
int64_t for_each_part(int64_t dim, const F& f) {
  constexpr int64_t size = Vec<W>::size(), num = PartSums<W>::num;
  int64_t i = 0;
  for (; i + num * size <= dim; i += num * size)
    for (int64_t p = 0; p < num; ++p) f(i + p * size, p);
  for (; i + size <= dim; i += size) f(i, 0);
  return i;
}

// stats: the mean, and 1 / sqrt(variance + eps).
template <typename T>
void find_stats(const T* x, int64_t dim, double eps, Wide<T>* stats) {
  using W = Wide<T>;

  PartSums<W> sums;
  const int64_t end = for_each_part<W>(dim, [&](int64_t i, int64_t p) {
    sums.parts[p] = sums.parts[p] + load(x + i, Vec<W>::size());
  });
  if (end < dim) sums.parts[1] = sums.parts[1] + load(x + end, dim - end);
  const W mean = sum(sums.total()) / dim;

  // What is left of the mean is that of the differences, as sums are rounded.
  PartSums<W> diffs, squares;
  for_each_part<W>(dim, [&](int64_t i, int64_t p) {
    const Vec<W> diff = load(x + i, Vec<W>::size()) - Vec<W>(mean);
    diffs.parts[p] = diffs.parts[p] + diff;
    squares.parts[p] = at::vec::fmadd(diff, diff, squares.parts[p]);
  });
  double rest = 0, rest_of_squares = 0;
  for (int64_t i = end; i < dim; ++i) {
    const double diff = static_cast<W>(x[i]) - mean;
    rest += diff;
    rest_of_squares += diff * diff;
  }
  const double left = (sum(diffs.total()) + rest) / dim;
  const double square = (sum(squares.total()) + rest_of_squares) / dim;

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
