// The sLSTM scan of moxe_plugin.nn.native for CPUs; see slstm_scan.py for what it computes.
//
// A head of a cell does not see the others, so each thread takes a head and a few rows of
// the batch through all steps: the head's recurrent matrix then stays in the thread's cache,
// where a loop over time with all heads in each step would read them all anew every time.

#include "bfloat16.h"
#include "vector_math.h"

#include <limits>
#include <type_traits>
#include <vector>

namespace {

using moxe::divide_up;
using moxe::Factors;
using moxe::load;
using moxe::num_places;
using moxe::Sigmoid;
using moxe::store;
using moxe::Vec;
using moxe::Wide;

// The most rows of the batch that a thread takes at a time.
constexpr int kRows = 4;
// Steps that are summed before they are added to the sum of all: the error grows with the length
// of a sum.
constexpr int64_t kSummedSteps = 32;

// The factors of the recurrent products: pairs of bfloat16, to which floats are rounded, or
// floats as they are.
template <typename T, Factors factors>
class Rounded {
 public:
  // Rows of `count` numbers.
  template <typename S>
  void set_rows(const S* from, int64_t num_rows, int64_t count) {
    if constexpr (factors == Factors::kFloat) data_ = from;
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
  template <typename S>
  void set_columns(const S* from, int64_t num_in, int64_t num_out) {
    if constexpr (factors == Factors::kFloat) data_ = from;
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
    for (int r = 0; r < rows; ++r)
      for (int q = 0; q < rows; ++q)
        place[r] += len[q] > len[r] || (len[q] == len[r] && q < r);
  }

  // How many rows have a step t: those in the first places.
  int rows_at(int64_t t) const {
    return static_cast<int>(
        std::count_if(len, len + rows, [t](int64_t steps) { return steps > t; }));
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
  // Where a row is computed: the longest first, so that products leave out those that ended.
  int64_t place[kRows] = {};
  int64_t max_len = 0;
};

// Fetches what the next step reads, which lies too far from this one's for the processor to
// foresee it, while this one's product is computed.
template <typename S>
void fetch(const S* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(S);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

// The pre-activations of a row's gates but for what recurs, (4,dim).
template <typename S>
void add_bias(const S* gates_if, const S* gates_zo, const Wide<S>* bias, int64_t dim,
              Wide<S>* to) {
  moxe::for_each_vector<Wide<S>>(0, 2 * dim, [&](int64_t d, int64_t n) {
    store(load(gates_if + d, n) + load(bias + d, n), to + d, n);
    store(load(gates_zo + d, n) + load(bias + 2 * dim + d, n), to + 2 * dim + d, n);
  });
}

// What a row remembers, (dim) each.
template <typename T>
struct Memory {
  T *c, *log_n, *y;
};

// The share w of what is new, and what is kept of the old.
template <typename T>
struct Shares {
  Vec<T> w, kept;
};

// Of a w near 1 that is rounded to 16 bits, 1 - w would be off: the smaller of both is saved,
// negative if it is what is kept.
template <typename S, typename T>
void save_shares(const Sigmoid<T>& share, S* to, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    store(share.value(), to, n);
  } else {
    const Vec<T> smaller = share.exp * share.at_abs, least(std::numeric_limits<T>::min());
    const Vec<T> kept = at::vec::maximum(smaller, least);
    store(Vec<T>::blendv(kept.neg(), smaller, share.is_negative), to, n);
  }
}

template <typename S, typename T = Wide<S>>
Shares<T> load_shares(const S* from, int64_t n) {
  const Vec<T> saved = load(from, n), one(T(1));
  if constexpr (std::is_same_v<S, T>) {
    return {saved, one - saved};
  } else {
    const Vec<T> smaller = saved.abs(), larger = one - smaller;
    const Vec<T> keeps_less = saved < Vec<T>(T(0));
    return {Vec<T>::blendv(smaller, larger, keeps_less),
            Vec<T>::blendv(larger, smaller, keeps_less)};
  }
}

// Takes a row a step further. gates: (4,dim); saved, (5,dim), may be null.
template <typename S>
void advance(const Wide<S>* gates, int64_t dim, const Memory<Wide<S>>& memory, S* out,
             S* saved) {
  using T = Wide<S>;
  const Vec<T> zero(T(0));

  moxe::for_each_vector<T>(0, dim, [&](int64_t d, int64_t n) {
    const Vec<T> i = load(gates + d, n), f = load(gates + dim + d, n);
    const Sigmoid<T> forget(f);
    const Vec<T> log_forget =
        at::vec::minimum(f, zero) - moxe::log1p_of_share<T>(forget.exp);
    const Vec<T> log_kept = log_forget + load(memory.log_n + d, n);

    const Sigmoid<T> share(i - log_kept);
    const Vec<T> w = share.value();
    store(at::vec::maximum(i, log_kept) + moxe::log1p_of_share<T>(share.exp),
          memory.log_n + d, n);

    const Vec<T> z = moxe::tanh<T>(load(gates + 2 * dim + d, n));
    const Vec<T> old_c = load(memory.c + d, n);
    const Vec<T> difference = z - old_c;
    const Vec<T> new_c = at::vec::fmadd(w, difference, old_c);
    const Vec<T> o = Sigmoid<T>(load(gates + 3 * dim + d, n)).value();
    const Vec<T> new_y = o * new_c;

    store(new_c, memory.c + d, n);
    store(new_y, memory.y + d, n);
    store(new_y, out + d, n);

    if (saved == nullptr) return;

    save_shares(share, saved + d, n);
    store(forget.complement(), saved + dim + d, n);
    store(z, saved + 2 * dim + d, n);
    store(o, saved + 3 * dim + d, n);
    // Of z and c that are rounded, it would lose digits.
    store(difference, saved + 4 * dim + d, n);
  });
}

template <typename S, Factors factors>
void scan_forward(const Shape& s, const S* gates_if, const S* gates_zo,
                  const Wide<S>* bias, const S* weight, const Wide<S>* c0,
                  const Wide<S>* log_n0, const Wide<S>* y0, S* outputs, S* activations,
                  Wide<S>* c_last, Wide<S>* log_n_last, Wide<S>* y_last,
                  int num_threads) {
  using T = Wide<S>;
  const int64_t dim = s.dim;
  const int64_t num_tasks = s.experts * s.heads * divide_up(s.rows, kRows);

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t id = 0; id < num_tasks; ++id) {
    const Task task(s, id);
    std::vector<T> gates(kRows * 4 * dim), y(kRows * dim, T(0)), c(kRows * dim),
        log_n(kRows * dim);
    Rounded<T, factors> recurrent, old_y;
    recurrent.set_columns(weight + task.head * 4 * dim * dim, dim, 4 * dim);

    for (int r = 0; r < task.rows; ++r) {
      const int64_t from = task.state(s, r), own = task.place[r] * dim;
      std::copy_n(y0 + from, dim, &y[own]);
      std::copy_n(c0 + from, dim, &c[own]);
      std::copy_n(log_n0 + from, dim, &log_n[own]);
    }

    for (int64_t t = 0; t < task.max_len; ++t) {
      for (int r = 0; r < task.rows; ++r) {
        if (t >= task.len[r]) continue;

        const int64_t at = task.position(s, r, t) * 2 * dim;
        add_bias(gates_if + at, gates_zo + at, bias + task.head * 4 * dim, dim,
                 &gates[task.place[r] * 4 * dim]);

        if (t + 1 < task.len[r]) {
          const int64_t next = at + 2 * s.heads * dim;
          fetch(gates_if + next, 2 * dim);
          fetch(gates_zo + next, 2 * dim);
        }
      }

      const int rows = task.rows_at(t);
      old_y.set_rows(y.data(), rows, dim);
      multiply(recurrent, dim, 4 * dim, old_y, gates.data(), rows);

      for (int r = 0; r < task.rows; ++r) {
        if (t >= task.len[r]) continue;

        const int64_t at = task.position(s, r, t) * dim, own = task.place[r] * dim;
        advance(&gates[4 * own], dim, {&c[own], &log_n[own], &y[own]},
                outputs + at, activations ? activations + 5 * at : nullptr);
      }
    }

    for (int r = 0; r < task.rows; ++r) {
      const int64_t to = task.state(s, r), own = task.place[r] * dim;
      std::copy_n(&y[own], dim, y_last + to);
      std::copy_n(&c[own], dim, c_last + to);
      std::copy_n(&log_n[own], dim, log_n_last + to);

      for (int64_t t = task.len[r]; t < s.steps; ++t)
        std::fill_n(outputs + task.position(s, r, t) * dim, dim, S(0));
    }
  }
}

// Takes the gradients of what a row remembers a step back; saved: (5,dim). Those of
// pre-activations become `gates`, (4,dim), are written, (2,dim) each, and are added to the
// bias's, (4,dim).
template <typename S>
void revert(const S* saved, const S* out, int64_t dim, const S* grad_out,
            const Memory<Wide<S>>& grads, Wide<S>* gates, S* grad_if, S* grad_zo,
            Wide<S>* of_bias) {
  using T = Wide<S>;
  const Vec<T> one(T(1));

  moxe::for_each_vector<T>(0, dim, [&](int64_t d, int64_t n) {
    const S* from = saved + d;
    const auto [w, kept] = load_shares(from, n);
    const Vec<T> not_f = load(from + dim, n), z = load(from + 2 * dim, n),
                 o = load(from + 3 * dim, n), difference = load(from + 4 * dim, n);

    const Vec<T> dy = load(grads.y + d, n) + load(grad_out + d, n);
    const Vec<T> dc = at::vec::fmadd(dy, o, load(grads.c + d, n));
    const Vec<T> old_dn = load(grads.log_n + d, n);

    const Vec<T> di = w * (dc * kept * difference + old_dn);
    const Vec<T> dn = old_dn - di;

    const auto give = [&](const Vec<T>& x, int64_t gate, S* to) {
      store(x, gates + gate * dim + d, n);
      store(x, to + d, n);
      T* sum = of_bias + gate * dim + d;
      store(load(sum, n) + x, sum, n);
    };
    give(di, 0, grad_if);
    give(dn * not_f, 1, grad_if + dim);
    give(dc * w * (one - z * z), 2, grad_zo);
    give(dy * load(out + d, n) * (one - o), 3, grad_zo + dim);
    store(dc * kept, grads.c + d, n);
    store(dn, grads.log_n + d, n);
  });
}

template <typename S, Factors factors>
void scan_backward(const Shape& s, const S* weight, const S* outputs,
                   const S* activations, const S* grad_outputs,
                   const Wide<S>* grad_c_last, const Wide<S>* grad_log_n_last,
                   const Wide<S>* grad_y_last, S* grad_if, S* grad_zo,
                   Wide<S>* grad_bias, Wide<S>* grad_c0, Wide<S>* grad_log_n0,
                   Wide<S>* grad_y0, int num_threads) {
  using T = Wide<S>;
  const int64_t dim = s.dim;
  const int64_t num_tasks = s.experts * s.heads * divide_up(s.rows, kRows);

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t id = 0; id < num_tasks; ++id) {
    const Task task(s, id);
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
      const int64_t from = task.state(s, r), own = task.place[r] * dim;
      std::copy_n(grad_c_last + from, dim, &grad_c[own]);
      std::copy_n(grad_log_n_last + from, dim, &grad_log_n[own]);

      for (int64_t t = task.len[r]; t < s.steps; ++t) {
        const int64_t at = task.position(s, r, t) * 2 * dim;
        std::fill_n(grad_if + at, 2 * dim, S(0));
        std::fill_n(grad_zo + at, 2 * dim, S(0));
      }
    }

    for (int64_t t = task.max_len - 1; t >= 0; --t) {
      for (int r = 0; r < task.rows; ++r) {
        if (t >= task.len[r]) continue;

        const int64_t at = task.position(s, r, t) * dim, own = task.place[r] * dim;
        T* gy = &grad_y[own];
        if (t == task.len[r] - 1) std::copy_n(grad_y_last + task.state(s, r), dim, gy);

        revert(activations + 5 * at, outputs + at, dim, grad_outputs + at,
               {&grad_c[own], &grad_log_n[own], gy}, &gates[4 * own], grad_if + 2 * at,
               grad_zo + 2 * at, of_bias.data());

        if (t > 0) {
          const int64_t next = at - s.heads * dim;
          fetch(activations + 5 * next, 5 * dim);
          fetch(outputs + next, dim);
          fetch(grad_outputs + next, dim);
        }
      }
      if (t % kSummedSteps == 0) flush(of_bias, grad_bias + id * 4 * dim);

      const int rows = task.rows_at(t);
      std::fill_n(grad_y.data(), rows * dim, T(0));
      of_gates.set_rows(gates.data(), rows, 4 * dim);
      multiply(of_columns, 4 * dim, dim, of_gates, grad_y.data(), rows);
    }

    for (int r = 0; r < task.rows; ++r) {
      const int64_t to = task.state(s, r), own = task.place[r] * dim;
      std::copy_n(&grad_c[own], dim, grad_c0 + to);
      std::copy_n(&grad_log_n[own], dim, grad_log_n0 + to);
      std::copy_n(task.len[r] > 0 ? &grad_y[own] : grad_y_last + to, dim, grad_y0 + to);
    }
  }
}

}  // namespace

// S is the type of rows and of R; all else is as wide as what is computed. grad_bias: a row
// for each task of the way back: experts, heads, kRows rows each.
#define MOXE_SLSTM_SCAN(S, FACTORS, SUFFIX)                                              \
  extern "C" void moxe_slstm_forward_##SUFFIX(                                           \
      const int64_t* shape, int num_threads, const int64_t* begins, const int64_t* lens, \
      const S* gates_if, const S* gates_zo, const Wide<S>* bias, const S* weight,        \
      const Wide<S>* c0, const Wide<S>* log_n0, const Wide<S>* y0, S* outputs,           \
      S* activations, Wide<S>* c_last, Wide<S>* log_n_last, Wide<S>* y_last) {           \
    scan_forward<S, FACTORS>(                                                            \
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, gates_if,      \
        gates_zo, bias, weight, c0, log_n0, y0, outputs, activations, c_last, log_n_last, \
        y_last, num_threads);                                                            \
  }                                                                                      \
  extern "C" void moxe_slstm_backward_##SUFFIX(                                          \
      const int64_t* shape, int num_threads, const int64_t* begins, const int64_t* lens, \
      const S* weight, const S* outputs, const S* activations, const S* grad_outputs,    \
      const Wide<S>* grad_c_last, const Wide<S>* grad_log_n_last,                        \
      const Wide<S>* grad_y_last, S* grad_if, S* grad_zo, Wide<S>* grad_bias,            \
      Wide<S>* grad_c0, Wide<S>* grad_log_n0, Wide<S>* grad_y0) {                        \
    scan_backward<S, FACTORS>(                                                           \
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, weight,        \
        outputs, activations, grad_outputs, grad_c_last, grad_log_n_last, grad_y_last,   \
        grad_if, grad_zo, grad_bias, grad_c0, grad_log_n0, grad_y0, num_threads);        \
  }

MOXE_SLSTM_SCAN(float, Factors::kFloat, float)
MOXE_SLSTM_SCAN(double, Factors::kFloat, double)
#ifdef __AVX512BF16__
MOXE_SLSTM_SCAN(float, Factors::kBFloat16, rounded)
MOXE_SLSTM_SCAN(at::BFloat16, Factors::kBFloat16, bfloat16)
#endif

extern "C" int moxe_slstm_rows_of_task() { return kRows; }
