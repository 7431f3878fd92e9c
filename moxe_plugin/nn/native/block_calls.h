// What whole blocks in C++ call: functions of other files, which are libraries of their own.

#pragma once

#include "products.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace moxe {

// Addresses, in the order of block_calls.py. Tensors are of what the block is in, but for those
// of `float`.
struct BlockFunctions {
  Multiply multiply;
  void (*norm_forward)(const int64_t* shape, const int64_t* counts, double eps, int num_threads,
                       const void* x, const void* weight, const void* residual, void* out,
                       float* stats);
  void (*norm_backward)(const int64_t* shape, const int64_t* counts, double eps, int num_threads,
                        const void* x, const void* weight, const float* stats, const void* grad,
                        const void* residual, void* grad_x, void* grad_weight);
  void (*conv_forward)(const int64_t* shape, int num_threads, const int64_t* lens, const void* x,
                       const void* windows, const void* weight, const void* bias, void* out);
  void (*conv_backward)(const int64_t* shape, int num_threads, const int64_t* lens, const void* x,
                        const void* windows, const void* weight, const void* bias,
                        const void* grad, void* grad_x, void* grad_windows, void* grad_weight,
                        void* grad_bias);
};

// Numbers of a block and its rows, in the order of block_calls.py.
struct BlockNumbers {
  int64_t size;      // bytes of a number of the block,
  int64_t rounding;  // how products treat bfloat16, see products.h
  int64_t num_threads;
  int64_t num_experts, num_rows;
  int64_t num_runs;  // of rows of an expert that are convolved together
  int64_t num_taps;
  int64_t model_dim, inner_dim, num_heads;
};

// The passes of a block over its rows (C,M).
class BlockCalls {
 public:
  BlockCalls(const BlockFunctions& functions, const BlockNumbers& numbers, const int64_t* counts,
             const int64_t* run_lens, double eps)
      : shared_(functions), n_(numbers), counts_(counts), run_lens_(run_lens), eps_(eps) {}

  const BlockNumbers& numbers() const { return n_; }
  const int64_t* counts() const { return counts_; }
  bool is_half() const { return n_.size == 2; }
  int64_t max_count() const {
    return n_.num_experts > 0 ? *std::max_element(counts_, counts_ + n_.num_experts) : 0;
  }

  // See moxe_multiply.
  void multiply(const std::vector<ProductNumbers>& products, int halves, bool adds,
                int num_streamed) const {
    if (shared_.multiply(products.size(), products.data(), nullptr, static_cast<int>(n_.rounding),
                         halves, adds, num_streamed, threads()) != 0)
      throw std::bad_alloc();
  }

  void norm(const void* x, const void* weight, int64_t dim, int64_t num_heads,
            const void* residual, void* out, float* stats) const {
    const int64_t shape[] = {n_.num_experts, num_heads, dim / num_heads};
    shared_.norm_forward(shape, counts_, eps_, threads(), x, weight, residual, out, stats);
  }

  void norm_backward(const void* x, const void* weight, const float* stats, int64_t dim,
                     int64_t num_heads, const void* grad, const void* residual, void* grad_x,
                     void* grad_weight) const {
    const int64_t shape[] = {n_.num_experts, num_heads, dim / num_heads};
    shared_.norm_backward(shape, counts_, eps_, threads(), x, weight, stats, grad, residual,
                          grad_x, grad_weight);
  }

  // Rows (C,M), to which products are added.
  void copy_rows(const void* from, void* to) const {
    const int64_t width = n_.model_dim * n_.size;
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
#pragma omp parallel for num_threads(n_.num_threads)
    for (int64_t i = 0; i < n_.num_rows; ++i)
      std::memcpy(target + i * width, source + i * width, width);
  }

  // Rows (C,dim), each sequence from zeros, and silu.
  void convolve(const void* x, int64_t dim, const void* weight, const void* bias,
                void* out) const {
    const int64_t shape[] = {n_.num_experts, n_.num_runs, n_.num_taps, dim, 1, dim};
    shared_.conv_forward(shape, threads(), run_lens_, x, nullptr, weight, bias, out);
  }

  // The gradient of `x` is added to `grad_x`.
  void convolve_backward(const void* x, int64_t dim, const void* weight, const void* bias,
                         const void* grad, void* grad_x, void* grad_weight,
                         void* grad_bias) const {
    const int64_t shape[] = {n_.num_experts, n_.num_runs, n_.num_taps, dim, 1, dim, dim, 1};
    shared_.conv_backward(shape, threads(), run_lens_, x, nullptr, weight, bias, grad, grad_x,
                          nullptr, grad_weight, grad_bias);
  }

 protected:
  int threads() const { return static_cast<int>(n_.num_threads); }
  // Of rows (C,width).
  int64_t num_bytes(int64_t width) const { return n_.num_rows * width * n_.size; }

  const BlockFunctions& shared_;
  const BlockNumbers& n_;
  const int64_t* counts_;
  const int64_t* run_lens_;
  double eps_;
};

}  // namespace moxe
