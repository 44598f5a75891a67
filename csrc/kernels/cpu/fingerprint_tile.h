// The vector code of fingerprint.cpp, included once per instruction set by for_each_isa.h.
typedef std::uint64_t Words __attribute__((vector_size(ISA_LANES * 4)));

// step() of every lane, with each block of kBlockBytes in turn.
ISA void absorb(std::uint64_t state[kWords], const unsigned char* data, std::size_t blocks) {
  constexpr int kVectors = kBlockBytes / sizeof(Words);
  Words lanes[kVectors];
  std::memcpy(lanes, state, kBlockBytes);
  for (; blocks > 0; --blocks, data += kBlockBytes) {
    for (int i = 0; i < kVectors; ++i) {
      Words words;
      std::memcpy(&words, data + i * sizeof words, sizeof words);
      const Words s = lanes[i] ^ words;
      lanes[i] = (s ^ s >> 29) * kOdd;
    }
  }
  std::memcpy(state, lanes, kBlockBytes);
}
