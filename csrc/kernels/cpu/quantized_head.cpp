// The quantised head: sums over pixels, then a matrix product, in integers.
//
// A sum over pixels does not fit in a byte, so it is written as bytes of its own, low and high:
// each is a row of the product with the weights, and the result is put together in 64 bits. (The
// products of sums and weights, summed over channels, overflow 32 bits.) int8 activations are
// summed with 128 added to each, which is taken back at the end. Memory traffic: x and the weights
// are read once.
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

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kPoolChannels = 512;  // of one task

PackedWeights head_layout(std::int64_t channels, std::int64_t classes) {
  return {1, channels, classes, 1};
}

struct HeadPass {
  const QuantizedHead& op;
  PackedWeights layout;
  std::int64_t pixels, planes;
  std::int64_t row_bytes;    // of one plane of an image: channels, padded
  std::uint8_t* plane_rows;  // (batch, planes, row_bytes)
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "quantized_head_tile.h"
#define ISA_WITH_VNNI
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

struct Tasks {
  void (*pool)(const HeadPass&, std::int64_t image, std::int64_t first, std::int64_t last);
  void (*multiply)(const HeadPass&, std::int64_t strip, std::int32_t* sums);
};

Tasks tasks_for(QuantizedIsa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa >= QuantizedIsa::kAvx512Vnni) return {avx512vnni::pool_task, avx512vnni::multiply_task};
  if (isa == QuantizedIsa::kAvxVnni) return {avxvnni::pool_task, avxvnni::multiply_task};
  if (isa == QuantizedIsa::kAvx2) return {avx2::pool_task, avx2::multiply_task};
#endif
  (void)isa;
  return {nullptr, nullptr};
}

// The logits of a strip from its planes' sums, (batch, planes, width).
void finish(const HeadPass& pass, std::int64_t strip, const std::int32_t* sums) {
  const QuantizedHead& op = pass.op;
  const std::int64_t width = pass.layout.width(strip), first = pass.layout.column(strip);
  const auto* const weight_sums = reinterpret_cast<const std::int32_t*>(
      static_cast<const char*>(op.packed) + pass.layout.weight_bytes());
  const float pixels = static_cast<float>(pass.pixels);
  for (std::int64_t n = 0; n < op.x.batch; ++n) {
    for (std::int64_t j = 0; j < std::min(width, op.classes - first); ++j) {
      const std::int64_t k = first + j;
      std::int64_t sum = 0;
      for (std::int64_t plane = pass.planes - 1; plane >= 0; --plane) {
        sum = 256 * sum + sums[(n * pass.planes + plane) * width + j];
      }
      if (op.x.is_signed) sum -= 128 * pass.pixels * weight_sums[k];
      // Three roundings, as the reference has them: the build forbids fused multiply-adds here.
      op.out[n * op.classes + k] =
          static_cast<float>(sum) * (op.multiplier[k] / pixels) + op.bias[k];
    }
  }
}

}  // namespace

std::int64_t quantized_head_packed_bytes(std::int64_t channels, std::int64_t classes) {
  return head_layout(channels, classes).bytes();
}

void quantized_head_pack(const std::int8_t* weight, const std::int64_t strides[2], void* packed,
                         std::int64_t channels, std::int64_t classes) {
  pack_weights(head_layout(channels, classes), packed,
               [&](std::int64_t k, std::int64_t, std::int64_t c) {
                 return weight[k * strides[0] + c * strides[1]];
               });
}

void quantized_head(const QuantizedHead& op, QuantizedIsa isa) {
  const Activations& x = op.x;
  HeadPass pass{op, head_layout(x.channels, op.classes), x.height * x.width, 1, 0, nullptr};
  while (pass.pixels * 255 >> 8 * pass.planes != 0) ++pass.planes;
  pass.row_bytes = round_up(x.channels, kQuantizedLanes);
  const std::int64_t rows = x.batch * pass.planes;
  std::vector<std::uint8_t> planes(rows * pass.row_bytes);
  pass.plane_rows = planes.data();
  const Tasks tasks = tasks_for(isa);
  const std::int64_t parts = ceil_div(x.channels, kPoolChannels);
  parallel_for(x.batch * parts, [&](std::int64_t i) {
    const std::int64_t first = i % parts * kPoolChannels;
    tasks.pool(pass, i / parts, first, std::min(first + kPoolChannels, x.channels));
  });
  parallel_for(pass.layout.strips(), [&](std::int64_t strip) {
    auto* const sums =
        reinterpret_cast<std::int32_t*>(thread_scratch(2).floats(rows * pass.layout.width(strip)));
    tasks.multiply(pass, strip, sums);
    finish(pass, strip, sums);
  });
}

}  // namespace resnet_fused::cpu
