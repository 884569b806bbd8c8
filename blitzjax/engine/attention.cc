// Queries over the keys and values that their sequence has kept in bfloat16, grouped heads, sums in float32.
//
// Reads what a query sees, not the whole context that its cache has room for, and once for all heads of a group. A query's
// numbers do not depend on the others, on the room, nor on the number of threads: in a prompt they are those of a step.
//
// With one query per sequence memory decides: keys and values are read in the order in which they lie, and fetched
// kCacheAhead before they are used, at a matrix's end those that the next group or row begins with. On Zen 5 that takes
// half of the time.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "fetch.h"
#include "team.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kVectors = 4;  // of values, side by side
inline Vector Load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#else
constexpr int kVectors = 2;
inline Vector Load(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#endif
constexpr int kMostHeads = 4, kMostRows = 6;  // of one query, of several: registers for their sums
constexpr int kKeyRows = 4;  // that are read side by side
constexpr int64_t kLineNumbers = kLine / sizeof(uint16_t);

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

// to[h, j] = sum_i a[h, i] * b[i, j] for kRows rows of a, every `a_row` numbers, `count` rows of b, every `b_row`, and
// kCount registers of columns. If `kFetch`, b is read from memory: what lies `ahead` rows further on is fetched, at the end
// `beyond` rows beyond that.
template <int kRows, int kCount, bool kFetch>
inline void Tile(const float* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t count, int64_t ahead,
                 int64_t beyond, float* to, int64_t to_row) {
  Vector sums[kRows * kCount];
  UNROLLED for (int s = 0; s < kRows * kCount; ++s) sums[s] = Zero();
  for (int64_t i = 0; i < count; ++i, b += b_row) {
    const uint16_t* next = b + (i + ahead < count ? ahead : ahead + beyond) * b_row;
    Vector row[kCount];
    UNROLLED for (int v = 0; v < kCount; ++v) {
      if (kFetch && v * kLanes % kLineNumbers == 0) Fetch<kCacheTo>(next + v * kLanes);
      row[v] = Load(b + v * kLanes);
    }
    UNROLLED for (int h = 0; h < kRows; ++h) {
      const Vector value = Broadcast(a[h * a_row + i]);
      UNROLLED for (int v = 0; v < kCount; ++v) sums[h * kCount + v] = MultiplyAdd(sums[h * kCount + v], value, row[v]);
    }
  }
  UNROLLED for (int h = 0; h < kRows; ++h)
    UNROLLED for (int v = 0; v < kCount; ++v) Store(to + h * to_row + v * kLanes, sums[h * kCount + v]);
}

// All of `columns`, a multiple of a register.
template <int kRows, bool kFetch>
void Columns(const float* a, int64_t a_row, const uint16_t* b, int64_t b_row, int64_t count, int64_t ahead, int64_t beyond,
             float* to, int64_t to_row, int64_t columns) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
    Tile<kRows, kVectors, kFetch>(a, a_row, b + j, b_row, count, ahead, beyond, to + j, to_row);
  for (; j < columns; j += kLanes)
    Tile<kRows, 1, kFetch>(a, a_row, b + j, b_row, count, ahead, beyond, to + j, to_row);
}

// kRows heads of some queries over the same keys [size, context] and values [context, size].
template <int kRows>
struct Heads {
  const uint16_t *keys, *values;
  int64_t size, context;
  float softcap;  // 0: none
  const float* q[kRows];
  float* out[kRows];
  int64_t first[kRows], stop[kRows];  // the tokens [first, stop) are seen
  float sinks[kRows];

  // `kStreams`: keys and values come from memory, else others have just read them.
  template <bool kStreams>
  void Attend() {
    const int64_t from = *std::min_element(first, first + kRows), to = *std::max_element(stop, stop + kRows);
    const int64_t begin = from / kLanes * kLanes, room = (to + kLanes - 1) / kLanes * kLanes - begin;
    thread_local std::vector<float> numbers;
    numbers.resize(kRows * (size + room));
    float *const rows = numbers.data(), *const weights = rows + kRows * size;
    for (int r = 0; r < kRows; ++r) std::copy(q[r], q[r] + size, rows + r * size);
    if constexpr (kStreams)
      Scores(rows, begin, room, weights);
    else
      Columns<kRows, false>(rows, size, keys + begin, context, size, 0, 0, weights, room, room);
    float sums[kRows];
    for (int r = 0; r < kRows; ++r) {
      float* scores = weights + r * room;
      if (softcap > 0) Squeeze(scores, room, softcap);
      sums[r] = Exponentials(scores, first[r] - begin, stop[r] - begin, room, sinks[r]);
    }
    const int64_t ahead = kCacheAhead / sizeof(uint16_t) / size, tokens = to - from;
    Columns<kRows, kStreams>(weights + from - begin, room, values + from * size, size, tokens, ahead, context - tokens,
                             rows, size, size);
    for (int r = 0; r < kRows; ++r)
      for (int64_t i = 0; i < size; ++i) out[r][i] = rows[r * size + i] / sums[r];
  }

  // scores[r, j] = sum_i rows[r, i] * keys[i, begin + j] of `room` tokens, reading kKeyRows rows of keys side by side.
  void Scores(const float* rows, int64_t begin, int64_t room, float* scores) const {
    const int64_t bytes = room * sizeof(uint16_t), further = kKeyRows * (1 + kCacheAhead / (kKeyRows * bytes));
    const int64_t ahead = std::min(further, size) * context;
    std::fill(scores, scores + kRows * room, 0.0f);
    for (int64_t i = 0; i < size; i += kKeyRows) {
      Vector queries[kRows * kKeyRows];
      UNROLLED for (int r = 0; r < kRows; ++r)
        UNROLLED for (int k = 0; k < kKeyRows; ++k) queries[r * kKeyRows + k] = Broadcast(rows[r * size + i + k]);
      const uint16_t* from = keys + i * context + begin;
      for (int64_t j = 0; j < room; j += kLanes, from += kLanes) {
        Vector row[kKeyRows];
        UNROLLED for (int k = 0; k < kKeyRows; ++k) {
          if (j % kLineNumbers == 0) Fetch<kCacheTo>(from + k * context + ahead);
          row[k] = Load(from + k * context);
        }
        UNROLLED for (int r = 0; r < kRows; ++r) {
          Vector sum = Load(scores + r * room + j);
          UNROLLED for (int k = 0; k < kKeyRows; ++k) sum = MultiplyAdd(sum, queries[r * kKeyRows + k], row[k]);
          Store(scores + r * room + j, sum);
        }
      }
    }
  }
};

// As many queries in turn as `turn` see one row of the cache, the last `window` of its tokens up to `last`.
struct Operands {
  const float* q;         // [queries, groups, heads, size], scaled
  const uint16_t *k, *v;  // [rows, groups, size, context], [rows, groups, context, size]
  const int32_t* last;    // [queries]
  const float* sinks;     // [groups, heads]
  float* out;
  int64_t turn, groups, heads, size, context, window;
  float softcap;

  // Heads [at, at + kRows) of all queries that see `matrix`, those of a query side by side; beyond `end` its last again.
  template <int kRows, bool kStreams>
  void Run(int64_t matrix, int64_t at, int64_t end) const {
    const int64_t group = matrix % groups, from = matrix * size * context;
    Heads<kRows> some{k + from, v + from, size, context, softcap};
    for (int r = 0; r < kRows; ++r) {
      const int64_t one = std::min(at + r, end - 1);
      const int64_t row = matrix / groups * turn + one / heads, head = group * heads + one % heads;
      some.q[r] = q + (row * groups * heads + head) * size;
      some.out[r] = out + (row * groups * heads + head) * size;
      some.stop[r] = std::clamp<int64_t>(last[row] + 1, 1, context);
      some.first[r] = std::clamp<int64_t>(some.stop[r] - window, 0, some.stop[r] - 1);
      some.sinks[r] = sinks[head];
    }
    some.template Attend<kStreams>();
  }
};

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::U16> k, ffi::Buffer<ffi::U16> v,
                  ffi::Buffer<ffi::S32> last, ffi::Buffer<ffi::F32> sinks, ffi::ResultBuffer<ffi::F32> out,
                  int64_t window, float softcap) {
  const auto sizes = k.dimensions();  // [rows of the cache, groups, size, context]
  const int64_t groups = sizes[1], size = sizes[2], context = sizes[3], matrices = sizes[0] * groups;
  const int64_t turn = q.dimensions()[0] / sizes[0], heads = q.dimensions()[1] / groups;
  if (size % kLanes || context % kLanes) return ffi::Error::InvalidArgument("sizes must be multiples of a register");
  const Operands all{q.typed_data(), k.typed_data(), v.typed_data(), last.typed_data(), sinks.typed_data(),
                     out->typed_data(), turn, groups, heads, size, context, window, softcap};
  if (turn == 1) {
    blitzjax::InParallel(pool, matrices, [&](int64_t matrix) {
      for (int64_t at = 0; at < heads; at += kMostHeads) switch (std::min<int64_t>(heads - at, kMostHeads)) {
          case 1: all.Run<1, true>(matrix, at, heads); break;
          case 2: all.Run<2, true>(matrix, at, heads); break;
          case 3: all.Run<3, true>(matrix, at, heads); break;
          default: all.Run<kMostHeads, true>(matrix, at, heads);
        }
    });
  } else {
    const int64_t end = turn * heads, tasks = (end + kMostRows - 1) / kMostRows;
    blitzjax::InParallel(pool, matrices * tasks, [&](int64_t task) {
      all.Run<kMostRows, false>(task / tasks, task % tasks * kMostRows, end);
    });
  }
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
