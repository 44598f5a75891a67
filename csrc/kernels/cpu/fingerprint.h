// A 64-bit content hash at memory speed, to notice that a tensor was edited in place.
// Implementation and guarantees: fingerprint.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resnet_fused::cpu {

struct Bytes {
  const unsigned char* data;
  std::size_t size;
};

// out[i] = the fingerprint of inputs[i]; all inputs share one parallel region.
void fingerprints(const Bytes* inputs, std::size_t count, std::uint64_t* out);

}  // namespace resnet_fused::cpu
