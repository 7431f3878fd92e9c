// Sums of the rows of tokens' choices, and their gradients, for CPUs; see row_dispatch.py for
// what they compute.
//
// Threads share the tokens. A row is that of one choice, so no two threads write the same row.

#include "vector_math.h"

#include <vector>

namespace {

using moxe::for_each_vector;
using moxe::load;
using moxe::store;
using moxe::Vec;
using moxe::Wide;

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

// The row of a choice, and what to multiply it by.
template <typename T>
struct Term {
  const T* row;
  Vec<Wide<T>> weight;
};

// weights: null if all are 1.
template <typename T>
void sum_choices(const Shape& s, const Banks<T>& rows, const Wide<T>* weights,
                 const int64_t* row_of_choice, T* out, int num_threads) {
  using W = Wide<T>;

#pragma omp parallel num_threads(num_threads) if (s.tokens > 1)
  {
    std::vector<Term<T>> terms;
    terms.reserve(s.choices);

#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; ++t) {
      terms.clear();
      for (int64_t choice = t * s.choices; choice < (t + 1) * s.choices; ++choice)
        if (row_of_choice[choice] >= 0)
          terms.push_back({rows[row_of_choice[choice]],
                           Vec<W>(weights == nullptr ? W(1) : weights[choice])});

      for_each_vector<W>(0, s.dim, [&](int64_t d, int64_t n) {
        Vec<W> sum(W(0));
        for (const Term<T>& term : terms)
          sum = at::vec::fmadd(term.weight, load(term.row + d, n), sum);
        store(sum, out + t * s.dim + d, n);
      });
    }
  }
}

template <typename T>
void spread_choices(const Shape& s, const Banks<T>& rows, const Wide<T>* weights,
                    const int64_t* row_of_choice, const T* grad, T* grad_rows,
                    Wide<T>* grad_weights, int num_threads) {
  using W = Wide<T>;

#pragma omp parallel for schedule(static) num_threads(num_threads) if (s.tokens > 1)
  for (int64_t t = 0; t < s.tokens; ++t) {
    const T* from = grad + t * s.dim;

    for (int64_t choice = t * s.choices; choice < (t + 1) * s.choices; ++choice) {
      const int64_t index = row_of_choice[choice];
      grad_weights[choice] = W(0);
      if (index < 0) continue;

      const T* row = rows[index];
      T* to = grad_rows + index * s.dim;
      const Vec<W> weight(weights[choice]);
      Vec<W> dots(W(0));
      for_each_vector<W>(0, s.dim, [&](int64_t d, int64_t n) {
        const Vec<W> g = load(from + d, n);
        store(weight * g, to + d, n);
        dots = at::vec::fmadd(g, load(row + d, n), dots);
      });
      grad_weights[choice] = moxe::sum(dots);
    }
  }
}

}  // namespace

// shape: tokens, choices of each, channels. ends: the number of rows up to each bank's end.
#define MOXE_ROW_DISPATCH(T, SUFFIX)                                                      \
  extern "C" void moxe_sum_choices_##SUFFIX(                                              \
      const int64_t* shape, int num_threads, const T* const* banks, const int64_t* ends,  \
      const int64_t* row_of_choice, const Wide<T>* weights, T* out) {                     \
    sum_choices<T>({shape[0], shape[1], shape[2]}, {banks, ends, shape[2]}, weights,      \
                   row_of_choice, out, num_threads);                                      \
  }                                                                                       \
  extern "C" void moxe_spread_choices_##SUFFIX(                                           \
      const int64_t* shape, int num_threads, const T* const* banks, const int64_t* ends,  \
      const int64_t* row_of_choice, const Wide<T>* weights, const T* grad, T* grad_rows,  \
      Wide<T>* grad_weights) {                                                            \
    spread_choices<T>({shape[0], shape[1], shape[2]}, {banks, ends, shape[2]}, weights,   \
                      row_of_choice, grad, grad_rows, grad_weights, num_threads);         \
  }

MOXE_ROW_DISPATCH(float, float)
MOXE_ROW_DISPATCH(double, double)
#ifdef __AVX512BF16__
MOXE_ROW_DISPATCH(at::BFloat16, bfloat16)
#endif
