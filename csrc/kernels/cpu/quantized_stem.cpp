// The quantised stem: direct 7 x 7 convolution whose rows are pooled while they are in cache.
//
// In NHWC the 7 pixels x 3 channels under one row of the filter are 21 consecutive bytes, and
// neighbouring outputs start 6 bytes apart: a row of outputs is a matrix product of those
// overlapping windows, 6 words each (the last 3 weights are zero), with the packed weights.
//
// One task is a band of pooled rows of one image, done by one thread. Its scratch is two rings: 8
// input rows in NHWC with the padding around them, and the last 3 rows of the requantised
// convolution, which are pooled straight into the output. Memory traffic: x is read once, the
// pooled output is written once; one convolution row is computed twice per border between bands.
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "isa.h"
#include "parallel.h"
#include "quantized.h"
#include "quantized_pack.h"
#include "stem.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr int kFilter = 7;    // rows and columns
constexpr int kChannels = 3;  // of x
constexpr int kBorder = 3;    // pixels of padding around x
constexpr int kRowRing = 8;   // input rows kept, >= kFilter
constexpr int kPoolRing = 3;  // convolution rows kept

struct Band {
  std::int64_t image, first, last;  // pooled rows [first, last)
};

PackedWeights stem_layout(std::int64_t out_channels) {
  return {1, kFilter * kChannels, out_channels, kFilter};
}

struct StemPass {
  const QuantizedStem& op;
  PackedWeights layout;
  std::uint8_t flip;                // the bit that makes int8 unsigned by adding 128
  std::vector<std::int32_t> start;  // of each column's sum
  std::vector<float> multiplier;
  std::uint8_t padding[kChannels];
};

// One row of x as NHWC, pixel by pixel, unsigned.
void copy_row(const StemPass& pass, std::int64_t image, std::int64_t y, std::uint8_t* to) {
  const QuantizedStem& op = pass.op;
  const std::uint8_t* from = op.x + image * op.strides[0] + y * op.strides[2];
  const std::int64_t channel = op.strides[1], pixel = op.strides[3];
  if (channel == 1 && pixel == kChannels && pass.flip == 0) {
    std::memcpy(to, from, op.width * kChannels);
    return;
  }
  for (std::int64_t x = 0; x < op.width; ++x, from += pixel, to += kChannels) {
    to[0] = from[0] ^ pass.flip;
    to[1] = from[channel] ^ pass.flip;
    to[2] = from[2 * channel] ^ pass.flip;
  }
}

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "quantized_stem_tile.h"
#define ISA_WITH_VNNI
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const StemPass&, const Band&);

Task task_for(QuantizedIsa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa >= QuantizedIsa::kAvx512Vnni) return avx512vnni::quantized_stem_task;
  if (isa == QuantizedIsa::kAvxVnni) return avxvnni::quantized_stem_task;
  if (isa == QuantizedIsa::kAvx2) return avx2::quantized_stem_task;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace

std::int64_t quantized_stem_packed_bytes(std::int64_t out_channels) {
  return stem_layout(out_channels).bytes();
}

void quantized_stem_pack(const std::int8_t* weight, const std::int64_t strides[4], void* packed,
                         std::int64_t out_channels) {
  pack_weights(stem_layout(out_channels), packed,
               [&](std::int64_t k, std::int64_t row, std::int64_t i) {
                 return weight[k * strides[0] + i % kChannels * strides[1] + row * strides[2] +
                               i / kChannels * strides[3]];
               });
}

void quantized_stem(const QuantizedStem& op, QuantizedIsa isa) {
  const std::int64_t pooled = stem_halved(stem_halved(op.height));
  if (op.batch * pooled * op.width * op.out_channels == 0) return;
  StemPass pass{op, stem_layout(op.out_channels), 0, {}, {}, {}};
  pass.flip = op.is_signed ? 0x80 : 0;
  const auto* const sums = reinterpret_cast<const std::int32_t*>(
      static_cast<const char*>(op.packed) + pass.layout.weight_bytes());
  pass.start.resize(pass.layout.padded());
  pass.multiplier.resize(pass.layout.padded());
  for (std::int64_t k = 0; k < op.out_channels; ++k) {
    pass.start[k] = op.bias[k] - (op.is_signed ? 128 * sums[k] : 0);
    pass.multiplier[k] = op.multiplier[k];
  }
  for (int c = 0; c < kChannels; ++c) {
    pass.padding[c] = (op.padding_value == nullptr ? 0 : op.padding_value[c]) ^ pass.flip;
  }

  const std::int64_t wanted = ceil_div(2 * max_threads(), op.batch);
  const std::int64_t rows = std::max(ceil_div(pooled, wanted), std::int64_t{4});
  const std::int64_t bands = ceil_div(pooled, rows);
  const Task task = task_for(isa);
  parallel_for(op.batch * bands, [&](std::int64_t i) {
    const std::int64_t first = i % bands * rows;
    task(pass, {i / bands, first, std::min(first + rows, pooled)});
  });
}

}  // namespace resnet_fused::cpu
