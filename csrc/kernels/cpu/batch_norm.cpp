// Batch norm's terms, computed at each call, so that they are never stale. The other threads wait
// meanwhile, hence the vectors: some cycles a channel instead of thirty.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {

namespace {

constexpr std::int64_t kChannels = 64;  // at a time

double number(double value) { return value; }
double number(float value) { return value; }
double number(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "batch_norm_tile.h"
#define ISA_WITH_BASELINE
#include "for_each_isa.h"

namespace resnet_fused::cpu {

double element(const Vector& vector, std::int64_t i) {
  double value;
  baseline::read(vector, i, 1, 0, &value);
  return value;
}

Terms::Terms(const BatchNorm& bn, std::int64_t channels, std::int64_t padded_to)
    : padded_(round_up(channels, padded_to)), values_(3 * padded_) {
  auto compute = baseline::terms;
#if defined(__x86_64__) && defined(__GNUC__)
  const Isa isa = best_isa();
  if (isa != Isa::kNone) compute = isa == Isa::kAvx512 ? avx512::terms : avx2::terms;
#endif
  for (std::int64_t first = 0; first < channels; first += kChannels) {
    compute(bn, first, std::min(kChannels, channels - first), values_.data() + first, padded_);
  }
}

}  // namespace resnet_fused::cpu
