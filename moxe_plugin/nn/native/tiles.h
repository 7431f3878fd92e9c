// Tiles of products for CPUs with AVX-512: their sums stay in registers.

#pragma once

#include "bfloat16.h"

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <utility>

namespace moxe {

constexpr int kTileRows = 14;    // With two vectors of columns, 28 of 32 registers hold sums.
constexpr int kTileCols = 32;
constexpr int64_t kRowsAhead = 16;  // of the right factor, which are fetched

template <typename Function, typename Get, int... I>
constexpr std::array<Function, sizeof...(I) + 1> list_by_rows(
    Get get, std::integer_sequence<int, I...>) {
  return {nullptr, get(std::integral_constant<int, I + 1>{})...};
}

// Functions for 1 to `max` rows by their number: get(std::integral_constant<int, rows>).
template <typename Function, int max, typename Get>
constexpr std::array<Function, max + 1> by_rows(Get get) {
  return list_by_rows<Function>(get, std::make_integer_sequence<int, max>{});
}

// out (Rows,kTileCols) = or += lhs (Rows,depth) @ rhs (depth,kTileCols), of factors as they lie:
// a copy of small ones would cost more than it spares. The columns of `rhs` and `out` follow each
// other; `depth` are places of what is multiplied.
template <Factors factors, int Rows>
void multiply_direct(int64_t depth, const float* lhs, int64_t lhs_row, int64_t lhs_col,
                     const float* rhs, int64_t rhs_row, float* out, int64_t out_row,
                     bool adds) {
  constexpr int vecs = kTileCols / 16;
  __m512 sums[Rows][vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vecs; ++v) sums[r][v] = _mm512_setzero_ps();

  for (int64_t i = 0; i < depth; ++i, lhs += lhs_col, rhs += rhs_row) {
    __m512 weights[vecs];
#pragma GCC unroll 16
    for (int v = 0; v < vecs; ++v) {
      __builtin_prefetch(rhs + kRowsAhead * rhs_row + v * 16);
      weights[v] = _mm512_loadu_ps(rhs + v * 16);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512 value = _mm512_set1_ps(lhs[r * lhs_row]);
#pragma GCC unroll 16
      for (int v = 0; v < vecs; ++v)
        sums[r][v] = add_products<factors>(sums[r][v], value, weights[v]);
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vecs; ++v) {
      float* to = out + r * out_row + v * 16;
      _mm512_storeu_ps(
          to, adds ? _mm512_add_ps(sums[r][v], _mm512_loadu_ps(to)) : sums[r][v]);
    }
}

using MultiplyDirect = void (*)(int64_t, const float*, int64_t, int64_t, const float*,
                                int64_t, float*, int64_t, bool);
template <Factors factors>
constexpr auto kMultiplyDirect = by_rows<MultiplyDirect, kTileRows>(
    [](auto rows) { return &multiply_direct<factors, decltype(rows)::value>; });

}  // namespace moxe
