// What is read from memory once is fetched before it is used, for as long as memory takes. Where to, and how far ahead, is
// all that CPUs of one instruction set differ in here.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t kLine = 64;  // bytes of a line of the caches

// Weights go to the second-level cache, if the first has few fills in flight, Intel's, or is full of x, AMD's: what leaves it
// before it is used comes from memory again. Zen 5's has half as much room again, and what goes there only evicts less.
#if defined(ZEN5)
constexpr auto kWeightsTo = _MM_HINT_NTA;
constexpr int64_t kWeightsAhead = 192 * kLine;  // bytes
constexpr bool kPassesFetch = false;
#elif defined(AMD)
constexpr auto kWeightsTo = _MM_HINT_T1;
constexpr int64_t kWeightsAhead = 512 * kLine;
constexpr bool kPassesFetch = true;
#else
constexpr auto kWeightsTo = _MM_HINT_T1;
constexpr int64_t kWeightsAhead = 128 * kLine;
constexpr bool kPassesFetch = false;
#endif

// Weights that 1, 2 or 4 rows of x meet in one stream.
constexpr int64_t kStreamAhead[] = {0, 32 * kLine, 32 * kLine, 0, 128 * kLine};

// Keys and values that one query of a sequence meets.
#if defined(AMD)
constexpr auto kCacheTo = _MM_HINT_T1;
#else
constexpr auto kCacheTo = _MM_HINT_T0;
#endif
constexpr int64_t kCacheAhead = 128 * kLine;

template <auto kTo>
inline void Fetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), kTo);
}

}  // namespace
