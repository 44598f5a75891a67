// The stem: direct 7x7 convolution whose rows are pooled while they are in cache.
//
// In NHWC the 7 pixels x 3 channels under one row of the filter are 21 consecutive numbers, and
// neighbouring outputs start 6 numbers apart. So a row of outputs is a matrix product of those
// overlapping windows with the packed weights [strip of 32 k][7 rows][taps][32 k], one tap being
//   fp32      one number: 21 taps a row, one multiply-add each
//   bfloat16  two neighbouring numbers: 11 taps a row (the 22nd weight is zero), VDPBF16PS each, or
//             two multiply-adds of fp32 on AVX2; products exact, sums fp32. (Infinite x therefore
//             also reaches one more column.)
// The micro-kernel holds pixels x 32 or 16 channels of sums in registers (AVX-512: 14 x 32, 28 of
// 32 registers; AVX2: 6 x 16, 12 of 16; NEON: 14 x 8, 28 of 32) through all 7 rows; a strip of
// weights (18 KB) stays in L1.
//
// One task is a band of pooled rows of one image, done by one thread. Its scratch is two rings: 8
// input rows with their zero borders, and the last 3 rows of relu(bn(conv)), rounded as
// the output is, into which they are pooled by comparing bits. Memory traffic: x is read once, the
// pooled output, a quarter of the convolution's, is written once; one convolution row is computed
// twice per border between bands.
#include "stem.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#elif defined(RESNET_FUSED_NEON)
#include <arm_neon.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr int kFilter = 7;    // rows and columns
constexpr int kChannels = 3;  // of x
constexpr int kBorder = 3;    // zero pixels around x
constexpr int kRowRing = 8;   // input rows kept, >= kFilter
constexpr int kPoolRing = 3;  // convolution rows kept

constexpr int taps_per_row(Format format) {
  return format == Format::kFloat32 ? kFilter * kChannels : (kFilter * kChannels + 1) / 2;
}

struct Band {
  std::int64_t image, first, last;  // pooled rows [first, last)
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "stem_tile.h"
#define ISA_WITH_BF16
#define ISA_WITH_BF16_WORDS
#define ISA_WITH_NEON
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const Stem&, const Terms&, const Band&);

Task task_for(Format format, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::kAvx2) {
    return format == Format::kBFloat16 ? avx2bf16::stem_task : avx2::stem_task;
  }
  return format == Format::kBFloat16 ? avx512bf16::stem_task : avx512::stem_task;
#elif defined(RESNET_FUSED_NEON)
  (void)isa;
  return format == Format::kBFloat16 ? neonbf16::stem_task : neon::stem_task;
#else
  (void)format, (void)isa;
  return nullptr;
#endif
}

}  // namespace

std::int64_t stem_weight_words(std::int64_t out_channels, Format format) {
  return kFilter * taps_per_row(format) * out_channels;
}

void stem_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                            std::int64_t out_channels, Format format) {
  const std::size_t size = format == Format::kFloat32 ? 4 : 2;
  const std::int64_t per_tap = 4 / size;
  const int taps = taps_per_row(format);
  auto* const to = static_cast<unsigned char*>(packed);
  const auto* const from = static_cast<const unsigned char*>(weight);
  std::memset(to, 0, 4 * stem_weight_words(out_channels, format));
  for (std::int64_t k = 0; k < out_channels; ++k) {
    for (std::int64_t row = 0; row < kFilter; ++row) {
      for (std::int64_t i = 0; i < kFilter * kChannels; ++i) {
        const std::int64_t tap = (k / kStemStrip * kFilter + row) * taps + i / per_tap;
        const std::int64_t at = (tap * kStemStrip + k % kStemStrip) * per_tap + i % per_tap;
        const std::int64_t source = k * strides[0] + i % kChannels * strides[1] + row * strides[2] +
                                    i / kChannels * strides[3];
        std::memcpy(to + at * size, from + source * size, size);
      }
    }
  }
}

void stem_conv_pool(const Stem& stem, Isa isa) {
  const std::int64_t pooled = stem_halved(stem_halved(stem.height));
  if (stem.batch * pooled * stem.width * stem.out_channels == 0) return;
  const std::int64_t wanted = ceil_div(2 * max_threads(), stem.batch);
  const std::int64_t rows = std::max(ceil_div(pooled, wanted), std::int64_t{4});
  const std::int64_t bands = ceil_div(pooled, rows);
  const Terms terms(stem.bn, stem.out_channels, kStemStrip);
  const Task task = task_for(stem.format, isa);
  parallel_for(stem.batch * bands, [&](std::int64_t i) {
    const std::int64_t first = i % bands * rows;
    task(stem, terms, {i / bands, first, std::min(first + rows, pooled)});
  });
}

}  // namespace resnet_fused::cpu
