// y[m, n] = sum_k x[m, k] * w[n, k]: float32 rows times weights [out, in], float32 sums. With a gate, of each two of these
// activate(first) * second, made where the sums lie in a core's own caches. Weights are bfloat16, or int8 with a power of
// two for each kBlock of a row, which makes them numbers that bfloat16 has: sums are the same bits.
//
// Reads the weights in place, once from memory: XLA repacks or widens them on every call, which costs more than the
// product when there are few rows. x is rounded to bfloat16 first, to nearest even, as XLA's form does. A row's sums
// are added in the same order whatever the number of threads and of rows is: neither an answer's batch nor whether its
// tokens are a prompt's or a step's shows in it.
// The instruction set is chosen by the compiler's flags (native.py): AVX-512 with bfloat16, AVX-512, or AVX2 with FMA.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "fetch.h"
#include "team.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__

using Words = __m512i;

// The sums of 16 registers, in one.
inline Vector Sums(const Vector* s) {
  Vector a[8], b[4];
  UNROLLED for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
  UNROLLED for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  // b[i] holds, in each 128-bit lane, partial sums of registers 4 i .. 4 i + 3.
  const Vector c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
  const Vector d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

#else

using Words = __m256i;

// The sums of 8 registers, in one.
inline Vector Sums(const Vector* s) {
  const Vector a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const Vector b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#endif

constexpr int64_t kStep = 2 * kLanes;  // weights of one register
constexpr int64_t kBlock = 32;  // int8 weights that share a scale

template <typename W>
constexpr bool kScaled = std::is_same_v<W, int8_t>;

// Weights from some place of a matrix on, and the scales of their blocks: bfloat16, null of bfloat16 weights.
template <typename W>
struct Weights {
  const W* w;
  const uint16_t* scales;

  // `count` further on: int8 weights from the beginning of a block, or by whole ones.
  Weights operator+(int64_t count) const { return {w + count, kScaled<W> ? scales + count / kBlock : nullptr}; }

  // Of the block that begins here, in every lane. With bfloat16's instructions 1.5 * 2^23 times as much, and a little more:
  // an int8 number is added to its bits, then it is subtracted as float32, which is exact up to a scale of 2^104. With
  // weights beyond, 10^33, norms overflow anyway.
  Vector Scale() const {
#if defined(__AVX512BF16__)
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_set1_epi16(*scales), _mm512_set1_epi32((23 << 23) + (1 << 22))));
#elif defined(__AVX512F__)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(*scales), 16));
#else
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(*scales), 16));
#endif
  }
};

// A step has kHalves multiply-adds: all of its weights at once, or those at even places, then those at odd ones, each
// widened to float32. Keep writes x as they take it, kStep values at a time. Weights that are turned in between are Packed
// before and Unpacked after it: multiplied by their scales before if they fit in 16 bits then.
#ifdef __AVX512BF16__

using Kept = uint32_t;  // two values
constexpr int kHalves = 1;

inline __m512bh Multiplier(const uint16_t* w, int, Vector) { return (__m512bh)_mm512_loadu_si512(w); }
inline __m512bh Multiplier(const int8_t* w, int, Vector scale) {
  const auto wide = [=](const int8_t* w) {
    const Words words = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(scale), words)), scale);
  };
#ifdef AMD  // nothing is rounded, and there this is cheaper
  alignas(kLine) static constexpr uint16_t kUpper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (__m512bh)_mm512_permutex2var_epi16((Words)wide(w), _mm512_load_si512(kUpper), (Words)wide(w + kLanes));
#else
  return _mm512_cvtne2ps_pbh(wide(w + kLanes), wide(w));
#endif
}
template <typename W>
inline Words Packed(Weights<W> w) {
  return (Words)Multiplier(w.w, 0, kScaled<W> ? w.Scale() : Zero());
}
template <typename W>
inline Words Unpacked(Words packed, int, Vector) {
  return packed;
}
inline __m512bh Activations(const Kept* x) { return (__m512bh)_mm512_loadu_si512(x); }
inline __m512bh Everywhere(Kept x) { return (__m512bh)_mm512_set1_epi32(x); }
inline Vector MultiplyAdd(Vector sum, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(sum, x, w); }
inline void Keep(const float* from, Kept* to) {
  _mm512_storeu_si512(to, (Words)_mm512_cvtne2ps_pbh(Load(from + kLanes), Load(from)));
}

#else

using Kept = float;
constexpr int kHalves = 2;

// Load gives pairs of 16-bit weights, Widened those at even places, or at odd ones, without their scale.
#ifdef __AVX512F__
inline Words Load(const uint16_t* w) { return _mm512_loadu_si512(w); }
inline Words Load(const int8_t* w) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
template <typename W>
inline Vector Widened(Words pairs, int half) {
  if constexpr (kScaled<W>)
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(half ? pairs : _mm512_slli_epi32(pairs, 16), 16));
  if (half) return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
inline Vector Multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Words RoundedWords(const float* from) {
  const Words bits = _mm512_loadu_si512(from);
  const Words last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Words up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
  const Words quiet = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_and_si512(quiet, _mm512_set1_epi32(0xffff0000));
}
inline void Keep(const float* from, Kept* to) {
  const Words a = RoundedWords(from), b = RoundedWords(from + kLanes);
  const Words even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(a, even, b));
  _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
}
#else
inline Words Load(const uint16_t* w) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(w)); }
inline Words Load(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
template <typename W>
inline Vector Widened(Words pairs, int half) {
  if constexpr (kScaled<W>)
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(half ? pairs : _mm256_slli_epi32(pairs, 16), 16));
  if (half) return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
inline Vector Multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }

// The bits of a float32, rounded to a bfloat16's, to nearest even; NaN stays NaN.
inline uint32_t Rounded(uint32_t bits) {
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return (nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
}

inline void Keep(const float* from, Kept* to) {
  uint32_t bits[kStep], kept[kStep];
  std::memcpy(bits, from, sizeof bits);
  for (int i = 0; i < kLanes; ++i) kept[i] = Rounded(bits[2 * i]), kept[kLanes + i] = Rounded(bits[2 * i + 1]);
  std::memcpy(to, kept, sizeof kept);
}
#endif
inline Vector Activations(const Kept* x) { return Load(x); }
inline Vector Everywhere(Kept x) { return Broadcast(x); }
template <typename W>
inline Words Packed(Weights<W> w) {
  return Load(w.w);
}
template <typename W>
inline Vector Unpacked(Words packed, int half, Vector scale) {
  const Vector wide = Widened<W>(packed, half);
  return kScaled<W> ? Multiply(wide, scale) : wide;
}
template <typename W>
inline Vector Multiplier(const W* w, int half, Vector scale) {
  return Unpacked<W>(Load(w), half, scale);
}

#endif

constexpr int kPair = 2 / kHalves;  // values that one Kept holds

template <int kRows, int kOuts, typename W>
inline void Step(const Kept* x, int64_t stride, Weights<W> w, int64_t k, Vector* sums) {
  Vector scales[kOuts];
  if constexpr (kScaled<W>)
    UNROLLED for (int o = 0; o < kOuts; ++o) scales[o] = (w + o * k).Scale();
  UNROLLED for (int half = 0; half < kHalves; ++half) {
    decltype(Multiplier(w.w, 0, Zero())) b[kOuts];
    UNROLLED for (int o = 0; o < kOuts; ++o) b[o] = Multiplier(w.w + o * k, half, scales[o]);
    UNROLLED for (int r = 0; r < kRows; ++r) {
      const auto a = Activations(x + r * stride + half * kLanes);
      UNROLLED for (int o = 0; o < kOuts; ++o) sums[r * kOuts + o] = MultiplyAdd(sums[r * kOuts + o], a, b[o]);
    }
  }
}

template <typename W>
constexpr int64_t kLineWeights = kLine / sizeof(W);

// What a pass over weights fetches: as many as it reads, kWeightsAhead of them, or of passes over the same weights each its
// share, for tiles to come.
enum class Fetches { kNone, kAll, kShare };
template <typename F>
struct Share {
  int64_t first, every;  // steps
  const F* next;         // what it would fetch with the first weights that are read
};

// kRows rows of x times kOuts rows of w [kOuts, k] into y [kRows, n].
template <int kRows, int kOuts, Fetches kFetches, typename W, typename F>
inline void Block(const Kept* x, int64_t stride, Weights<W> w, int64_t k, Share<F> share, float* y, int64_t n) {
  constexpr int kSums = (kRows * kOuts + kLanes - 1) / kLanes * kLanes;
  Vector sums[kSums];
  UNROLLED for (int s = 0; s < kSums; ++s) sums[s] = Zero();
  int64_t i = 0, due = share.first * kStep;
  for (; i + kStep <= k; i += kStep) {
    if (kFetches == Fetches::kAll || (kFetches == Fetches::kShare && i == due)) {
      const F* next = share.next + i * kOuts;
      UNROLLED for (int o = 0; o < kOuts * kStep; o += kLineWeights<F>) Fetch<kWeightsTo>(next + o);
      due += share.every * kStep;
    }
    Step<kRows, kOuts>(x + i / kPair, stride, w + i, k, sums);
  }
  if (i < k) {  // of bfloat16 only
    W rest[kOuts * kStep] = {};
    for (int o = 0; o < kOuts; ++o) std::memcpy(rest + o * kStep, w.w + o * k + i, (k - i) * sizeof(W));
    Step<kRows, kOuts>(x + i / kPair, stride, Weights<W>{rest, w.scales}, kStep, sums);
  }
  float out[kSums];
  UNROLLED for (int s = 0; s < kSums; s += kLanes) Store(out + s, Sums(sums + s));
  UNROLLED for (int r = 0; r < kRows; ++r) std::memcpy(y + r * n, out + r * kOuts, kOuts * sizeof(float));
}

// kRows rows of x times as many rows of w as fill a register with sums, one after the other: with so few rows of x memory
// decides, and that is faster where its own fetching sees one stream. Whole steps only, of bfloat16.
template <int kRows>
inline void Stream(const Kept* x, int64_t stride, const uint16_t* w, int64_t steps, float* y, int64_t n) {
  constexpr int kOuts = kLanes / kRows;
  Vector sums[kLanes];
  UNROLLED for (int s = 0; s < kLanes; ++s) sums[s] = Zero();
  UNROLLED for (int o = 0; o < kOuts; ++o)
    for (int64_t step = 0; step < steps; ++step, w += kStep) {
      Fetch<kWeightsTo>(w + kStreamAhead[kRows] / sizeof(uint16_t));
      const auto b = Multiplier(w, 0, Zero());
      UNROLLED for (int r = 0; r < kRows; ++r)
        sums[r * kOuts + o] = MultiplyAdd(sums[r * kOuts + o], Activations(x + r * stride + step * kLanes), b);
    }
  float out[kLanes];
  Store(out, Sums(sums));
  UNROLLED for (int r = 0; r < kRows; ++r) std::memcpy(y + r * n, out + r * kOuts, kOuts * sizeof(float));
}

// Many rows: kPanel rows of weights at a time are turned, so that a register has the same place of several rows, as
// multiply-adds take it. What a lane of Block's registers adds is added at once then, of kPanelRows rows of x and the whole
// panel; after the last place such sums are added to those of other lanes in the order in which Sums does it.
constexpr int kPanelVectors = 3, kPanel = kPanelVectors * kLanes;
constexpr int64_t kPanelBytes = 160 << 10;  // of a panel that stay in the caches near by until all rows have met them
#ifdef __AVX512F__
constexpr int kTree[kLanes] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // neighbours are added first
constexpr int kPanelRows = 8, kLevels = 4;  // of the tree
#else
constexpr int kTree[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int kPanelRows = 4, kLevels = 3;
#endif

// What a panel has for a lane, and a line, so that lanes do not meet in one set of the caches.
constexpr int64_t Places(int64_t steps) { return steps * kHalves * kPanel + kLine / sizeof(Kept); }

// Turns kLanes registers of kLanes words.
inline void Turn(Words* w) {
  Words t[kLanes], u[kLanes];
#ifdef __AVX512F__
  UNROLLED for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  UNROLLED for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLLED for (int i = 0; i < 4; ++i) {  // lane l of u[4 j + i] has word 4 l + i of rows 4 j .. 4 j + 3
    const Words a = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    const Words c = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd), d = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    w[i] = _mm512_shuffle_i32x4(a, b, 0x88), w[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    w[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88), w[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#else
  UNROLLED for (int i = 0; i < 8; i += 2)
    t[i] = _mm256_unpacklo_epi32(w[i], w[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(w[i], w[i + 1]);
  UNROLLED for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLLED for (int i = 0; i < 4; ++i) {  // lane l of u[4 j + i] has word 4 l + i of rows 4 j .. 4 j + 3
    w[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20), w[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
  }
#endif
}

// The first `count` of kPanel rows of w, the last of them again for others, into panel: its places for each lane of kTree
// are [steps, kHalves, kPanel].
template <typename W>
void Pack(Weights<W> w, int64_t k, int64_t count, int64_t steps, Kept* panel) {
  for (int64_t step = 0; step < steps; ++step)
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t i = step * kStep;
      Words words[kLanes];
      float scales[kLanes] = {}, lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = std::min<int64_t>(v * kLanes + lane, count - 1);
        const Weights<W> from = w + row * k + i;
        W rest[kStep] = {};
        if (i + kStep > k) std::memcpy(rest, from.w, (k - i) * sizeof(W));
        words[lane] = Packed(Weights<W>{i + kStep > k ? rest : from.w, from.scales});
        if constexpr (kScaled<W>) Store(lanes, from.Scale()), scales[lane] = lanes[0];
      }
      Turn(words);
      const Vector scale = Load(scales);
      for (int half = 0; half < kHalves; ++half)
        for (int lane = 0; lane < kLanes; ++lane) {
          const auto operand = Unpacked<W>(words[kTree[lane]], half, scale);
          std::memcpy(panel + lane * Places(steps) + (step * kHalves + half) * kPanel + v * kLanes, &operand, sizeof operand);
        }
    }
}

// Lane `lane` of kTree: kPanelRows rows of x, whose halves lie `half` apart, times what a panel has for it. Sums that wait
// for others are in partial [kLevels, kPanelRows, kPanel], the last go into y [kPanelRows, n]. Weights from `next` on are
// fetched meanwhile unless it is null.
template <typename W>
inline void PanelLane(const Kept* x, int64_t stride, int64_t half, const Kept* panel, int64_t steps, int lane,
                      const W* next, float* partial, float* y, int64_t n) {
  constexpr int kSums = kPanelRows * kPanelVectors;
  Vector sums[kSums];
  UNROLLED for (int s = 0; s < kSums; ++s) sums[s] = Zero();
  for (int64_t step = 0; step < steps; ++step) {
    if (next) Fetch<kWeightsTo>(next), next += kLineWeights<W>;
    UNROLLED for (int h = 0; h < kHalves; ++h, panel += kPanel) {
      decltype(Activations(panel)) b[kPanelVectors];
      UNROLLED for (int v = 0; v < kPanelVectors; ++v) b[v] = Activations(panel + v * kLanes);
      UNROLLED for (int r = 0; r < kPanelRows; ++r) {
        const auto a = Everywhere(x[r * stride + h * half + step]);
        UNROLLED for (int v = 0; v < kPanelVectors; ++v)
          sums[r * kPanelVectors + v] = MultiplyAdd(sums[r * kPanelVectors + v], a, b[v]);
      }
    }
  }
  for (; lane & 1; lane >>= 1, partial += kPanelRows * kPanel)
    UNROLLED for (int s = 0; s < kSums; ++s) sums[s] = Add(Load(partial + s * kLanes), sums[s]);
  const bool last = y != nullptr;
  float* const to = last ? y : partial;
  const int64_t row = last ? n : kPanel;
  UNROLLED for (int r = 0; r < kPanelRows; ++r)
    UNROLLED for (int v = 0; v < kPanelVectors; ++v) Store(to + r * row + v * kLanes, sums[r * kPanelVectors + v]);
}

// Registers for sums, so that there are some left for operands.
#ifdef __AVX512F__
constexpr int kMostRows = 8, kMostOuts = 6;
#else
constexpr int kMostRows = 4, kMostOuts = 4;
#endif
constexpr int kHalf = kMostRows / 2;

#if defined(AMD) && defined(__AVX512BF16__)
constexpr bool kZen4 = true;
#else
constexpr bool kZen4 = false;
#endif

// More rows are worth a panel. Where all passes fetch, and read what was widened once, none are: to turn weights costs more.
constexpr int64_t kFewRows = kZen4 ? INT64_MAX : 16;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Array = std::unique_ptr<T[], Free>;

// Aligned: a load that crosses a line takes twice as long. `count` is a multiple of kStep.
template <typename T>
Array<T> Allocated(int64_t count) {
  return Array<T>(static_cast<T*>(std::aligned_alloc(kLine, count * sizeof(T))));
}

constexpr int64_t kTaskColumns = 96;  // a multiple of kMostOuts and kPanel
constexpr int64_t kTaskRows = 64;     // of x, to be kept: fewer are not worth to begin together
constexpr int64_t kNear = 32768;      // bytes of x that the first-level cache holds; of more, half as often, twice the outs

// Columns from `first` on of rows of y, one every `row` numbers.
struct Target {
  float* y;
  int64_t row, first;

  float* At(int64_t r, int64_t j) const { return y + r * row + j - first; }
};

template <typename W>
struct Work {
  Weights<W> w;
  int64_t m, k, steps;
  bool few = m <= kFewRows;
  int64_t pitch = few ? steps : std::max<int64_t>(steps, kLanes);  // steps that a row of x has room for
  int64_t stride = pitch * kHalves * kLanes;
  Array<Kept> x = Allocated<Kept>(m * stride);  // [m, pitch, kHalves, kLanes], of many rows [m, kHalves, kLanes, pitch]

  Work(Weights<W> w, int64_t m, int64_t k) : w(w), m(m), k(k), steps((k + kStep - 1) / kStep) {}

  // Rows [first, last) of x.
  void KeepRows(const float* from, int64_t first, int64_t last) const {
    for (int64_t r = first; r < last; ++r)
      if (Kept* to = x.get() + r * stride; few)
        for (int64_t step = 0; step < steps; ++step) KeepStep(from + r * k, step, to + step * kHalves * kLanes);
      else
        for (int64_t step = 0; step < steps; step += kLanes) KeepTurned(from + r * k, std::min(step, pitch - kLanes), to);
  }

  void KeepStep(const float* from, int64_t step, Kept* to) const {
    const int64_t i = step * kStep;
    if (i + kStep <= k) return Keep(from + i, to);
    float rest[kStep] = {};
    if (i < k) std::memcpy(rest, from + i, (k - i) * sizeof(float));
    Keep(rest, to);
  }

  // kLanes steps at a time.
  void KeepTurned(const float* from, int64_t step, Kept* to) const {
    alignas(kLine) Kept kept[kLanes][kHalves * kLanes];
    to += step;
    for (int s = 0; s < kLanes; ++s) KeepStep(from, step + s, kept[s]);
    UNROLLED for (int half = 0; half < kHalves; ++half) {
      Words words[kLanes];
      UNROLLED for (int s = 0; s < kLanes; ++s) std::memcpy(&words[s], kept[s] + half * kLanes, sizeof words[s]);
      Turn(words);
      UNROLLED for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(to + (half * kLanes + lane) * pitch, &words[kTree[lane]], sizeof words[lane]);
    }
  }

  // Rows j .. j + kOuts of weights, in a pass for some rows of x each. `wide` has room for kMostOuts rows.
  template <int kOuts>
  void Rows(int64_t j, uint16_t* wide, const Target& to) const {
    const Weights<W> tile = w + j * k;
    if constexpr (kZen4 && kScaled<W>)
      if (m > (kOuts < kMostOuts ? kMostRows : kHalf)) {
        for (int64_t i = 0; i < kOuts * k; i += kStep) {
          const Words words = Packed(tile + i);
          std::memcpy(wide + i, &words, sizeof words);
        }
        return Passes<kOuts>(Weights<uint16_t>{wide, nullptr}, j, to);
      }
    Passes<kOuts>(tile, j, to);
  }

  template <int kOuts, typename V>
  void Passes(Weights<V> tile, int64_t j, const Target& to) const {
    int64_t r = 0;
    if constexpr (kOuts < kMostOuts)
      for (; r + kMostRows <= m; r += kMostRows) Pass<kMostRows, kOuts>(tile, r, j, to);
    for (; r + kHalf <= m; r += kHalf) Pass<kHalf, kOuts>(tile, r, j, to);
    for (; r + 2 <= m; r += 2) Pass<2, kOuts>(tile, r, j, to);
    if (r < m) Pass<1, kOuts>(tile, r, j, to);
  }

  template <int kRows, int kOuts, typename V>
  void Pass(Weights<V> tile, int64_t r, int64_t j, const Target& to) const {
    constexpr int64_t kAhead = kWeightsAhead / sizeof(W);
    const W* const from = w.w + j * k;
    if (const int64_t size = kOuts * k; kPassesFetch && kOuts == kMostOuts && m > kHalf) {
      const int64_t passes = m / kHalf + m % kHalf / 2 + m % 2, pass = (r + kHalf - 1) / kHalf;
      Tile<kRows, kOuts, Fetches::kShare>(tile, r, j, {pass, passes, from + (kAhead + size - 1) / size * size}, to);
    } else if (r == 0) {
      Tile<kRows, kOuts, Fetches::kAll>(tile, r, j, {0, 1, from + kAhead}, to);
    } else {
      Tile<kRows, kOuts, Fetches::kNone>(tile, r, j, {}, to);
    }
  }

  template <int kRows, int kOuts, Fetches kFetches, typename V>
  void Tile(Weights<V> tile, int64_t r, int64_t j, Share<W> share, const Target& to) const {
    Block<kRows, kOuts, kFetches>(x.get() + r * stride, stride, tile, k, share, to.At(r, j), to.row);
  }

  // Columns from j on in one stream, if x has as few rows as that is for. Returns where others begin.
  int64_t Streamed(int64_t j, int64_t end, const Target& to) const {
    if (k % kStep) return j;
    switch (m) {
      case 1: return Streams<1>(j, end, to);
      case 2: return Streams<2>(j, end, to);
      case 4: return Streams<4>(j, end, to);
      default: return j;
    }
  }

  template <int kRows>
  int64_t Streams(int64_t j, int64_t end, const Target& to) const {
    for (; j + kLanes / kRows <= end; j += kLanes / kRows)
      Stream<kRows>(x.get(), stride, w.w + j * k, steps, to.At(0, j), to.row);
    return j;
  }

  void Columns(int64_t begin, int64_t end, const Target& to) const {
    if (!few) {
      for (; begin < end; begin += kPanel) Panel(begin, std::min<int64_t>(kPanel, end - begin), to);
      return;
    }
    int64_t j = begin;
    Array<uint16_t> wide;
    if constexpr (kZen4 && kScaled<W>) wide = Allocated<uint16_t>(kMostOuts * k);
    if constexpr (kZen4 && !kScaled<W>) j = Streamed(j, end, to);
    if (m < kMostRows || m * stride * int64_t{sizeof(Kept)} > kNear)
      for (; j + kMostOuts <= end; j += kMostOuts) Rows<kMostOuts>(j, wide.get(), to);
    else
      for (; j + kMostOuts / 2 <= end; j += kMostOuts / 2) Rows<kMostOuts / 2>(j, wide.get(), to);
    for (; j < end; ++j) Rows<1>(j, wide.get(), to);
  }

  // `count` columns from j on. The last rows are multiplied twice where kPanelRows does not divide m.
  void Panel(int64_t j, int64_t count, const Target& to) const {
    const int64_t tiles = (m + kPanelRows - 1) / kPanelRows, places = Places(steps);
    int near = kLanes;  // lanes
    while (near > 1 && near * places * int64_t{sizeof(Kept)} > kPanelBytes) near /= 2;
    const int64_t size = kPanelRows * kPanel, waiting = (near < kLanes ? tiles : 1) * kLevels * size;
    const Array<float> numbers = Allocated<float>(waiting + size);
    const Array<Kept> panel = Allocated<Kept>(kLanes * places);
    Pack(w + j * k, k, count, steps, panel.get());
    const W *next = w.w + (j + kPanel) * k, *const last = next + kPanel * k;
    for (int first = 0; first < kLanes; first += near)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = std::min(tile * kPanelRows, m - kPanelRows), row = count < kPanel ? kPanel : to.row;
        float* const waits = numbers.get() + (near < kLanes ? tile : 0) * kLevels * size;
        float* const y = count < kPanel ? numbers.get() + waiting : to.At(r, j);
        const bool ends = first + near == kLanes;
        if (ends)  // or many stores wait for memory at once
          for (int i = 0; i < kPanelRows; ++i)
            for (int v = 0; v < kPanelVectors; ++v) __builtin_prefetch(y + i * row + v * kLanes, 1);
        for (int lane = first; lane < first + near; ++lane, next += steps * kLineWeights<W>)
          PanelLane(x.get() + r * stride + lane * pitch, stride, kLanes * pitch, panel.get() + lane * places, steps, lane,
                    next < last ? next : nullptr, waits, lane == kLanes - 1 ? y : nullptr, row);
        if (ends && count < kPanel)
          for (int i = 0; i < kPanelRows; ++i) std::memcpy(to.At(r + i, j), y + i * row, count * sizeof(float));
      }
  }
};

inline float Logistic(float x) {
  const float power = Exp(-std::abs(x));
  return (x < 0 ? power : 1.0f) / (1.0f + power);
}

inline float Silu(float x) { return x * Logistic(x); }

// (1 + tanh(z)) / 2 is the logistic function of 2 z, with all digits where it is small.
inline float GeluTanh(float x) { return x * Logistic(1.59576912f * (x + 0.044715f * x * x * x)); }

// y[f] = activate(x[f, 0]) * x[f, 1]
template <float (*kActivate)(float)>
void Gate(const float* x, int64_t count, float* y) {
  for (int64_t f = 0; f < count; ++f) y[f] = kActivate(x[2 * f]) * x[2 * f + 1];
}

using Gating = void (*)(const float*, int64_t, float*);
constexpr Gating kGates[] = {nullptr, Gate<Silu>, Gate<GeluTanh>};  // as _GATES of native.py counts them

template <typename W, typename Buffer>
ffi::Error Multiplied(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, const Buffer& w, const uint16_t* scales,
                      ffi::ResultBuffer<ffi::F32>& y, int64_t gate) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  if (w.dimensions()[1] != k) return ffi::Error::InvalidArgument("x and w differ in their last dimension");
  const Work<W> work({static_cast<const W*>(w.untyped_data()), scales}, m, k);
  blitzjax::InParallel(pool, (m + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
    work.KeepRows(x.typed_data(), task * kTaskRows, std::min(m, (task + 1) * kTaskRows));
  });
  blitzjax::InParallel(pool, (n + kTaskColumns - 1) / kTaskColumns, [&](int64_t task) {
    const int64_t begin = task * kTaskColumns, end = std::min(n, begin + kTaskColumns);
    if (gate == 0) return work.Columns(begin, end, {y->typed_data(), n, 0});
    thread_local std::vector<float> both;
    both.resize(m * kTaskColumns);
    work.Columns(begin, end, {both.data(), kTaskColumns, begin});
    for (int64_t r = 0; r < m; ++r)
      kGates[gate](both.data() + r * kTaskColumns, (end - begin) / 2, y->typed_data() + (r * n + begin) / 2);
  });
  return ffi::Error::Success();
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> w,
                  ffi::ResultBuffer<ffi::F32> y, int64_t gate) {
  return Multiplied<uint16_t>(pool, x, w, nullptr, y, gate);
}

ffi::Error MatmulInt8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> w,
                      ffi::Buffer<ffi::BF16> scales, ffi::ResultBuffer<ffi::F32> y, int64_t gate) {
  const auto rows = w.dimensions(), blocks = scales.dimensions();
  if (blocks[0] != rows[0] || blocks[1] * kBlock != rows[1])
    return ffi::Error::InvalidArgument("w has other blocks than scales");
  return Multiplied<int8_t>(pool, x, w, static_cast<const uint16_t*>(scales.untyped_data()), y, gate);
}

// kRows rows of x times a row of w, in float32: into y, one every n numbers.
template <int kRows>
inline void Exact(const float* x, const float* w, int64_t k, float* y, int64_t n) {
  Vector sums[kRows];
  UNROLLED for (int r = 0; r < kRows; ++r) sums[r] = Zero();
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes)
    UNROLLED for (int r = 0; r < kRows; ++r) sums[r] = MultiplyAdd(sums[r], Load(x + r * k + i), Load(w + i));
  UNROLLED for (int r = 0; r < kRows; ++r) {
    float lanes[kLanes], sum = 0;
    Store(lanes, sums[r]);
    for (float lane : lanes) sum += lane;
    for (int64_t j = i; j < k; ++j) sum = std::fma(x[r * k + j], w[j], sum);
    y[r * n] = sum;
  }
}

// Weights in float32 are few: those of routers, where close calls decide.
ffi::Error MatmulFloat32(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                         ffi::ResultBuffer<ffi::F32> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  if (w.dimensions()[1] != k) return ffi::Error::InvalidArgument("x and w differ in their last dimension");
  constexpr int64_t kTaskOuts = 16;
  blitzjax::InParallel(pool, (n + kTaskOuts - 1) / kTaskOuts, [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kTaskOuts);
    for (int64_t r = 0; r < m;) {
      const bool many = r + kMostRows <= m;
      for (int64_t j = task * kTaskOuts; j < end; ++j)
        (many ? Exact<kMostRows> : Exact<1>)(x.typed_data() + r * k, w.typed_data() + j * k, k,
                                             y->typed_data() + r * n + j, n);
      r += many ? kMostRows : 1;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxMatmulFloat32, MatmulFloat32,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("gate"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxMatmulInt8, MatmulInt8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("gate"));
