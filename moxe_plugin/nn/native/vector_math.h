// Vectors of numbers, as ATen has them, and functions of them, for the C++ of
// moxe_plugin.nn.native.

#pragma once

#include "bfloat16.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace moxe {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// What numbers are computed in: bfloat16 is what they are only kept in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, at::BFloat16>, float, T>;

// Calls f(offset, count) for each vector of the numbers from `begin` to `end`: all but the last
// one are known to be whole when it is compiled, which spares masks.
template <typename T, typename F>
void for_each_vector(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t size = Vec<T>::size();
  int64_t i = begin;
  for (; i + size <= end; i += size) f(i, size);
  if (i < end) f(i, end - i);
}

// Numbers beyond `count` are 0.
template <typename T>
Vec<T> load(const T* from, int64_t count) {
  return count == Vec<T>::size() ? Vec<T>::loadu(from) : Vec<T>::loadu(from, count);
}

template <typename T>
void store(const Vec<T>& x, T* to, int64_t count) {
  if (count == Vec<T>::size())
    x.store(to);
  else
    x.store(to, count);
}

#ifdef __AVX512F__
inline __mmask16 first_of_vector(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}

inline Vec<float> load(const at::BFloat16* from, int64_t count) {
  const __m256i bits = count == Vec<float>::size()
                           ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                           : _mm256_maskz_loadu_epi16(first_of_vector(count), from);
  return widen_half(bits);
}

inline void store(const Vec<float>& x, at::BFloat16* to, int64_t count) {
  const __m256i bits = round_to_half(x);
  if (count == Vec<float>::size())
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  else
    _mm256_mask_storeu_epi16(to, first_of_vector(count), bits);
}
#endif

template <typename T>
T sum(const Vec<T>& x) {
  return at::vec::vec_reduce_all<T>([](const auto& a, const auto& b) { return a + b; }, x);
}

// c[0] + x c[1] + x^2 c[2] …
template <typename T, int N>
Vec<T> polynomial(const Vec<T>& x, const T (&c)[N]) {
  Vec<T> result(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) result = at::vec::fmadd(result, x, Vec<T>(c[i]));
  return result;
}

// In float32 with AVX-512, exp, log1p and tanh are polynomials, fitted to the largest error on
// their intervals, without calls or branches, and right to 2 ulps; else they are ATen's.
#if defined(CPU_CAPABILITY_AVX512)
template <typename T>
constexpr bool kHasPolynomials = std::is_same_v<T, float>;
#else
template <typename T>
constexpr bool kHasPolynomials = false;
#endif

template <typename T>
Vec<T> exp(const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kHasPolynomials<T>) {
    // x = n log(2) + r. Beyond these limits are 0 and infinity; NaN stays.
    const __m512 within =
        _mm512_min_ps(_mm512_set1_ps(90), _mm512_max_ps(_mm512_set1_ps(-105), x));
    const __m512 n =
        _mm512_roundscale_ps(_mm512_mul_ps(within, _mm512_set1_ps(1.44269504f)), 8);
    // log(2) in two parts, the first of which times n is exact.
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), within);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);

    const Vec<T> rest = polynomial<T>(
        Vec<T>(r), {0.49999993f, 0.16666521f, 0.041668387f, 0.0083687103f, 0.0013814611f});
    const __m512 of_r =
        _mm512_fmadd_ps(_mm512_mul_ps(r, r), rest, _mm512_add_ps(r, _mm512_set1_ps(1)));

    return _mm512_scalef_ps(of_r, n);
  }
#endif
  return x.exp();
}

// log(1 + x) for x from 0 to 1.
template <typename T>
Vec<T> log1p_of_share(const Vec<T>& x) {
  if constexpr (kHasPolynomials<T>) {
    // 2 artanh(s)
    const Vec<T> s = x / (x + Vec<T>(T(2))), square = s * s;
    const Vec<T> rest =
        polynomial<T>(square, {0.33333338f, 0.19999439f, 0.14308443f, 0.10713827f, 0.12150475f});

    const Vec<T> half = at::vec::fmadd(s * square, rest, s);

    return half + half;
  }
  return x.log1p();
}

// The logistic function, with as little error where it is near 0 as where it is near 1.
template <typename T>
struct Sigmoid {
  // exp(-|x|) cannot overflow.
  explicit Sigmoid(const Vec<T>& x)
      : exp(moxe::exp<T>(x.abs().neg())),
        at_abs(Vec<T>(T(1)) / (Vec<T>(T(1)) + exp)),
        is_negative(x < Vec<T>(T(0))) {}

  Vec<T> value() const { return Vec<T>::blendv(at_abs, exp * at_abs, is_negative); }
  Vec<T> complement() const { return Vec<T>::blendv(exp * at_abs, at_abs, is_negative); }

  Vec<T> exp, at_abs, is_negative;
};

template <typename T>
Vec<T> tanh(const Vec<T>& x) {
  if constexpr (kHasPolynomials<T>) {
    const Vec<T> square = x * x, one(T(1));
    const Vec<T> rest = polynomial<T>(
        square, {-0.33333284f, 0.13331491f, -0.053743494f, 0.020650576f, -0.0057170325f});
    const Vec<T> near_zero = at::vec::fmadd(x * square, rest, x);

    const Vec<T> power = moxe::exp<T>(x.abs() * Vec<T>(T(-2)));
    const Vec<T> at_abs = (one - power) / (one + power);
    const Vec<T> elsewhere = Vec<T>::blendv(at_abs, at_abs.neg(), x < Vec<T>(T(0)));

    return Vec<T>::blendv(elsewhere, near_zero, x.abs() < Vec<T>(T(0.625)));
  }
  return x.tanh();
}

// x sigmoid(x), and its derivative.
template <typename T>
struct Silu {
  explicit Silu(const Vec<T>& x) : x(x), sigmoid(x) {}

  Vec<T> value() const { return x * sigmoid.value(); }
  Vec<T> slope() const {
    const Vec<T> share = sigmoid.value();
    return at::vec::fmadd(x * share, sigmoid.complement(), share);
  }

  Vec<T> x;
  Sigmoid<T> sigmoid;
};

}  // namespace moxe
