// Queries, keys, values and gates of an mLSTM's rows, and the gradients of what they are made
// of, for CPUs with AVX-512; see mlstm_projections.py for what it computes. Numbers are kept in
// T: floats, or bfloat16, to which sums are rounded when they are written.
//
// Products here are so small that reading and writing rows takes as long as they do: all that
// is made of a row, or of some rows of a group of channels, is made while they are in the first
// cache. Results do not depend on the number of threads.

#include "tiles.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

using moxe::add_products;
using moxe::BFloat16;
using moxe::divide_up;
using moxe::Factors;
using moxe::kMultiplyDirect;
using moxe::num_places;

constexpr int kFloats = 16;     // of a vector
constexpr int kWidth = moxe::kTileCols;     // channels of a group
constexpr int kRows = moxe::kTileRows;
constexpr int kBlockRows = 4 * kRows;   // that are read at a time
constexpr int64_t kGroupsOfTask = 4;
constexpr int64_t kGroupsAhead = 4;     // whose channels are fetched
constexpr int64_t kLine = 64;           // bytes of the caches
constexpr int kKinds = 3;       // queries, keys and values
constexpr int kMaxGates = 16;
constexpr int kGatesOfTile = 8;    // whose sums are in registers

struct Shape {
  int64_t experts, groups, gates;  // `gates` of a row
  int64_t input_row;               // numbers from one row of values' inputs to the next
  const int64_t* counts;           // rows of each expert

  int64_t width() const { return groups * kWidth; }
};

// Some rows of an expert.
struct Rows {
  int64_t expert, begin, end;
};

// sums (Rows,16) += x (Rows,kWidth) @ weight: columns of even places, and of odd ones, in turn.
template <Factors factors, int Rows>
void add_gates(const float* x, const float* weight, int64_t next_place, float* sums,
               int64_t next_row) {
  constexpr int places = factors == Factors::kBFloat16 ? kWidth / 2 : kWidth;
  __m512 of_rows[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) of_rows[r] = _mm512_loadu_ps(sums + r * next_row);

  for (int i = 0; i < places; i += 2) {
    const __m512 weights = _mm512_loadu_ps(weight + i / 2 * next_place);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      double two;
      std::memcpy(&two, x + r * places + i, sizeof(two));
      of_rows[r] = add_products<factors>(of_rows[r], _mm512_castpd_ps(_mm512_set1_pd(two)),
                                         weights);
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) _mm512_storeu_ps(sums + r * next_row, of_rows[r]);
}

using AddGates = void (*)(const float*, const float*, int64_t, float*, int64_t);
template <Factors factors>
constexpr auto kAddGates = moxe::by_rows<AddGates, kRows>(
    [](auto rows) { return &add_gates<factors, decltype(rows)::value>; });

// Brings a group's channels of some rows into the caches.
template <typename T>
void fetch(const T* from, int64_t num_rows, int64_t next_row) {
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t i = 0; i < kWidth; i += kLine / int64_t(sizeof(T)))
      __builtin_prefetch(from + r * next_row + i);
}

// Copies `count` numbers that are multiplied by others in the same row.
template <Factors factors, typename T>
void set_row(const T* from, int64_t count, float* to) {
  if (factors == Factors::kFloat)
    moxe::widen_row(from, count, to);
  else if (factors == Factors::kWidened)
    moxe::round_row(from, count, to);
  else
    moxe::pair_row(from, count, to);
}

// Copies rows of `count` numbers, each of which is multiplied by others of its column.
template <Factors factors, typename T>
void set_columns(const T* from, int64_t num_rows, int64_t next_row, int64_t count,
                 float* to) {
  if (factors != Factors::kBFloat16) {
    for (int64_t r = 0; r < num_rows; ++r)
      set_row<factors>(from + r * next_row, count, to + r * count);
    return;
  }
  for (int64_t r = 0; r < num_rows; r += 2)
    moxe::pair_rows(from + r * next_row,
                    r + 1 < num_rows ? from + (r + 1) * next_row : nullptr, count,
                    to + r / 2 * count);
}

// The same of the transposed matrix, (count,num_rows).
template <Factors factors, typename T>
void set_transposed(const T* from, int64_t num_rows, int64_t next_row, int64_t count,
                    float* to) {
  const int64_t places = num_places(count, factors);
  std::vector<float> row(places);
  for (int64_t r = 0; r < num_rows; ++r) {
    set_row<factors>(from + r * next_row, count, row.data());
    for (int64_t i = 0; i < places; ++i) to[i * num_rows + r] = row[i];
  }
}

// Of input gates and of forget gates.
template <typename T>
using OfGates = std::array<T*, 2>;

// Weights of both side by side: kWidth rows from `first` on, of all experts' (E,3*I,H).
template <typename T>
void join_gates(const Shape& s, const OfGates<const T>& weights, int64_t first, T* to) {
  const int64_t heads = s.gates / 2;
  for (int64_t i = 0; i < kWidth; ++i)
    for (const T* from : weights) to = std::copy_n(from + (first + i) * heads, heads, to);
}

// The reverse: writes a row.
template <typename T>
void split_gates(const Shape& s, const float* row, int64_t index, const OfGates<T>& to) {
  const int64_t heads = s.gates / 2;
  for (int half = 0; half < 2; ++half)
    moxe::store_row(row + half * heads, heads, false, to[half] + index * heads);
}

// What is multiplied is kept as.
template <Factors factors>
using Factor = std::conditional_t<factors == Factors::kBFloat16, BFloat16, float>;

// kWidth numbers of a row.
struct Row {
  __m512 low, high;
};

inline Row load_row(const float* from) {
  return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + kFloats)};
}
inline Row load_row(const BFloat16* from) {
  return {moxe::load_half(from, kFloats), moxe::load_half(from + kFloats, kFloats)};
}

inline void write_row(const Row& row, float* to) {
  _mm512_storeu_ps(to, row.low);
  _mm512_storeu_ps(to + kFloats, row.high);
}
inline void write_row(const Row& row, BFloat16* to) {
  _mm512_storeu_ps(to, moxe::pair_neighbours(row.low, row.high));
}

// Pairs of the numbers of two rows.
inline Row pair_two(const float* low, const float* high) {
  const Row x = load_row(low), y = load_row(high);
  return {moxe::pair_places(x.low, y.low), moxe::pair_places(x.high, y.high)};
}
inline Row pair_two(const BFloat16* low, const BFloat16* high) {
  alignas(64) static constexpr int16_t order[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i x = _mm512_loadu_si512(low), y = _mm512_loadu_si512(high);
  const auto pick = [&](const int16_t* from) {
    return _mm512_castsi512_ps(
        _mm512_permutex2var_epi16(x, _mm512_load_si512(from), y));
  };
  return {pick(order), pick(order + 32)};
}

// Those of place `i` of `num_rows` rows, see set_columns.
template <Factors factors, typename T>
Row load_columns(const T* from, int64_t num_rows, int64_t next_row, int64_t i) {
  static constexpr T zeros[kWidth] = {};
  if (factors != Factors::kBFloat16) {
    const Row row = load_row(from + i * next_row);
    if (factors == Factors::kFloat || std::is_same_v<T, BFloat16>) return row;
    return {moxe::round_floats(row.low), moxe::round_floats(row.high)};
  }
  const T* low = from + 2 * i * next_row;
  return pair_two(low, 2 * i + 1 < num_rows ? low + next_row : zeros);
}

// out (Rows,kWidth) = start + lhs (Rows,depth) @ rhs (depth,kWidth), rounded where it is
// written. `start` is read if `starts`; `depth` are places of what is multiplied. What is known
// when it is compiled leaves the registers to the sums.
template <Factors factors, typename T, typename Out, int lhs_row, bool starts, int Rows>
void multiply_rows(int64_t depth, const float* lhs, const float* rhs, const T* start,
                   Out* out, int64_t next_row, int64_t out_row) {
  Row sums[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if constexpr (starts)
      sums[r] = load_row(start + r * next_row);
    else
      sums[r] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  }

  for (int64_t i = 0; i < depth; ++i, rhs += kWidth, ++lhs) {
    const Row weights = load_row(rhs);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512 value = _mm512_set1_ps(lhs[r * lhs_row]);
      sums[r].low = add_products<factors>(sums[r].low, value, weights.low);
      sums[r].high = add_products<factors>(sums[r].high, value, weights.high);
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) write_row(sums[r], out + r * out_row);
}

template <typename T, typename Out>
using MultiplyRows = void (*)(int64_t, const float*, const float*, const T*, Out*, int64_t,
                              int64_t);
template <Factors factors, typename T, typename Out, int lhs_row, bool starts>
constexpr auto kMultiplyRows = moxe::by_rows<MultiplyRows<T, Out>, kRows>([](auto rows) {
  return &multiply_rows<factors, T, Out, lhs_row, starts, decltype(rows)::value>;
});

// sums (Gates,kWidth) += the transposed `gates` @ rows, as they lie. `gates` are places of
// columns, from one of which it is `num_gates` to the next.
template <Factors factors, typename T, int Gates>
void add_gate_weights(const T* rows, int64_t num_rows, int64_t next_row, const float* gates,
                      int64_t num_gates, float* sums) {
  Row of_gates[Gates];
#pragma GCC unroll 16
  for (int gate = 0; gate < Gates; ++gate) of_gates[gate] = load_row(sums + gate * kWidth);

  for (int64_t i = 0; i < num_places(num_rows, factors); ++i, gates += num_gates) {
    const Row row = load_columns<factors>(rows, num_rows, next_row, i);
#pragma GCC unroll 16
    for (int gate = 0; gate < Gates; ++gate) {
      const __m512 value = _mm512_set1_ps(gates[gate]);
      of_gates[gate].low = add_products<factors>(of_gates[gate].low, value, row.low);
      of_gates[gate].high = add_products<factors>(of_gates[gate].high, value, row.high);
    }
  }

#pragma GCC unroll 16
  for (int gate = 0; gate < Gates; ++gate) write_row(of_gates[gate], sums + gate * kWidth);
}

template <typename T>
using AddGateWeights = void (*)(const T*, int64_t, int64_t, const float*, int64_t, float*);
template <Factors factors, typename T>
constexpr auto kAddGateWeights = moxe::by_rows<AddGateWeights<T>, kGatesOfTile>(
    [](auto gates) { return &add_gate_weights<factors, T, decltype(gates)::value>; });

// Copies rows of a group, each number of which is multiplied by others of its column.
template <Factors factors, typename T>
void set_group_columns(const T* from, int64_t num_rows, int64_t next_row, float* to) {
  for (int64_t i = 0; i < num_places(num_rows, factors); ++i)
    write_row(load_columns<factors>(from, num_rows, next_row, i), to + i * kWidth);
}

std::vector<Rows> cut_rows(const Shape& s) {
  std::vector<Rows> blocks;
  int64_t row = 0;
  for (int64_t expert = 0; expert < s.experts; ++expert)
    for (const int64_t end = row + s.counts[expert]; row < end; row = blocks.back().end)
      blocks.push_back({expert, row, std::min(row + kBlockRows, end)});
  return blocks;
}

// Weights as tiles read them, of all experts and groups.
template <Factors factors>
struct Weights {
  static constexpr int64_t kPlaces = factors == Factors::kBFloat16 ? kWidth / 2 : kWidth;
  static constexpr int64_t kSize = kPlaces * kWidth;

  template <typename T>
  Weights(const Shape& s, const std::array<const T*, kKinds>& weights,
          const OfGates<const T>& gate_weights, int num_threads)
      : groups(s.groups),
        num_vectors(divide_up(2 * s.gates, kFloats)),
        gate_size(kPlaces / 2 * num_vectors * kFloats),
        projections(new float[kKinds * s.experts * groups * kSize]),
        gates(kKinds * s.experts * groups * gate_size, 0.0f) {
#pragma omp parallel for num_threads(num_threads)
    for (int64_t i = 0; i < kKinds * s.experts * groups; ++i) {
      const int64_t kind = i / (s.experts * groups), rest = i % (s.experts * groups);
      set_columns<factors>(weights[kind] + rest * kWidth * kWidth, kWidth, kWidth, kWidth,
                           &projections[i * kSize]);

      const int64_t expert = rest / groups, group = rest % groups;
      T joined[kWidth * kMaxGates];
      join_gates(s, gate_weights, ((expert * kKinds + kind) * groups + group) * kWidth,
                 joined);
      float columns[kWidth * kMaxGates];
      set_columns<factors>(joined, kWidth, s.gates, s.gates, columns);
      for (int64_t place = 0; place < kPlaces; ++place)
        for (int64_t gate = 0; gate < s.gates; ++gate)
          gates[i * gate_size + place / 2 * num_vectors * kFloats + 2 * gate + place % 2] =
              columns[place * s.gates + gate];
    }
  }

  int64_t index(int64_t kind, int64_t num_experts, int64_t expert, int64_t group) const {
    return (kind * num_experts + expert) * groups + group;
  }

  int64_t groups, num_vectors, gate_size;
  std::unique_ptr<float[]> projections;  // All of it is written: no zeros before.
  std::vector<float> gates;
};

template <typename T, Factors factors>
void project(const Shape& s, int num_threads, const T* conv_input, const T* convolved,
             const std::array<const T*, kKinds>& weights,
             const OfGates<const T>& gate_weights, const OfGates<const T>& gate_biases,
             const std::array<T*, kKinds>& outs, float* gates) {
  using Packed = Weights<factors>;
  constexpr int64_t places = Packed::kPlaces;
  const Packed packed(s, weights, gate_weights, num_threads);
  std::vector<float> bias(s.experts * s.gates);
  for (int64_t i = 0; i < 2 * s.experts; ++i)
    moxe::widen_row(gate_biases[i % 2] + i / 2 * (s.gates / 2), s.gates / 2,
                    &bias[i * (s.gates / 2)]);
  const std::vector<Rows> blocks = cut_rows(s);
  const int64_t num_blocks = blocks.size(), width = s.width(),
                num_sums = packed.num_vectors * kFloats;

#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t block = 0; block < num_blocks; ++block) {
    const Rows& rows = blocks[block];
    float inputs[kRows * kWidth], outputs[kRows * kWidth], sums[kRows * 2 * kMaxGates];

    for (int64_t row = rows.begin; row < rows.end; row += kRows) {
      const int num = static_cast<int>(std::min<int64_t>(kRows, rows.end - row));
      std::fill_n(sums, num * num_sums, 0.0f);

      for (int64_t group = 0; group < s.groups; ++group)
        for (int kind = 0; kind < kKinds; ++kind) {
          const bool is_value = kind == kKinds - 1;
          // Queries and keys are made of the same.
          if (kind != 1) {
            const T* from =
                (is_value ? conv_input + row * s.input_row : convolved + row * width) +
                group * kWidth;
            const int64_t next_row = is_value ? s.input_row : width;
            fetch(from + kGroupsAhead * kWidth, num, next_row);
            for (int r = 0; r < num; ++r)
              set_row<factors>(from + r * next_row, kWidth, inputs + r * places);
          }

          const int64_t at = packed.index(kind, s.experts, rows.expert, group);
          T* out = outs[kind] + row * width + group * kWidth;
          fetch(out + kGroupsAhead * kWidth, num, width);
          kMultiplyRows<factors, T, T, places, false>[num](
              places, inputs, &packed.projections[at * Packed::kSize], nullptr, out, 0,
              width);

          for (int r = 0; r < num; ++r)
            set_row<factors>(out + r * width, kWidth, outputs + r * places);
          for (int64_t v = 0; v < num_sums; v += kFloats)
            kAddGates<factors>[num](outputs, &packed.gates[at * packed.gate_size] + v,
                                    num_sums, sums + v, num_sums);
        }

      for (int r = 0; r < num; ++r)
        for (int64_t gate = 0; gate < s.gates; ++gate) {
          const float* pair = sums + r * num_sums + 2 * gate;
          gates[(row + r) * s.gates + gate] =
              pair[0] + pair[1] + bias[rows.expert * s.gates + gate];
        }
    }
  }
}

template <typename T>
struct Gradients {
  std::array<const T*, kKinds> of_outs;  // of queries, keys and values
  const float* of_gates;
  T *of_conv_input, *of_convolved;    // The second is added to what is there.
  std::array<T*, kKinds> of_weights;  // null where none is wanted
  OfGates<T> of_gate_weights, of_gate_biases;
};

// Of some groups of an expert: the way back through all of its rows.
template <typename T, Factors factors>
class WayBack {
 public:
  static constexpr int64_t kPlaces = Weights<factors>::kPlaces;
  static constexpr int64_t kOutsRow = kKinds * kWidth;

  WayBack(const Shape& s, int64_t expert, int64_t group,
          const std::array<const T*, kKinds>& weights, const OfGates<const T>& gate_weights)
      : s_(s), expert_(expert), group_(group) {
    for (int kind = 0; kind < kKinds; ++kind) {
      set_transposed<factors>(
          weights[kind] + (expert * s.groups + group) * kWidth * kWidth, kWidth, kWidth,
          kWidth, transposed_[kind]);
      T joined[kWidth * kMaxGates];
      join_gates(s, gate_weights, at_gates(kind), joined);
      set_transposed<factors>(joined, kWidth, s.gates, s.gates, gates_transposed_[kind]);
    }
  }

  // `gate_rows` and `gate_columns` are places of the gates' gradients.
  void add(const Rows& rows, const T* conv_input, const T* convolved,
           const std::array<const T*, kKinds>& outs, const Gradients<T>& grads,
           const float* gate_rows, const float* gate_columns) {
    const int64_t num = rows.end - rows.begin, width = s_.width(),
                  at = rows.begin * width + group_ * kWidth;
    alignas(64) Factor<factors> of_outs[kBlockRows * kOutsRow];
    alignas(64) float columns[kBlockRows * kWidth], of_out_columns[kBlockRows * kWidth];

    for (int kind = 0; kind < kKinds; ++kind) {
      for (int64_t r = 0; r < num; r += kRows)
        kMultiplyRows<factors, T, Factor<factors>, kMaxGates,
                      true>[std::min<int64_t>(kRows, num - r)](
            num_places(s_.gates, factors), gate_rows + r * kMaxGates,
            gates_transposed_[kind], grads.of_outs[kind] + at + r * width,
            of_outs + r * kOutsRow + kind * kWidth, width, kOutsRow);
      // Else they were rounded where they were written.
      if constexpr (factors == Factors::kWidened)
        for (int64_t r = 0; r < num; ++r) {
          float* row = of_outs + r * kOutsRow + kind * kWidth;
          moxe::round_row(row, kWidth, row);
        }

      // Those of weights: rows are summed.
      if (kind == 0) set_group_columns<factors>(convolved + at, num, width, columns);
      if (kind == kKinds - 1)
        set_group_columns<factors>(
            conv_input + rows.begin * s_.input_row + group_ * kWidth, num, s_.input_row,
            columns);
      set_group_columns<factors>(of_outs + kind * kWidth, num, kOutsRow, of_out_columns);
      for (int i = 0; i < kWidth && grads.of_weights[kind] != nullptr; i += 8)
        kMultiplyDirect<factors>[8](num_places(num, factors), columns + i, 1, kWidth,
                                    of_out_columns, kWidth, of_weights_[kind] + i * kWidth,
                                    kWidth, true);

      for (int64_t gate = 0; gate < s_.gates; gate += kGatesOfTile)
        kAddGateWeights<factors, T>[std::min<int64_t>(kGatesOfTile, s_.gates - gate)](
            outs[kind] + at, num, width, gate_columns + gate, s_.gates,
            of_gate_weights_[kind] + gate * kWidth);
    }

    // Of queries and keys, both.
    multiply_back<true>(of_outs, 0, 2, num, grads.of_convolved + at);
    multiply_back<false>(of_outs, 2, 1, num, grads.of_conv_input + at);
  }

  void store(const Gradients<T>& grads) const {
    for (int kind = 0; kind < kKinds; ++kind) {
      if (T* to = grads.of_weights[kind])
        moxe::store_row(of_weights_[kind], kWidth * kWidth, false,
                        to + (expert_ * s_.groups + group_) * kWidth * kWidth);
      for (int64_t i = 0; i < kWidth; ++i) {
        float row[kMaxGates];
        for (int64_t gate = 0; gate < s_.gates; ++gate)
          row[gate] = of_gate_weights_[kind][gate * kWidth + i];
        split_gates(s_, row, at_gates(kind) + i, grads.of_gate_weights);
      }
    }
  }

 private:
  // Gradients of what some kinds are made of.
  template <bool adds>
  void multiply_back(const Factor<factors>* of_outs, int kind, int num_kinds, int64_t num,
                     T* to) const {
    constexpr int row_places = kKinds * kPlaces;
    const float* places = reinterpret_cast<const float*>(of_outs) + kind * kPlaces;
    for (int64_t r = 0; r < num; r += kRows)
      kMultiplyRows<factors, T, T, row_places, adds>[std::min<int64_t>(kRows, num - r)](
          num_kinds * kPlaces, places + r * row_places, transposed_[kind],
          to + r * s_.width(), to + r * s_.width(), s_.width(), s_.width());
  }

  // The first row of the gates' weights.
  int64_t at_gates(int kind) const {
    return ((expert_ * kKinds + kind) * s_.groups + group_) * kWidth;
  }

  const Shape& s_;
  int64_t expert_, group_;
  alignas(kLine) float transposed_[kKinds][kPlaces * kWidth];
  alignas(kLine) float gates_transposed_[kKinds][kMaxGates * kWidth];
  alignas(kLine) float of_weights_[kKinds][kWidth * kWidth] = {};
  alignas(kLine) float of_gate_weights_[kKinds][kMaxGates * kWidth] = {};
};

template <typename T, Factors factors>
void project_backward(const Shape& s, int num_threads, const T* conv_input,
                      const T* convolved, const std::array<const T*, kKinds>& outs,
                      const std::array<const T*, kKinds>& weights,
                      const OfGates<const T>& gate_weights, const Gradients<T>& grads) {
  const std::vector<Rows> blocks = cut_rows(s);
  const int64_t num_tasks = divide_up(s.groups, kGroupsOfTask);

#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t expert = 0; expert < s.experts; ++expert)
    for (int64_t task = 0; task < num_tasks; ++task) {
      std::vector<WayBack<T, factors>> groups;
      for (int64_t g = task * kGroupsOfTask;
           g < std::min((task + 1) * kGroupsOfTask, s.groups); ++g)
        groups.emplace_back(s, expert, g, weights, gate_weights);
      double of_biases[kMaxGates] = {};

      float gate_rows[kBlockRows * kMaxGates], gate_columns[kBlockRows * kMaxGates];
      for (const Rows& rows : blocks) {
        if (rows.expert != expert) continue;

        const int64_t num = rows.end - rows.begin;
        const float* of_gates = grads.of_gates + rows.begin * s.gates;
        for (int64_t r = 0; r < num; ++r)
          set_row<factors>(of_gates + r * s.gates, s.gates, gate_rows + r * kMaxGates);
        set_columns<factors>(of_gates, num, s.gates, s.gates, gate_columns);

        for (int64_t i = 0; task == 0 && i < num * s.gates; ++i)
          of_biases[i % s.gates] += of_gates[i];

        for (auto& group : groups)
          group.add(rows, conv_input, convolved, outs, grads, gate_rows, gate_columns);
      }

      for (const auto& group : groups) group.store(grads);
      if (task == 0) {
        float row[kMaxGates];
        std::copy_n(of_biases, s.gates, row);
        split_gates(s, row, expert, grads.of_gate_biases);
      }
    }
}

}  // namespace

#define MOXE_MLSTM_PROJECTIONS(T, FACTORS, SUFFIX)                                       \
  extern "C" void moxe_mlstm_project_##SUFFIX(                                           \
      const int64_t* shape, const int64_t* counts, int num_threads, const T* conv_input, \
      const T* convolved, const T* q_weight, const T* k_weight, const T* v_weight,       \
      const T* input_gate_weight, const T* forget_gate_weight,                           \
      const T* input_gate_bias, const T* forget_gate_bias, T* q, T* k, T* v,             \
      float* gates) {                                                                    \
    project<T, FACTORS>({shape[0], shape[1], shape[2], shape[3], counts}, num_threads,   \
                        conv_input, convolved, {q_weight, k_weight, v_weight},           \
                        {input_gate_weight, forget_gate_weight},                         \
                        {input_gate_bias, forget_gate_bias}, {q, k, v}, gates);          \
  }                                                                                      \
  extern "C" void moxe_mlstm_project_backward_##SUFFIX(                                  \
      const int64_t* shape, const int64_t* counts, int num_threads, const T* conv_input, \
      const T* convolved, const T* q, const T* k, const T* v, const T* q_weight,         \
      const T* k_weight, const T* v_weight, const T* input_gate_weight,                  \
      const T* forget_gate_weight, const T* grad_q, const T* grad_k, const T* grad_v,    \
      const float* grad_gates, T* grad_conv_input, T* grad_convolved, T* grad_q_weight,  \
      T* grad_k_weight, T* grad_v_weight, T* grad_input_gate_weight,                     \
      T* grad_forget_gate_weight, T* grad_input_gate_bias, T* grad_forget_gate_bias) {   \
    project_backward<T, FACTORS>(                                                        \
        {shape[0], shape[1], shape[2], shape[3], counts}, num_threads, conv_input,       \
        convolved, {q, k, v}, {q_weight, k_weight, v_weight},                            \
        {input_gate_weight, forget_gate_weight},                                         \
        {{grad_q, grad_k, grad_v},                                                       \
         grad_gates,                                                                     \
         grad_conv_input,                                                                \
         grad_convolved,                                                                 \
         {grad_q_weight, grad_k_weight, grad_v_weight},                                  \
         {grad_input_gate_weight, grad_forget_gate_weight},                              \
         {grad_input_gate_bias, grad_forget_gate_bias}});                                \
  }

MOXE_MLSTM_PROJECTIONS(float, Factors::kFloat, float)
MOXE_MLSTM_PROJECTIONS(float, Factors::kWidened, rounded_widened)
MOXE_MLSTM_PROJECTIONS(BFloat16, Factors::kWidened, bfloat16_widened)
#ifdef __AVX512BF16__
MOXE_MLSTM_PROJECTIONS(float, Factors::kBFloat16, rounded)
MOXE_MLSTM_PROJECTIONS(BFloat16, Factors::kBFloat16, bfloat16)
#endif
