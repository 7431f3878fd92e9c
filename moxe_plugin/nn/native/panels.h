// Panels of factors of products, which the innermost loop reads one row after the other.

#pragma once

#include "bfloat16.h"
#include "integers.h"
#include "tiles.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

// What the compiler would leave out as soon as a file has more functions than it likes.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace moxe {

constexpr int kWidth = 16;              // floats of a vector
constexpr int64_t kPanelsAtOnce = 8;    // that are copied together
constexpr int64_t kPackedAhead = 8;     // rows that a copy into panels fetches ahead

// Stores a row of 16 numbers of panel row i, of `depth` that are `Stride` apart. Of rows of fewer,
// all but the last one may reach into the next, which comes later: a masked store is slow.
template <int Stride>
ALWAYS_INLINE void store(float* row, int64_t i, int64_t depth, __m512 x) {
  if (Stride >= kWidth || i + 1 < depth)
    _mm512_storeu_ps(row, x);
  else
    _mm512_mask_storeu_ps(row, first_floats(Stride), x);
}

// How many of the inner dimension are in a row of a panel.
constexpr int64_t per_place(Factors factors) { return factors == Factors::kBFloat16 ? 2 : 1; }
template <Factors factors>
constexpr int64_t kPerRow = per_place(factors);

// The next `count` numbers of the inner dimension, which follow each other, as panels hold them:
// 16 floats or 16 pairs; 0 beyond them.
template <Factors factors>
ALWAYS_INLINE __m512 load_inner(const float* from, int64_t count) {
  const __m512 low = _mm512_maskz_loadu_ps(first_floats(count), from);
  if (factors == Factors::kFloat) return low;
  if (factors == Factors::kWidened) return round_floats(low);

  return pair_neighbours(
      low, _mm512_maskz_loadu_ps(first_floats(count - kWidth), from + kWidth));
}

template <Factors factors>
ALWAYS_INLINE __m512 load_inner(const BFloat16* from, int64_t count) {
  if (factors == Factors::kWidened) return load_half(from, count);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first_halves(count), from));
}

// 16 numbers of a panel's row, each of a column: of pairs, the other half is `next` further, or
// 0 if there is none.
template <Factors factors>
ALWAYS_INLINE __m512 load_columns(const float* from, __mmask16 mask, int64_t next,
                                  bool has_next) {
  const __m512 low = _mm512_maskz_loadu_ps(mask, from);
  if (factors == Factors::kFloat) return low;
  if (factors == Factors::kWidened) return round_floats(low);

  return pair_places(low, _mm512_maskz_loadu_ps(has_next ? mask : 0, from + next));
}

template <Factors factors>
ALWAYS_INLINE __m512 load_columns(const BFloat16* from, __mmask16 mask, int64_t next,
                                  bool has_next) {
  if (factors == Factors::kWidened) return load_masked_half(from, mask);
  return pair_places(from, mask, from + next, has_next ? mask : 0);
}

// One of these.
template <Factors factors, typename T>
float load_one(const T* from, int64_t next, bool has_next) {
  float x;
  _mm_store_ss(&x, _mm512_castps512_ps128(load_columns<factors>(from, 1, next, has_next)));
  return x;
}

// Stores column c of a matrix of `num_rows`, at most 16, and 16 columns as row i + c. A row of
// it holds `inner` of the inner dimension.
template <Factors factors, int Stride, typename T>
ALWAYS_INLINE void transpose(const T* from, int64_t next_row, int64_t num_rows,
                             int64_t inner, float* out, int64_t i, int64_t depth) {
  __m512 a[16], b[16];
  // Rows that there are not are the last one again.
  for (int64_t r = 0; r < 16; ++r)
    a[r] = load_inner<factors>(from + std::min(r, num_rows - 1) * next_row, inner);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4)
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(b[r + half]),
                    high = _mm512_castps_pd(b[r + 2 + half]);
      a[r + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[r + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; ++c)
    for (int r = 0; r < 16; r += 8) {
      b[r + c] = _mm512_shuffle_f32x4(a[r + c], a[r + 4 + c], 0x88);
      b[r + 4 + c] = _mm512_shuffle_f32x4(a[r + c], a[r + 4 + c], 0xdd);
    }
  for (int c = 0; c < 8; ++c) {
    a[c] = _mm512_shuffle_f32x4(b[c], b[8 + c], 0x88);
    a[8 + c] = _mm512_shuffle_f32x4(b[c], b[8 + c], 0xdd);
  }
  for (int c = 0; c < 16; ++c)
    if (i + c < depth) store<Stride>(out + c * Stride, i + c, depth, a[c]);
}

// Panels: out[i * Stride + j] = from[i * outer + j * inner] for all i below `num_outer` and
// `width` j, at most Stride; up to Stride, finite numbers. Pairs hold i and i + 1. Panels follow
// each other in `out`, the `count` j of all of them in `from`.
template <Factors factors, int Stride, typename T>
void pack(const T* from, int64_t outer, int64_t inner, int64_t num_outer,
          int64_t count, int64_t width, float* out) {
  const int64_t num_panels = divide_up(count, width);
  const int64_t depth = num_places(num_outer, factors);
  constexpr int64_t per_row = kPerRow<factors>;
  // Of the cache, which a vector's numbers are read from.
  constexpr int64_t num_lines = divide_up(per_row * int64_t(sizeof(T)), int64_t(sizeof(float)));

  if (inner == 1) {
    // Rows of several panels, as the next row is on another page of memory.
    for (int64_t begin = 0; begin < num_panels; begin += kPanelsAtOnce)
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t p = begin; p < std::min(begin + kPanelsAtOnce, num_panels); ++p)
          for (int64_t j = 0; j < width; j += kWidth) {
            const T* at = from + i * per_row * outer + p * width + j;
            for (int64_t ahead = 0; ahead < per_row; ++ahead)
              if (i * per_row + kPackedAhead + ahead < num_outer)
                __builtin_prefetch(at + (kPackedAhead + ahead) * outer);
            store<Stride>(
                out + (p * depth + i) * Stride + j, i, depth,
                load_columns<factors>(at, first_floats(count - p * width - j), outer,
                                      (i + 1) * per_row <= num_outer));
          }
    return;
  }

  for (int64_t p = 0; p < num_panels; ++p) {
    const T* panel_from = from + p * width * inner;
    float* panel = out + p * depth * Stride;
    const int64_t num_filled = std::min(width, count - p * width);

    if (outer == 1) {
      for (int64_t i = 0; i < depth; i += kWidth)
        for (int64_t j = 0; j < num_filled; j += kWidth) {
          const int64_t at = i * per_row;
          // Of short rows on many pages the processor foresees nothing.
          if (p + 1 < num_panels)
            for (int64_t r = j; r < std::min(width, j + kWidth); ++r)
              for (int64_t line = 0; line < num_lines; ++line)
                __builtin_prefetch(panel_from + at + line * kWidth + (width + r) * inner);
          if (j == 0)
            for (int64_t l = 0; l < Stride; ++l)
              __builtin_prefetch(panel + (i + 3 * kWidth) * Stride + l * kWidth, 1);
          transpose<factors, Stride>(panel_from + at + j * inner, inner, num_filled - j,
                                     num_outer - at, panel + i * Stride + j, i, depth);
        }
    } else {
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t j = 0; j < num_filled; ++j)
          panel[i * Stride + j] =
              load_one<factors>(panel_from + i * per_row * outer + j * inner, outer,
                                (i + 1) * per_row <= num_outer);
    }
  }
}

template <int Stride>
void pack(Factors factors, bool is_half, const char* from, int64_t outer, int64_t inner,
          int64_t num_outer, int64_t count, int64_t width, float* out) {
  const auto* floats = reinterpret_cast<const float*>(from);
  const auto* halves = reinterpret_cast<const BFloat16*>(from);
  if (factors == Factors::kFloat)
    pack<Factors::kFloat, Stride>(floats, outer, inner, num_outer, count, width, out);
  else if (factors == Factors::kBFloat16 && is_half)
    pack<Factors::kBFloat16, Stride>(halves, outer, inner, num_outer, count, width, out);
  else if (factors == Factors::kBFloat16)
    pack<Factors::kBFloat16, Stride>(floats, outer, inner, num_outer, count, width, out);
  else if (is_half)
    pack<Factors::kWidened, Stride>(halves, outer, inner, num_outer, count, width, out);
  else
    pack<Factors::kWidened, Stride>(floats, outer, inner, num_outer, count, width, out);
}

}  // namespace moxe
