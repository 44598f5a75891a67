// Which bytes bulk copies move and matrix products read: the geometry of tensor maps, swizzles and
// matrix descriptors, without any kernel that runs. Held against CUTLASS (tests/cutlass_oracle.h)
// and against a second derivation from the text (tests/test_layouts.py).
//
// Quoted are sections of NVIDIA's "Parallel Thread Execution ISA": "Tensors" (tiled mode, im2col
// mode, bounding boxes, swizzling modes) and "Asynchronous Warpgroup Level Matrix Shared Memory
// Layout" (matrix descriptor format).
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

namespace host_sim {

constexpr std::uint32_t kChunk = 16;  // bytes that move together

// "Swizzling modes", by the number of bits of a 128-byte row's number that permute its chunks: 3, 2
// and 1 for 128, 64 and 32 bytes. Rows are counted from address 0 on, or from row `base` on.
inline std::uint32_t swizzled(std::uint32_t address, int bits, std::uint32_t base = 0) {
  const std::uint32_t row = (address >> 7) - base;
  return address ^ (row & ((1u << bits) - 1)) << 4;
}

// 16 bytes, or fewer where the tensor ends within them.
struct Chunk {
  std::uint32_t shared;
  unsigned char* global;  // null outside
  std::uint32_t bytes;
};

// The box of `map` from the element with these coordinates on, fastest dimension first, at
// `shared`.
std::vector<Chunk> tile_chunks(const CUtensorMap& map, const std::int32_t* first,
                               std::uint32_t shared);

// "im2col mode": from the first channel and pixel on, pixels of a box that reaches from `lower` to
// the image's last pixel + `upper`, line by line and image by image, each moved by the offsets.
std::vector<Chunk> pixel_chunks(const CUtensorMap& map, const std::int32_t* first,
                                const std::uint16_t* offsets, std::uint32_t shared);
// Whether the first pixel lies within that box, as it must.
bool within_box(const CUtensorMap& map, const std::int32_t* first);

// "Matrix descriptor format", of an operand of wgmma.
struct Matrix {
  std::uint32_t start;    // address of row 0, or of the first depth
  std::uint32_t leading;  // bytes between a row's chunks, where there is no swizzle; or see below
  std::uint32_t stride;   // bytes between groups of 8 rows, or of 8 depths
  std::uint32_t base;     // 128-byte row, modulo 8, at which the swizzle's pattern starts
  int bits;               // of the swizzle
};
Matrix decode(std::uint64_t descriptor);

// The address of 8 elements of 2 bytes: chunk 0 or 1 of a row of 16 of them. The ISA does not spell
// out how the base offset enters; here the pattern starts at a row of that number, modulo 8.
std::uint32_t chunk_address(const Matrix& matrix, int row, int chunk);

// The same of an MN-major operand with the 128-byte swizzle: elements 8 * chunk to 8 * chunk + 7 of
// one depth. A row of 128 bytes holds 64 of them, and the next 64 lie `leading` bytes behind.
std::uint32_t transposed_chunk_address(const Matrix& matrix, int depth, int chunk);

}  // namespace host_sim
