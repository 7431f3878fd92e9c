// The causal convolution of moxe_plugin.nn.native for CPUs; see causal_conv.py for what it
// computes.
//
// It is bound by memory, so each row is read and written once, with all taps at a time.
// Channels do not see each other: the threads share rows on the way forward, and channels on
// the way back, where each walks all rows of an expert in their order. So no sum depends on
// the number of threads. For the usual number of taps, some channels at a time walk the steps
// of a run, and what they need again stays in registers.

#include "integers.h"
#include "vector_math.h"

#include <vector>

namespace {

using moxe::divide_up;
using moxe::for_each_vector;
using moxe::load;
using moxe::Silu;
using moxe::store;
using moxe::Vec;
using moxe::Wide;

// The rows that a thread takes at a time on the way forward, and that are summed before they
// are added to the sum of all: the error grows with the length of a sum.
constexpr int64_t kRows = 64;
// The fewest channels that a thread takes at a time on the way back: some lines of the cache.
constexpr int64_t kMinChannels = 64;
// So many tasks a thread that none waits for long.
constexpr int64_t kTasksPerThread = 2;

// Experts have `runs` runs of rows each, one after the other, of `lens` rows.
struct Shape {
  int64_t experts, runs, taps, dim;
  bool activates;  // whether results are silu of the sums
  const int64_t* lens;
};

// Rows of `dim` channels, `stride` apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

// A run, and what comes before it: `taps - 1` rows of its window, or zeros.
template <typename T>
struct Run {
  Run(const Shape& s, int64_t index, int64_t begin, Rows<const T> x, const T* windows)
      : index(index),
        expert(index / s.runs),
        begin(begin),
        len(s.lens[index]),
        x(x),
        before(s.taps - 1),
        window(windows == nullptr ? nullptr : windows + index * before * s.dim),
        dim(s.dim) {}

  // What the first tap meets at `step` is `taps - 1` steps before it, the last tap's is
  // there. Null where nothing was.
  const T* input(int64_t step, int64_t tap) const {
    const int64_t at = step - before + tap;
    if (at >= 0) return x[begin + at];
    return window == nullptr ? nullptr : window + (step + tap) * dim;
  }

  int64_t index, expert, begin, len;
  Rows<const T> x;
  int64_t before;
  const T* window;
  int64_t dim;
};

// What the taps meet at a step of a run; those before `first` meet nothing.
template <typename T>
struct Inputs {
  explicit Inputs(int64_t taps) : rows(taps) {}

  void find(const Run<T>& run, int64_t step) {
    const int64_t taps = rows.size();
    for (int64_t k = 0; k < taps; ++k) rows[k] = run.input(step, k);
    for (first = 0; first < taps && rows[first] == nullptr;) ++first;
  }

  // The sum over taps, for `count` channels from `d` on.
  Vec<Wide<T>> convolve(const Shape& s, const T* w, const T* b, int64_t d,
                        int64_t count) const {
    Vec<Wide<T>> sum = load(b + d, count);
    for (int64_t k = first; k < s.taps; ++k)
      sum = at::vec::fmadd(load(rows[k] + d, count), load(w + k * s.dim + d, count), sum);
    return sum;
  }

  std::vector<const T*> rows;
  int64_t first = 0;
};

template <typename T>
std::vector<Run<T>> find_runs(const Shape& s, Rows<const T> x, const T* windows) {
  std::vector<Run<T>> runs;
  runs.reserve(s.experts * s.runs);
  int64_t begin = 0;
  for (int64_t i = 0; i < s.experts * s.runs; ++i) {
    runs.emplace_back(s, i, begin, x, windows);
    begin += s.lens[i];
  }

  return runs;
}

// to += from, and from = 0.
template <typename T>
void flush(T* from, T* to, int64_t count) {
  for_each_vector<T>(0, count, [&](int64_t d, int64_t n) {
    store(load(to + d, n) + load(from + d, n), to + d, n);
  });
  std::fill_n(from, count, T(0));
}

// The taps that blocks have, for which the walks below are compiled.
constexpr int64_t kUsualTaps = 4;
// Vectors of channels of a walk: one or two lines of the cache.
constexpr int64_t kWalked = 2;
// How many steps ahead of a walk numbers are fetched: its rows are on different pages.
constexpr int64_t kAhead = 8;

// V vectors; the one of V = 1 may be of fewer channels, `count`.
template <typename W, int64_t V>
struct Lanes {
  Lanes() {
    for (int64_t v = 0; v < V; ++v) at[v] = Vec<W>(W(0));
  }

  template <typename T>
  static Lanes read(const T* from, int64_t count) {
    Lanes lanes;
    for (int64_t v = 0; v < V; ++v)
      lanes.at[v] = load(from + v * Vec<W>::size(), size_of(count));
    return lanes;
  }

  template <typename T>
  void write(T* to, int64_t count) const {
    for (int64_t v = 0; v < V; ++v) store(at[v], to + v * Vec<W>::size(), size_of(count));
  }

  // Known when it is compiled, if it can be.
  static constexpr int64_t size_of(int64_t count) { return V > 1 ? Vec<W>::size() : count; }

  // += x y
  void add(const Lanes& x, const Lanes& y) {
    for (int64_t v = 0; v < V; ++v) at[v] = at::vec::fmadd(x.at[v], y.at[v], at[v]);
  }

  void add(const Lanes& x) {
    for (int64_t v = 0; v < V; ++v) at[v] = at[v] + x.at[v];
  }

  Vec<W> at[V];
};

// The taps of V vectors of channels, which walk the steps of runs: what they meet stays in
// registers.
template <typename T, int64_t V>
struct Walk {
  using L = Lanes<Wide<T>, V>;
  static constexpr int64_t taps = kUsualTaps;

  // w, b: an expert's, from the first channel on.
  Walk(const T* w, const T* b, int64_t dim, int64_t count)
      : bias(L::read(b, count)), count(count) {
    for (int64_t k = 0; k < taps; ++k) weight[k] = L::read(w + k * dim, count);
  }

  // Finds the inputs before a step of a run, for channels from `d` on.
  void begin(const Run<T>& run, int64_t step, int64_t d) {
    for (int64_t k = 0; k + 1 < taps; ++k) {
      const T* input = run.input(step, k);
      inputs[k] = input == nullptr ? L() : L::read(input + d, count);
    }
  }

  // Meets the next input, and returns the sum over taps.
  L meet(const T* input) {
    inputs[taps - 1] = L::read(input, count);
    L sum = bias;
    for (int64_t k = 0; k < taps; ++k) sum.add(inputs[k], weight[k]);
    return sum;
  }

  void forget_first() {
    for (int64_t k = 0; k + 1 < taps; ++k) inputs[k] = inputs[k + 1];
  }

  L weight[taps], bias, inputs[taps];
  int64_t count;
};

// Calls f(d, count, V) for channels from `begin` to `end`: V vectors of `count` channels,
// V a compile-time constant.
template <typename T, typename F>
void for_each_walk(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t size = Vec<Wide<T>>::size();
  int64_t d = begin;
  for (; d + kWalked * size <= end; d += kWalked * size)
    f(d, size, std::integral_constant<int64_t, kWalked>());
  for (; d + size <= end; d += size) f(d, size, std::integral_constant<int64_t, 1>());
  if (d < end) f(d, end - d, std::integral_constant<int64_t, 1>());
}

// Results of the steps from `first` to `end` of a run; out: its first row.
template <typename T>
void walk_forward(const Shape& s, const Run<T>& run, int64_t first, int64_t end, const T* w,
                  const T* b, T* out) {
  const Rows<const T> x = {run.x[run.begin], run.x.stride};
  const int64_t dim = s.dim;
  const bool activates = s.activates;

  for_each_walk<T>(0, dim, [&](int64_t d, int64_t n, auto vectors) {
    Walk<T, vectors> walk(w + d, b + d, dim, n);
    walk.begin(run, first, d);
    for (int64_t t = first; t < end; ++t) {
      __builtin_prefetch(x[t + kAhead] + d);
      auto sum = walk.meet(x[t] + d);
      if (activates)
        for (Vec<Wide<T>>& y : sum.at) y = Silu<Wide<T>>(y).value();
      sum.write(out + t * dim + d, n);
      walk.forget_first();
    }
  });
}

template <typename T>
void convolve_forward(const Shape& s, Rows<const T> x, const T* windows, const T* weight,
                      const T* bias, T* out, int num_threads) {
  struct Task {
    const Run<T>* run;
    int64_t first;
  };

  const std::vector<Run<T>> runs = find_runs(s, x, windows);
  std::vector<Task> tasks;
  for (const Run<T>& run : runs)
    for (int64_t first = 0; first < run.len; first += kRows) tasks.push_back({&run, first});
  const int64_t num_tasks = tasks.size();

#pragma omp parallel for num_threads(num_threads) if (num_tasks > 1)
  for (int64_t id = 0; id < num_tasks; ++id) {
    const Run<T>& run = *tasks[id].run;
    const T* w = weight + run.expert * s.taps * s.dim;
    const T* b = bias + run.expert * s.dim;
    const int64_t end = std::min(tasks[id].first + kRows, run.len);
    // Wide numbers are bound by memory, which rows are read from in order.
    if (s.taps == kUsualTaps && !std::is_same_v<T, Wide<T>>) {
      walk_forward(s, run, tasks[id].first, end, w, b, out + run.begin * s.dim);
      continue;
    }
    Inputs<T> inputs(s.taps);

    for (int64_t t = tasks[id].first; t < end; ++t) {
      inputs.find(run, t);
      T* to = out + (run.begin + t) * s.dim;

      for_each_vector<Wide<T>>(0, s.dim, [&](int64_t d, int64_t n) {
        const Vec<Wide<T>> sum = inputs.convolve(s, w, b, d, n);
        store(s.activates ? Silu<Wide<T>>(sum).value() : sum, to + d, n);
      });
    }
  }
}

// What is computed on the way back; null where it is not asked for.
template <typename T>
struct Gradients {
  T *x, *windows, *weight, *bias;
  bool adds_to_x;
};

// Channels of an expert.
struct Block {
  int64_t expert, begin, end;
};

// to = or += the sum over taps of the gradients that the step `at` of a run gets from later
// ones. Steps below 0 are those of the window. `grad` are the block's, from the run's first on.
template <typename T, typename G>
void sum_taps(const Shape& s, const Run<T>& run, Rows<const G> grad, const T* w, int64_t at,
              const Block& block, T* to, bool adds) {
  // Tap k is met at the step `at + taps - 1 - k` of the run.
  const int64_t last = at + s.taps - 1;
  const int64_t first_tap = std::max<int64_t>(0, last - run.len + 1);
  const int64_t end_tap = std::min(s.taps, last + 1);
  // Copies, which the compiler knows that no store changes.
  const int64_t dim = s.dim, count = block.end - block.begin;
  w += block.begin;
  to += block.begin;

  for_each_vector<Wide<T>>(0, count, [=](int64_t d, int64_t n) {
    Vec<Wide<T>> sum = adds ? load(to + d, n) : Vec<Wide<T>>(Wide<T>(0));
    for (int64_t k = first_tap; k < end_tap; ++k)
      sum = at::vec::fmadd(load(grad[last - k] + d, n), load(w + k * dim + d, n), sum);
    store(sum, to + d, n);
  });
}

// The gradients of the sums over taps, from those of the results.
template <typename T>
void pass_silu(const Shape& s, const Run<T>& run, Rows<const T> grad, const T* w, const T* b,
               const Block& block, Rows<Wide<T>> to) {
  Inputs<T> inputs(s.taps);

  for (int64_t t = 0; t < run.len; ++t) {
    inputs.find(run, t);
    for_each_vector<Wide<T>>(0, block.end - block.begin, [&](int64_t d, int64_t n) {
      const Silu<Wide<T>> silu(inputs.convolve(s, w, b, block.begin + d, n));
      store(load(grad[t] + d, n) * silu.slope(), to[t] + d, n);
    });
  }
}

// The gradients of an expert's parameters, summed over its rows; of channels of a block.
template <typename T>
struct Sums {
  using W = Wide<T>;

  Sums(const Shape& s, const Block& block)
      : taps(s.taps),
        count(block.end - block.begin),
        sums((taps + 1) * count, W(0)),
        totals(sums) {}

  // Adds a row's; grad: that of its result, from the block's first channel on.
  template <typename G>
  void add(const Run<T>& run, int64_t step, const Block& block, const G* grad) {
    W* bias_sum = &sums[taps * count];
    for_each_vector<W>(0, count, [&](int64_t d, int64_t n) {
      store(load(bias_sum + d, n) + load(grad + d, n), bias_sum + d, n);
    });
    for (int64_t k = 0; k < taps; ++k)
      if (const T* input = run.input(step, k)) {
        W* sum = &sums[k * count];
        for_each_vector<W>(0, count, [&](int64_t d, int64_t n) {
          store(at::vec::fmadd(load(grad + d, n), load(input + block.begin + d, n),
                               load(sum + d, n)),
                sum + d, n);
        });
      }

    if (++num_summed % kRows == 0) end();
  }

  void end() { flush(sums.data(), totals.data(), static_cast<int64_t>(sums.size())); }

  int64_t taps, count;
  // Those of the taps, then that of the bias.
  std::vector<W> sums, totals;
  int64_t num_summed = 0;
};

// grad: of the sums over taps of a run, from its first row and the block's first channel on.
template <typename T, typename G>
void walk_run(const Shape& s, const Run<T>& run, Rows<const G> grad, const T* w,
              const Gradients<T>& grads, const Block& block, Sums<T>& sums) {
  if (grads.windows != nullptr)
    for (int64_t i = 0; i < run.before; ++i)
      sum_taps(s, run, grad, w, i - run.before, block,
               grads.windows + (run.index * run.before + i) * s.dim, false);

  for (int64_t t = 0; t < run.len; ++t) {
    if (grads.x != nullptr)
      sum_taps(s, run, grad, w, t, block, grads.x + (run.begin + t) * s.dim,
               grads.adds_to_x);
    if (grads.weight != nullptr) sums.add(run, t, block, grad[t]);
  }
}

template <typename T>
void walk_back(const Shape& s, const std::vector<Run<T>>& runs, Rows<const T> grad,
               const T* weight, const T* bias, const Gradients<T>& grads,
               const Block& block) {
  using W = Wide<T>;

  const int64_t count = block.end - block.begin;
  const T* w = weight + block.expert * s.taps * s.dim;
  Sums<T> sums(s, block);
  std::vector<W> of_sums;

  for (int64_t r = block.expert * s.runs; r < (block.expert + 1) * s.runs; ++r) {
    const Run<T>& run = runs[r];
    const Rows<const T> of_run = {grad[run.begin] + block.begin, grad.stride};

    if (s.activates) {
      of_sums.resize(run.len * count);
      pass_silu(s, run, of_run, w, bias + block.expert * s.dim, block,
                {of_sums.data(), count});
      walk_run(s, run, Rows<const W>{of_sums.data(), count}, w, grads, block, sums);
    } else {
      walk_run(s, run, of_run, w, grads, block, sums);
    }
  }

  if (grads.weight == nullptr) return;

  sums.end();
  for (int64_t k = 0; k <= s.taps; ++k)
    std::copy_n(&sums.totals[k * count], count,
                (k < s.taps ? grads.weight + (block.expert * s.taps + k) * s.dim
                            : grads.bias + block.expert * s.dim) +
                    block.begin);
}

// The same for the usual taps, V vectors of channels, the first of `count` from `d` on, at a
// time.
template <typename T, int64_t V>
struct WalkBack : Walk<T, V> {
  using Base = Walk<T, V>;
  using typename Base::L;
  using Base::taps, Base::count, Base::inputs, Base::weight;

  using Base::Base;

  // Walks all steps of a run.
  void pass(const Shape& s, const Run<T>& run, Rows<const T> grad, const Gradients<T>& grads,
            int64_t d) {
    const int64_t dim = s.dim;
    const bool activates = s.activates;
    const Rows<const T> x = {run.x[run.begin] + d, run.x.stride};
    // Rows of the window come before those of the run.
    T* of_window = grads.windows == nullptr
                       ? nullptr
                       : grads.windows + run.index * run.before * dim + d;
    T* of_run = grads.x == nullptr ? nullptr : grads.x + run.begin * dim + d;
    const bool adds = grads.adds_to_x;
    const auto write = [=](L lanes, int64_t row) {
      const bool is_window = row < run.before;
      T* to = is_window ? of_window : of_run;
      if (to == nullptr) return;
      to += (is_window ? row : row - run.before) * dim;
      if (adds && !is_window) lanes.add(L::read(to, count));
      lanes.write(to, count);
    };

    Base::begin(run, 0, d);
    // The gradients of the last inputs, to which later steps add.
    L pending[taps];
    for (int64_t t = 0; t < run.len; ++t) {
      __builtin_prefetch(x[t + kAhead]);
      __builtin_prefetch(grad[run.begin + t + kAhead] + d);
      const L sum = Base::meet(x[t]);
      L g = L::read(grad[run.begin + t] + d, count);
      if (activates)
        for (int64_t v = 0; v < V; ++v) g.at[v] = g.at[v] * Silu<Wide<T>>(sum.at[v]).slope();

      of_bias.add(g);
      for (int64_t k = 0; k < taps; ++k) of_weight[k].add(g, inputs[k]);
      for (int64_t k = 0; k < taps; ++k) pending[k].add(g, weight[k]);
      write(pending[0], t);
      for (int64_t k = 0; k + 1 < taps; ++k) pending[k] = pending[k + 1];
      pending[taps - 1] = L();
      Base::forget_first();
      if (++num_summed % kRows == 0) flush_sums();
    }
    for (int64_t k = 0; k + 1 < taps; ++k) write(pending[k], run.len + k);
  }

  void flush_sums() {
    for (int64_t k = 0; k < taps; ++k) {
      of_weight_in_all[k].add(of_weight[k]);
      of_weight[k] = L();
    }
    of_bias_in_all.add(of_bias);
    of_bias = L();
  }

  L of_weight[taps], of_bias, of_weight_in_all[taps], of_bias_in_all;
  int64_t num_summed = 0;
};

template <typename T>
void walk_back_usual(const Shape& s, const std::vector<Run<T>>& runs, Rows<const T> grad,
                     const T* weight, const T* bias, const Gradients<T>& grads,
                     const Block& block) {
  const int64_t first_row = block.expert * s.taps * s.dim, of_expert = block.expert * s.dim;

  for_each_walk<T>(block.begin, block.end, [&](int64_t d, int64_t n, auto vectors) {
    WalkBack<T, vectors> walk(weight + first_row + d, bias + of_expert + d, s.dim, n);
    for (int64_t r = block.expert * s.runs; r < (block.expert + 1) * s.runs; ++r)
      walk.pass(s, runs[r], grad, grads, d);

    if (grads.weight == nullptr) return;

    walk.flush_sums();
    for (int64_t k = 0; k < s.taps; ++k)
      walk.of_weight_in_all[k].write(grads.weight + first_row + k * s.dim + d, n);
    walk.of_bias_in_all.write(grads.bias + of_expert + d, n);
  });
}

template <typename T>
void convolve_backward(const Shape& s, Rows<const T> x, const T* windows, const T* weight,
                       const T* bias, Rows<const T> grad, const Gradients<T>& grads,
                       int num_threads) {
  const std::vector<Run<T>> runs = find_runs(s, x, windows);

  const int64_t num_blocks = divide_up(kTasksPerThread * num_threads, s.experts);
  const int64_t width =
      divide_up(std::max(kMinChannels, divide_up(s.dim, num_blocks)), Vec<Wide<T>>::size()) *
      Vec<Wide<T>>::size();

  std::vector<Block> blocks;
  for (int64_t expert = 0; expert < s.experts; ++expert)
    for (int64_t begin = 0; begin < s.dim; begin += width)
      blocks.push_back({expert, begin, std::min(begin + width, s.dim)});
  const int64_t num_tasks = blocks.size();

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_tasks > 1)
  for (int64_t id = 0; id < num_tasks; ++id)
    (s.taps == kUsualTaps ? walk_back_usual<T> : walk_back<T>)(s, runs, grad, weight, bias,
                                                              grads, blocks[id]);
}

}  // namespace

// shape: experts, runs of each, taps, channels, whether results are activated, strides of x and
// of the results' gradient, whether to add to the gradient of x.
#define MOXE_CAUSAL_CONV(T, SUFFIX)                                                      \
  extern "C" void moxe_conv_forward_##SUFFIX(                                            \
      const int64_t* shape, int num_threads, const int64_t* lens, const T* x,            \
      const T* windows, const T* weight, const T* bias, T* out) {                        \
    convolve_forward<T>({shape[0], shape[1], shape[2], shape[3], shape[4] != 0, lens},   \
                        {x, shape[5]}, windows, weight, bias, out, num_threads);         \
  }                                                                                      \
  extern "C" void moxe_conv_backward_##SUFFIX(                                           \
      const int64_t* shape, int num_threads, const int64_t* lens, const T* x,            \
      const T* windows, const T* weight, const T* bias, const T* grad, T* grad_x,        \
      T* grad_windows, T* grad_weight, T* grad_bias) {                                   \
    convolve_backward<T>({shape[0], shape[1], shape[2], shape[3], shape[4] != 0, lens},  \
                         {x, shape[5]}, windows, weight, bias, {grad, shape[6]},         \
                         {grad_x, grad_windows, grad_weight, grad_bias, shape[7] != 0},   \
                         num_threads);                                                   \
  }

MOXE_CAUSAL_CONV(float, float)
MOXE_CAUSAL_CONV(double, double)
#ifdef __AVX512F__
MOXE_CAUSAL_CONV(at::BFloat16, bfloat16)
#endif
