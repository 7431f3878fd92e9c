// What the parallel form of the mLSTM cell does between its products, for CPUs; see
// mlstm_parallel.py for the whole.
//
// A sequence of length S has for each head a square (S,S) of weights, of which the rows above
// the diagonal are 0 next to it, and not read beyond, see causal_squares.h.

#include "causal_squares.h"
#include "vector_math.h"

#include <cmath>
#include <vector>

namespace {

using moxe::for_each_vector;
using moxe::load;
using moxe::store;
using moxe::Vec;

struct Shape {
  int64_t num_seqs, num_heads;
  const int64_t *begins, *lens, *squares;
};

// Of (C,H), (C,2H) and the squares.
template <typename T>
struct Constants {
  T scale, empty, max_exponent, eps;
};

// ln(sigmoid(x))
template <typename T>
T log_sigmoid(T x) {
  return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x)));
}

// What one head needs of one sequence.
template <typename T>
struct Head {
  Head(const Shape& s, int64_t task)
      : seq(task / s.num_heads),
        head(task % s.num_heads),
        begin(s.begins[seq]),
        len(s.lens[seq]),
        square(s.squares[seq] + head * len * len) {}

  int64_t seq, head, begin, len, square;
};

// weights: q k^T at first. Writes them, over what h is divided by, and per position
// a = i - F, A = the largest a so far, m = F + A, the sum of weights, and that divisor; all
// (C,H).
template <typename T>
void weigh(const Shape& s, const Constants<T>& k, const T* gates, T* weights, T* a, T* peak,
           T* m, T* total, T* normalizer, int num_threads) {
  const int64_t num_tasks = s.num_seqs * s.num_heads;

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const Head<T> h(s, task);
    std::vector<T> log_weight(h.len);
    T decay = 0, largest = k.empty;

    for (int64_t t = 0; t < h.len; ++t) {
      const T* gate = gates + (h.begin + t) * 2 * s.num_heads + h.head;
      const int64_t at = (h.begin + t) * s.num_heads + h.head;

      decay += log_sigmoid(gate[s.num_heads]);
      log_weight[t] = a[at] = gate[0] - decay;
      largest = std::max(largest, a[at]);
      peak[at] = largest;
      m[at] = decay + largest;

      T* row = weights + h.square + t * h.len;
      const Vec<T> top(largest), scale(k.scale);
      Vec<T> sums(T(0));
      for_each_vector<T>(0, t + 1, [&](int64_t i, int64_t n) {
        const Vec<T> w = moxe::exp<T>(load(log_weight.data() + i, n) - top) * scale *
                         load(row + i, n);
        store(w, row + i, n);
        sums = sums + Vec<T>::set(Vec<T>(T(0)), w, n);
      });
      moxe::clear_beyond_diagonal(row, t, h.len);

      total[at] = moxe::sum(sums);
      const T floor = std::exp(std::min(-m[at], k.max_exponent));
      normalizer[at] = std::max(std::abs(total[at]), floor) + k.eps;

      const Vec<T> share(T(1) / normalizer[at]);
      for_each_vector<T>(0, t + 1, [&](int64_t i, int64_t n) {
        store(load(row + i, n) * share, row + i, n);
      });
    }
  }
}

// grads: the gradient of h times v^T at first, then the gradient of q k^T.
template <typename T>
void weigh_backward(const Shape& s, const Constants<T>& k, const T* gates,
                    const T* weights, const T* a, const T* peak, const T* m, const T* total,
                    const T* normalizer, T* grads, T* grad_gates, int num_threads) {
  const int64_t num_tasks = s.num_seqs * s.num_heads;

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const Head<T> h(s, task);
    std::vector<T> log_weight(h.len), grad_a(h.len, T(0)), grad_m(h.len);

    int64_t largest = -1;
    for (int64_t t = 0; t < h.len; ++t) {
      const int64_t at = (h.begin + t) * s.num_heads + h.head;
      log_weight[t] = a[at];
      // The last one of the largest, none if no one is above an empty memory's.
      if (a[at] >= peak[at]) largest = t;

      const T* row = weights + h.square + t * h.len;
      T* grad_row = grads + h.square + t * h.len;

      // h and its gradient, multiplied and summed over channels.
      Vec<T> dots(T(0));
      for_each_vector<T>(0, t + 1, [&](int64_t i, int64_t n) {
        dots = at::vec::fmadd(load(grad_row + i, n), load(row + i, n), dots);
      });
      const T grad_normalizer = -moxe::sum(dots) / normalizer[at];

      const T floor = std::exp(std::min(-m[at], k.max_exponent));
      const bool is_floor = floor > std::abs(total[at]);
      const T grad_total = is_floor          ? T(0)
                           : total[at] < T(0) ? -grad_normalizer
                                              : grad_normalizer;
      grad_m[t] =
          is_floor && -m[at] <= k.max_exponent ? -floor * grad_normalizer : T(0);

      const Vec<T> top(peak[at]), scale(k.scale), of_total(grad_total);
      const Vec<T> divisor(normalizer[at]), share(T(1) / normalizer[at]);
      Vec<T> sums(T(0));
      for_each_vector<T>(0, t + 1, [&](int64_t i, int64_t n) {
        // Of what is summed: its gradient, and that of its logarithm.
        const Vec<T> grad = at::vec::fmadd(load(grad_row + i, n), share, of_total);
        const Vec<T> grad_log = grad * divisor * load(row + i, n);
        store(load(grad_a.data() + i, n) + grad_log, grad_a.data() + i, n);
        sums = sums + Vec<T>::set(Vec<T>(T(0)), grad_log, n);
        store(grad * moxe::exp<T>(load(log_weight.data() + i, n) - top) * scale,
              grad_row + i, n);
      });
      moxe::clear_beyond_diagonal(grad_row, t, h.len);

      if (largest >= 0) grad_a[largest] += grad_m[t] - moxe::sum(sums);
    }

    T grad_decay = 0;
    for (int64_t t = h.len - 1; t >= 0; --t) {
      const int64_t at = (h.begin + t) * 2 * s.num_heads + h.head;
      const T f = gates[at + s.num_heads];

      grad_decay += grad_m[t] - grad_a[t];
      grad_gates[at] = grad_a[t];
      // Of ln(sigmoid(f)): sigmoid(-f)
      grad_gates[at + s.num_heads] = grad_decay * std::exp(log_sigmoid(-f));
    }
  }
}

}  // namespace

#define MOXE_MLSTM_PARALLEL(T, SUFFIX)                                                   \
  extern "C" void moxe_mlstm_weigh_##SUFFIX(                                             \
      const int64_t* shape, const double* constants, int num_threads,                    \
      const int64_t* begins, const int64_t* lens, const int64_t* squares,                \
      const T* gates, T* weights, T* a, T* peak, T* m, T* total, T* normalizer) {        \
    weigh<T>({shape[0], shape[1], begins, lens, squares},                                \
             {T(constants[0]), T(constants[1]), T(constants[2]), T(constants[3])},       \
             gates, weights, a, peak, m, total, normalizer, num_threads);                \
  }                                                                                      \
  extern "C" void moxe_mlstm_weigh_backward_##SUFFIX(                                    \
      const int64_t* shape, const double* constants, int num_threads,                    \
      const int64_t* begins, const int64_t* lens, const int64_t* squares,                \
      const T* gates, const T* weights, const T* a, const T* peak, const T* m,           \
      const T* total, const T* normalizer, T* grads, T* grad_gates) {               \
    weigh_backward<T>({shape[0], shape[1], begins, lens, squares},                       \
                      {T(constants[0]), T(constants[1]), T(constants[2]),                \
                       T(constants[3])},                                                 \
                      gates, weights, a, peak, m, total, normalizer, grads,         \
                      grad_gates, num_threads);                                          \
  }

MOXE_MLSTM_PARALLEL(float, float)
MOXE_MLSTM_PARALLEL(double, double)
