// The longest registers of float32 that the compiler's flags allow, and plain code that compilers turn into them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define UNROLLED _Pragma("GCC unroll 32")  // arrays of registers stay in registers

namespace {

#ifdef __AVX512F__
using Vector = __m512;
inline Vector Zero() { return _mm512_setzero_ps(); }
inline Vector Broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector Load(const float* from) { return _mm512_loadu_ps(from); }
inline void Store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
inline Vector Add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector MultiplyAdd(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
#else
using Vector = __m256;
inline Vector Zero() { return _mm256_setzero_ps(); }
inline Vector Broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector Load(const float* from) { return _mm256_loadu_ps(from); }
inline void Store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
inline Vector Add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector MultiplyAdd(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
#endif

constexpr int kLanes = sizeof(Vector) / sizeof(float);

// For x <= 0; the polynomial of Cephes' expf.
inline float Exp(float x) {
  x = std::max(x, -87.0f);
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded: 1.5 * 2^23
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

}  // namespace
