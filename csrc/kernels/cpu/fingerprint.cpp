// Content hash of memory, position-dependent and the same for any number of threads and any
// instruction set.
//
// The input is cut into chunks of kChunkBytes; chunks are hashed in parallel and their hashes
// folded in order. Within a chunk, 64-bit word number i goes into lane i % kWords:
//   step(state, word): s = state ^ word;  s ^= s >> 29;  s *= odd constant
// For a fixed word this is a bijection of the state, for a fixed state one of the word. So when two
// inputs of one size differ within a single word, that lane's state differs from there to its end;
// the folds over lanes and chunks are the same step, hence the results differ: for such edits (any
// single bit, any one element) with certainty. Edits of several words, reordered ones included,
// agree by accident only. The shift carries high bits down and the product carries them up, so that
// one step spreads even a flipped sign over some thirty bits: for two edited words of one lane the
// odds are about 1 in 2^30, with more words or lanes 1 in 2^64. Not cryptographic: an adversary can
// construct collisions.
//
// Memory traffic: each byte is read once, at the speed of memory: five vector instructions per 64
// bytes with AVX-512, the lanes' four registers hiding the multiplication's latency.
#include "fingerprint.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace resnet_fused::cpu {
namespace {

constexpr std::size_t kChunkBytes = 256 << 10;
constexpr int kWords = 32;  // lanes
constexpr std::size_t kBlockBytes = kWords * sizeof(std::uint64_t);

constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio

inline std::uint64_t step(std::uint64_t state, std::uint64_t word) {
  const std::uint64_t s = state ^ word;
  return (s ^ s >> 29) * kOdd;
}

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "fingerprint_tile.h"
#define ISA_WITH_BASELINE
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Absorb = void (*)(std::uint64_t state[kWords], const unsigned char* data, std::size_t blocks);

Absorb absorb_for(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::kAvx512) return avx512::absorb;
  if (isa == Isa::kAvx2) return avx2::absorb;
#endif
  (void)isa;
  return baseline::absorb;
}

std::uint64_t hash_chunk(Absorb absorb, const unsigned char* data, std::size_t size) {
  std::uint64_t state[kWords];
  for (int lane = 0; lane < kWords; ++lane) state[lane] = step(size, lane + 1);
  const std::size_t rest = size % kBlockBytes;
  absorb(state, data, size / kBlockBytes);
  if (rest > 0) {
    unsigned char padded[kBlockBytes] = {};
    std::memcpy(padded, data + size - rest, rest);
    absorb(state, padded, 1);
  }
  std::uint64_t hash = 0;
  for (const std::uint64_t lane : state) hash = step(hash, lane);
  return hash;
}

}  // namespace

Fingerprints::Fingerprints(const std::vector<Bytes>& inputs) {
  for (const auto& [data, size] : inputs) {
    for (std::size_t at = 0; at < size; at += kChunkBytes) {
      chunks_.push_back({{data + at, std::min(kChunkBytes, size - at)}, sizes_.size()});
    }
    sizes_.push_back(size);
  }
}

void Fingerprints::hash(std::size_t first, std::size_t last, std::uint64_t* hashes) const {
  const Absorb absorb = absorb_for(best_isa());
  parallel_for(static_cast<std::int64_t>(last - first), [&](std::int64_t i) {
    const auto& [data, size] = chunks_[first + i].bytes;
    hashes[first + i] = hash_chunk(absorb, data, size);
  });
}

std::vector<std::uint64_t> Fingerprints::fold(const std::uint64_t* hashes) const {
  std::vector<std::uint64_t> out;
  for (const std::uint64_t size : sizes_) out.push_back(step(0, size));
  for (std::size_t i = 0; i < chunks_.size(); ++i) {
    std::uint64_t& hash = out[chunks_[i].input];
    hash = step(hash, hashes[i]);
  }
  return out;
}

std::vector<std::uint64_t> Fingerprints::all() const {
  std::vector<std::uint64_t> hashes(chunks());
  hash(0, chunks(), hashes.data());
  return fold(hashes.data());
}

}  // namespace resnet_fused::cpu
