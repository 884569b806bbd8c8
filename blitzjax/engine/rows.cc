// Norms of rows, their softmax, and their weighted sums. XLA:CPU makes three passes of a norm, each begun apart and on one core.
// And in which order it adds, and whether it rounds a product before, depends on how many rows there are and on what else a
// program has: numbers of a prompt would not be those of a step.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "team.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTaskNumbers = 8192;  // at least, where there are as many
constexpr int kSums = 4 * kLanes;       // side by side

// The sum of term(x[i]) of `count` numbers.
template <typename Term>
inline float Sum(const float* x, int64_t count, const Term& term) {
  float sums[kSums] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += term(x[i + lane]);
  for (; i < count; ++i) sums[i % kSums] += term(x[i]);
  for (float s : sums) sum += s;
  return sum;
}

// y = x / sqrt(mean(x^2) + eps) * scale (arXiv:1910.07467)
void RmsNormed(const float* x, const float* scale, float eps, int64_t count, float* y) {
  const float factor = 1.0f / std::sqrt(Sum(x, count, [](float x) { return x * x; }) / count + eps);
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor * scale[i];
}

// y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * scale + bias (arXiv:1607.06450)
void LayerNormed(const float* x, const float* scale, const float* bias, float eps, int64_t count, float* y) {
  const float mean = Sum(x, count, [](float x) { return x; }) / count;
  const float factor = 1.0f / std::sqrt(Sum(x, count, [=](float x) { return (x - mean) * (x - mean); }) / count + eps);
  for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * factor * scale[i] + bias[i];
}

// Calls run(row) for all rows of `count` numbers.
template <typename Run>
void OfRows(const ffi::ThreadPool& pool, int64_t rows, int64_t count, const Run& run) {
  const int64_t task_rows = std::max<int64_t>(1, kTaskNumbers / count);
  blitzjax::InParallel(pool, (rows + task_rows - 1) / task_rows, [&](int64_t task) {
    for (int64_t row = task * task_rows, end = std::min(rows, row + task_rows); row < end; ++row) run(row);
  });
}

// Calls norm(row of x, row of y) for all rows of `count` numbers.
template <typename Norm>
ffi::Error NormedRows(const ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, int64_t count,
                      ffi::ResultBuffer<ffi::F32>& y, const Norm& norm) {
  const int64_t numbers = x.element_count();
  if (numbers % count) return ffi::Error::InvalidArgument("rows of as many numbers as there are scales");
  OfRows(pool, numbers / count, count,
         [&](int64_t row) { norm(x.typed_data() + row * count, y->typed_data() + row * count); });
  return ffi::Error::Success();
}

ffi::Error RmsNorm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                   ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t count = scale.element_count();
  return NormedRows(pool, x, count, y, [&](const float* x, float* y) { RmsNormed(x, scale.typed_data(), eps, count, y); });
}

ffi::Error LayerNorm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                     ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t count = scale.element_count();
  return NormedRows(pool, x, count, y, [&](const float* x, float* y) {
    LayerNormed(x, scale.typed_data(), bias.typed_data(), eps, count, y);
  });
}

ffi::Error Softmax(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t count = x.dimensions().back();
  return NormedRows(pool, x, count, y, [&](const float* x, float* y) {
    const float most = *std::max_element(x, x + count);
    for (int64_t i = 0; i < count; ++i) y[i] = Exp(x[i] - most);
    const float sum = Sum(y, count, [](float x) { return x; });
    for (int64_t i = 0; i < count; ++i) y[i] /= sum;
  });
}

// y[n] = sum_k weights[n, k] * x[n, k]
ffi::Error Weighted(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::F32> x,
                    ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], ways = x.dimensions()[1], count = x.dimensions()[2];
  if (int64_t(weights.element_count()) != rows * ways) return ffi::Error::InvalidArgument("a weight for each vector");
  OfRows(pool, rows, ways * count, [&](int64_t row) {
    float* const to = y->typed_data() + row * count;
    std::fill(to, to + count, 0.0f);
    for (int64_t way = row * ways; way < (row + 1) * ways; ++way) {
      const float *from = x.typed_data() + way * count, weight = weights.typed_data()[way];
      for (int64_t i = 0; i < count; ++i) to[i] = std::fma(weight, from[i], to[i]);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxWeighted, Weighted,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxSoftmax, Softmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxRmsNorm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxLayerNorm, LayerNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));
