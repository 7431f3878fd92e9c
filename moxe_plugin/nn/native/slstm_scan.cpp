// The sLSTM scan of moxe_plugin.nn.native for CPUs; see slstm_scan.py for what it computes.
//
// A head of a cell does not see the others, so each thread takes a head and a few rows of
// the batch through all steps: the head's recurrent matrix then stays in the thread's cache,
// where a loop over time with all heads in each step would read them all anew every time.

#include "bfloat16.h"
#include "vector_math.h"

#include <vector>

namespace {

using moxe::divide_up;
using moxe::Factors;
using moxe::load;
using moxe::num_places;
using moxe::Sigmoid;
using moxe::store;
using moxe::Vec;

// The most rows of the batch that a thread takes at a time.
constexpr int kRows = 4;
// Steps that are summed before they are added to the sum of all: the error grows with the length
// of a sum.
constexpr int64_t kSummedSteps = 32;

// The factors of the recurrent products: copies of floats as pairs of bfloat16, or floats as
// they are.
template <typename T, Factors factors>
class Rounded {
 public:
  // Rows of `count` numbers.
  void set_rows(const T* from, int64_t num_rows, int64_t count) {
    data_ = from;
#ifdef __AVX512BF16__
    if constexpr (factors == Factors::kBFloat16) {
      const int64_t places = num_places(count, factors);
      pairs_.resize(num_rows * places);
      for (int64_t i = 0; i < num_rows; ++i)
        moxe::pair_row(from + i * count, count, &pairs_[i * places]);
      data_ = pairs_.data();
    }
#endif
  }

  // A matrix of which a column is multiplied, (num_in,num_out).
  void set_columns(const T* from, int64_t num_in, int64_t num_out) {
    data_ = from;
#ifdef __AVX512BF16__
    if constexpr (factors == Factors::kBFloat16) {
      pairs_.resize(num_places(num_in, factors) * num_out);
      for (int64_t i = 0; i < num_in; i += 2)
        moxe::pair_rows(from + i * num_out,
                        i + 1 < num_in ? from + (i + 1) * num_out : nullptr, num_out,
                        &pairs_[i / 2 * num_out]);
      data_ = pairs_.data();
    }
#endif
  }

  // Takes what has been rounded already.
  void refer_to(const T* places) { data_ = places; }

  const T* data() const { return data_; }

 private:
  const T* data_ = nullptr;
  std::vector<T> pairs_;
};

template <typename T, Factors factors>
inline Vec<T> add_products(const Vec<T>& sum, const Vec<T>& x, const Vec<T>& y) {
#ifdef __AVX512BF16__
  if constexpr (factors == Factors::kBFloat16)
    return Vec<T>(moxe::add_products<factors>(sum, x, y));
#endif
  return at::vec::fmadd(x, y, sum);
}

// out[r,:] += x[r,:] @ weight for `Rows` rows, for `Vecs` vectors of columns. `num_in` are
// places of what is multiplied.
template <typename T, Factors factors, int Rows, int Vecs>
void multiply_columns(const T* weight, int64_t num_in, int64_t num_out, const T* x,
                      T* out, int64_t column, int64_t count) {
  constexpr int64_t width = Vec<T>::size();
  // Only a single vector may be partial.
  const bool partial = count < Vecs * width;

  Vec<T> sums[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) {
      const T* from = out + r * num_out + column + v * width;
      sums[r][v] = partial ? Vec<T>::loadu(from, count) : Vec<T>::loadu(from);
    }

  for (int64_t i = 0; i < num_in; ++i) {
    const T* row = weight + i * num_out + column;
    Vec<T> weights[Vecs];
    for (int v = 0; v < Vecs; ++v)
      weights[v] = partial ? Vec<T>::loadu(row, count) : Vec<T>::loadu(row + v * width);
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> value(x[r * num_in + i]);
      for (int v = 0; v < Vecs; ++v)
        sums[r][v] = add_products<T, factors>(sums[r][v], value, weights[v]);
    }
  }

  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) {
      T* to = out + r * num_out + column + v * width;
      if (partial)
        sums[r][v].store(to, count);
      else
        sums[r][v].store(to);
    }
}

template <typename T, Factors factors, int Rows>
void multiply_rows(const T* weight, int64_t num_in, int64_t num_out, const T* x, T* out) {
  constexpr int64_t width = Vec<T>::size();
  // As many sums as there are registers for.
  constexpr int vecs = width * sizeof(T) == 64 ? 4 : 2;

  int64_t column = 0;
  for (; column + vecs * width <= num_out; column += vecs * width)
    multiply_columns<T, factors, Rows, vecs>(weight, num_in, num_out, x, out, column,
                                             vecs * width);
  for (; column + 2 * width <= num_out; column += 2 * width)
    multiply_columns<T, factors, Rows, 2>(weight, num_in, num_out, x, out, column,
                                          2 * width);
  for (; column < num_out; column += width)
    multiply_columns<T, factors, Rows, 1>(weight, num_in, num_out, x, out, column,
                                          std::min<int64_t>(width, num_out - column));
}

// out (rows,num_out) += x (rows,num_in) @ weight (num_in,num_out)
template <typename T, Factors factors>
void multiply(const Rounded<T, factors>& weight, int64_t num_in, int64_t num_out,
              const Rounded<T, factors>& x, T* out, int rows) {
  const T *w = weight.data(), *from = x.data();
  const int64_t places = num_places(num_in, factors);
  switch (rows) {
    case 1: return multiply_rows<T, factors, 1>(w, places, num_out, from, out);
    case 2: return multiply_rows<T, factors, 2>(w, places, num_out, from, out);
    case 3: return multiply_rows<T, factors, 3>(w, places, num_out, from, out);
    default: return multiply_rows<T, factors, 4>(w, places, num_out, from, out);
  }
}

// to (num_out,num_in) = from (num_in,num_out)^T, in blocks that fit the first cache.
template <typename T>
void transpose(const T* from, int64_t num_in, int64_t num_out, T* to) {
  constexpr int64_t width = Vec<T>::size();
  for (int64_t j = 0; j < num_out; j += width)
    for (int64_t i = 0; i < num_in; ++i)
      for (int64_t k = j; k < std::min(j + width, num_out); ++k)
        to[k * num_in + i] = from[i * num_out + k];
}

// to += from, and from = 0.
template <typename T>
void flush(std::vector<T>& from, T* to) {
  for (T& x : from) {
    *to++ += x;
    x = T(0);
  }
}

// Rows of the batch and their channels. A row is a run of positions from begins[row] on;
// `steps` positions are its own, of which those from lens[row] on are padding.
struct Shape {
  int64_t experts, heads, rows, steps, dim;
  const int64_t *begins, *lens;
};

template <typename T>
struct Task {
  Task(const Shape& s, int64_t task)
      : blocks(divide_up(s.rows, kRows)),
        head(task / blocks),
        expert(head / s.heads),
        head_in_expert(head % s.heads),
        first(task % blocks * kRows),
        rows(static_cast<int>(std::min<int64_t>(kRows, s.rows - first))) {
    for (int r = 0; r < rows; ++r) {
      begin[r] = s.begins[expert * s.rows + first + r];
      len[r] = s.lens[expert * s.rows + first + r];
      max_len = std::max(max_len, len[r]);
    }
  }

  // Into what is laid out (C,H).
  int64_t position(const Shape& s, int r, int64_t t) const {
    return (begin[r] + t) * s.heads + head_in_expert;
  }
  // Into (E,N,H,D).
  int64_t state(const Shape& s, int r) const {
    return ((expert * s.rows + first + r) * s.heads + head_in_expert) * s.dim;
  }

  int64_t blocks, head, expert, head_in_expert, first;
  int rows;
  int64_t begin[kRows] = {}, len[kRows] = {};
  int64_t max_len = 0;
};

template <typename T, Factors factors>
void scan_forward(const Shape& s, const T* gates_if, const T* gates_zo,
                  const T* bias, const T* weight, const T* c0,
                  const T* log_n0, const T* y0, T* outputs, T* activations, T* cs,
                  T* c_last, T* log_n_last, T* y_last, int num_threads) {
  const int64_t dim = s.dim;
  const int64_t num_tasks = s.experts * s.heads * divide_up(s.rows, kRows);
  const Vec<T> zero(T(0));

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t id = 0; id < num_tasks; ++id) {
    const Task<T> task(s, id);
    std::vector<T> gates(kRows * 4 * dim), y(kRows * dim, T(0)), c(kRows * dim),
        log_n(kRows * dim);
    Rounded<T, factors> recurrent, old_y;
    recurrent.set_columns(weight + task.head * 4 * dim * dim, dim, 4 * dim);

    for (int r = 0; r < task.rows; ++r) {
      const int64_t from = task.state(s, r);
      std::copy_n(y0 + from, dim, &y[r * dim]);
      std::copy_n(c0 + from, dim, &c[r * dim]);
      std::copy_n(log_n0 + from, dim, &log_n[r * dim]);
    }

    for (int64_t t = 0; t < task.max_len; ++t) {
      for (int r = 0; r < task.rows; ++r) {
        if (t >= task.len[r]) continue;

        const int64_t at = task.position(s, r, t) * 2 * dim;
        T* gate = &gates[r * 4 * dim];
        const T* b = bias + task.head * 4 * dim;
        moxe::for_each_vector<T>(0, 2 * dim, [&](int64_t d, int64_t n) {
          (load(gates_if + at + d, n) + load(b + d, n)).store(gate + d, n);
          (load(gates_zo + at + d, n) + load(b + 2 * dim + d, n))
              .store(gate + 2 * dim + d, n);
        });
      }

      old_y.set_rows(y.data(), task.rows, dim);
      multiply(recurrent, dim, 4 * dim, old_y, gates.data(), task.rows);

      for (int r = 0; r < task.rows; ++r) {
        if (t >= task.len[r]) continue;

        const int64_t at = task.position(s, r, t) * dim;
        const T* gate = &gates[r * 4 * dim];
        T *yr = &y[r * dim], *cr = &c[r * dim], *nr = &log_n[r * dim];
        T* out = outputs + at;

        moxe::for_each_vector<T>(0, dim, [&](int64_t d, int64_t n) {
          const Vec<T> i = load(gate + d, n), f = load(gate + dim + d, n);
          const Sigmoid<T> forget(f);
          const Vec<T> log_forget = at::vec::minimum(f, zero) - moxe::log1p_of_share<T>(forget.exp);
          const Vec<T> log_kept = log_forget + load(nr + d, n);

          const Sigmoid<T> share(i - log_kept);
          const Vec<T> w = share.value();
          (at::vec::maximum(i, log_kept) + moxe::log1p_of_share<T>(share.exp)).store(nr + d, n);

          const Vec<T> z = moxe::tanh<T>(load(gate + 2 * dim + d, n));
          const Vec<T> old_c = load(cr + d, n);
          const Vec<T> new_c = at::vec::fmadd(w, z - old_c, old_c);
          const Vec<T> o = Sigmoid<T>(load(gate + 3 * dim + d, n)).value();
          const Vec<T> new_y = o * new_c;

          new_c.store(cr + d, n);
          new_y.store(yr + d, n);
          new_y.store(out + d, n);

          if (activations == nullptr) return;

          T* saved = activations + 4 * at + d;
          w.store(saved, n);
          forget.complement().store(saved + dim, n);
          z.store(saved + 2 * dim, n);
          o.store(saved + 3 * dim, n);
          new_c.store(cs + at + d, n);
        });
      }
    }

    for (int r = 0; r < task.rows; ++r) {
      const int64_t to = task.state(s, r);
      std::copy_n(&y[r * dim], dim, y_last + to);
      std::copy_n(&c[r * dim], dim, c_last + to);
      std::copy_n(&log_n[r * dim], dim, log_n_last + to);

      for (int64_t t = task.len[r]; t < s.steps; ++t)
        std::fill_n(outputs + task.position(s, r, t) * dim, dim, T(0));
    }
  }
}

template <typename T, Factors factors>
void scan_backward(const Shape& s, const T* weight, const T* c0,
                   const T* outputs, const T* activations, const T* cs,
                   const T* grad_outputs, const T* grad_c_last, const T* grad_log_n_last,
                   const T* grad_y_last, T* grad_if, T* grad_zo, T* grad_bias,
                   T* grad_c0, T* grad_log_n0, T* grad_y0, int num_threads) {
  const int64_t dim = s.dim;
  const int64_t num_tasks = s.experts * s.heads * divide_up(s.rows, kRows);
  const Vec<T> one(T(1));

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t id = 0; id < num_tasks; ++id) {
    const Task<T> task(s, id);
    std::vector<T> gates(kRows * 4 * dim, T(0)), grad_y(kRows * dim, T(0)),
        grad_c(kRows * dim), grad_log_n(kRows * dim), of_bias(4 * dim, T(0)),
        transposed(num_places(4 * dim, factors) * dim);
    Rounded<T, factors> recurrent, of_gates, of_columns;
    // A place holds what is multiplied, before and after.
    recurrent.set_rows(weight + task.head * 4 * dim * dim, dim, 4 * dim);
    transpose(recurrent.data(), dim, num_places(4 * dim, factors), transposed.data());
    of_columns.refer_to(transposed.data());
    std::fill_n(grad_bias + id * 4 * dim, 4 * dim, T(0));

    for (int r = 0; r < task.rows; ++r) {
      const int64_t from = task.state(s, r);
      std::copy_n(grad_c_last + from, dim, &grad_c[r * dim]);
      std::copy_n(grad_log_n_last + from, dim, &grad_log_n[r * dim]);

      for (int64_t t = task.len[r]; t < s.steps; ++t) {
        const int64_t at = task.position(s, r, t) * 2 * dim;
        std::fill_n(grad_if + at, 2 * dim, T(0));
        std::fill_n(grad_zo + at, 2 * dim, T(0));
      }
    }

    for (int64_t t = task.max_len - 1; t >= 0; --t) {
      for (int r = 0; r < task.rows; ++r) {
        if (t >= task.len[r]) continue;

        const int64_t at = task.position(s, r, t) * dim;
        T *gate = &gates[r * 4 * dim], *gy = &grad_y[r * dim], *gc = &grad_c[r * dim],
          *gn = &grad_log_n[r * dim];
        const T* saved = activations + 4 * at;
        const T* old_cs =
            t > 0 ? cs + at - s.heads * dim : c0 + task.state(s, r);
        if (t == task.len[r] - 1)
          std::copy_n(grad_y_last + task.state(s, r), dim, gy);

        moxe::for_each_vector<T>(0, dim, [&](int64_t d, int64_t n) {
          const Vec<T> w = load(saved + d, n), not_f = load(saved + dim + d, n),
                       z = load(saved + 2 * dim + d, n), o = load(saved + 3 * dim + d, n);
          const Vec<T> kept = one - w;

          const Vec<T> dy = load(gy + d, n) + load(grad_outputs + at + d, n);
          const Vec<T> dc = at::vec::fmadd(dy, o, load(gc + d, n));
          const Vec<T> old_dn = load(gn + d, n);

          const Vec<T> di =
              w * (dc * kept * (z - load(old_cs + d, n)) + old_dn);
          const Vec<T> dn = old_dn - di;

          di.store(gate + d, n);
          (dn * not_f).store(gate + dim + d, n);
          (dc * w * (one - z * z)).store(gate + 2 * dim + d, n);
          (dy * load(outputs + at + d, n) * (one - o)).store(gate + 3 * dim + d, n);
          (dc * kept).store(gc + d, n);
          dn.store(gn + d, n);
        });

        std::copy_n(gate, 2 * dim, grad_if + 2 * at);
        std::copy_n(gate + 2 * dim, 2 * dim, grad_zo + 2 * at);
        moxe::for_each_vector<T>(0, 4 * dim, [&](int64_t d, int64_t n) {
          store(load(&of_bias[d], n) + load(gate + d, n), &of_bias[d], n);
        });
      }
      if (t % kSummedSteps == 0) flush(of_bias, grad_bias + id * 4 * dim);

      std::fill_n(grad_y.data(), task.rows * dim, T(0));
      of_gates.set_rows(gates.data(), task.rows, 4 * dim);
      multiply(of_columns, 4 * dim, dim, of_gates, grad_y.data(), task.rows);
    }

    for (int r = 0; r < task.rows; ++r) {
      const int64_t to = task.state(s, r);
      std::copy_n(&grad_c[r * dim], dim, grad_c0 + to);
      std::copy_n(&grad_log_n[r * dim], dim, grad_log_n0 + to);
      std::copy_n(task.len[r] > 0 ? &grad_y[r * dim] : grad_y_last + to, dim,
                  grad_y0 + to);
    }
  }
}

}  // namespace

// grad_bias: a row for each task of the way back: experts, heads, kRows rows each.
#define MOXE_SLSTM_SCAN(T, FACTORS, SUFFIX)                                              \
  extern "C" void moxe_slstm_forward_##SUFFIX(                                           \
      const int64_t* shape, int num_threads, const int64_t* begins, const int64_t* lens, \
      const T* gates_if, const T* gates_zo, const T* bias, const T* weight, const T* c0, \
      const T* log_n0, const T* y0, T* outputs, T* activations, T* cs, T* c_last,        \
      T* log_n_last, T* y_last) {                                                        \
    scan_forward<T, FACTORS>(                                                            \
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, gates_if,      \
        gates_zo, bias, weight, c0, log_n0, y0, outputs, activations, cs, c_last,        \
        log_n_last, y_last, num_threads);                                                \
  }                                                                                      \
  extern "C" void moxe_slstm_backward_##SUFFIX(                                          \
      const int64_t* shape, int num_threads, const int64_t* begins, const int64_t* lens, \
      const T* weight, const T* c0, const T* outputs, const T* activations, const T* cs, \
      const T* grad_outputs, const T* grad_c_last, const T* grad_log_n_last,             \
      const T* grad_y_last, T* grad_if, T* grad_zo, T* grad_bias, T* grad_c0,            \
      T* grad_log_n0, T* grad_y0) {                                                      \
    scan_backward<T, FACTORS>(                                                           \
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, weight, c0,    \
        outputs, activations, cs, grad_outputs, grad_c_last, grad_log_n_last,            \
        grad_y_last, grad_if, grad_zo, grad_bias, grad_c0, grad_log_n0, grad_y0,         \
        num_threads);                                                                    \
  }

MOXE_SLSTM_SCAN(float, Factors::kFloat, float)
MOXE_SLSTM_SCAN(double, Factors::kFloat, double)
#ifdef __AVX512BF16__
MOXE_SLSTM_SCAN(float, Factors::kBFloat16, rounded)
#endif

extern "C" int moxe_slstm_rows_of_task() { return kRows; }
