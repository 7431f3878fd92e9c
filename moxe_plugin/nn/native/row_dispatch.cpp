// The rows of tokens' choices, their sums, and the gradients of these, for CPUs; see
// row_dispatch.py for what they compute.
//
// Threads share the tokens. A row is that of one choice, so no two threads write the same row.

#include "vector_math.h"

#include <algorithm>
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

// Gives a row to each choice, by expert, sequence and time. shape: sequences, tokens of each,
// choices of each, banks. indices: no row for those that are not of an expert. mask: of tokens;
// null if all are sent. lens: the rows of each expert's part of each sequence. Slots and segments
// are those of a bank, whose slots are as many for each segment.
extern "C" void moxe_plan_rows(const int64_t* shape, const int64_t* bank_sizes,
                               const int64_t* indices, const bool* mask, int64_t* lens,
                               int64_t* row_of_choice, int64_t* token_of_row,
                               int64_t* slot_of_row, int64_t* segment_of_row,
                               int64_t* step_of_row) {
  const int64_t num_seqs = shape[0], num_steps = shape[1], num_choices = shape[2];
  const int64_t num_tokens = num_seqs * num_steps;
  int64_t num_experts = 0;
  for (int64_t bank = 0; bank < shape[3]; ++bank) num_experts += bank_sizes[bank];

  // Calls f(choice, token, segment) for each choice that is sent.
  const auto for_each_sent = [&](const auto& f) {
    for (int64_t token = 0; token < num_tokens; ++token)
      for (int64_t choice = token * num_choices; choice < (token + 1) * num_choices; ++choice) {
        const int64_t expert = indices[choice];
        row_of_choice[choice] = -1;
        if (expert >= 0 && expert < num_experts && (mask == nullptr || mask[token]))
          f(choice, token, expert * num_seqs + token / num_steps);
      }
  };

  std::fill(lens, lens + num_experts * num_seqs, int64_t(0));
  for_each_sent([&](int64_t, int64_t, int64_t segment) { ++lens[segment]; });

  // Of each segment: its first row, and how many have come; of its bank: where it begins, and
  // how many slots a segment has.
  struct Segment {
    int64_t begin, num, first, padded_len;
  };
  std::vector<Segment> segments;
  segments.reserve(num_experts * num_seqs);
  for (int64_t bank = 0, begin = 0; bank < shape[3]; ++bank) {
    const int64_t first = segments.size(), end = first + bank_sizes[bank] * num_seqs;
    const int64_t longest = first == end ? 0 : *std::max_element(lens + first, lens + end);
    for (int64_t i = first; i < end; begin += lens[i++])
      segments.push_back({begin, 0, first, longest});
  }

  for_each_sent([&](int64_t choice, int64_t token, int64_t index) {
    Segment& segment = segments[index];
    const int64_t step = segment.num++, row = segment.begin + step;
    row_of_choice[choice] = row;
    token_of_row[row] = token;
    segment_of_row[row] = index - segment.first;
    step_of_row[row] = step;
    slot_of_row[row] = segment_of_row[row] * segment.padded_len + step;
  });
}

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
#ifdef __AVX512F__
MOXE_ROW_DISPATCH(at::BFloat16, bfloat16)
#endif
