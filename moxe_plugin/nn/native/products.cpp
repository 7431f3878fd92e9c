// Products of float32 matrices for CPUs with AVX-512; see products.py for what it computes.
// Panels may hold factors rounded to bfloat16: two in place of one, or, where processors are
// slower at multiplying pairs, as floats; their products and sums are float32. Factors and results
// may be kept in bfloat16, too.
//
// As in Goto's algorithm, blocks of both factors of large products are copied into panels that
// the innermost loop reads one after the other, whatever the factors' layout is, and the sums of
// a small tile stay in registers; left factors whose rows hold what a panel would are not copied,
// see Part::packs_left(), or row by row, see Part::widens_rows(), and other products read both as
// they lie, see `Kind`. All products of a call share the threads, so that many small ones
// (experts, heads) are as fast as one large one. Each element is summed in an order that depends
// on nothing but the inner dimension.

#include "causal_squares.h"
#include "panels.h"
#include "products.h"
#include "tiles.h"

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

using moxe::BFloat16;
using moxe::add_products;
using moxe::by_rows;
using moxe::divide_up;
using moxe::Factors;
using moxe::first_floats;
using moxe::kMaxDepth;
using moxe::kPanelsAtOnce;
using moxe::kPerRow;
using moxe::kRowsAhead;
using moxe::kWidth;
using moxe::num_places;
using moxe::pack;
using moxe::per_place;
using moxe::Triangle;

constexpr int kRows = moxe::kTileRows;  // rows of a tile,
constexpr int kVecs = 2;                // and its vectors: 28 of 32 registers hold sums
constexpr int kCols = kVecs * kWidth;
constexpr int64_t kBlockRows = 5 * kRows;   // of the left factor, which fit the second cache
constexpr int64_t kMaxCols = 128;       // of a block of the right factor, which fits it too
constexpr int64_t kMinCols = 2 * kCols;
// Where there are many panels, half as many rows: what is packed of them stays in more caches.
constexpr int64_t kVeryDeep = 4 * kMaxDepth;
constexpr int64_t kMaxPacked = 9 << 18;  // floats of left factors that are packed at a time
// Of so many rows in panels, parts have few enough for each thread to read those that it packed.
constexpr int64_t kManyRows = 4096, kRowsOfMany = 1024;
constexpr int64_t kDepthAtOnce = 32;    // rows of a panel, after which tiles fetch
constexpr int64_t kLine = 64;           // bytes that are fetched at once
constexpr int64_t kSameLines = 1024;    // floats after which the first cache has no other place
constexpr int64_t kDirect = 64;         // up to which a size is small
constexpr int64_t kMaxWeights = 1 << 16;    // of small right factors that lie side by side
constexpr int64_t kNarrow = kWidth;     // columns up to which a product is narrow
constexpr int64_t kNarrowAhead = 8 * kWidth;    // how far ahead it fetches
constexpr int kFlipped = 8;             // columns up to which it is computed as rows
constexpr int kThinRows = 4;            // rows up to which it is thin
constexpr double kMinWork = 1e6;        // multiply-adds below which a task is not divided

// How a product is computed: from copies in panels, or from factors as they lie if there are
// few rows, few columns (as rows, where that is how the left factor lies), or little else.
enum class Kind { kPacked, kThin, kNarrow, kFlipped, kDirect };

static_assert(kRows < moxe::kBeyondDiagonal, "panels read zeros beyond the diagonal");

// What is kept in bfloat16 of all products of a call, and what is multiplied.
struct Types {
  bool is_lhs_half, is_rhs_half, is_out_half;
  Factors factors;

  bool has_half() const { return is_lhs_half || is_rhs_half || is_out_half; }
};

inline int64_t bytes_of(bool is_half) { return is_half ? sizeof(BFloat16) : sizeof(float); }

// How a product is computed, besides what is told of it.
struct Product : moxe::ProductNumbers {
  Kind kind(const Types& types, Triangle triangle) const {
    // All others read and write floats.
    if (types.has_half()) return Kind::kPacked;
    // They know no halves either, but for one.
    if (triangle != Triangle::kNone &&
        (triangle == Triangle::kLowerResult || m > kDirect || n % kCols != 0 || rhs_col != 1))
      return Kind::kPacked;
    if (m <= kThinRows && rhs_col == 1) return Kind::kThin;
    // The right factor is small, or few rows read it, and panels of pairs would not halve what
    // is left to do.
    if (n % kCols == 0 && ((n <= kDirect && k <= kDirect) ||
                           (m <= kDirect && rhs_col == 1 && types.factors == Factors::kFloat)))
      return Kind::kDirect;
    if (n <= kNarrow && rhs_col == 1 && lhs_col == 1) return Kind::kNarrow;
    if (n <= kFlipped && lhs_row == 1) return Kind::kFlipped;
    return Kind::kPacked;
  }

  // How many pieces the inner dimension is cut into.
  int64_t num_pieces(Factors factors) const {
    // In pairs or not, as many of bfloat16 are summed at once.
    const int64_t places = factors == Factors::kFloat ? k : divide_up(k, 2);
    const int64_t depth = places > kVeryDeep ? kMaxDepth / 2 : kMaxDepth;
    return std::max<int64_t>(1, divide_up(places, depth));
  }

  // Whether small products lie side by side. Together, they read and write whole rows.
  bool is_side_by_side(const Types& types, Triangle triangle) const {
    return triangle == Triangle::kNone && kind(types, triangle) == Kind::kDirect &&
           n <= kDirect && k <= kDirect && count * n * k <= kMaxWeights && lhs_next > 0 &&
           count * lhs_next <= lhs_row;
  }
};
static_assert(sizeof(Product) == sizeof(moxe::ProductNumbers), "callers know the numbers");

// What becomes of a result: it is written, added to, or written past the caches.
enum class Into { kOut, kSum, kMemory };

// Rows of memory that the next task is going to copy into panels. Tiles, which need little
// memory, fetch it meanwhile.
class Ahead {
 public:
  Ahead() = default;
  // `num_rows` of `width` bytes; all of them in `num_times` calls of fetch().
  Ahead(const char* from, int64_t next_row, int64_t num_rows, int64_t width,
        int64_t num_times)
      : row_(from),
        next_row_(next_row),
        num_rows_(num_rows),
        width_(width),
        num_at_once_(divide_up(num_rows * divide_up(width_, kLine),
                               std::max<int64_t>(num_times, 1))) {}

  ALWAYS_INLINE void fetch() {
    for (int64_t i = 0; i < num_at_once_ && num_rows_ > 0; ++i) {
      __builtin_prefetch(row_ + at_);
      at_ += kLine;
      if (at_ < width_) continue;
      at_ = 0;
      row_ += next_row_;
      --num_rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t next_row_ = 0, num_rows_ = 0, width_ = 0, num_at_once_ = 0, at_ = 0;
};

// Writes a row of a tile.
ALWAYS_INLINE void put(const __m512 (&sums)[kVecs], float* out, Into into) {
  for (int v = 0; v < kVecs; ++v) {
    float* to = out + v * kWidth;
    if (into == Into::kMemory)
      _mm512_stream_ps(to, sums[v]);
    else if (into == Into::kSum)
      _mm512_storeu_ps(to, _mm512_add_ps(sums[v], _mm512_loadu_ps(to)));
    else
      _mm512_storeu_ps(to, sums[v]);
  }
}

ALWAYS_INLINE void put(const __m512 (&sums)[kVecs], BFloat16* out, Into into) {
  static_assert(kVecs == 2, "a vector of bfloat16 holds two");
  __m512 low = sums[0], high = sums[1];
  if (into == Into::kSum) {
    low = _mm512_add_ps(low, moxe::load_half(out, kWidth));
    high = _mm512_add_ps(high, moxe::load_half(out + kWidth, kWidth));
  }

  const __m512 row = moxe::pair_neighbours(low, high);
  if (into == Into::kMemory)
    _mm512_stream_ps(reinterpret_cast<float*>(out), row);
  else
    _mm512_storeu_ps(out, row);
}

// out (Rows,kCols) = or += lhs (depth,kRows)^T @ rhs (depth,kCols), Rows of its rows. With
// `Lies`, lhs is (Rows,depth), and its rows are `lhs_row` places apart.
template <Factors factors, typename Out, bool Lies, int Rows>
void multiply_tile(int64_t depth, const float* __restrict lhs, int64_t lhs_row,
                   const float* __restrict rhs, Out* __restrict out, int64_t out_row,
                   Into into, Ahead& ahead) {
  // Not unrolled, loops over registers would keep them on the stack.
  __m512 sums[Rows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = _mm512_setzero_ps();
      // A line holds two vectors of bfloat16.
      if (into != Into::kMemory && (sizeof(Out) == sizeof(float) || v == 0))
        __builtin_prefetch(out + r * out_row + v * kWidth, 1);
    }

  for (int64_t begin = 0; begin < depth; begin += kDepthAtOnce) {
    ahead.fetch();

    // A line of one row after the other: all at once would wait for each other, and of so many
    // rows the processor foresees nothing.
    const float* next = lhs + begin + kDepthAtOnce;
    int next_row = 0;

    const int64_t end = std::min(begin + kDepthAtOnce, depth);
    for (int64_t i = begin; i < end; ++i) {
      if (Lies) {
        __builtin_prefetch(next);
        next += lhs_row;
        if (++next_row == Rows) {
          next += kWidth - Rows * lhs_row;
          next_row = 0;
        }
      }

      __m512 weights[kVecs];
      for (int v = 0; v < kVecs; ++v)
        weights[v] = _mm512_loadu_ps(rhs + i * kCols + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const __m512 value =
            _mm512_set1_ps(Lies ? lhs[r * lhs_row + i] : lhs[i * kRows + r]);
        for (int v = 0; v < kVecs; ++v)
          sums[r][v] = add_products<factors>(sums[r][v], value, weights[v]);
      }
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) put(sums[r], out + r * out_row, into);
}

// Rows of the left factor times `count` rows of the right one, from which they are read as
// they lie: with few rows, a copy into panels would cost more than it spares. With `Flips`, rows
// of the result are columns of `out`.
template <int Rows, bool Flips>
void multiply_thin(const float* lhs, int64_t lhs_row, int64_t lhs_col, const float* rhs,
                   int64_t rhs_row, int64_t count, int64_t num_cols, float* out,
                   int64_t out_row, bool adds) {
  constexpr int vecs = Flips ? 24 / Rows < 4 ? 24 / Rows : 4 : 16 / Rows;

  for (int64_t col = 0; col < num_cols; col += vecs * kWidth) {
    __mmask16 masks[vecs];
    __m512 sums[Rows][vecs];
    for (int v = 0; v < vecs; ++v) {
      masks[v] = first_floats(num_cols - col - v * kWidth);
      for (int r = 0; r < Rows; ++r) sums[r][v] = _mm512_setzero_ps();
    }

    for (int64_t i = 0; i < count; ++i) {
      const float* row = rhs + i * rhs_row + col;
      for (int v = 0; v < vecs; ++v) {
        // The next rows are on other pages, which the processor does not foresee.
        if (i + kRowsAhead < count)
          __builtin_prefetch(row + kRowsAhead * rhs_row + v * kWidth);
        const __m512 weights = _mm512_maskz_loadu_ps(masks[v], row + v * kWidth);
        for (int r = 0; r < Rows; ++r)
          sums[r][v] = _mm512_fmadd_ps(_mm512_set1_ps(lhs[r * lhs_row + i * lhs_col]),
                                       weights, sums[r][v]);
      }
    }

    if (Flips) {
      float rows[Rows][vecs * kWidth];
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < vecs; ++v) _mm512_storeu_ps(rows[r] + v * kWidth, sums[r][v]);

      for (int64_t c = 0; c < std::min<int64_t>(vecs * kWidth, num_cols - col); ++c)
        for (int r = 0; r < Rows; ++r) {
          float& x = out[(col + c) * out_row + r];
          x = adds ? rows[r][c] + x : rows[r][c];
        }
      continue;
    }

    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < vecs; ++v) {
        float* to = out + r * out_row + col + v * kWidth;
        const __m512 sum =
            adds ? _mm512_add_ps(sums[r][v], _mm512_maskz_loadu_ps(masks[v], to))
                 : sums[r][v];
        _mm512_mask_storeu_ps(to, masks[v], sum);
      }
  }
}

// The same of at most a vector of columns and more rows, whose left factor is read as it lies.
template <int Rows>
void multiply_narrow(int64_t depth, const float* lhs, int64_t lhs_row, const float* rhs,
                     int64_t rhs_row, int64_t num_cols, float* out, int64_t out_row,
                     bool adds) {
  const __mmask16 mask = first_floats(num_cols);
  __m512 sums[Rows];
  for (int r = 0; r < Rows; ++r) sums[r] = _mm512_setzero_ps();

  for (int64_t begin = 0; begin < depth; begin += kWidth) {
    for (int r = 0; r < Rows; ++r)
      __builtin_prefetch(lhs + r * lhs_row + begin + kNarrowAhead);
    for (int64_t i = begin; i < std::min<int64_t>(begin + kWidth, depth); ++i) {
      const __m512 weights = _mm512_maskz_loadu_ps(mask, rhs + i * rhs_row);
      for (int r = 0; r < Rows; ++r)
        sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(lhs[r * lhs_row + i]), weights, sums[r]);
    }
  }

  for (int r = 0; r < Rows; ++r) {
    float* to = out + r * out_row;
    _mm512_mask_storeu_ps(
        to, mask,
        adds ? _mm512_add_ps(sums[r], _mm512_maskz_loadu_ps(mask, to)) : sums[r]);
  }
}

using MultiplyThin = void (*)(const float*, int64_t, int64_t, const float*, int64_t,
                              int64_t, int64_t, float*, int64_t, bool);
constexpr auto kMultiplyThin = by_rows<MultiplyThin, kThinRows>(
    [](auto rows) { return &multiply_thin<decltype(rows)::value, false>; });
constexpr auto kMultiplyFlipped = by_rows<MultiplyThin, kFlipped>(
    [](auto rows) { return &multiply_thin<decltype(rows)::value, true>; });

using MultiplyNarrow = void (*)(int64_t, const float*, int64_t, const float*, int64_t,
                                int64_t, float*, int64_t, bool);
constexpr auto kMultiplyNarrow = by_rows<MultiplyNarrow, kRows>(
    [](auto rows) { return &multiply_narrow<decltype(rows)::value>; });

template <typename Out>
using MultiplyTile = void (*)(int64_t, const float*, int64_t, const float*, Out*, int64_t,
                              Into, Ahead&);
template <Factors factors, typename Out, bool Lies>
constexpr auto kMultiplyTile = by_rows<MultiplyTile<Out>, kRows>([](auto rows) {
  return &multiply_tile<factors, Out, Lies, decltype(rows)::value>;
});

// Memory that is kept for the next call.
class Buffer {
 public:
  // Returns whether there is memory for `size` floats.
  bool reserve(int64_t size) {
    if (size <= capacity_) return true;

    const int64_t bytes = divide_up(size * sizeof(float), 4096) * 4096;
    memory_.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    capacity_ = memory_ ? size : 0;

    return memory_ != nullptr;
  }

  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t capacity_ = 0;
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Some rows of a product, or of all that lie side by side, and `inner` of the inner dimension
// from `first` on. A left factor is packed once, for all threads, in panels of `panel_rows`.
struct Part {
  const Product* product;
  Triangle triangle;
  int64_t index, num_indices, row, num_rows, num_cols, first, inner, panel_rows;
  bool is_first;  // of the pieces of the inner dimension
  bool streams;   // past the caches
  Kind kind;
  Types types;  // `factors` are those of panels
  float* packed;

  int64_t num_panels() const { return divide_up(num_rows, panel_rows); }
  int64_t rows_of(int64_t panel) const {
    return std::min(panel_rows, num_rows - panel * panel_rows);
  }
  bool packs() const { return kind == Kind::kPacked; }
  // Whether the left factor is copied, too: not if its rows are what a panel holds of them, and
  // a cache keeps lines of so many.
  bool packs_left() const {
    const Product& p = *product;
    const int64_t per = per_place(types.factors);
    const bool lies = p.lhs_col == 1 && types.factors != Factors::kWidened &&
                      types.is_lhs_half == (per == 2) && p.lhs_row % per == 0 &&
                      inner % per == 0 && !has_left_triangle() &&
                      reinterpret_cast<uintptr_t>(lhs(0)) % sizeof(float) == 0;
    return packs() && !(lies && p.lhs_row / per % kSameLines != 0);
  }
  bool has_left_triangle() const {
    return triangle == Triangle::kLowerLeft || triangle == Triangle::kUpperLeft;
  }
  // Whether rows of the left factor are copied one after the other, as floats: no panels, for
  // which they would have to be transposed.
  bool widens_rows() const {
    return packs_left() && types.factors == Factors::kWidened && product->lhs_col == 1 &&
           !has_left_triangle();
  }
  // Places from one of these to the next, an odd number of lines: a cache keeps all of a tile.
  int64_t widened_row() const { return (divide_up(depth(), kWidth) | 1) * kWidth; }
  // Rows of panels.
  int64_t depth() const { return num_places(inner, types.factors); }
  // Those that a panel of the left factor is multiplied with: others are 0 in it.
  Range depths_of(int64_t panel) const {
    const int64_t begin = row + panel * panel_rows - first, end = begin + rows_of(panel);
    if (triangle == Triangle::kLowerLeft)
      return {0, num_places(std::clamp<int64_t>(end, 0, inner), types.factors)};
    if (triangle == Triangle::kUpperLeft)
      return {std::clamp<int64_t>(begin, 0, inner) / per_place(types.factors), depth()};
    return {0, depth()};
  }
  // Where the columns of a panel's results end.
  int64_t end_of_cols(int64_t panel) const {
    return triangle == Triangle::kLowerResult
               ? std::min(num_cols, row + panel * panel_rows + rows_of(panel))
               : num_cols;
  }
  // What it packs.
  int64_t size() const {
    if (widens_rows()) return num_rows * widened_row();
    return packs_left() ? num_panels() * kRows * depth() : 0;
  }

  // Where a row is, of its own or of a product beside it.
  const char* lhs(int64_t r, int64_t i = 0) const {
    const Product& p = *product;
    return p.lhs + bytes_of(types.is_lhs_half) * ((index + i) * p.lhs_next +
                                                  (row + r) * p.lhs_row + first * p.lhs_col);
  }
  char* out(int64_t r, int64_t i = 0) const {
    const Product& p = *product;
    return p.out +
           bytes_of(types.is_out_half) * ((index + i) * p.out_next + (row + r) * p.out_row);
  }
  // Where a column is.
  const char* rhs(int64_t col, int64_t i = 0) const {
    const Product& p = *product;
    return p.rhs + bytes_of(types.is_rhs_half) *
                       ((index + i) * p.rhs_next + first * p.rhs_row + col * p.rhs_col);
  }
  // The same where they are floats.
  const float* lhs_floats(int64_t r, int64_t i = 0) const {
    return reinterpret_cast<const float*>(lhs(r, i));
  }
  float* out_floats(int64_t r, int64_t i = 0) const {
    return reinterpret_cast<float*>(out(r, i));
  }
  const float* rhs_floats(int64_t col, int64_t i = 0) const {
    return reinterpret_cast<const float*>(rhs(col, i));
  }
};

struct PackTask {
  const Part* part;
  int64_t panel;  // the first of kPanelsAtOnce
};

struct Task {
  const Part* part;
  int64_t col, num_cols;

  // How many tiles' rows of panels are multiplied, about.
  double work() const {
    double sum = 0;
    for (int64_t i = 0; i < part->num_panels(); ++i) {
      const int64_t cols = std::min(num_cols, part->end_of_cols(i) - col);
      sum += double(part->rows_of(i)) * part->depths_of(i).size() *
             std::max<int64_t>(cols, 0) * part->num_indices;
    }
    return sum;
  }

  // Panels of the right factor.
  int64_t size() const {
    return part->depth() * divide_up(num_cols, kCols) * kCols * part->num_indices;
  }
};

void run(const PackTask& task) {
  const Part& part = *task.part;
  const int64_t row = task.panel * part.panel_rows;
  const int64_t num_rows =
      std::min(kPanelsAtOnce * part.panel_rows, part.num_rows - row);

  if (part.widens_rows()) {
    for (int64_t r = row; r < row + num_rows; ++r) {
      float* to = part.packed + r * part.widened_row();
      if (part.types.is_lhs_half)
        moxe::round_row(reinterpret_cast<const BFloat16*>(part.lhs(r)), part.inner, to);
      else
        moxe::round_row(part.lhs_floats(r), part.inner, to);
    }
    return;
  }

  if (part.has_left_triangle()) {
    const Product& p = *part.product;
    const int64_t per = per_place(part.types.factors);
    const int64_t bytes = bytes_of(part.types.is_lhs_half);
    const int64_t last = std::min(task.panel + kPanelsAtOnce, part.num_panels());
    for (int64_t i = task.panel; i < last; ++i) {
      const Range depths = part.depths_of(i);
      const int64_t begin = depths.begin * per, end = std::min(depths.end * per, part.inner);
      pack<kRows>(part.types.factors, part.types.is_lhs_half,
                  part.lhs(i * part.panel_rows) + bytes * begin * p.lhs_col, p.lhs_col,
                  p.lhs_row, end - begin, part.rows_of(i), part.panel_rows,
                  part.packed + (i * part.depth() + depths.begin) * kRows);
    }
    return;
  }

  pack<kRows>(part.types.factors, part.types.is_lhs_half, part.lhs(row),
              part.product->lhs_col, part.product->lhs_row, part.inner, num_rows,
              part.panel_rows,
              part.packed + task.panel * kRows * part.depth());
}

void run_direct(const Task& task, bool adds, float* panels) {
  const Part& part = *task.part;
  const Product& p = *part.product;
  const bool packs = p.rhs_col != 1;

  for (int64_t i = 0; packs && i < part.num_indices; ++i)
    pack<kCols>(Factors::kFloat, false, part.rhs(0, i), p.rhs_row, p.rhs_col, part.inner,
                p.n, kCols, panels + i * p.n * part.inner);

  const auto multiply = [&](int64_t panel, int64_t i, int64_t col) {
    const float* rhs =
        packs ? panels + (i * p.n + col) * part.inner : part.rhs_floats(col, i);
    const int64_t row = panel * part.panel_rows, rhs_row = packs ? kCols : p.rhs_row;
    const Range depths = part.depths_of(panel);

    moxe::kMultiplyDirect<Factors::kFloat>[part.rows_of(panel)](
        depths.size(), part.lhs_floats(row, i) + depths.begin * p.lhs_col, p.lhs_row,
        p.lhs_col, rhs + depths.begin * rhs_row, rhs_row, part.out_floats(row, i) + col,
        p.out_row, adds);
  };

  // Of several small products whole rows, of a large right factor what was just read.
  if (part.num_indices > 1) {
    for (int64_t panel = 0; panel < part.num_panels(); ++panel)
      for (int64_t i = 0; i < part.num_indices; ++i)
        for (int64_t col = 0; col < p.n; col += kCols) multiply(panel, i, col);
  } else {
    for (int64_t col = task.col; col < task.col + task.num_cols; col += kCols)
      for (int64_t panel = 0; panel < part.num_panels(); ++panel) multiply(panel, 0, col);
  }
}

// What a task copies into panels of its own, fetched in `num_times` calls.
Ahead look_ahead(const Task* task, int64_t num_times) {
  if (task == nullptr || !task->part->packs()) return {};

  const Part& part = *task->part;
  const Product& p = *part.product;
  const char* from = part.rhs(task->col);
  const int64_t bytes = bytes_of(part.types.is_rhs_half);

  if (p.rhs_col == 1)
    return {from, bytes * p.rhs_row, part.inner, bytes * task->num_cols, num_times};
  if (p.rhs_row == 1)
    return {from, bytes * p.rhs_col, task->num_cols, bytes * part.inner, num_times};
  return {};
}

// Multiplies tiles of panels.
template <Factors factors, typename Out, bool Lies>
void run_tiles(const Task& task, const Task* next, bool adds, float* panels) {
  const Part& part = *task.part;
  const Product& p = *part.product;
  const int64_t num_col_panels = divide_up(task.num_cols, kCols);

  Out* out = reinterpret_cast<Out*>(part.out(0)) + task.col;

  // Only what is complete at once, and in whole vectors.
  constexpr int64_t vector = kWidth * sizeof(float);
  const bool streams = part.streams && !adds && p.k == part.inner &&
                       p.out_row * sizeof(Out) % vector == 0 &&
                       reinterpret_cast<uintptr_t>(out) % vector == 0;
  const Into into = streams ? Into::kMemory : adds ? Into::kSum : Into::kOut;

  int64_t num_times = 0;
  for (int64_t i = 0; i < part.num_panels(); ++i)
    num_times += divide_up(std::min(task.num_cols, part.end_of_cols(i) - task.col), kCols) *
                 divide_up(part.depths_of(i).size(), kDepthAtOnce);
  Ahead ahead = look_ahead(next, num_times);

  const auto& multiply = kMultiplyTile<factors, Out, Lies>;
  const bool widens = Lies && part.widens_rows();
  const int64_t lhs_row = widens ? part.widened_row() : p.lhs_row / kPerRow<factors>;
  const int64_t block = std::max<int64_t>(1, kBlockRows / part.panel_rows);
  for (int64_t first = 0; first < part.num_panels(); first += block)
    for (int64_t j = 0; j < num_col_panels; ++j) {
      const int64_t cols = std::min<int64_t>(kCols, task.num_cols - j * kCols);
      const float* right = panels + j * kCols * part.depth();

      for (int64_t i = first; i < std::min(first + block, part.num_panels()); ++i) {
        if (task.col + j * kCols >= part.end_of_cols(i)) continue;

        const int64_t row = i * part.panel_rows, rows = part.rows_of(i);
        const Range depths = part.depths_of(i);
        const float* left =
            widens ? part.packed + row * lhs_row
            : Lies ? part.lhs_floats(row)
                   : part.packed + (i * part.depth() + depths.begin) * kRows;
        const float* below = right + depths.begin * kCols;
        Out* to = out + row * p.out_row + j * kCols;

        if (cols == kCols) {
          multiply[rows](depths.size(), left, lhs_row, below, to, p.out_row, into, ahead);
          continue;
        }

        alignas(64) float edge[kRows * kCols];
        kMultiplyTile<factors, float, Lies>[rows](depths.size(), left, lhs_row, below, edge,
                                                  kCols, Into::kOut, ahead);
        for (int64_t r = 0; r < rows; ++r)
          moxe::store_row(edge + r * kCols, cols, adds, to + r * p.out_row);
      }
    }
}

using RunTiles = void (*)(const Task&, const Task*, bool, float*);

template <bool Lies>
RunTiles find_run_tiles(const Types& types) {
  const bool pairs = types.factors == Factors::kBFloat16;
  return types.is_out_half ? pairs ? run_tiles<Factors::kBFloat16, BFloat16, Lies>
                                   : run_tiles<Factors::kFloat, BFloat16, Lies>
         : pairs           ? run_tiles<Factors::kBFloat16, float, Lies>
                           : run_tiles<Factors::kFloat, float, Lies>;
}

// `next` is what the thread does next, as a rule.
void run_packed(const Task& task, const Task* next, bool adds, float* panels) {
  const Part& part = *task.part;
  const Product& p = *part.product;

  pack<kCols>(part.types.factors, part.types.is_rhs_half, part.rhs(task.col), p.rhs_row,
              p.rhs_col, part.inner, task.num_cols, kCols, panels);

  const bool lies = !part.packs_left() || part.widens_rows();
  const auto run = lies ? find_run_tiles<true>(part.types) : find_run_tiles<false>(part.types);
  run(task, next, adds, panels);
}

void run(const Task& task, const Task* next, bool adds, float* panels) {
  const Part& part = *task.part;
  const Product& p = *part.product;

  if (p.k == 0 && !adds) {
    const int64_t bytes = bytes_of(part.types.is_out_half);
    for (int64_t r = 0; r < part.num_rows; ++r)
      std::memset(part.out(r) + bytes * task.col, 0, bytes * task.num_cols);
  }

  adds = adds || !part.is_first;

  switch (part.kind) {
    case Kind::kPacked:
      run_packed(task, next, adds, panels);
      break;
    case Kind::kDirect:
      run_direct(task, adds, panels);
      break;
    case Kind::kThin:
      kMultiplyThin[part.num_rows](part.lhs_floats(0), p.lhs_row, p.lhs_col,
                                   part.rhs_floats(task.col), p.rhs_row, part.inner,
                                   task.num_cols, part.out_floats(0) + task.col, p.out_row,
                                   adds);
      break;
    case Kind::kFlipped:
      kMultiplyFlipped[p.n](part.rhs_floats(0), p.rhs_col, p.rhs_row, part.lhs_floats(0),
                            p.lhs_col, part.inner, part.num_rows,
                            part.out_floats(0) + task.col, p.out_row, adds);
      break;
    case Kind::kNarrow:
      for (int64_t i = 0; i < part.num_panels(); ++i)
        kMultiplyNarrow[part.rows_of(i)](part.inner, part.lhs_floats(i * part.panel_rows),
                                         p.lhs_row, part.rhs_floats(0), p.rhs_row, p.n,
                                         part.out_floats(i * part.panel_rows), p.out_row,
                                         adds);
      break;
  }
}

// The products, cut into parts, for one of several equal pieces of their inner dimensions;
// `num_col_blocks` gets what each part is divided into.
std::vector<Part> cut(int64_t num_products, const Product* products,
                      const Triangle* triangles, const Types& types, int64_t num_streamed,
                      int64_t piece, int num_threads, std::vector<int64_t>& num_col_blocks) {
  // Depends on k alone, as the order of sums does.
  const auto first_of = [types](const Product& p, int64_t piece) {
    return p.k == 0 ? 0 : piece * divide_up(p.k, p.num_pieces(types.factors));
  };
  const auto inner_of = [&](const Product& p) {
    return p.m == 0 || p.n == 0 || piece >= p.num_pieces(types.factors)
               ? int64_t(-1)
               : std::min(first_of(p, piece + 1), p.k) - first_of(p, piece);
  };
  const auto triangle_of = [&](int64_t i) {
    return triangles == nullptr ? Triangle::kNone : triangles[i];
  };
  // Of one of `count` products.
  const auto work_of = [&](int64_t i) {
    const Product& p = products[i];
    const double work = double(p.m) * p.n * std::max<int64_t>(inner_of(p), 0);
    return triangle_of(i) == Triangle::kNone ? work : work / 2;
  };

  double work = 0;
  for (int64_t i = 0; i < num_products; ++i) work += products[i].count * work_of(i);
  // Some tasks a thread, so that none waits for long.
  const double limit = std::max(work / (8.0 * num_threads), kMinWork);

  std::vector<Part> parts;
  num_col_blocks.clear();
  for (int64_t i = 0; i < num_products; ++i) {
    const Product& p = products[i];
    const Triangle triangle = triangle_of(i);
    const int64_t whole = inner_of(p);
    if (whole < 0) continue;

    const Kind kind = p.kind(types, triangle);
    const int64_t num_indices = p.is_side_by_side(types, triangle) ? p.count : 1;
    Types of_part = types;
    if (kind != Kind::kPacked) of_part.factors = Factors::kFloat;
    const int64_t num_tasks = 1 + int64_t(num_indices * work_of(i) / limit);
    const int64_t cols = std::max(std::min(num_tasks, divide_up(p.n, kMinCols)),
                                  divide_up(p.n, kMaxCols));
    const bool has_many = p.m >= kManyRows && p.lhs_col != 1;
    const int64_t max_rows =
        std::min({kMaxPacked / std::max<int64_t>(whole, 1), has_many ? kRowsOfMany : p.m,
                  divide_up(p.m, divide_up(num_tasks, cols))});
    const int64_t rows = divide_up(max_rows, kRows) * kRows;
    for (int64_t index = 0; index < p.count; index += num_indices)
      for (int64_t row = 0; row < p.m; row += rows) {
        const int64_t num_rows = std::min(rows, p.m - row), end = row + num_rows;
        // Even, since a panel of few rows is slow.
        const int64_t panel_rows = divide_up(num_rows, divide_up(num_rows, kRows));

        int64_t num_cols = p.n, first = first_of(p, piece), inner = whole;
        if (triangle == Triangle::kLowerResult) num_cols = std::min(num_cols, end);
        if (triangle == Triangle::kLowerLeft)
          inner = std::clamp<int64_t>(end - first, 0, inner);
        if (triangle == Triangle::kUpperLeft) {
          // Pairs stay what they are.
          const int64_t per = per_place(of_part.factors);
          const int64_t skipped = std::clamp<int64_t>(row - first, 0, inner) / per * per;
          first += skipped;
          inner -= skipped;
        }
        if (inner == 0 && piece > 0) continue;

        parts.push_back({&p, triangle, index, num_indices, row, num_rows, num_cols, first,
                         inner, panel_rows, piece == 0, i < num_streamed, kind, of_part,
                         nullptr});
        num_col_blocks.push_back(cols);
      }
  }

  return parts;
}

// Tasks that are a thread's own, as far as no other thread has finished its own before. Caches of
// several threads may be far apart, so it is mostly the one that has copied what they read.
struct alignas(64) Queue {
  std::atomic<int64_t> next;
  int64_t end;
};

// Gives each thread an equal share of the work, of which the last task is cut into small ones:
// the threads end at about the same time then.
std::vector<Task> deal(const std::vector<Task>& tasks, std::vector<Queue>& queues) {
  const int64_t num_tasks = tasks.size(), num_threads = queues.size();
  std::vector<Task> dealt;
  dealt.reserve(num_tasks + num_threads * divide_up(kMaxCols, kCols));

  // Up to each task. All tasks do something, so that there is an order to cut.
  std::vector<double> work(num_tasks + 1, 0);
  for (int64_t t = 0; t < num_tasks; ++t) work[t + 1] = work[t] + tasks[t].work() + 1;

  for (int64_t i = 0, begin = 0, end; i < num_threads; ++i, begin = end) {
    const double share = work[num_tasks] * (i + 1) / num_threads;
    // A task is of the thread in whose share its middle lies.
    for (end = begin; end < num_tasks && work[end] + work[end + 1] <= 2 * share;) ++end;

    queues[i].next = dealt.size();
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = tasks[t];
      const bool is_cut = t == end - 1 && task.part->packs();
      const int64_t cols = is_cut ? int64_t(kCols) : task.num_cols;
      for (int64_t col = 0; col < task.num_cols; col += cols)
        dealt.push_back({task.part, task.col + col, std::min(cols, task.num_cols - col)});
    }
    queues[i].end = dealt.size();
  }

  return dealt;
}

// Parts that are packed together. Returns whether there was memory for it.
bool run(Part* begin, Part* end, const int64_t* num_col_blocks, int64_t size, bool adds,
         int num_threads) {
  static thread_local Buffer packed;
  if (!packed.reserve(size)) return false;
  float* memory = packed.get();

  std::vector<PackTask> pack_tasks;
  std::vector<Task> tasks;

  for (Part* part = begin; part < end; ++part, ++num_col_blocks) {
    part->packed = memory;
    memory += part->size();

    for (int64_t panel = 0; part->packs_left() && panel < part->num_panels();
         panel += kPanelsAtOnce)
      pack_tasks.push_back({part, panel});

    const int64_t cols =
        divide_up(divide_up(part->product->n, *num_col_blocks), kCols) * kCols;
    for (int64_t col = 0; col < part->num_cols; col += cols)
      tasks.push_back({part, col, std::min(cols, part->num_cols - col)});
  }

  const int64_t num_pack_tasks = pack_tasks.size();
  std::vector<Queue> queues(num_threads);
  tasks = deal(tasks, queues);
  const int64_t num_tasks = tasks.size();

  bool done = true;
#pragma omp parallel num_threads(num_threads) if (num_tasks > 1) reduction(&& : done)
  {
    static thread_local Buffer buffer;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_pack_tasks; ++i) run(pack_tasks[i]);
    for (int64_t i = 0; i < num_threads; ++i) {
      Queue& queue = queues[(omp_get_thread_num() + i) % num_threads];
      for (int64_t task = queue.next++; task < queue.end; task = queue.next++) {
        const Task* next = task + 1 < queue.end ? &tasks[task + 1] : nullptr;
        if (buffer.reserve(tasks[task].size()))
          run(tasks[task], next, adds, buffer.get());
        else
          done = false;
      }
    }
    // What was written past the caches comes before what other threads do next.
    _mm_sfence();
  }

  return done;
}

bool multiply_all(int64_t num_products, const Product* products, const Triangle* triangles,
                  const Types& types, bool adds, int64_t num_streamed, int num_threads) {
  int64_t num_pieces = 0;
  for (int64_t i = 0; i < num_products; ++i)
    num_pieces = std::max(num_pieces, products[i].num_pieces(types.factors));

  std::vector<int64_t> num_col_blocks;
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    std::vector<Part> parts =
        cut(num_products, products, triangles, types, num_streamed, piece, num_threads,
            num_col_blocks);

    // Groups of equal size, as the threads wait for each other after each.
    int64_t total = 0;
    for (const Part& part : parts) total += part.size();
    const int64_t share = total / std::max<int64_t>(1, divide_up(total, kMaxPacked));

    for (size_t begin = 0, end = 0; begin < parts.size(); begin = end) {
      int64_t size = 0;
      for (end = begin; end < parts.size(); ++end) {
        const int64_t next = parts[end].size();
        if (end > begin && (size + next > kMaxPacked || size + next / 2 > share)) break;
        size += next;
      }

      if (!run(&parts[begin], parts.data() + end, &num_col_blocks[begin], size, adds,
               num_threads))
        return false;
    }
  }

  return true;
}

}  // namespace

// Returns 0, or 1 if there is no memory for copies of the factors. Where bits of `halves` are
// set, left factors (1), right ones (2) or results (4) are kept in bfloat16. Factors are rounded
// to it where one is, and with kRounds of `rounding`. Without `triangles`, all matrices are
// whole. The first `num_streamed` results are written past the caches.
extern "C" int moxe_multiply(int64_t num_products, const Product* products,
                             const Triangle* triangles, int rounding, int halves, int adds,
                             int num_streamed, int num_threads) {
  const bool is_rounded = (rounding & moxe::kRounds) || (halves & 3);
  const bool pairs = moxe::kHasPairs && !(rounding & moxe::kWidens);
  const Types types = {(halves & 1) != 0, (halves & 2) != 0, (halves & 4) != 0,
                       !is_rounded ? Factors::kFloat
                       : pairs     ? Factors::kBFloat16
                                   : Factors::kWidened};
  try {
    const bool done = multiply_all(num_products, products, triangles, types, adds != 0,
                                   num_streamed, num_threads);
    return done ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
