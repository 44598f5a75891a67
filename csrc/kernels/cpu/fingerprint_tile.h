// The vector code of fingerprint.cpp, included once per instruction set by for_each_isa.h.
constexpr int kWordsPerVector = ISA_LANES / 2;
typedef std::uint64_t Words __attribute__((vector_size(ISA_LANES * 4)));
typedef std::uint64_t UnalignedWords
    __attribute__((vector_size(ISA_LANES * 4), aligned(1), may_alias));

// step() of every lane, with each block of kBlockBytes in turn.
ISA void absorb(std::uint64_t state[kWords], const unsigned char* data, std::size_t blocks) {
  constexpr int kVectors = kWords / kWordsPerVector;
  auto* const stored = reinterpret_cast<UnalignedWords*>(state);
  Words lanes[kVectors];
  for (int i = 0; i < kVectors; ++i) lanes[i] = stored[i];
  for (; blocks > 0; --blocks, data += kBlockBytes) {
    const auto* const block = reinterpret_cast<const UnalignedWords*>(data);
    for (int i = 0; i < kVectors; ++i) {
      const Words s = lanes[i] ^ block[i];
      lanes[i] = (s ^ s >> 29) * kOdd;
    }
  }
  for (int i = 0; i < kVectors; ++i) stored[i] = lanes[i];
}
