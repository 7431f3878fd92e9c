// Products of the rows of experts, as row_products.py computes them.

#pragma once

#include "block_calls.h"
#include "memory.h"

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace moxe {

// Weights (E,G,in,out) of experts, one for each of G groups of channels; strides in numbers.
struct Weights {
  char* at;
  int64_t num_experts, num_groups, in, out;
  int64_t next_expert, next_group, row, column;

  // Those that lie one after the other.
  static Weights dense(const void* at, int64_t num_experts, int64_t num_groups, int64_t in,
                       int64_t out) {
    return {static_cast<char*>(const_cast<void*>(at)), num_experts, num_groups, in, out,
            num_groups * in * out, in * out, out, 1};
  }

  Weights transposed() const {
    return {at, num_experts, num_groups, out, in, next_expert, next_group, column, row};
  }

  // The first or the second half of their columns.
  Weights half(int64_t which, int64_t size) const {
    Weights weights = *this;
    weights.out = out / 2;
    weights.at += which * weights.out * column * size;
    return weights;
  }

  int64_t num_rows() const { return num_experts * num_groups * in; }

  char* find_row(int64_t i, int64_t size) const {
    return at + size * (i / in / num_groups * next_expert + i / in % num_groups * next_group +
                        i % in * row);
  }
};

// Products of one type and of rows (C,…), which lie one after the other.
//
// Of a large inner dimension, several results are added, which bfloat16 would round one after
// the other: they are summed in float32, and rounded once.
class BlockProducts {
 public:
  // `max_depth`: the largest inner dimension.
  BlockProducts(const BlockCalls& calls, int64_t max_depth)
      : calls_(calls),
        size_(calls.numbers().size),
        sums_floats_(calls.is_half() && max_depth > 2 * kMaxDepth) {}

  // Rows (C,G*in) times the weights of their experts: (C,G*out).
  void add_rows(const void* rows, const Weights& weights, void* out) {
    const int64_t in = weights.num_groups * weights.in, num_rows = calls_.numbers().num_rows;
    const int64_t out_width = weights.num_groups * weights.out;
    const char* from = static_cast<const char*>(rows);
    Weights to = sums_of(Weights::dense(out, 1, 1, num_rows, out_width));
    for (int64_t e = 0; e < weights.num_experts; ++e) {
      const int64_t count = calls_.counts()[e];
      if (count == 0) continue;
      products_.push_back({weights.num_groups, count, weights.out, weights.in,  //
                           from, weights.in, in, 1,                             //
                           weights.at + e * weights.next_expert * size_, weights.next_group,
                           weights.row, weights.column,  //
                           to.at, weights.out, out_width});
      from += count * in * size_;
      to.at += count * out_width * size_of_sums();
    }
  }

  // lhs^T rhs over the rows of each expert, of (C,G*in) and (C,G*out).
  void add_columns(const void* lhs, const void* rhs, const Weights& out) {
    const int64_t in = out.num_groups * out.in, width = out.num_groups * out.out;
    const char *left = static_cast<const char*>(lhs), *right = static_cast<const char*>(rhs);
    const Weights to = sums_of(out);
    for (int64_t e = 0; e < out.num_experts; ++e) {
      const int64_t count = calls_.counts()[e];
      products_.push_back({out.num_groups, out.in, out.out, count,  //
                           left, out.in, 1, in,                     //
                           right, out.out, width, 1,                //
                           to.at + e * to.next_expert * size_of_sums(), to.next_group, to.row});
      left += count * in * size_;
      right += count * width * size_;
    }
  }

  // `adds`: to what results hold.
  void run(bool adds = false) const {
    if (adds) copy_sums<float, BFloat16>();
    calls_.multiply(products_, halves(), adds, 0);
    copy_sums<BFloat16, float>();
  }

  // Both at once, if they are summed in the same type. Results of `large` are not read soon.
  static void run(BlockProducts& large, const BlockProducts& others) {
    const int num_large = static_cast<int>(large.products_.size());
    if (large.sums_floats_ == others.sums_floats_) {
      large.products_.insert(large.products_.end(), others.products_.begin(),
                             others.products_.end());
      large.calls_.multiply(large.products_, large.halves(), false, num_large);
    } else {
      large.calls_.multiply(large.products_, large.halves(), false, num_large);
      others.calls_.multiply(others.products_, others.halves(), false, 0);
    }
    large.copy_sums<BFloat16, float>();
    others.copy_sums<BFloat16, float>();
  }

 private:
  using BFloat16 = c10::BFloat16;

  // Where results go, and where they are summed.
  struct Result {
    Weights out, sums;
    std::unique_ptr<Buffer> memory;
  };

  int halves() const { return calls_.is_half() ? (sums_floats_ ? 3 : 7) : 0; }
  int64_t size_of_sums() const { return sums_floats_ ? sizeof(float) : size_; }

  Weights sums_of(const Weights& out) {
    if (!sums_floats_) return out;
    auto memory = std::make_unique<Buffer>(out.num_rows() * out.out * sizeof(float));
    const Weights sums =
        Weights::dense(memory->bytes(), out.num_experts, out.num_groups, out.in, out.out);
    results_.push_back({out, sums, std::move(memory)});
    return sums;
  }

  // Between results and their sums, to what is of type `To`.
  template <typename To, typename From>
  void copy_sums() const {
    for (const Result& result : results_) {
      const Weights &to = sizeof(To) == 2 ? result.out : result.sums,
                    &from = sizeof(To) == 2 ? result.sums : result.out;
#pragma omp parallel for num_threads(calls_.numbers().num_threads)
      for (int64_t i = 0; i < to.num_rows(); ++i) {
        To* row = reinterpret_cast<To*>(to.find_row(i, sizeof(To)));
        const From* source = reinterpret_cast<const From*>(from.find_row(i, sizeof(From)));
        for (int64_t j = 0; j < to.out; ++j) row[j] = To(static_cast<float>(source[j]));
      }
    }
  }

  const BlockCalls& calls_;
  const int64_t size_;
  const bool sums_floats_;
  std::vector<ProductNumbers> products_;
  std::vector<Result> results_;
};

}  // namespace moxe
