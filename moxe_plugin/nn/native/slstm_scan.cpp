// The sLSTM scan of moxe_plugin.nn.native for CPUs; see slstm_scan.py for what it computes.
//
// A head of a cell does not see the others, so each thread takes a head and a few rows of
// the batch through all steps: the head's recurrent matrix then stays in the thread's cache,
// where a loop over time with all heads in each step would read them all anew every time.
//
// It is copied to panels: what a step multiplies for some channels lies in the order in which
// it is read, so that the processor fetches it in time. What else the step computes for these
// channels follows at once.

#include "bfloat16.h"
#include "vector_math.h"

#include <array>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
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
constexpr int kGates = 4;
constexpr int kSaved = 5;  // of a channel, for the way back
// Places of a panel that are fetched before they are read.
constexpr int64_t kPlacesAhead = 8;

// Whether there are 32 registers for vectors, else 16.
template <typename T>
constexpr bool kManyRegisters = sizeof(Vec<T>) == 64;
// Of how many vectors of columns sums are in registers: of the gates of some channels, and of
// the channels of gradients.
template <typename T>
constexpr int kGateVecs = kManyRegisters<T> ? kGates : 2;
template <typename T>
constexpr int kMaxVecs = kManyRegisters<T> ? 5 : 2;

// Numbers that vectors are read from without a part in another line of the caches.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : lines_(divide_up(count, kPerLine)) {}

  T* data() { return lines_.data()->numbers; }
  const T* data() const { return lines_.data()->numbers; }

 private:
  static constexpr int64_t kPerLine = 64 / sizeof(T);
  struct alignas(64) Line {
    T numbers[kPerLine] = {};
  };
  std::vector<Line> lines_;
};

// Whether lines of the caches can be written that are not in one, which spares reading them
// and leaves what is read sooner where it is.
inline bool can_stream(const void* to) {
#ifdef __AVX512F__
  return to != nullptr && reinterpret_cast<uintptr_t>(to) % 64 == 0;
#else
  return false;
#endif
}

inline void write_line(const void* from, void* to) {
#ifdef __AVX512F__
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#endif
}

// What is multiplied is kept as: bfloat16, of which a pair is a place, or as it is.
template <typename T, Factors factors>
using Factor = std::conditional_t<factors == Factors::kBFloat16, at::BFloat16, T>;

// A number that is multiplied, rounded where factors are, if storing it would not.
template <Factors factors, typename T>
Vec<T> factor_of(const Vec<T>& x) {
#ifdef __AVX512F__
  if constexpr (factors == Factors::kWidened) return Vec<T>(moxe::round_floats(x));
#endif
  return x;
}

template <typename T, Factors factors>
inline Vec<T> add_products(const Vec<T>& sum, const Vec<T>& x, const Vec<T>& y) {
#ifdef __AVX512BF16__
  if constexpr (factors == Factors::kBFloat16)
    return Vec<T>(moxe::add_products<factors>(sum, x, y));
#endif
  return at::vec::fmadd(x, y, sum);
}

// out (Rows,Vecs*width) = x (Rows,num_places) @ panel (num_places,Vecs*width)
template <typename T, Factors factors, int Rows, int Vecs>
void multiply_panel(const T* panel, int64_t num_places, const T* x, int64_t x_row, T* out,
                    int64_t out_row) {
  constexpr int64_t width = Vec<T>::size();

  Vec<T> sums[Rows][Vecs];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) sums[r][v] = Vec<T>(T(0));

  for (int64_t i = 0; i < num_places; ++i, panel += Vecs * width) {
    Vec<T> weights[Vecs];
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      __builtin_prefetch(panel + kPlacesAhead * Vecs * width + v * width);
      weights[v] = Vec<T>::loadu(panel + v * width);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> value(x[r * x_row + i]);
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v)
        sums[r][v] = add_products<T, factors>(sums[r][v], value, weights[v]);
    }
  }

#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) sums[r][v].store(out + r * out_row + v * width);
}

// Calls f with a number from 1 to `max` that is known when it is compiled.
template <int max, typename F>
void with_constant(int64_t number, const F& f) {
  if constexpr (max > 1)
    if (number < max) return with_constant<max - 1>(number, f);
  f(std::integral_constant<int, max>{});
}

template <typename F, int... R>
auto list_of_rows(const F& f, std::integer_sequence<int, R...>) {
  return std::array<decltype(f(0)), sizeof...(R)>{f(R)...};
}

// What f returns of each row.
template <int Rows, typename F>
auto of_rows(const F& f) {
  return list_of_rows(f, std::make_integer_sequence<int, Rows>{});
}

// Rows of the batch and their channels. A row is a run of positions from begins[row] on;
// `steps` positions are its own, of which those from lens[row] on are padding.
struct Shape {
  int64_t experts, heads, rows, steps, dim;
  const int64_t *begins, *lens;

  int64_t blocks() const { return divide_up(rows, kRows); }
  int64_t num_tasks() const { return experts * heads * blocks(); }
};

// Rows of a head, the longest first, so that those that have a step are the first ones.
struct Task {
  Task(const Shape& s, int64_t task)
      : head(task / s.blocks()), expert(head / s.heads), head_in_expert(head % s.heads) {
    const int64_t first = expert * s.rows + task % s.blocks() * kRows;
    rows = static_cast<int>(std::min<int64_t>(kRows, (expert + 1) * s.rows - first));
    std::iota(row, row + rows, first);
    std::stable_sort(row, row + rows,
                     [&](int64_t x, int64_t y) { return s.lens[x] > s.lens[y]; });
    for (int r = 0; r < rows; ++r) {
      begin[r] = s.begins[row[r]];
      len[r] = s.lens[row[r]];
      num_steps += len[r];
    }
  }

  // How many rows have a step t.
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
    return (row[r] * s.heads + head_in_expert) * s.dim;
  }

  int64_t head, expert, head_in_expert;
  int rows;
  int64_t row[kRows] = {}, begin[kRows] = {}, len[kRows] = {};
  int64_t num_steps = 0;  // of all rows
};

// Those with the most steps first: threads are done at nearly the same time.
std::vector<int64_t> order_tasks(const Shape& s) {
  std::vector<int64_t> order(s.num_tasks()), num_steps;
  for (int64_t id = 0; id < s.num_tasks(); ++id)
    num_steps.push_back(Task(s, id).num_steps);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    return num_steps[x] > num_steps[y];
  });
  return order;
}

// Fetches channels of some rows.
template <bool writes, typename S>
void fetch(S* from, int64_t num_rows, int64_t next_row) {
  for (int64_t i = 0; i < num_rows; ++i) __builtin_prefetch(from + i * next_row, writes);
}

// Calls f with how many channels there are from `d` on, at most a vector: mostly with a
// constant.
template <typename T, typename F>
void with_count(int64_t d, int64_t dim, const F& f) {
  constexpr int64_t width = Vec<T>::size();
  if (d + width <= dim)
    f(std::integral_constant<int64_t, width>{});
  else
    f(dim - d);
}

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

// What the scan reads and writes, see slstm_scan.py.
template <typename S>
struct Forward {
  const S *gates_if, *gates_zo;
  const Wide<S>* bias;
  const S* weight;
  const Wide<S> *c0, *log_n0, *y0;
  S *outputs, *activations;  // `activations` may be null.
  Wide<S> *c_last, *log_n_last, *y_last;
};

// A thread's share of the scan: a task at a time.
template <typename S, Factors factors>
class ForwardScan {
 public:
  using T = Wide<S>;

  ForwardScan(const Shape& s, const Forward<S>& data)
      : s_(s),
        data_(data),
        num_places_(num_places(s.dim, factors)),
        panels_(divide_up(s.dim, kWidth) * kGates * num_places_ * kWidth),
        c_(kRows * s.dim),
        log_n_(kRows * s.dim),
        y_(kRows * s.dim),
        old_y_(kRows * num_places_),
        new_y_(kRows * num_places_),
        staged_(kRows * kSaved * kLine),
        streams_(can_stream(data.activations) && s.dim % kLine == 0) {}

  void run(const Task& task) {
    const int64_t dim = s_.dim;
    pack(data_.weight + task.head * kGates * dim * dim);

    for (int r = 0; r < task.rows; ++r) {
      const int64_t from = task.state(s_, r);
      std::copy_n(data_.c0 + from, dim, c_.data() + r * dim);
      std::copy_n(data_.log_n0 + from, dim, log_n_.data() + r * dim);
      std::copy_n(data_.y0 + from, dim, y_.data() + r * dim);
      for (int64_t d = 0; d < dim; d += kWidth)
        with_count<T>(d, dim, [&](auto n) {
          const Vec<T> y = load(y_.data() + r * dim + d, n);
          store(factor_of<factors>(y), factors_of(old_y_, r) + d, n);
        });
    }

    for (int64_t t = 0; task.rows_at(t) > 0; ++t) {
      with_constant<kRows>(task.rows_at(t), [&](auto rows) {
        for (int64_t d = 0; d < dim; d += kWidth) step<decltype(rows)::value>(task, t, d);
      });
      std::swap(old_y_, new_y_);
    }

    if (streams_) _mm_sfence();

    for (int r = 0; r < task.rows; ++r) {
      const int64_t to = task.state(s_, r);
      std::copy_n(c_.data() + r * dim, dim, data_.c_last + to);
      std::copy_n(log_n_.data() + r * dim, dim, data_.log_n_last + to);
      std::copy_n(y_.data() + r * dim, dim, data_.y_last + to);

      for (int64_t t = task.len[r]; t < s_.steps; ++t)
        std::fill_n(data_.outputs + task.position(s_, r, t) * dim, dim, S(0));
    }
  }

 private:
  static constexpr int64_t kWidth = Vec<T>::size();
  static constexpr int kVecs = kGateVecs<T>;
  static constexpr int64_t kLine = 64 / sizeof(S);

  // (num_in,4,dim): to panels of a vector of channels of some gates each.
  void pack(const S* weight) {
    const int64_t dim = s_.dim, row = kGates * dim;
    for (int64_t i = 0; i < num_places_; ++i)
      for (int gate = 0; gate < kGates; ++gate)
        for (int64_t d = 0; d < dim; d += kWidth) {
          const int64_t count = std::min(kWidth, dim - d);
          T* to = panels_.data() +
                  ((d / kWidth * kGates + gate / kVecs * kVecs) * num_places_ +
                   i * kVecs + gate % kVecs) *
                      kWidth;
          if constexpr (factors == Factors::kFloat)
            std::copy_n(weight + i * row + gate * dim + d, count, to);
#ifdef __AVX512F__
          if constexpr (factors == Factors::kWidened)
            moxe::round_row(weight + i * row + gate * dim + d, count, to);
          if constexpr (factors == Factors::kBFloat16) {
            const S* from = weight + 2 * i * row + gate * dim + d;
            moxe::pair_rows(from, 2 * i + 1 < dim ? from + row : nullptr, count, to);
          }
#endif
        }
  }

  // A step of the channels of a vector.
  template <int Rows>
  void step(const Task& task, int64_t t, int64_t d) {
    const int64_t dim = s_.dim;
    T recurrent[Rows * kGates * kWidth];
    fetch_step(task, t, d, Rows);
    for (int gate = 0; gate < kGates; gate += kVecs)
      multiply_panel<T, factors, Rows, kVecs>(
          panels_.data() + (d / kWidth * kGates + gate) * num_places_ * kWidth,
          num_places_, old_y_.data(), num_places_, recurrent + gate * kWidth,
          kGates * kWidth);

    with_count<T>(d, dim,
                  [&](auto count) { advance<Rows>(task, t, d, recurrent, count); });
  }

  // Takes channels of rows a step further. Each function is computed of all rows before the
  // next one, which waits for it.
  template <int Rows, typename Count>
  __attribute__((flatten)) void advance(const Task& task, int64_t t, int64_t d,
                                        const T* recurrent, Count n) {
    const int64_t dim = s_.dim;
    const Vec<T> zero(T(0));
    T *log_n = log_n_.data() + d, *c = c_.data() + d, *last_y = y_.data() + d;
    int64_t at[Rows];
    for (int r = 0; r < Rows; ++r) at[r] = task.position(s_, r, t) * dim + d;

    const auto gates = [&](int gate, const S* from) {
      const T* bias = data_.bias + (task.head * kGates + gate) * dim + d;
      return of_rows<Rows>([&](int r) {
        return load(from + 2 * at[r] - d + gate % 2 * dim, n) + load(bias, n) +
               Vec<T>::loadu(recurrent + (r * kGates + gate) * kWidth);
      });
    };
    const auto f = gates(1, data_.gates_if);
    const auto forget = of_rows<Rows>([&](int r) { return Sigmoid<T>(f[r]); });
    const auto log_kept = of_rows<Rows>([&](int r) {
      return at::vec::minimum(f[r], zero) - moxe::log1p_of_share<T>(forget[r].exp) +
             load(log_n + r * dim, n);
    });
    const auto i = gates(0, data_.gates_if);
    const auto share =
        of_rows<Rows>([&](int r) { return Sigmoid<T>(i[r] - log_kept[r]); });
    for (int r = 0; r < Rows; ++r)
      store(at::vec::maximum(i[r], log_kept[r]) + moxe::log1p_of_share<T>(share[r].exp),
            log_n + r * dim, n);

    const auto in_z = gates(2, data_.gates_zo);
    const auto z = of_rows<Rows>([&](int r) { return moxe::tanh<T>(in_z[r]); });
    const auto in_o = gates(3, data_.gates_zo);
    const auto o = of_rows<Rows>([&](int r) { return Sigmoid<T>(in_o[r]).value(); });

    for (int r = 0; r < Rows; ++r) {
      const Vec<T> old_c = load(c + r * dim, n), difference = z[r] - old_c,
                   new_c = at::vec::fmadd(share[r].value(), difference, old_c),
                   y = o[r] * new_c;
      store(new_c, c + r * dim, n);
      store(y, last_y + r * dim, n);
      store(factor_of<factors>(y), factors_of(new_y_, r) + d, n);
      store(y, data_.outputs + at[r], n);

      if (data_.activations == nullptr) continue;

      S* saved = streams_ ? staged_.data() + r * kSaved * kLine + d % kLine
                          : data_.activations + kSaved * at[r] - (kSaved - 1) * d;
      const int64_t next = streams_ ? kLine : dim;
      save_shares(share[r], saved, n);
      store(forget[r].complement(), saved + next, n);
      store(z[r], saved + 2 * next, n);
      store(o[r], saved + 3 * next, n);
      // Of z and c that are rounded, it would lose digits.
      store(difference, saved + 4 * next, n);
    }

    if (streams_ && (d + kWidth) % kLine == 0)
      for (int r = 0; r < Rows; ++r)
        for (int k = 0; k < kSaved; ++k)
          write_line(staged_.data() + (r * kSaved + k) * kLine,
                     data_.activations + kSaved * (at[r] - d) + k * dim + d + kWidth - kLine);
  }

  // Fetches what the next step reads or writes, which lies too far from this one's for the
  // processor to foresee it, while this one's products are computed.
  void fetch_step(const Task& task, int64_t t, int64_t d, int rows) {
    const int64_t dim = s_.dim;
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (task.position(s_, r, t) + s_.heads) * dim;
      fetch<false>(data_.gates_if + 2 * at + d, 2, dim);
      fetch<false>(data_.gates_zo + 2 * at + d, 2, dim);
      fetch<true>(data_.outputs + at + d, 1, dim);
    }
  }

  // Of a row.
  Factor<T, factors>* factors_of(Aligned<T>& places, int r) {
    return reinterpret_cast<Factor<T, factors>*>(places.data() + r * num_places_);
  }

  const Shape& s_;
  const Forward<S>& data_;
  int64_t num_places_;
  Aligned<T> panels_, c_, log_n_, y_, old_y_, new_y_;
  // What is saved of a step, until it fills lines of the caches.
  Aligned<S> staged_;
  bool streams_;
};

template <typename S, Factors factors>
void scan_forward(const Shape& s, int num_threads, const Forward<S>& data) {
  const std::vector<int64_t> order = order_tasks(s);

#pragma omp parallel num_threads(num_threads)
  {
    ForwardScan<S, factors> scan(s, data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < s.num_tasks(); ++i) scan.run(Task(s, order[i]));
  }
}

// What the way back reads and writes. `grad_bias` has a row for each task.
template <typename S>
struct Backward {
  const S *weight, *outputs, *activations, *grad_outputs;
  const Wide<S> *grad_c_last, *grad_log_n_last, *grad_y_last;
  S *grad_if, *grad_zo;
  Wide<S> *grad_bias, *grad_c0, *grad_log_n0, *grad_y0;
};

// A thread's share of the way back.
template <typename S, Factors factors>
class BackwardScan {
 public:
  using T = Wide<S>;

  BackwardScan(const Shape& s, const Backward<S>& data)
      : s_(s),
        data_(data),
        num_vecs_(divide_up(s.dim, kWidth)),
        panel_vecs_(divide_up(num_vecs_, divide_up(num_vecs_, kMaxVecs<T>))),
        num_places_(num_places(kGates * s.dim, factors)),
        rounded_(factors == Factors::kFloat ? 0 : s.dim * num_places_),
        panels_(num_vecs_ * num_places_ * kWidth),
        grad_c_(kRows * s.dim),
        grad_log_n_(kRows * s.dim),
        of_bias_(kGates * s.dim),
        old_gates_(kRows * num_places_),
        new_gates_(kRows * num_places_) {}

  void run(const Task& task, T* grad_bias) {
    const int64_t dim = s_.dim;
    pack(data_.weight + task.head * kGates * dim * dim);
    std::fill_n(grad_bias, kGates * dim, T(0));

    for (int r = 0; r < task.rows; ++r) {
      const int64_t from = task.state(s_, r);
      std::copy_n(data_.grad_c_last + from, dim, grad_c_.data() + r * dim);
      std::copy_n(data_.grad_log_n_last + from, dim, grad_log_n_.data() + r * dim);

      for (int64_t t = task.len[r]; t < s_.steps; ++t) {
        const int64_t at = task.position(s_, r, t) * 2 * dim;
        std::fill_n(data_.grad_if + at, 2 * dim, S(0));
        std::fill_n(data_.grad_zo + at, 2 * dim, S(0));
      }
    }

    int later_rows = 0;  // that have the step after
    for (int64_t t = task.len[0] - 1; t >= 0; --t) {
      const int rows = task.rows_at(t);
      for_each_panel(later_rows, [&](int64_t d, int64_t end, const T* grad_y) {
        for (; d < end; d += kWidth, grad_y += kWidth)
          with_count<T>(d, dim, [&](auto count) {
            revert(task, t, rows, later_rows, d, grad_y, count);
          });
      });
      std::swap(old_gates_, new_gates_);
      later_rows = rows;
      if (t % kSummedSteps == 0) flush(grad_bias);
    }

    for_each_panel(later_rows, [&](int64_t d, int64_t end, const T* grad_y) {
      for (int r = 0; r < later_rows; ++r)
        std::copy_n(grad_y + r * kGradRow, std::min(end, dim) - d,
                    data_.grad_y0 + task.state(s_, r) + d);
    });
    for (int r = 0; r < task.rows; ++r) {
      const int64_t to = task.state(s_, r);
      std::copy_n(grad_c_.data() + r * dim, dim, data_.grad_c0 + to);
      std::copy_n(grad_log_n_.data() + r * dim, dim, data_.grad_log_n0 + to);
      if (task.len[r] == 0)
        std::copy_n(data_.grad_y_last + to, dim, data_.grad_y0 + to);
    }
  }

 private:
  static constexpr int64_t kWidth = Vec<T>::size();
  static constexpr int64_t kGradRow = kMaxVecs<T> * kWidth;

  // (dim,4,dim), transposed: to panels of some vectors of its rows.
  void pack(const S* weight) {
    const int64_t dim = s_.dim;
    const T* places;
    if constexpr (factors == Factors::kFloat) places = weight;
#ifdef __AVX512F__
    if constexpr (factors != Factors::kFloat) {
      for (int64_t i = 0; i < dim; ++i) {
        const S* from = weight + i * kGates * dim;
        T* to = rounded_.data() + i * num_places_;
        if (factors == Factors::kBFloat16)
          moxe::pair_row(from, kGates * dim, to);
        else
          moxe::round_row(from, kGates * dim, to);
      }
      places = rounded_.data();
    }
#endif
    for (int64_t vec = 0; vec < num_vecs_; ++vec) {
      const int64_t first = vec / panel_vecs_ * panel_vecs_,
                    vecs = std::min(panel_vecs_, num_vecs_ - first),
                    count = std::min(kWidth, dim - vec * kWidth);
      T* to = panels_.data() + (first * num_places_ + vec - first) * kWidth;
      for (int64_t i = 0; i < num_places_; i += kWidth)
        at::vec::transpose_mxn<T>(places + vec * kWidth * num_places_ + i, num_places_,
                                  to + i * vecs * kWidth, vecs * kWidth, count,
                                  std::min(kWidth, num_places_ - i));
    }
  }

  // Calls f(begin, end, gradients) of channels, with those of the outputs that the next step
  // of some rows has read.
  template <typename F>
  void for_each_panel(int rows, const F& f) {
    T grad_y[kRows * kGradRow];
    for (int64_t first = 0; first < num_vecs_; first += panel_vecs_) {
      const int64_t vecs = std::min(panel_vecs_, num_vecs_ - first);
      if (rows > 0)
        with_constant<kRows>(rows, [&](auto num_rows) {
          with_constant<kMaxVecs<T>>(vecs, [&](auto num_vecs) {
            multiply_panel<T, factors, decltype(num_rows)::value,
                           decltype(num_vecs)::value>(
                panels_.data() + first * num_places_ * kWidth, num_places_,
                old_gates_.data(), num_places_, grad_y, kGradRow);
          });
        });
      f(first * kWidth, (first + vecs) * kWidth, grad_y);
    }
  }

  // Takes the gradients of channels a step back. Those of pre-activations are written, kept to
  // be multiplied, and added to the bias's.
  template <typename Count>
  void revert(const Task& task, int64_t t, int rows, int later_rows, int64_t d,
              const T* later_grad_y, Count n) {
    const int64_t dim = s_.dim, last_step = s_.heads * dim;
    const Vec<T> one(T(1));
    Vec<T> of_bias[kGates];
    for (int gate = 0; gate < kGates; ++gate)
      of_bias[gate] = load(of_bias_.data() + gate * dim + d, n);

    for (int r = 0; r < rows; ++r) {
      const int64_t at = task.position(s_, r, t) * dim;
      const S *from = data_.activations + 5 * at + d, *out = data_.outputs + at + d,
              *grad_out = data_.grad_outputs + at + d;
      if (t > 0) {
        fetch<false>(from - 5 * last_step, 5, dim);
        fetch<false>(out - last_step, 1, dim);
        fetch<false>(grad_out - last_step, 1, dim);
      }

      const auto [w, kept] = load_shares(from, n);
      const Vec<T> not_f = load(from + dim, n), z = load(from + 2 * dim, n),
                   o = load(from + 3 * dim, n), difference = load(from + 4 * dim, n);

      const Vec<T> of_y = r < later_rows
                              ? Vec<T>::loadu(later_grad_y + r * kGradRow)
                              : load(data_.grad_y_last + task.state(s_, r) + d, n);
      const Vec<T> dy = of_y + load(grad_out, n);
      T *grad_c = grad_c_.data() + r * dim + d, *grad_log_n = grad_log_n_.data() + r * dim + d;
      const Vec<T> dc = at::vec::fmadd(dy, o, load(grad_c, n));
      const Vec<T> old_dn = load(grad_log_n, n);

      const Vec<T> di = w * (dc * kept * difference + old_dn);
      const Vec<T> dn = old_dn - di;

      auto* factors_of_row = reinterpret_cast<Factor<T, factors>*>(
          new_gates_.data() + r * num_places_);
      const auto give = [&](const Vec<T>& x, int gate, S* to) {
        store(factor_of<factors>(x), factors_of_row + gate * dim + d, n);
        store(x, to + 2 * at + gate % 2 * dim + d, n);
        of_bias[gate] = of_bias[gate] + x;
      };
      give(di, 0, data_.grad_if);
      give(dn * not_f, 1, data_.grad_if);
      give(dc * w * (one - z * z), 2, data_.grad_zo);
      give(dy * load(out, n) * (one - o), 3, data_.grad_zo);
      store(dc * kept, grad_c, n);
      store(dn, grad_log_n, n);
    }

    for (int gate = 0; gate < kGates; ++gate)
      store(of_bias[gate], of_bias_.data() + gate * dim + d, n);
  }

  // Adds the sum of some steps to that of all.
  void flush(T* grad_bias) {
    for (int64_t i = 0; i < kGates * s_.dim; ++i) {
      grad_bias[i] += of_bias_.data()[i];
      of_bias_.data()[i] = T(0);
    }
  }

  const Shape& s_;
  const Backward<S>& data_;
  int64_t num_vecs_, panel_vecs_, num_places_;
  Aligned<T> rounded_, panels_, grad_c_, grad_log_n_, of_bias_, old_gates_, new_gates_;
};

template <typename S, Factors factors>
void scan_backward(const Shape& s, int num_threads, const Backward<S>& data) {
  const std::vector<int64_t> order = order_tasks(s);

#pragma omp parallel num_threads(num_threads)
  {
    BackwardScan<S, factors> scan(s, data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < s.num_tasks(); ++i)
      scan.run(Task(s, order[i]), data.grad_bias + order[i] * kGates * s.dim);
  }
}

// What each step has read: the output before it, or that of the memory.
template <typename S>
void shift_outputs(const Shape& s, int num_threads, const S* outputs, const Wide<S>* y0,
                   S* old) {
  const int64_t width = s.heads * s.dim;

#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < s.experts * s.rows; ++row) {
    const int64_t len = s.lens[row], end = std::max(len, s.steps);
    S* to = old + s.begins[row] * width;
    if (len > 0) {
      std::copy_n(y0 + row * width, width, to);
      std::copy_n(outputs + s.begins[row] * width, (len - 1) * width, to + width);
    }
    std::fill_n(to + len * width, (end - len) * width, S(0));
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
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, num_threads,   \
        {gates_if, gates_zo, bias, weight, c0, log_n0, y0, outputs, activations, c_last, \
         log_n_last, y_last});                                                           \
  }                                                                                      \
  extern "C" void moxe_slstm_shift_##SUFFIX(                                             \
      const int64_t* shape, int num_threads, const int64_t* begins, const int64_t* lens, \
      const S* outputs, const Wide<S>* y0, S* old) {                                     \
    shift_outputs<S>(                                                                    \
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, num_threads,   \
        outputs, y0, old);                                                               \
  }                                                                                      \
  extern "C" void moxe_slstm_backward_##SUFFIX(                                          \
      const int64_t* shape, int num_threads, const int64_t* begins, const int64_t* lens, \
      const S* weight, const S* outputs, const S* activations, const S* grad_outputs,    \
      const Wide<S>* grad_c_last, const Wide<S>* grad_log_n_last,                        \
      const Wide<S>* grad_y_last, S* grad_if, S* grad_zo, Wide<S>* grad_bias,            \
      Wide<S>* grad_c0, Wide<S>* grad_log_n0, Wide<S>* grad_y0) {                        \
    scan_backward<S, FACTORS>(                                                           \
        {shape[0], shape[1], shape[2], shape[3], shape[4], begins, lens}, num_threads,   \
        {weight, outputs, activations, grad_outputs, grad_c_last, grad_log_n_last,       \
         grad_y_last, grad_if, grad_zo, grad_bias, grad_c0, grad_log_n0, grad_y0});      \
  }

MOXE_SLSTM_SCAN(float, Factors::kFloat, float)
MOXE_SLSTM_SCAN(double, Factors::kFloat, double)
#ifdef __AVX512F__
MOXE_SLSTM_SCAN(float, Factors::kWidened, rounded_widened)
MOXE_SLSTM_SCAN(at::BFloat16, Factors::kWidened, bfloat16_widened)
#endif
#ifdef __AVX512BF16__
MOXE_SLSTM_SCAN(float, Factors::kBFloat16, rounded)
MOXE_SLSTM_SCAN(at::BFloat16, Factors::kBFloat16, bfloat16)
#endif

extern "C" int moxe_slstm_rows_of_task() { return kRows; }
