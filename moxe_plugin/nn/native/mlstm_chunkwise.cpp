// What the chunkwise form of the mLSTM cell does between its products, for CPUs; see
// mlstm_chunkwise.py for the whole.
//
// A chunk of length L has for each head a square (L,L) of weights, as in mlstm_parallel.cpp. Of
// the J memories, number j lies between chunks j + s and j + s + 1 of sequence s.

#include "causal_squares.h"

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

struct Shape {
  int64_t num_seqs, num_heads, dim, num_rows, rows_at_once;
  // Of each chunk; of each sequence its first chunk, and at last the number of chunks.
  const int64_t *begins, *lens, *squares, *firsts;

  int64_t num_chunks() const { return firsts[num_seqs]; }
  // Where position t of head h is in (C,H), (C,H,D) and (C,2H).
  int64_t at(int64_t t, int64_t h) const { return t * num_heads + h; }
  int64_t row(int64_t t, int64_t h) const { return at(t, h) * dim; }
  int64_t gate(int64_t t, int64_t h) const { return 2 * t * num_heads + h; }
  int64_t seq_of(int64_t chunk) const {
    return std::upper_bound(firsts, firsts + num_seqs + 1, chunk) - firsts - 1;
  }
};

template <typename T>
struct Constants {
  T scale, empty, max_exponent, eps;
};

template <typename T>
Vec<T> load(const T* from, int64_t count) {
  return count == Vec<T>::size() ? Vec<T>::loadu(from) : Vec<T>::loadu(from, count);
}

// Calls with where in a row each vector begins, and how many numbers it has.
template <typename T, typename F>
void for_each(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += Vec<T>::size())
    f(i, std::min<int64_t>(Vec<T>::size(), count - i));
}

template <typename T>
T sum_of(const Vec<T>& x) {
  T lanes[Vec<T>::size()];
  x.store(lanes);
  T sum = 0;
  for (T lane : lanes) sum += lane;
  return sum;
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  Vec<T> sums(T(0));
  for_each<T>(count, [&](int64_t i, int64_t n) {
    sums = at::vec::fmadd(load(a + i, n), load(b + i, n), sums);
  });
  return sum_of(sums);
}

// out += factor * x
template <typename T>
void add_scaled(T* out, T factor, const T* x, int64_t count) {
  const Vec<T> factors(factor);
  for_each<T>(count, [&](int64_t i, int64_t n) {
    at::vec::fmadd(factors, load(x + i, n), load(out + i, n)).store(out + i, n);
  });
}

// ln(sigmoid(x))
template <typename T>
T log_sigmoid(T x) {
  return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x)));
}

template <typename T>
T floor_of(T m, const Constants<T>& k) {
  return std::exp(std::min(-m, k.max_exponent));
}

// Writes of each position a = i - b (H,C), its peak, m = b + peak, how it weighs the memory before
// its chunk (kept), and how much it counts in the one after it (added); of each chunk how much of the former is in
// the latter (decay), (chunks,H).
template <typename T>
void stabilise(const Shape& s, const Constants<T>& k, int num_threads, const T* gates, T* a,
               T* peak, T* m, T* kept, T* added, T* decay) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < s.num_seqs * s.num_heads; ++task) {
    const int64_t seq = task / s.num_heads, head = task % s.num_heads;
    T before = k.empty;

    for (int64_t chunk = s.firsts[seq]; chunk < s.firsts[seq + 1]; ++chunk) {
      const int64_t begin = s.begins[chunk], end = begin + s.lens[chunk];
      T b = 0, largest = before;

      for (int64_t t = begin; t < end; ++t) {
        const T* gate = gates + s.gate(t, head);
        const int64_t at = s.at(t, head);
        b += log_sigmoid(gate[s.num_heads]);
        const T log_weight = a[head * s.num_rows + t] = gate[0] - b;
        peak[at] = largest = std::max(largest, log_weight);
        m[at] = b + largest;
        kept[at] = std::exp(before - largest);
      }
      for (int64_t t = begin; t < end; ++t)
        added[s.at(t, head)] = std::exp(a[head * s.num_rows + t] - largest) * k.scale;

      decay[s.at(chunk, head)] = std::exp(before - largest);
      before = b + largest;
    }
  }
}

// c: what each chunk adds at first, (J,H,D,D). Writes the memories c and n, (J,H,D).
template <typename T>
void remember(const Shape& s, const Constants<T>&, int num_threads, const T* k,
              const T* added, const T* decay, T* c, T* n) {
  const int64_t num_parts = (s.dim + s.rows_at_once - 1) / s.rows_at_once;

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < s.num_seqs * s.num_heads * num_parts; ++task) {
    const int64_t part = task % num_parts, head = task / num_parts % s.num_heads;
    const int64_t seq = task / num_parts / s.num_heads;
    const int64_t row = part * s.rows_at_once;
    const int64_t rows = std::min(s.rows_at_once, s.dim - row);

    for (int64_t chunk = s.firsts[seq]; chunk + 1 < s.firsts[seq + 1]; ++chunk) {
      const int64_t at = s.row(chunk - seq, head) + row, last = at - s.row(1, 0);

      std::fill_n(n + at, rows, T(0));
      for (int64_t t = s.begins[chunk]; t < s.begins[chunk] + s.lens[chunk]; ++t)
        add_scaled(n + at, added[s.at(t, head)], k + s.row(t, head) + row, rows);

      if (chunk == s.firsts[seq]) continue;

      const T kept = decay[s.at(chunk, head)];
      add_scaled(n + at, kept, n + last, rows);
      add_scaled(c + at * s.dim, kept, c + last * s.dim, rows * s.dim);
    }
  }
}

// grad_c: the gradient from the chunk after each at first. Writes the memories' gradients, and
// the sums of memories times gradients by parts of the memory, (parts,J,H).
template <typename T>
void remember_backward(const Shape& s, const Constants<T>&, int num_threads, const T* q,
                       const T* kept, const T* decay, const T* c, const T* n,
                       const T* grad_total, T* grad_c, T* grad_n, T* dots) {
  const int64_t num_parts = (s.dim + s.rows_at_once - 1) / s.rows_at_once;
  const int64_t num_memories = s.num_chunks() - s.num_seqs;

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < s.num_seqs * s.num_heads * num_parts; ++task) {
    const int64_t part = task % num_parts, head = task / num_parts % s.num_heads;
    const int64_t seq = task / num_parts / s.num_heads;
    const int64_t row = part * s.rows_at_once;
    const int64_t rows = std::min(s.rows_at_once, s.dim - row);

    for (int64_t chunk = s.firsts[seq + 1] - 1; chunk > s.firsts[seq]; --chunk) {
      const int64_t memory = chunk - 1 - seq;
      const int64_t at = s.row(memory, head) + row, next = at + s.row(1, 0);

      std::fill_n(grad_n + at, rows, T(0));
      for (int64_t t = s.begins[chunk]; t < s.begins[chunk] + s.lens[chunk]; ++t)
        add_scaled(grad_n + at, kept[s.at(t, head)] * grad_total[s.at(t, head)],
                   q + s.row(t, head) + row, rows);

      if (chunk + 1 < s.firsts[seq + 1]) {
        const T factor = decay[s.at(chunk, head)];
        add_scaled(grad_n + at, factor, grad_n + next, rows);
        add_scaled(grad_c + at * s.dim, factor, grad_c + next * s.dim, rows * s.dim);
      }

      dots[s.at(part * num_memories + memory, head)] =
          dot(grad_n + at, n + at, rows) +
          dot(grad_c + at * s.dim, c + at * s.dim, rows * s.dim);
    }
  }
}

// A position of a head.
struct Position {
  // Its chunk, its head, its row, and how many of its chunk come before it.
  int64_t chunk, head, t, index;
  // Its row of the chunk's square.
  int64_t square;
  // The memories before and after its chunk, -1 if there is none.
  int64_t before, after;
};

// Calls for all positions, those of one chunk and head in order.
template <typename F>
void for_each_position(const Shape& s, int num_threads, F f) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < s.num_chunks() * s.num_heads; ++task) {
    const int64_t chunk = task / s.num_heads, head = task % s.num_heads;
    const int64_t seq = s.seq_of(chunk), len = s.lens[chunk];
    const int64_t before = chunk > s.firsts[seq] ? chunk - 1 - seq : -1;
    const int64_t after = chunk + 1 < s.firsts[seq + 1] ? chunk - seq : -1;

    for (int64_t i = 0; i < len; ++i)
      f(Position{chunk, head, s.begins[chunk] + i, i,
                 s.squares[chunk] + (head * len + i) * len, before, after});
  }
}

// Replaces x, the row of a position, by f(exp(a - peak) / sqrt(D), x) as far as it reads, and
// by 0 beyond.
template <typename T, typename F>
void replace_row(const Shape& s, const Constants<T>& k, const Position& p, const T* a,
                 const T* peak, T* x, F f) {
  const T* log_weights = a + p.head * s.num_rows + p.t - p.index;
  const Vec<T> top(peak[s.at(p.t, p.head)]), scale(k.scale);

  for_each<T>(p.index + 1, [&](int64_t i, int64_t n) {
    const Vec<T> decayed = (load(log_weights + i, n) - top).exp() * scale;
    f(decayed, load(x + i, n), n).store(x + i, n);
  });

  moxe::clear_beyond_diagonal(x, p.index, s.lens[p.chunk]);
}

// weights: q k^T at first. Writes them, their sums with what the memory adds, and what h is
// divided by, (C,H).
template <typename T>
void weigh(const Shape& s, const Constants<T>& k, int num_threads, const T* q, const T* n,
           const T* a, const T* peak, const T* m, const T* kept, T* weights, T* total,
           T* normalizer) {
  for_each_position(s, num_threads, [&](const Position& p) {
    const int64_t at = s.at(p.t, p.head), row = s.row(p.t, p.head);
    Vec<T> sums(T(0));

    replace_row(s, k, p, a, peak, weights + p.square,
                [&](Vec<T> decayed, Vec<T> product, int64_t count) {
                  const Vec<T> weight = decayed * product;
                  sums = sums + Vec<T>::set(Vec<T>(T(0)), weight, count);
                  return weight;
                });

    total[at] = sum_of(sums);
    if (p.before >= 0)
      total[at] += kept[at] * dot(q + row, n + s.row(p.before, p.head), s.dim);
    normalizer[at] = std::max(std::abs(total[at]), floor_of(m[at], k)) + k.eps;
  });
}

// Writes the gradients of the numerator (C,H,D) and of the normaliser (C,H).
template <typename T>
void divide_backward(const Shape& s, const Constants<T>&, int num_threads,
                     const T* grad_hidden, const T* hidden, const T* normalizer,
                     T* grad_numerator, T* grad_normalizer) {
  for_each_position(s, num_threads, [&](const Position& p) {
    const int64_t at = s.at(p.t, p.head), row = s.row(p.t, p.head);
    const Vec<T> factor(T(1) / normalizer[at]);

    for_each<T>(s.dim, [&](int64_t i, int64_t n) {
      (load(grad_hidden + row + i, n) * factor).store(grad_numerator + row + i, n);
    });
    grad_normalizer[at] = -dot(grad_numerator + row, hidden + row, s.dim);
  });
}

// grads: the gradient of the weights from the numerator at first, then that of q k^T. Writes
// the gradients of total, and of m where that is the normaliser.
template <typename T>
void weigh_backward(const Shape& s, const Constants<T>& k, int num_threads, const T* a,
                    const T* peak, const T* m, const T* total, const T* grad_normalizer,
                    T* grads, T* grad_total, T* grad_m) {
  for_each_position(s, num_threads, [&](const Position& p) {
    const int64_t at = s.at(p.t, p.head);
    const T floor = floor_of(m[at], k), grad = grad_normalizer[at];
    const bool is_floor = floor > std::abs(total[at]);

    grad_total[at] = is_floor ? T(0) : total[at] < T(0) ? -grad : grad;
    grad_m[at] = is_floor && -m[at] <= k.max_exponent ? -floor * grad : T(0);

    const Vec<T> of_total(grad_total[at]);
    replace_row(s, k, p, a, peak, grads + p.square,
                [&](Vec<T> decayed, Vec<T> x, int64_t) { return (x + of_total) * decayed; });
  });
}

// Adds what comes through n to the gradients of q and k, and writes the products of each with
// what it is the gradient of, (C,H).
template <typename T>
void finish(const Shape& s, const Constants<T>&, int num_threads, const T* q, const T* k,
            const T* kept, const T* added, const T* n, const T* grad_n,
            const T* grad_total, T* grad_q, T* grad_k, T* q_dots, T* k_dots) {
  for_each_position(s, num_threads, [&](const Position& p) {
    const int64_t at = s.at(p.t, p.head), row = s.row(p.t, p.head);

    if (p.before >= 0)
      add_scaled(grad_q + row, kept[at] * grad_total[at], n + s.row(p.before, p.head),
                 s.dim);
    if (p.after >= 0)
      add_scaled(grad_k + row, added[at], grad_n + s.row(p.after, p.head), s.dim);

    q_dots[at] = dot(q + row, grad_q + row, s.dim);
    k_dots[at] = dot(k + row, grad_k + row, s.dim);
  });
}

// Writes the gradients of the gates. That of a is k times its gradient, that of a peak minus q
// times its gradient; what the m after a chunk gets as the unit of its memory cancels in its
// peak, and is left to b.
template <typename T>
void stabilise_backward(const Shape& s, const Constants<T>&, int num_threads,
                        const T* gates, const T* a, const T* peak, const T* q_dots,
                        const T* k_dots, const T* grad_m, const T* memory_dots,
                        T* grad_gates) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < s.num_seqs * s.num_heads; ++task) {
    const int64_t seq = task / s.num_heads, head = task % s.num_heads;
    // Of the m after a chunk: as the unit of its memory, and as the next chunk's peaks.
    T grad_unit = 0, grad_peak = 0;

    for (int64_t chunk = s.firsts[seq + 1] - 1; chunk >= s.firsts[seq]; --chunk) {
      const int64_t begin = s.begins[chunk], len = s.lens[chunk];
      std::vector<T> grad_a(len);
      T grad_b = grad_unit + grad_peak;
      T grad_before = 0;
      int64_t largest = -1;

      for (int64_t i = 0; i < len; ++i) {
        const int64_t at = s.at(begin + i, head);
        // The last one of the largest, none if the m before the chunk is above.
        if (a[head * s.num_rows + begin + i] >= peak[at]) largest = i;

        T& grad_largest = largest >= 0 ? grad_a[largest] : grad_before;
        grad_largest += grad_m[at] - q_dots[at];
        if (i + 1 == len) grad_largest += grad_peak;
        grad_a[i] += k_dots[at];
      }

      for (int64_t i = len - 1; i >= 0; --i) {
        const int64_t at = s.gate(begin + i, head);
        const T f = gates[at + s.num_heads];

        grad_b += grad_m[s.at(begin + i, head)] - grad_a[i];
        grad_gates[at] = grad_a[i];
        // Of ln(sigmoid(f)): sigmoid(-f)
        grad_gates[at + s.num_heads] = grad_b * std::exp(log_sigmoid(-f));
      }

      grad_peak = grad_before;
      if (chunk > s.firsts[seq]) grad_unit = memory_dots[s.at(chunk - 1 - seq, head)];
    }
  }
}

}  // namespace

#define MOXE_SHAPE_PARAMETERS                                                           \
  const int64_t *shape, const double *constants, int num_threads, const int64_t *begins, \
      const int64_t *lens, const int64_t *squares, const int64_t *firsts
#define MOXE_SHAPE(T)                                                                    \
  {shape[0], shape[1], shape[2], shape[3], shape[4],                                     \
   begins,   lens,     squares,  firsts},                                                \
      {T(constants[0]), T(constants[1]), T(constants[2]), T(constants[3])}, num_threads

#define MOXE_MLSTM_CHUNKWISE(T)                                                          \
  extern "C" void moxe_mlstm_stabilise_##T(MOXE_SHAPE_PARAMETERS, const T* gates, T* a,  \
                                           T* peak, T* m, T* kept, T* added, T* decay) { \
    stabilise<T>(MOXE_SHAPE(T), gates, a, peak, m, kept, added, decay);                  \
  }                                                                                      \
  extern "C" void moxe_mlstm_remember_##T(MOXE_SHAPE_PARAMETERS, const T* k,             \
                                          const T* added, const T* decay, T* c, T* n) {  \
    remember<T>(MOXE_SHAPE(T), k, added, decay, c, n);                                   \
  }                                                                                      \
  extern "C" void moxe_mlstm_remember_backward_##T(                                      \
      MOXE_SHAPE_PARAMETERS, const T* q, const T* kept, const T* decay, const T* c,      \
      const T* n, const T* grad_total, T* grad_c, T* grad_n, T* dots) {                  \
    remember_backward<T>(MOXE_SHAPE(T), q, kept, decay, c, n, grad_total, grad_c,        \
                         grad_n, dots);                                                  \
  }                                                                                      \
  extern "C" void moxe_mlstm_weigh_##T(                                                  \
      MOXE_SHAPE_PARAMETERS, const T* q, const T* n, const T* a, const T* peak,          \
      const T* m, const T* kept, T* weights, T* total, T* normalizer) {                  \
    weigh<T>(MOXE_SHAPE(T), q, n, a, peak, m, kept, weights, total, normalizer);         \
  }                                                                                      \
  extern "C" void moxe_mlstm_divide_backward_##T(                                        \
      MOXE_SHAPE_PARAMETERS, const T* grad_hidden, const T* hidden, const T* normalizer, \
      T* grad_numerator, T* grad_normalizer) {                                           \
    divide_backward<T>(MOXE_SHAPE(T), grad_hidden, hidden, normalizer, grad_numerator,   \
                       grad_normalizer);                                                 \
  }                                                                                      \
  extern "C" void moxe_mlstm_weigh_backward_##T(                                         \
      MOXE_SHAPE_PARAMETERS, const T* a, const T* peak, const T* m, const T* total,      \
      const T* grad_normalizer, T* grads, T* grad_total, T* grad_m) {                    \
    weigh_backward<T>(MOXE_SHAPE(T), a, peak, m, total, grad_normalizer, grads,          \
                      grad_total, grad_m);                                               \
  }                                                                                      \
  extern "C" void moxe_mlstm_finish_##T(                                                 \
      MOXE_SHAPE_PARAMETERS, const T* q, const T* k, const T* kept, const T* added,      \
      const T* n, const T* grad_n, const T* grad_total, T* grad_q, T* grad_k, T* q_dots, \
      T* k_dots) {                                                                       \
    finish<T>(MOXE_SHAPE(T), q, k, kept, added, n, grad_n, grad_total, grad_q, grad_k,   \
              q_dots, k_dots);                                                           \
  }                                                                                      \
  extern "C" void moxe_mlstm_stabilise_backward_##T(                                     \
      MOXE_SHAPE_PARAMETERS, const T* gates, const T* a, const T* peak, const T* q_dots, \
      const T* k_dots, const T* grad_m, const T* memory_dots, T* grad_gates) {           \
    stabilise_backward<T>(MOXE_SHAPE(T), gates, a, peak, q_dots, k_dots, grad_m,         \
                          memory_dots, grad_gates);                                      \
  }

MOXE_MLSTM_CHUNKWISE(float)
MOXE_MLSTM_CHUNKWISE(double)
