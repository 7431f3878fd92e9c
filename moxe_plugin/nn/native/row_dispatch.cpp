// Sums of the rows of tokens' choices, and their gradients, for CPUs; see row_dispatch.py for
// what they compute.
//
// Threads share the tokens. A row is that of one choice, so no two threads write the same row.

#include "vector_math.h"

namespace {

using moxe::for_each_vector;
using moxe::load;
using moxe::store;
using moxe::Vec;

struct Shape {
  int64_t tokens, choices, dim;
};

// The rows of several banks, numbered through.
template <typename T>
struct Banks {
  const T* const* banks;
  const int64_t* ends;
  int64_t dim;

  const T* operator[](int64_t row) const {
    int64_t bank = 0, begin = 0;
    for (; row >= ends[bank]; ++bank) begin = ends[bank];
    return banks[bank] + (row - begin) * dim;
  }
};

// weights: null if all are 1.
template <typename T>
void sum_choices(const Shape& s, const Banks<T>& rows, const T* weights,
                 const int64_t* row_of_choice, T* out, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (s.tokens > 1)
  for (int64_t t = 0; t < s.tokens; ++t) {
    T* to = out + t * s.dim;
    bool is_first = true;

    for (int64_t choice = t * s.choices; choice < (t + 1) * s.choices; ++choice) {
      if (row_of_choice[choice] < 0) continue;

      const T* row = rows[row_of_choice[choice]];
      const Vec<T> weight(weights == nullptr ? T(1) : weights[choice]);
      for_each_vector<T>(0, s.dim, [&](int64_t d, int64_t n) {
        const Vec<T> sum = is_first ? Vec<T>(T(0)) : load(to + d, n);
        store(at::vec::fmadd(weight, load(row + d, n), sum), to + d, n);
      });
      is_first = false;
    }

    if (is_first) std::fill_n(to, s.dim, T(0));
  }
}

template <typename T>
void spread_choices(const Shape& s, const Banks<T>& rows, const T* weights,
                    const int64_t* row_of_choice, const T* grad, T* grad_rows,
                    T* grad_weights, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (s.tokens > 1)
  for (int64_t t = 0; t < s.tokens; ++t) {
    const T* from = grad + t * s.dim;

    for (int64_t choice = t * s.choices; choice < (t + 1) * s.choices; ++choice) {
      const int64_t index = row_of_choice[choice];
      grad_weights[choice] = T(0);
      if (index < 0) continue;

      const T* row = rows[index];
      T* to = grad_rows + index * s.dim;
      const Vec<T> weight(weights[choice]);
      Vec<T> dots(T(0));
      for_each_vector<T>(0, s.dim, [&](int64_t d, int64_t n) {
        const Vec<T> g = load(from + d, n);
        store(weight * g, to + d, n);
        dots = at::vec::fmadd(g, load(row + d, n), dots);
      });
      grad_weights[choice] = moxe::sum(dots);
    }
  }
}

}  // namespace

// shape: tokens, choices of each, channels. ends: the number of rows up to each bank's end.
#define MOXE_ROW_DISPATCH(T)                                                               \
  extern "C" void moxe_sum_choices_##T(const int64_t* shape, int num_threads,              \
                                       const T* const* banks, const int64_t* ends,         \
                                       const int64_t* row_of_choice, const T* weights,     \
                                       T* out) {                                           \
    sum_choices<T>({shape[0], shape[1], shape[2]}, {banks, ends, shape[2]}, weights,       \
                   row_of_choice, out, num_threads);                                       \
  }                                                                                        \
  extern "C" void moxe_spread_choices_##T(                                                 \
      const int64_t* shape, int num_threads, const T* const* banks, const int64_t* ends,   \
      const int64_t* row_of_choice, const T* weights, const T* grad, T* grad_rows,         \
      T* grad_weights) {                                                                   \
    spread_choices<T>({shape[0], shape[1], shape[2]}, {banks, ends, shape[2]}, weights,    \
                      row_of_choice, grad, grad_rows, grad_weights, num_threads);          \
  }

MOXE_ROW_DISPATCH(float)
MOXE_ROW_DISPATCH(double)
