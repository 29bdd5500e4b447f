// Numbers in FP8: E4M3 (3 bits of mantissa, largest value 448) and E5M2 (2 bits, 57,344). All of them are BF16 numbers too,
// none of them too small for the units, and products of two are FP32 numbers: BF16 units multiply FP8 exactly.
#pragma once
#include "products.h"

enum { PIECE = 128 };  // of the inner dimension share a scale

static inline int64_t pieces_of(int64_t n) { return (n + PIECE - 1) / PIECE; }
static inline __mmask32 first_of_32(int64_t n) { return first_lanes(n) | (__mmask32)first_lanes(n - LANES) << LANES; }

// 32 of them in BF16. Those below the smallest normal number, the first 8 or 4, are looked up.
static inline __attribute__((always_inline)) __m512i from_fp8(__m256i bytes, const int e5m2) {
    const __m512i first = e5m2 ? _mm512_set1_epi64(0x3840380037800000)
                               : _mm512_set4_epi32(0x3c603c40, 0x3c203c00, 0x3bc03b80, 0x3b000000);
    __m512i x = _mm512_cvtepu8_epi16(bytes), low = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
    __m512i shifted = _mm512_slli_epi16(low, e5m2 ? 5 : 4);
    __m512i out = _mm512_add_epi16(shifted, _mm512_set1_epi16((e5m2 ? 127 - 15 : 127 - 7) << 7));
    out = _mm512_mask_permutexvar_epi16(out, _mm512_cmplt_epu16_mask(low, _mm512_set1_epi16(e5m2 ? 4 : 8)), low, first);
    // E5M2 has infinities, and 3 NaN of each sign; E4M3 one NaN.
    __mmask32 special = _mm512_cmpge_epu16_mask(low, _mm512_set1_epi16(e5m2 ? 0x7c : 0x7f));
    out = _mm512_mask_add_epi16(out, special, shifted, _mm512_set1_epi16(e5m2 ? 0x7000 : 0x77d0));
    return _mm512_or_si512(out, _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7f), x), 8));
}

// 16 of them in FP32.
static inline __attribute__((always_inline)) __m512 widened_fp8(__m128i bytes, const int e5m2) {
    return widened(_mm512_castsi512_si256(from_fp8(_mm256_castsi128_si256(bytes), e5m2)));
}

static inline __mmask16 is_finite(__m512i magnitude) {
    return _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
}
static inline __m512i magnitude_of(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
// The larger of `largest` and of the magnitude of x where x is finite; bits of FP32 numbers, whose order is theirs.
static inline __m512i larger(__m512i largest, __m512 x) {
    __m512i magnitude = magnitude_of(x);
    return _mm512_mask_max_epu32(largest, is_finite(magnitude), largest, magnitude);
}

// The nearest FP8 numbers to x / scale, ties to even and nothing beyond the largest; NaN where x is not finite.
static inline __attribute__((always_inline)) __m128i to_fp8(__m512 x, __m512 scale, const int e5m2) {
    const int shift = e5m2 ? 21 : 20, bias = e5m2 ? (127 - 15) << 2 : (127 - 7) << 3;
    __m512 limit = _mm512_set1_ps(e5m2 ? 57344.0f : 448.0f);
    __m512 exact = _mm512_min_ps(_mm512_castsi512_ps(magnitude_of(_mm512_div_ps(x, scale))), limit);
    __m512i bits = _mm512_castps_si512(exact), odd = _mm512_srli_epi32(bits, shift);
    odd = _mm512_and_si512(odd, _mm512_set1_epi32(1));
    __m512i up_ = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32((1 << (shift - 1)) - 1)), odd);
    __m512i found = _mm512_sub_epi32(_mm512_srli_epi32(up_, shift), _mm512_set1_epi32(bias));
    // Below the smallest normal number: what is rounded where FP32 numbers lie as far apart as these, 2^-9 or 2^-16.
    __m512 far = _mm512_set1_ps(e5m2 ? 128.0f : 16384.0f);
    __m512i subnormal = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(exact, far)), _mm512_castps_si512(far));
    __mmask16 small = _mm512_cmp_ps_mask(exact, _mm512_set1_ps(e5m2 ? 0x1p-14f : 0x1p-6f), _CMP_LT_OQ);
    found = _mm512_mask_mov_epi32(found, small, subnormal);
    __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(x), 31);
    found = _mm512_or_si512(found, _mm512_slli_epi32(sign, 7));
    found = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7f), is_finite(magnitude_of(x)), found);
    return _mm512_cvtepi32_epi8(found);
}

// Of a piece whose largest finite magnitude has these bits.
static inline float scale_of(int32_t largest_bits, int e5m2, int power_of_two) {
    float largest, scale;
    memcpy(&largest, &largest_bits, sizeof largest);
    scale = largest / (e5m2 ? 57344.0f : 448.0f);
    if (!(scale > 0)) return 1.0f;
    if (scale < 0x1p-126f) return 0x1p-126f;
    if (power_of_two) {
        uint32_t bits;
        memcpy(&bits, &scale, sizeof bits);
        bits = (bits + 0x7fffff) & 0xff800000;
        memcpy(&scale, &bits, sizeof bits);
    }
    return scale;
}
