// Root mean square norms of rows (arXiv:1910.07467): XLA:CPU makes three passes of one, each begun apart, and on one core.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "team.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTaskRows = 16;
constexpr int kSums = 4 * kLanes;  // side by side

// y = x / sqrt(mean(x^2) + eps) * scale, of `count` numbers.
void Normed(const float* x, const float* scale, float eps, int64_t count, float* y) {
  float sums[kSums] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (; i < count; ++i) sums[i % kSums] += x[i] * x[i];
  for (float s : sums) sum += s;
  const float factor = 1.0f / std::sqrt(sum / count + eps);
  for (i = 0; i < count; ++i) y[i] = x[i] * factor * scale[i];
}

ffi::Error RmsNorm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                   ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t count = scale.element_count(), rows = x.element_count() / count;
  if (x.dimensions().back() != count) return ffi::Error::InvalidArgument("a scale for each number of a row");
  blitzjax::InParallel(pool, (rows + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
    for (int64_t row = task * kTaskRows, end = std::min(rows, row + kTaskRows); row < end; ++row)
      Normed(x.typed_data() + row * count, scale.typed_data(), eps, count, y->typed_data() + row * count);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BlitzjaxRmsNorm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));
