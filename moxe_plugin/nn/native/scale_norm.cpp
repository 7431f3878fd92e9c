// Layer normalisation of rows per head, scaled by the weight of the row's expert, for CPUs; see
// scale_norm.py for what it computes.
//
// Rows are taken in blocks that lie within an expert and do not depend on the number of threads.
// The gradients of weights are summed block by block, then over the blocks in their order.

#include "norm_stats.h"

#include <vector>

namespace {

using moxe::for_each_vector;
using moxe::load;
using moxe::store;
using moxe::sum;
using moxe::Vec;
using moxe::Wide;

struct Shape {
  int64_t experts, heads, dim;  // dim: channels of a head
  const int64_t* counts;        // rows of each expert
};

// residual: rows that are added, if any.
template <typename T>
void norm_forward(const Shape& s, double eps, int num_threads, const T* x, const T* weight,
                  const T* residual, T* out, Wide<T>* stats) {
  using W = Wide<T>;
  const std::vector<moxe::RowBlock> blocks = moxe::cut_rows(s.experts, s.counts);
  const int64_t num_blocks = blocks.size(), width = s.heads * s.dim;

#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_blocks > 1)
  for (int64_t b = 0; b < num_blocks; ++b)
    for (int64_t row = blocks[b].begin; row < blocks[b].end; ++row)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t at = row * width + head * s.dim;
        const T* scale = weight + blocks[b].expert * width + head * s.dim;

        W* stat = stats + 2 * (row * s.heads + head);
        moxe::find_stats(x + at, s.dim, eps, stat);
        const Vec<W> mean(stat[0]), rstd(stat[1]);

        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          const Vec<W> normed = (load(x + at + i, n) - mean) * rstd;
          const Vec<W> scaled = normed * load(scale + i, n);
          store(residual ? scaled + load(residual + at + i, n) : scaled, out + at + i, n);
        });
      }
}

// residual: what is added to the gradient of x, if anything.
template <typename T>
void norm_backward(const Shape& s, int num_threads, const T* x, const T* weight,
                   const Wide<T>* stats, const T* grad, const T* residual, T* grad_x,
                   T* grad_weight) {
  using W = Wide<T>;
  const std::vector<moxe::RowBlock> blocks = moxe::cut_rows(s.experts, s.counts);
  const int64_t num_blocks = blocks.size(), width = s.heads * s.dim;
  std::vector<W> parts(num_blocks * width);

#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_blocks > 1)
  for (int64_t b = 0; b < num_blocks; ++b)
    for (int64_t row = blocks[b].begin; row < blocks[b].end; ++row)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t at = row * width + head * s.dim;
        const T* scale = weight + blocks[b].expert * width + head * s.dim;
        W* part = parts.data() + b * width + head * s.dim;
        const Vec<W> mean(stats[2 * (row * s.heads + head)]);
        const Vec<W> rstd(stats[2 * (row * s.heads + head) + 1]);

        // Beyond the end, gradients are 0.
        Vec<W> sums(0), products(0);
        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          const Vec<W> normed = (load(x + at + i, n) - mean) * rstd;
          const Vec<W> g = load(grad + at + i, n), scaled = g * load(scale + i, n);
          sums = sums + scaled;
          products = at::vec::fmadd(scaled, normed, products);
          store(at::vec::fmadd(g, normed, load(part + i, n)), part + i, n);
        });

        const Vec<W> first(sum(sums) / s.dim), second(sum(products) / s.dim);
        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          const Vec<W> normed = (load(x + at + i, n) - mean) * rstd;
          const Vec<W> scaled = load(grad + at + i, n) * load(scale + i, n);
          const Vec<W> of_x = (scaled - first - normed * second) * rstd;
          store(residual ? of_x + load(residual + at + i, n) : of_x, grad_x + at + i, n);
        });
      }

  moxe::sum_parts(blocks, s.experts, width, parts.data(), width, grad_weight);
}

}  // namespace

// shape: experts, heads, channels of a head. stats: mean and 1 / deviation of each head.
#define MOXE_SCALE_NORM(T, SUFFIX)                                                        \
  extern "C" void moxe_norm_forward_##SUFFIX(                                             \
      const int64_t* shape, const int64_t* counts, double eps, int num_threads,           \
      const T* x, const T* weight, const T* residual, T* out, Wide<T>* stats) {           \
    norm_forward<T>({shape[0], shape[1], shape[2], counts}, eps, num_threads, x, weight,  \
                    residual, out, stats);                                                \
  }                                                                                       \
  extern "C" void moxe_norm_backward_##SUFFIX(                                            \
      const int64_t* shape, const int64_t* counts, double, int num_threads, const T* x,   \
      const T* weight, const Wide<T>* stats, const T* grad, const T* residual, T* grad_x, \
      T* grad_weight) {                                                                   \
    norm_backward<T>({shape[0], shape[1], shape[2], counts}, num_threads, x, weight,      \
                     stats, grad, residual, grad_x, grad_weight);                         \
  }

MOXE_SCALE_NORM(float, float)
MOXE_SCALE_NORM(double, double)
#ifdef __AVX512F__
MOXE_SCALE_NORM(at::BFloat16, bfloat16)
#endif
