// The longest registers of float32 that the compiler's flags allow.
#pragma once

#include <immintrin.h>

#define UNROLLED _Pragma("GCC unroll 32")  // arrays of registers stay in registers

namespace {

#ifdef __AVX512F__
using Vector = __m512;
inline Vector Zero() { return _mm512_setzero_ps(); }
inline Vector Broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector Load(const float* from) { return _mm512_loadu_ps(from); }
inline void Store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
inline Vector MultiplyAdd(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
#else
using Vector = __m256;
inline Vector Zero() { return _mm256_setzero_ps(); }
inline Vector Broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector Load(const float* from) { return _mm256_loadu_ps(from); }
inline void Store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
inline Vector MultiplyAdd(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
#endif

constexpr int kLanes = sizeof(Vector) / sizeof(float);

}  // namespace
