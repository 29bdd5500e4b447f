// e^x and what is made of it, on 16 numbers in FP32. NaN stays NaN.
#pragma once
#include <immintrin.h>

// To 3 units in the last place for |x| < 30: 2^n · e^r, |r| <= ln(2) / 2, by the polynomial of the fifth degree whose largest
// relative error is the least, 1.1e-7.
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));  // the second where one is NaN
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147181f), x);
    __m512 sum = _mm512_set1_ps(8.3125196e-3f);
    const float others[] = {4.1890156e-2f, 0.16667114f, 0.49999231f, 1.0f, 1.0f};
    for (int i = 0; i < 5; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(others[i]));
    return _mm512_scalef_ps(sum, n);
}

// 2^x for x <= 0, to 2 units in the last place, NaN for NaN: 2^n · 2^f, |f| <= 1/2, by a polynomial.
static inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // the second where one is NaN
    const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 sum = _mm512_set1_ps(0.00132647274f);
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.00967151297f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.0555073375f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.240222421f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.693146978f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f)), n);
}

// 1 / (1 + e^-x), the division by an estimate to 14 bits and a step of Newton's. Below -88 as at -88.
static inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    __m512 below = exponential(_mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), x)));
    __m512 sum = _mm512_add_ps(one, below), guess = _mm512_rcp14_ps(sum);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, two));
}
