// y[m, n] = sum_k x[m, k] * w[n, k]: float32 rows times bfloat16 weights [out, in], float32 sums.
//
// Reads the weights in place, once from memory: XLA repacks or widens them on every call, which costs more than the
// product when there are few rows. x is rounded to bfloat16 (to nearest even) first, as XLA's form does. A row's sums are
// added in the same order whatever the number of rows and of threads is: an answer does not depend on its batch.
// The instruction set is chosen by the compiler's flags (native.py): AVX-512 with bfloat16, AVX-512, or AVX2 with FMA.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define UNROLLED _Pragma("GCC unroll 32")  // arrays of registers stay in registers

namespace {

// The bits of a float32 after rounding to bfloat16, to nearest even; NaN stays NaN.
inline uint32_t Rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (value != value ? bits | 0x400000 : rounded) & 0xffff0000;
}

#ifdef __AVX512F__

using Vector = __m512;

inline Vector Zero() { return _mm512_setzero_ps(); }

// The sums of 16 registers, in one.
inline Vector Sums(const Vector* s) {
  Vector a[8], b[4];
  UNROLLED for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
  UNROLLED for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  // b[i] holds, in each 128-bit lane, partial sums of registers 4 i .. 4 i + 3.
  const Vector c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
  const Vector d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

inline void Store(float* to, Vector v) { _mm512_storeu_ps(to, v); }

#else

using Vector = __m256;

inline Vector Zero() { return _mm256_setzero_ps(); }

// The sums of 8 registers, in one.
inline Vector Sums(const Vector* s) {
  const Vector a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const Vector b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

inline void Store(float* to, Vector v) { _mm256_storeu_ps(to, v); }

#endif

constexpr int kLanes = sizeof(Vector) / sizeof(float);
constexpr int64_t kStep = 2 * kLanes;  // weights of one register

// A step has kHalves multiply-adds: all of its weights at once, or those at even places, then those at odd ones, each
// widened to float32. Keep writes x as they take it, kStep values at a time.
#ifdef __AVX512BF16__

using Kept = uint16_t;
constexpr int kHalves = 1;

inline __m512bh Weights(const uint16_t* w, int) { return (__m512bh)_mm512_loadu_si512(w); }
inline __m512bh Activations(const Kept* x) { return (__m512bh)_mm512_loadu_si512(x); }
inline Vector MultiplyAdd(Vector sum, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(sum, x, w); }
inline void Keep(const float* from, Kept* to) {
  for (int i = 0; i < kStep; ++i) to[i] = static_cast<Kept>(Rounded(from[i]) >> 16);
}

#else

using Kept = float;
constexpr int kHalves = 2;

#ifdef __AVX512F__
inline Vector Weights(const uint16_t* w, int half) {
  const __m512i pairs = _mm512_loadu_si512(w);
  return _mm512_castsi512_ps(half ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
}
inline Vector Activations(const Kept* x) { return _mm512_loadu_ps(x); }
inline Vector MultiplyAdd(Vector sum, Vector x, Vector w) { return _mm512_fmadd_ps(x, w, sum); }
#else
inline Vector Weights(const uint16_t* w, int half) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return _mm256_castsi256_ps(half ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)) : _mm256_slli_epi32(pairs, 16));
}
inline Vector Activations(const Kept* x) { return _mm256_loadu_ps(x); }
inline Vector MultiplyAdd(Vector sum, Vector x, Vector w) { return _mm256_fmadd_ps(x, w, sum); }
#endif

inline void Keep(const float* from, Kept* to) {
  for (int i = 0; i < kStep; ++i) {
    const uint32_t bits = Rounded(from[i]);
    std::memcpy(to + i % 2 * kLanes + i / 2, &bits, sizeof bits);
  }
}

#endif

template <int kRows, int kOuts>
inline void Step(const Kept* x, int64_t stride, const uint16_t* w, int64_t k, Vector* sums) {
  UNROLLED for (int half = 0; half < kHalves; ++half) {
    decltype(Weights(w, 0)) b[kOuts];
    UNROLLED for (int o = 0; o < kOuts; ++o) b[o] = Weights(w + o * k, half);
    UNROLLED for (int r = 0; r < kRows; ++r) {
      const auto a = Activations(x + r * stride + half * kLanes);
      UNROLLED for (int o = 0; o < kOuts; ++o) sums[r * kOuts + o] = MultiplyAdd(sums[r * kOuts + o], a, b[o]);
    }
  }
}

// kRows rows of x times kOuts rows of w [kOuts, k] into y [kRows, n]. The next kOuts rows of w are fetched if `kFetch`.
template <int kRows, int kOuts, bool kFetch>
inline void Block(const Kept* x, int64_t stride, const uint16_t* w, int64_t k, float* y, int64_t n) {
  constexpr int kSums = (kRows * kOuts + kLanes - 1) / kLanes * kLanes;
  Vector sums[kSums];
  UNROLLED for (int s = 0; s < kSums; ++s) sums[s] = Zero();
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    if constexpr (kFetch)
      UNROLLED for (int o = 0; o < kOuts; ++o) _mm_prefetch(reinterpret_cast<const char*>(w + (o + kOuts) * k + i), _MM_HINT_T0);
    Step<kRows, kOuts>(x + i, stride, w + i, k, sums);
  }
  if (i < k) {
    uint16_t rest[kOuts * kStep] = {};
    for (int o = 0; o < kOuts; ++o) std::memcpy(rest + o * kStep, w + o * k + i, (k - i) * sizeof(uint16_t));
    Step<kRows, kOuts>(x + i, stride, rest, kStep, sums);
  }
  float out[kSums];
  UNROLLED for (int s = 0; s < kSums; s += kLanes) Store(out + s, Sums(sums + s));
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOuts; ++o) y[r * n + o] = out[r * kOuts + o];
}

// Registers for sums, so that there are some left for operands.
#ifdef __AVX512F__
constexpr int kMostRows = 4, kMostOuts = 6;
#else
constexpr int kMostRows = 4, kMostOuts = 2;
#endif

struct Free {
  void operator()(Kept* p) const { std::free(p); }
};

constexpr int64_t kChunk = 64;

// Tasks are taken by whoever is free; the caller takes them too, so it never waits for one that nobody has begun.
struct Work {
  const uint16_t* w;
  float* y;
  int64_t m, k, n, stride;
  std::unique_ptr<Kept[], Free> x;  // [m, stride], aligned: a load that crosses a line takes twice as long
  int64_t tasks;
  std::atomic<int64_t> next{0}, done{0};

  // Rows [first, last) with weight rows j .. j + kOuts.
  template <int kOuts>
  void Rows(int64_t first, int64_t last, int64_t j) const {
    const bool fetch = first == 0;
    int64_t r = first;
    if (fetch && r + kMostRows <= last) Tile<kMostRows, kOuts, true>(r, j), r += kMostRows;
    for (; r + kMostRows <= last; r += kMostRows) Tile<kMostRows, kOuts, false>(r, j);
    for (; r + 2 <= last; r += 2) Tile<2, kOuts, true>(r, j);
    if (r < last) Tile<1, kOuts, true>(r, j);
  }

  template <int kRows, int kOuts, bool kFetch>
  void Tile(int64_t r, int64_t j) const {
    Block<kRows, kOuts, kFetch>(x.get() + r * stride, stride, w + j * k, k, y + r * n + j, n);
  }

  void Columns(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < m; first += kChunk) {
      const int64_t last = std::min(m, first + kChunk);
      int64_t j = begin;
      for (; j + kMostOuts <= end; j += kMostOuts) Rows<kMostOuts>(first, last, j);
      for (; j < end; ++j) Rows<1>(first, last, j);
    }
  }

  void Run() {
    for (int64_t task; (task = next.fetch_add(1)) < tasks; done.fetch_add(1, std::memory_order_release))
      Columns(task * n / tasks, (task + 1) * n / tasks);
  }
};

constexpr int64_t kTaskColumns = 96;
constexpr size_t kLine = 64;

void Fill(Work& work, const float* x, const uint16_t* w, float* y, int64_t m, int64_t k, int64_t n) {
  work.w = w, work.y = y, work.m = m, work.k = k, work.n = n;
  work.stride = (k + kStep - 1) / kStep * kStep;
  work.x.reset(static_cast<Kept*>(std::aligned_alloc(kLine, m * work.stride * sizeof(Kept))));
  for (int64_t r = 0; r < m; ++r) {
    const float* from = x + r * k;
    Kept* to = work.x.get() + r * work.stride;
    int64_t i = 0;
    for (; i + kStep <= k; i += kStep) Keep(from + i, to + i);
    if (i < k) {
      float rest[kStep] = {};
      std::memcpy(rest, from + i, (k - i) * sizeof(float));
      Keep(rest, to + i);
    }
  }
  work.tasks = (n + kTaskColumns - 1) / kTaskColumns;
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> w,
                  ffi::ResultBuffer<ffi::F32> y) {
  auto work = std::make_shared<Work>();
  Fill(*work, x.typed_data(), reinterpret_cast<const uint16_t*>(w.untyped_data()), y->typed_data(), x.dimensions()[0],
       x.dimensions()[1], w.dimensions()[0]);
  for (int64_t helper = 1; helper < std::min<int64_t>(pool.num_threads(), work->tasks); ++helper)
    pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->tasks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
