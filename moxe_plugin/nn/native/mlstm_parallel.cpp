// What the parallel form of the mLSTM cell does between its products, for CPUs; see
// mlstm_parallel.py for the whole.
//
// A sequence of length S has for each head a square (S,S) of weights, of which the rows above
// the diagonal are 0 next to it, and not read beyond, see causal_squares.h.

#include "causal_squares.h"
#include "memory.h"
#include "products.h"
#include "vector_math.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

namespace {

using moxe::Buffer;
using moxe::for_each_vector;
using moxe::kMaxDepth;
using moxe::load;
using moxe::Multiply;
using moxe::ProductNumbers;
using moxe::store;
using moxe::Triangle;
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

// The sequences of a cell: without a gap, or padded.
struct Sequences {
  int64_t size, rounding, num_threads, num_seqs, num_rows, num_heads, head_dim;
};

// The cell over sequences; see mlstm_parallel.py.
class Cell {
 public:
  Cell(Multiply multiply, const Sequences& n, const int64_t* begins, const int64_t* lens,
       const Constants<float>& constants)
      : call_(multiply), n_(n), begins_(begins), lens_(lens), constants_(constants) {
    squares_.reserve(n.num_seqs);
    for (int64_t i = 0; i < n.num_seqs; ++i) {
      squares_.push_back(size_);
      size_ += n.num_heads * lens[i] * lens[i];
    }
  }

  void forward(const void* q, const void* k, const void* v, const float* gates, float* weights,
               float* const* stats, void* hidden) const {
    multiply_into_lower(q, k, weights);
    weigh<float>(shape(), constants_, gates, weights, stats[0], stats[1], stats[2], stats[3],
                 stats[4], threads());
    Lower products(*this);
    products.add(weights, v, hidden, false);
    products.run();
  }

  void backward(const void* q, const void* k, const void* v, const float* gates,
                const float* weights, const float* const* stats, const void* grad_hidden,
                void* grad_q, void* grad_k, void* grad_v, float* grad_gates) const {
    Buffer grads(size_ * sizeof(float));
    multiply_into_lower(grad_hidden, v, grads.floats());
    if (has_padding()) std::memset(grad_gates, 0, n_.num_rows * 2 * n_.num_heads * sizeof(float));
    weigh_backward<float>(shape(), constants_, gates, weights, stats[0], stats[1], stats[2],
                          stats[3], stats[4], grads.floats(), grad_gates, threads());
    Lower products(*this);
    products.add(grads.floats(), k, grad_q, false);
    products.add(grads.floats(), q, grad_k, true);
    products.add(weights, grad_hidden, grad_v, true);
    products.run();
  }

 private:
  // The lower halves of squares, or of transposed ones, times rows (C,H,D), all at once.
  class Lower {
   public:
    explicit Lower(const Cell& cell)
        : cell_(cell),
          sums_floats_(cell.is_half() && cell.max_len() > 2 * kMaxDepth) {}

    void add(const float* squares, const void* rows, void* out, bool transposed) {
      const Sequences& n = cell_.n_;
      char* to = static_cast<char*>(out);
      const int64_t size = sums_floats_ ? sizeof(float) : n.size, width = cell_.width();
      const int64_t num_bytes = n.num_rows * width * size;
      if (sums_floats_) {
        sums_.push_back({out, std::make_unique<Buffer>(num_bytes)});
        to = sums_.back().second->bytes();
      }
      if (cell_.has_padding()) std::memset(to, 0, num_bytes);
      for (int64_t i = 0; i < n.num_seqs; ++i) {
        const int64_t len = cell_.lens_[i], first = cell_.begins_[i] * width;
        if (len == 0) continue;
        products_.push_back({n.num_heads, len, n.head_dim, len,
                             reinterpret_cast<const char*>(squares + cell_.squares_[i]),
                             len * len, transposed ? 1 : len, transposed ? len : 1,
                             static_cast<const char*>(rows) + first * n.size, n.head_dim, width,
                             1, to + first * size, n.head_dim, width});
        triangles_.push_back(transposed ? Triangle::kUpperLeft : Triangle::kLowerLeft);
      }
    }

    void run() const {
      cell_.multiply(products_, triangles_, cell_.is_half() ? (sums_floats_ ? 2 : 6) : 0);
      const int64_t count = cell_.n_.num_rows * cell_.width();
      for (const auto& [out, sums] : sums_) {
        c10::BFloat16* to = static_cast<c10::BFloat16*>(out);
        const float* from = sums->floats();
#pragma omp parallel for num_threads(cell_.n_.num_threads)
        for (int64_t i = 0; i < count; ++i) to[i] = c10::BFloat16(from[i]);
      }
    }

   private:
    const Cell& cell_;
    const bool sums_floats_;
    std::vector<ProductNumbers> products_;
    std::vector<Triangle> triangles_;
    std::vector<std::pair<void*, std::unique_ptr<Buffer>>> sums_;
  };

  int threads() const { return static_cast<int>(n_.num_threads); }
  Shape shape() const { return {n_.num_seqs, n_.num_heads, begins_, lens_, squares_.data()}; }
  int64_t width() const { return n_.num_heads * n_.head_dim; }
  bool is_half() const { return n_.size == 2; }
  bool has_padding() const {
    return std::accumulate(lens_, lens_ + n_.num_seqs, int64_t(0)) < n_.num_rows;
  }
  int64_t max_len() const {
    return n_.num_seqs > 0 ? *std::max_element(lens_, lens_ + n_.num_seqs) : 0;
  }

  // lhs rhs^T of each sequence and head, as far as the diagonal at least.
  void multiply_into_lower(const void* lhs, const void* rhs, float* squares) const {
    std::vector<ProductNumbers> products;
    for (int64_t i = 0; i < n_.num_seqs; ++i) {
      const int64_t len = lens_[i], first = begins_[i] * width() * n_.size;
      if (len == 0) continue;
      products.push_back({n_.num_heads, len, len, n_.head_dim,
                          static_cast<const char*>(lhs) + first, n_.head_dim, width(), 1,
                          static_cast<const char*>(rhs) + first, n_.head_dim, 1, width(),
                          reinterpret_cast<char*>(squares + squares_[i]), len * len, len});
    }
    multiply(products, std::vector<Triangle>(products.size(), Triangle::kLowerResult),
             is_half() ? 3 : 0);
  }

  void multiply(const std::vector<ProductNumbers>& products,
                const std::vector<Triangle>& triangles, int halves) const {
    if (call_(products.size(), products.data(), triangles.data(), static_cast<int>(n_.rounding),
              halves, 0, 0, threads()) != 0)
      throw std::bad_alloc();
  }

  const Multiply call_;
  const Sequences& n_;
  const int64_t *begins_, *lens_;
  const Constants<float>& constants_;
  std::vector<int64_t> squares_;
  int64_t size_ = 0;
};

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

// The whole cell; the numbers of `sequences` as for `Sequences`, what is kept for the way back as
// of moxe_mlstm_weigh_float. Returns 0, or 1 if there is no memory.
extern "C" int moxe_mlstm_parallel_forward(Multiply multiply, const Sequences* sequences,
                                           const int64_t* begins, const int64_t* lens,
                                           const double* constants, const void* q, const void* k,
                                           const void* v, const float* gates, float* weights,
                                           float* a, float* peak, float* m, float* total,
                                           float* normalizer, void* hidden) {
  float* const stats[] = {a, peak, m, total, normalizer};
  const Constants<float> of_cell = {float(constants[0]), float(constants[1]),
                                    float(constants[2]), float(constants[3])};
  return moxe::lacks_memory([&] {
    Cell(multiply, *sequences, begins, lens, of_cell)
        .forward(q, k, v, gates, weights, stats, hidden);
  });
}

extern "C" int moxe_mlstm_parallel_backward(
    Multiply multiply, const Sequences* sequences, const int64_t* begins, const int64_t* lens,
    const double* constants, const void* q, const void* k, const void* v, const float* gates,
    const float* weights, const float* a, const float* peak, const float* m, const float* total,
    const float* normalizer, const void* grad_hidden, void* grad_q, void* grad_k, void* grad_v,
    float* grad_gates) {
  const float* const stats[] = {a, peak, m, total, normalizer};
  const Constants<float> of_cell = {float(constants[0]), float(constants[1]),
                                    float(constants[2]), float(constants[3])};
  return moxe::lacks_memory([&] {
    Cell(multiply, *sequences, begins, lens, of_cell)
        .backward(q, k, v, gates, weights, stats, grad_hidden, grad_q, grad_k, grad_v,
                  grad_gates);
  });
}
