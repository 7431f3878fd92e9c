// The ends of the blocks' branches, where a gate meets what it lets through, for CPUs; see
// gating.py for what they compute.
//
// They are bound by memory, so all that happens to a number happens in one pass. Rows are taken
// in blocks that lie within an expert and do not depend on the number of threads.

#include "norm_stats.h"

#include <vector>

namespace {

using moxe::for_each_vector;
using moxe::load;
using moxe::Silu;
using moxe::store;
using moxe::Vec;
using moxe::Wide;

struct Shape {
  int64_t experts, heads, dim;  // dim: channels of a head
  int64_t gate_stride;          // from a row of gates to the next
  const int64_t* counts;        // rows of each expert

  int64_t width() const { return heads * dim; }
};

template <typename T>
void output_forward(const Shape& s, double eps, int num_threads, const T* hidden,
                    const T* weight, const T* convolved, const T* skip, const T* gate,
                    T* out, Wide<T>* stats) {
  using W = Wide<T>;
  const std::vector<moxe::RowBlock> blocks = moxe::cut_rows(s.experts, s.counts);
  const int64_t num_blocks = blocks.size(), width = s.width();

#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_blocks > 1)
  for (int64_t b = 0; b < num_blocks; ++b)
    for (int64_t row = blocks[b].begin; row < blocks[b].end; ++row)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t channel = head * s.dim, at = row * width + channel;
        const int64_t of_expert = blocks[b].expert * width + channel;
        const T* z = gate + row * s.gate_stride + channel;
        W* stat = stats + 2 * (row * s.heads + head);

        moxe::find_stats(hidden + at, s.dim, eps, stat);
        const Vec<W> mean(stat[0]), rstd(stat[1]);

        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          const Vec<W> normed = (load(hidden + at + i, n) - mean) * rstd;
          const Vec<W> skipped =
              load(skip + of_expert + i, n) * load(convolved + at + i, n);
          const Vec<W> let = at::vec::fmadd(normed, load(weight + of_expert + i, n), skipped);
          store(let * Silu<W>(load(z + i, n)).value(), out + at + i, n);
        });
      }
}

// grads: of hidden, weight, convolved, skip and gate.
template <typename T>
void output_backward(const Shape& s, int num_threads, const T* hidden, const T* weight,
                     const T* convolved, const T* skip, const T* gate,
                     const Wide<T>* stats, const T* grad, T* grad_hidden, T* grad_weight,
                     T* grad_convolved, T* grad_skip, T* grad_gate) {
  using W = Wide<T>;
  const std::vector<moxe::RowBlock> blocks = moxe::cut_rows(s.experts, s.counts);
  const int64_t num_blocks = blocks.size(), width = s.width();
  // Of the norm's weight, then of the skip's.
  std::vector<W> parts(num_blocks * 2 * width);

#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_blocks > 1)
  for (int64_t b = 0; b < num_blocks; ++b) {
    // Gradients of a head's normalised outputs, times their scale.
    std::vector<W> scaled_of_head(s.dim);

    for (int64_t row = blocks[b].begin; row < blocks[b].end; ++row)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t channel = head * s.dim, at = row * width + channel;
        const int64_t of_expert = blocks[b].expert * width + channel;
        const T* z = gate + row * s.gate_stride + channel;
        W* of_weight = parts.data() + 2 * b * width + channel;
        W* of_skip = of_weight + width;
        const Vec<W> mean(stats[2 * (row * s.heads + head)]);
        const Vec<W> rstd(stats[2 * (row * s.heads + head) + 1]);

        // Beyond the end, gradients are 0.
        Vec<W> sums(0), products(0);
        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          const Vec<W> normed = (load(hidden + at + i, n) - mean) * rstd;
          const Vec<W> scale = load(weight + of_expert + i, n);
          const Vec<W> factor = load(skip + of_expert + i, n);
          const Vec<W> u = load(convolved + at + i, n), g = load(grad + at + i, n);
          const Silu<W> silu(load(z + i, n));

          const Vec<W> let = at::vec::fmadd(normed, scale, factor * u);
          store(g * let * silu.slope(), grad_gate + at + i, n);

          const Vec<W> of_let = g * silu.value(), scaled = of_let * scale;
          store(of_let * factor, grad_convolved + at + i, n);
          store(scaled, &scaled_of_head[i], n);
          sums = sums + scaled;
          products = at::vec::fmadd(scaled, normed, products);
          store(at::vec::fmadd(of_let, normed, load(of_weight + i, n)), of_weight + i, n);
          store(at::vec::fmadd(of_let, u, load(of_skip + i, n)), of_skip + i, n);
        });

        const Vec<W> first(moxe::sum(sums) / s.dim), second(moxe::sum(products) / s.dim);
        for_each_vector<W>(0, s.dim, [&](int64_t i, int64_t n) {
          const Vec<W> normed = (load(hidden + at + i, n) - mean) * rstd;
          const Vec<W> scaled = load(&scaled_of_head[i], n);
          store((scaled - first - normed * second) * rstd, grad_hidden + at + i, n);
        });
      }
  }

  const W* part = parts.data();
  moxe::sum_parts(blocks, s.experts, width, part, 2 * width, grad_weight);
  moxe::sum_parts(blocks, s.experts, width, part + width, 2 * width, grad_skip);
}

// joint: rows of gates, then values, `dim` each.
template <typename T>
void silu_forward(int64_t rows, int64_t dim, int num_threads, const T* joint, T* out) {
  using W = Wide<T>;

#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = joint + 2 * row * dim, *value = gate + dim;
    for_each_vector<W>(0, dim, [&](int64_t i, int64_t n) {
      store(Silu<W>(load(gate + i, n)).value() * load(value + i, n), out + row * dim + i, n);
    });
  }
}

template <typename T>
void silu_backward(int64_t rows, int64_t dim, int num_threads, const T* joint, const T* grad,
                   T* grad_joint) {
  using W = Wide<T>;

#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = joint + 2 * row * dim, *value = gate + dim;
    T *of_gate = grad_joint + 2 * row * dim, *of_value = of_gate + dim;
    for_each_vector<W>(0, dim, [&](int64_t i, int64_t n) {
      const Silu<W> silu(load(gate + i, n));
      const Vec<W> g = load(grad + row * dim + i, n);
      store(g * load(value + i, n) * silu.slope(), of_gate + i, n);
      store(g * silu.value(), of_value + i, n);
    });
  }
}

}  // namespace

// shape: experts, heads, channels of a head, stride of gates. stats: mean and 1 / deviation of
// each head.
#define MOXE_GATING(T, SUFFIX)                                                            \
  extern "C" void moxe_output_forward_##SUFFIX(                                           \
      const int64_t* shape, const int64_t* counts, double eps, int num_threads,           \
      const T* hidden, const T* weight, const T* convolved, const T* skip, const T* gate, \
      T* out, Wide<T>* stats) {                                                           \
    output_forward<T>({shape[0], shape[1], shape[2], shape[3], counts}, eps, num_threads, \
                      hidden, weight, convolved, skip, gate, out, stats);                 \
  }                                                                                       \
  extern "C" void moxe_output_backward_##SUFFIX(                                          \
      const int64_t* shape, const int64_t* counts, double, int num_threads,               \
      const T* hidden, const T* weight, const T* convolved, const T* skip, const T* gate, \
      const Wide<T>* stats, const T* grad, T* grad_hidden, T* grad_weight,                \
      T* grad_convolved, T* grad_skip, T* grad_gate) {                                    \
    output_backward<T>({shape[0], shape[1], shape[2], shape[3], counts}, num_threads,     \
                       hidden, weight, convolved, skip, gate, stats, grad, grad_hidden,   \
                       grad_weight, grad_convolved, grad_skip, grad_gate);                \
  }                                                                                       \
  extern "C" void moxe_silu_forward_##SUFFIX(int64_t rows, int64_t dim, int num_threads,  \
                                             const T* joint, T* out) {                    \
    silu_forward<T>(rows, dim, num_threads, joint, out);                                  \
  }                                                                                       \
  extern "C" void moxe_silu_backward_##SUFFIX(int64_t rows, int64_t dim, int num_threads, \
                                              const T* joint, const T* grad,              \
                                              T* grad_joint) {                            \
    silu_backward<T>(rows, dim, num_threads, joint, grad, grad_joint);                    \
  }

MOXE_GATING(float, float)
MOXE_GATING(double, double)
#ifdef __AVX512F__
MOXE_GATING(at::BFloat16, bfloat16)
#endif
