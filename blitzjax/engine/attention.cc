// One query per sequence over the keys and values that the sequence has kept in bfloat16, grouped heads, sums in float32.
//
// Reads what a row has, not the whole context that its cache has room for, and once for all heads of a group. A row's
// numbers do not depend on the other rows, on the room, nor on the number of threads.
//
// Memory decides: keys and values are read in the order in which they lie, and fetched kAheadBytes before they are used,
// at a matrix's end those that the next group or row begins with. On Zen 5 that takes half of the time.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "tasks.h"

namespace ffi = xla::ffi;

#define UNROLLED _Pragma("GCC unroll 32")  // arrays of registers stay in registers

namespace {

#ifdef __AVX512F__
using Vector = __m512;
constexpr int kVectors = 4;  // of values, side by side
inline Vector Load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vector Load(const float* from) { return _mm512_loadu_ps(from); }
inline void Store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
inline Vector Broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector MultiplyAdd(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
#else
using Vector = __m256;
constexpr int kVectors = 2;
inline Vector Load(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vector Load(const float* from) { return _mm256_loadu_ps(from); }
inline void Store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
inline Vector Broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector MultiplyAdd(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
#endif
constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
constexpr int kMostHeads = 4;  // registers for their sums
constexpr int kKeyRows = 4;  // that are read side by side
constexpr int64_t kAheadBytes = 8192, kLine = 64 / sizeof(uint16_t);  // numbers of a line of cache

inline void Fetch(const uint16_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0); }

// For x <= 0; the polynomial of Cephes' expf. Plain code that compilers turn into vectors.
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

// most * tanh(x / most) in place of `count` values.
inline void Squeeze(float* x, int64_t count, float most) {
  for (int64_t i = 0; i < count; ++i) {
    const float power = Exp(-2.0f * std::abs(x[i] / most));
    x[i] = std::copysign(most * (1.0f - power) / (1.0f + power), x[i]);
  }
}

// exp(x - max) in place of `room` values, zeros but for [first, stop); `sink` is one more x. Returns the sum of all.
inline float Exponentials(float* x, int64_t first, int64_t stop, int64_t room, float sink) {
  const auto others = [=](float value) { std::fill(x, x + first, value), std::fill(x + stop, x + room, value); };
  others(-std::numeric_limits<float>::infinity());
  float most[kLanes], sums[kLanes] = {};
  std::memcpy(most, x, sizeof most);
  for (int64_t i = kLanes; i < room; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = std::max(most[lane], x[i + lane]);
  const float top = std::max(sink, *std::max_element(most, most + kLanes));
  for (int64_t i = 0; i < room; ++i) x[i] = Exp(x[i] - top);
  others(0.0f);
  for (int64_t i = 0; i < room; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane];
  float sum = 0;
  for (float s : sums) sum += s;
  return sum + Exp(sink - top);  // without a sink too little to be seen
}

// What a row attends to, and how: keys [size, context] and values [context, size] of the tokens [first, stop).
struct Cache {
  const uint16_t *keys, *values;
  int64_t size, context, first, stop;
  float softcap;  // 0: none
};

// scores[h, j] = sum_i q[h, i] * keys[i, begin + j] for kHeads heads q [kHeads, size] and `room` tokens.
template <int kHeads>
void Scores(const float* q, const Cache& kv, int64_t begin, int64_t room, float* scores) {
  const int64_t bytes = room * sizeof(uint16_t), rows = kKeyRows * (1 + kAheadBytes / (kKeyRows * bytes));
  const int64_t ahead = std::min(rows, kv.size) * kv.context;
  std::fill(scores, scores + kHeads * room, 0.0f);
  for (int64_t i = 0; i < kv.size; i += kKeyRows) {
    Vector queries[kHeads * kKeyRows];
    UNROLLED for (int h = 0; h < kHeads; ++h)
      UNROLLED for (int r = 0; r < kKeyRows; ++r) queries[h * kKeyRows + r] = Broadcast(q[h * kv.size + i + r]);
    const uint16_t* keys = kv.keys + i * kv.context + begin;
    for (int64_t j = 0; j < room; j += kLanes, keys += kLanes) {
      Vector row[kKeyRows];
      UNROLLED for (int r = 0; r < kKeyRows; ++r) {
        if (j % kLine == 0) Fetch(keys + r * kv.context + ahead);
        row[r] = Load(keys + r * kv.context);
      }
      UNROLLED for (int h = 0; h < kHeads; ++h) {
        Vector sum = Load(scores + h * room + j);
        UNROLLED for (int r = 0; r < kKeyRows; ++r) sum = MultiplyAdd(sum, queries[h * kKeyRows + r], row[r]);
        Store(scores + h * room + j, sum);
      }
    }
  }
}

// out[h, j] = sum_i weights[h, i] * values[i, j] for kHeads heads, every `room` weights, and kCount registers from `column`.
template <int kHeads, int kCount>
inline void Sums(const float* weights, int64_t room, const Cache& kv, int64_t column, float* out) {
  const int64_t tokens = kv.stop - kv.first, ahead = kAheadBytes / sizeof(uint16_t) / kv.size;
  const uint16_t* values = kv.values + kv.first * kv.size + column;
  Vector sums[kHeads * kCount];
  UNROLLED for (int s = 0; s < kHeads * kCount; ++s) sums[s] = Broadcast(0);
  for (int64_t i = 0; i < tokens; ++i, values += kv.size) {
    const uint16_t* next = values + (i + ahead < tokens ? ahead : ahead + kv.context - tokens) * kv.size;
    Vector row[kCount];
    UNROLLED for (int v = 0; v < kCount; ++v) {
      if (v * kLanes % kLine == 0) Fetch(next + v * kLanes);
      row[v] = Load(values + v * kLanes);
    }
    UNROLLED for (int h = 0; h < kHeads; ++h) {
      const Vector weight = Broadcast(weights[h * room + i]);
      UNROLLED for (int v = 0; v < kCount; ++v) sums[h * kCount + v] = MultiplyAdd(sums[h * kCount + v], weight, row[v]);
    }
  }
  UNROLLED for (int h = 0; h < kHeads; ++h)
    UNROLLED for (int v = 0; v < kCount; ++v) Store(out + h * kv.size + column + v * kLanes, sums[h * kCount + v]);
}

// kHeads heads q [kHeads, size], with a sink each, into out [kHeads, size].
template <int kHeads>
void Heads(const float* q, const Cache& kv, const float* sinks, float* out) {
  const int64_t begin = kv.first / kLanes * kLanes, room = (kv.stop + kLanes - 1) / kLanes * kLanes - begin;
  const int64_t first = kv.first - begin, stop = kv.stop - begin, size = kv.size;
  thread_local std::vector<float> weights;
  weights.resize(kHeads * room);
  Scores<kHeads>(q, kv, begin, room, weights.data());
  float sums[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    float* scores = weights.data() + h * room;
    if (kv.softcap > 0) Squeeze(scores, room, kv.softcap);
    sums[h] = Exponentials(scores, first, stop, room, sinks[h]);
  }
  int64_t column = 0;
  for (; column + kVectors * kLanes <= size; column += kVectors * kLanes)
    Sums<kHeads, kVectors>(weights.data() + first, room, kv, column, out);
  for (; column < size; column += kLanes) Sums<kHeads, 1>(weights.data() + first, room, kv, column, out);
  for (int h = 0; h < kHeads; ++h)
    for (int64_t i = 0; i < size; ++i) out[h * size + i] /= sums[h];
}

// q is scaled. A row sees `window` tokens, the last of them at last[row]; sinks [groups, heads of a group].
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::U16> k, ffi::Buffer<ffi::U16> v,
                  ffi::Buffer<ffi::S32> last, ffi::Buffer<ffi::F32> sinks, ffi::ResultBuffer<ffi::F32> out,
                  int64_t window, float softcap) {
  const auto sizes = k.dimensions();  // [rows, groups, size, context]
  const int64_t rows = sizes[0], groups = sizes[1], size = sizes[2], context = sizes[3];
  const int64_t heads = q.dimensions()[1] / groups;
  if (size % kLanes || context % kLanes) return ffi::Error::InvalidArgument("sizes must be multiples of a register");
  InParallel(pool, rows * groups, [=, q = q.typed_data(), k = k.typed_data(), v = v.typed_data(),
                                   last = last.typed_data(), sinks = sinks.typed_data(),
                                   out = out->typed_data()](int64_t task) {
    const int64_t stop = std::clamp<int64_t>(last[task / groups] + 1, 1, context);
    const int64_t first = std::clamp<int64_t>(stop - window, 0, stop - 1), at = task * size * context;
    const Cache kv{k + at, v + at, size, context, first, stop, softcap};
    for (int64_t h = 0; h < heads; h += kMostHeads) {
      const float *queries = q + (task * heads + h) * size, *own = sinks + task % groups * heads + h;
      float* to = out + (task * heads + h) * size;
      switch (std::min<int64_t>(heads - h, kMostHeads)) {
        case 1: Heads<1>(queries, kv, own, to); break;
        case 2: Heads<2>(queries, kv, own, to); break;
        case 3: Heads<3>(queries, kv, own, to); break;
        default: Heads<kMostHeads>(queries, kv, own, to);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));
