// A 64-bit content hash at memory speed, to notice that a tensor was edited in place.
// Implementation and guarantees: fingerprint.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace resnet_fused::cpu {

struct Bytes {
  const unsigned char* data;
  std::size_t size;
};

// The fingerprints of several inputs, whose chunks are hashed in any order and by any threads.
class Fingerprints {
 public:
  explicit Fingerprints(const std::vector<Bytes>& inputs);

  std::size_t chunks() const { return chunks_.size(); }

  // Hashes chunks `first` to before `last`, those of the first input coming first, into `hashes`,
  // which has room for all.
  void hash(std::size_t first, std::size_t last, std::uint64_t* hashes) const;

  // One for each input, of the hashes of all chunks.
  std::vector<std::uint64_t> fold(const std::uint64_t* hashes) const;

  std::vector<std::uint64_t> all() const;

 private:
  struct Chunk {
    Bytes bytes;
    std::size_t input;
  };

  std::vector<std::uint64_t> sizes_;
  std::vector<Chunk> chunks_;
};

}  // namespace resnet_fused::cpu
