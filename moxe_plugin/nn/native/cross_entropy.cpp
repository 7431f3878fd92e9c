// The cross-entropy of rows of logits, and its gradient in their place, for CPUs; see
// cross_entropy.py for what it computes.
//
// A row of a large vocabulary fits the second cache, so that memory is read once and written once.

#include "vector_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>

namespace {

using moxe::Vec;

// Numbers that are summed in their own type, before double takes over.
constexpr int64_t kBlock = 1024;

// T is what stands in memory, A what is computed in; a vector of T is `parts` of A.
template <typename T, typename A>
struct Row {
  static constexpr int parts = Vec<T>::size() / Vec<A>::size();
  static constexpr int64_t step = Vec<T>::size();

  static void load(const T* from, Vec<A>* to) {
    if constexpr (std::is_same_v<T, A>)
      to[0] = Vec<A>::loadu(from);
    else
      std::tie(to[0], to[1]) = at::vec::convert_bfloat16_float(Vec<T>::loadu(from));
  }

  static void store(T* to, const Vec<A>* from) {
    if constexpr (std::is_same_v<T, A>)
      from[0].store(to);
    else
      at::vec::convert_float_bfloat16(from[0], from[1]).store(to);
  }
};

template <typename A>
A reduce(Vec<A> x, A (*function)(A, A)) {
  A numbers[Vec<A>::size()];
  x.store(numbers);
  A result = numbers[0];
  for (int i = 1; i < Vec<A>::size(); ++i) result = function(result, numbers[i]);
  return result;
}

// NaN if one of both is.
template <typename A>
A larger(A a, A b) {
  return a > b || std::isnan(a) ? a : b;
}

template <typename A>
A add(A a, A b) {
  return a + b;
}

template <typename T, typename A>
A find_max(const T* row, int64_t size) {
  using R = Row<T, A>;
  A result = -std::numeric_limits<A>::infinity();
  Vec<A> maxima(result);

  int64_t i = 0;
  for (; i + R::step <= size; i += R::step) {
    Vec<A> x[R::parts];
    R::load(row + i, x);
    for (int p = 0; p < R::parts; ++p) maxima = at::vec::maximum(maxima, x[p]);
  }
  for (; i < size; ++i) result = larger(result, A(row[i]));

  return larger(result, reduce<A>(maxima, larger<A>));
}

// Writes exp(row - max), and returns the sum.
template <typename T, typename A>
double exponentiate(const T* row, int64_t size, A max, A* exps) {
  using R = Row<T, A>;
  double total = 0;

  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    Vec<A> sums(0);

    int64_t i = begin;
    for (; i + R::step <= end; i += R::step) {
      Vec<A> x[R::parts];
      R::load(row + i, x);
      for (int p = 0; p < R::parts; ++p) {
        x[p] = moxe::exp<A>(x[p] - Vec<A>(max));
        x[p].store(exps + i + p * Vec<A>::size());
        sums = sums + x[p];
      }
    }
    for (; i < end; ++i) {
      exps[i] = std::exp(A(row[i]) - max);
      total += exps[i];
    }

    total += reduce<A>(sums, add<A>);
  }

  return total;
}

template <typename T, typename A>
void scale(const A* exps, int64_t size, A factor, T* out) {
  using R = Row<T, A>;

  int64_t i = 0;
  for (; i + R::step <= size; i += R::step) {
    Vec<A> x[R::parts];
    for (int p = 0; p < R::parts; ++p)
      x[p] = Vec<A>::loadu(exps + i + p * Vec<A>::size()) * Vec<A>(factor);
    R::store(out + i, x);
  }
  for (; i < size; ++i) out[i] = T(exps[i] * factor);
}

template <typename T, typename A>
void run(const int64_t* shape, int num_threads, T* logits, const int64_t* targets,
         const A* weights, A* losses) {
  const int64_t num_rows = shape[0], size = shape[1], next_row = shape[2];
  const bool wants_grad = shape[3] != 0;

#pragma omp parallel num_threads(num_threads) if (num_rows > 1)
  {
    const std::unique_ptr<A[]> exps(new A[size]);

#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) {
      T* row = logits + r * next_row;
      const int64_t target = targets[r];
      const A max = find_max<T, A>(row, size);
      const A of_target = A(row[target]) - max;
      const double total = exponentiate<T, A>(row, size, max, exps.get());
      losses[r] = A(std::log(total)) - of_target;

      if (!wants_grad) continue;

      // Softmax minus one-hot, weighed.
      const A factor = A(weights[r] / total);
      scale<T, A>(exps.get(), size, factor, row);
      row[target] = T(exps[target] * factor - weights[r]);
    }
  }
}

}  // namespace

#define MOXE_CROSS_ENTROPY(name, T, A)                                                    \
  extern "C" void moxe_cross_entropy_##name(const int64_t* shape, int num_threads,        \
                                            T* logits, const int64_t* targets,            \
                                            const A* weights, A* losses) {                \
    run<T, A>(shape, num_threads, logits, targets, weights, losses);                      \
  }

MOXE_CROSS_ENTROPY(float, float, float)
MOXE_CROSS_ENTROPY(double, double, double)
MOXE_CROSS_ENTROPY(bfloat16, at::BFloat16, float)
