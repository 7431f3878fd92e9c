// Products of bfloat16, to which floats are rounded. Pairs of them are as large as a float, and
// are kept in place of one, where processors multiply pairs faster; else they are floats.

#pragma once

#include "integers.h"

#include <c10/util/BFloat16.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace moxe {

// Whether the processor multiplies pairs.
#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// What is multiplied: floats, pairs of bfloat16, or floats of which each is a bfloat16.
enum class Factors { kFloat, kBFloat16, kWidened };

// The upper half of a float.
using c10::BFloat16;

// How many places hold `count` numbers.
inline int64_t num_places(int64_t count, Factors factors) {
  return factors == Factors::kBFloat16 ? divide_up(count, 2) : count;
}

#ifdef __AVX512F__

inline __mmask16 first_floats(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

inline __mmask32 first_halves(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

// Numbers rounded to bfloat16, to the nearest, and to even ones where two are as near.
inline __m256i round_to_half(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i half = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  // NaN stays NaN.
  const __m512i quiet =
      _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(
      rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet));
#endif
}

// Numbers as floats.
inline __m512 widen_half(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Those of a mask, 0 beyond them.
inline __m512 load_masked_half(const BFloat16* from, __mmask16 mask) {
  return widen_half(_mm256_maskz_loadu_epi16(mask, from));
}

// At most 16 numbers, 0 beyond `count`.
inline __m512 load_half(const BFloat16* from, int64_t count) {
  return load_masked_half(from, first_floats(count));
}

// Pairs of numbers that follow each other, of which `high` are the last ones.
inline __m512 pair_neighbours(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return (__m512)_mm512_cvtne2ps_pbh(high, low);
#else
  return _mm512_castsi512_ps(_mm512_inserti64x4(
      _mm512_castsi256_si512(round_to_half(low)), round_to_half(high), 1));
#endif
}

// Pairs of a number of `low` and that of `high` in the same place.
inline __m512 pair_places(__m512 low, __m512 high) {
  alignas(64) static constexpr int16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_castsi512_ps(
      _mm512_permutexvar_epi16(_mm512_load_si512(order),
                               _mm512_castps_si512(pair_neighbours(low, high))));
}

// The same of numbers that are bfloat16: `low` and `high` of masks, 0 beyond them.
inline __m512 pair_places(const BFloat16* low, __mmask16 of_low, const BFloat16* high,
                          __mmask16 of_high) {
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_low, low)),
                second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_high, high));
  return _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

// sum + x y, or the sum of that of both numbers of pairs.
template <Factors factors>
inline __attribute__((always_inline)) __m512 add_products(__m512 sum, __m512 x, __m512 y) {
#ifdef __AVX512BF16__
  if (factors == Factors::kBFloat16)
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
#endif
  return _mm512_fmadd_ps(x, y, sum);
}

// Writes or adds `count` numbers.
inline void store_row(const float* from, int64_t count, bool adds, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = adds ? from[i] + to[i] : from[i];
}

// The same, which rounds sums.
inline void store_row(const float* from, int64_t count, bool adds, BFloat16* to) {
  for (int64_t i = 0; i < count; i += 32) {
    __m512 low = _mm512_maskz_loadu_ps(first_floats(count - i), from + i),
           high = _mm512_maskz_loadu_ps(first_floats(count - i - 16), from + i + 16);
    if (adds) {
      low = _mm512_add_ps(low, load_half(to + i, count - i));
      high = _mm512_add_ps(high, load_half(to + i + 16, count - i - 16));
    }
    _mm512_mask_storeu_epi16(to + i, first_halves(count - i),
                             _mm512_castps_si512(pair_neighbours(low, high)));
  }
}

// Writes pairs of the `count` numbers of a row.
inline void pair_row(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 32)
    _mm512_mask_storeu_ps(
        to + i / 2, first_floats(divide_up(count - i, 2)),
        pair_neighbours(_mm512_maskz_loadu_ps(first_floats(count - i), from + i),
                        _mm512_maskz_loadu_ps(first_floats(count - i - 16), from + i + 16)));
}

// The same of numbers that are bfloat16, which are pairs already.
inline void pair_row(const BFloat16* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(BFloat16));
  // What completes the last pair.
  if (count % 2 == 1) reinterpret_cast<BFloat16*>(to)[count] = BFloat16(0);
}

// Writes pairs of the numbers of two rows of `count`; of one row and 0 if the second is null.
inline void pair_rows(const float* low, const float* high, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_floats(count - i);
    _mm512_mask_storeu_ps(
        to + i, mask,
        pair_places(_mm512_maskz_loadu_ps(mask, low + i),
                    _mm512_maskz_loadu_ps(high ? mask : 0, high ? high + i : low + i)));
  }
}

// The same of numbers that are bfloat16.
inline void pair_rows(const BFloat16* low, const BFloat16* high, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_floats(count - i);
    _mm512_mask_storeu_ps(
        to + i, mask,
        pair_places(low + i, mask, high ? high + i : low + i, high ? mask : 0));
  }
}

// Numbers rounded to bfloat16, as floats.
inline __m512 round_floats(__m512 x) { return widen_half(round_to_half(x)); }

// Writes the `count` numbers of a row as floats.
inline void widen_row(const float* from, int64_t count, float* to) {
  std::copy_n(from, count, to);
}

inline void widen_row(const BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16)
    _mm512_mask_storeu_ps(to + i, first_floats(count - i), load_half(from + i, count - i));
}

// Writes the `count` numbers of a row, rounded to bfloat16, as floats.
inline void round_row(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_floats(count - i);
    _mm512_mask_storeu_ps(to + i, mask,
                          round_floats(_mm512_maskz_loadu_ps(mask, from + i)));
  }
}

// The same of numbers that are bfloat16.
inline void round_row(const BFloat16* from, int64_t count, float* to) {
  widen_row(from, count, to);
}

#endif  // __AVX512F__

}  // namespace moxe
