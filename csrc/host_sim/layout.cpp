#include "host_sim/layout.h"

#include <algorithm>

namespace host_sim {
namespace {

constexpr int kCoreRows = 8;  // rows of a core matrix

bool within(std::int64_t coordinate, cuuint64_t size) {
  return coordinate >= 0 && coordinate < static_cast<std::int64_t>(size);
}

std::int64_t stride(const CUtensorMap& map, int d) {
  return static_cast<std::int64_t>(map.stride[d]);
}

// The last pixel of the box in width (k = 0) or height (k = 1).
std::int64_t last(const CUtensorMap& map, int k) {
  return static_cast<std::int64_t>(map.size[k + 1]) - 1 + map.upper[k];
}

// The row of one pixel or of one line of a box: chunks from channel `first` on.
void add_row(const CUtensorMap& map, bool inside, unsigned char* row, std::int64_t first,
             std::uint32_t& shared, std::vector<Chunk>& to) {
  const std::int64_t element = stride(map, 0);
  const std::int64_t lanes = kChunk / element;
  for (std::int64_t c = first; c < first + map.box[0]; c += lanes, shared += kChunk) {
    const std::int64_t left = std::min(lanes, static_cast<std::int64_t>(map.size[0]) - c);
    const bool some = inside && c >= 0 && left > 0;
    to.push_back({swizzled(shared, map.swizzle), some ? row + c * element : nullptr,
                  some ? static_cast<std::uint32_t>(left * element) : 0});
  }
}

}  // namespace

std::vector<Chunk> tile_chunks(const CUtensorMap& map, const std::int32_t* first,
                               std::uint32_t shared) {
  std::vector<Chunk> to;
  std::uint32_t index[CUtensorMap::kRanks] = {};
  for (;;) {
    bool inside = true;
    unsigned char* row = map.data;
    for (int d = 1; d < map.rank; ++d) {
      const std::int64_t coordinate = std::int64_t{first[d]} + index[d];
      inside = inside && within(coordinate, map.size[d]);
      row += coordinate * stride(map, d);
    }
    add_row(map, inside, row, first[0], shared, to);
    int d = 1;
    while (d < map.rank && ++index[d] == map.box[d]) index[d++] = 0;
    if (d == map.rank) return to;
  }
}

bool within_box(const CUtensorMap& map, const std::int32_t* first) {
  return first[1] >= map.lower[0] && first[1] <= last(map, 0) && first[2] >= map.lower[1] &&
         first[2] <= last(map, 1);
}

std::vector<Chunk> pixel_chunks(const CUtensorMap& map, const std::int32_t* first,
                                const std::uint16_t* offsets, std::uint32_t shared) {
  std::vector<Chunk> to;
  std::int64_t w = first[1], h = first[2], n = first[3];
  for (std::uint32_t pixel = 0; pixel < map.box[1]; ++pixel) {
    const std::int64_t x = w + offsets[0], y = h + offsets[1];
    const bool inside = within(x, map.size[1]) && within(y, map.size[2]) && within(n, map.size[3]);
    unsigned char* row = map.data + x * stride(map, 1) + y * stride(map, 2) + n * stride(map, 3);
    add_row(map, inside, row, first[0], shared, to);
    if ((w += map.step[0]) > last(map, 0)) {
      w = map.lower[0];
      if ((h += map.step[1]) > last(map, 1)) {
        h = map.lower[1];
        ++n;
      }
    }
  }
  return to;
}

Matrix decode(std::uint64_t descriptor) {
  const auto bytes = [&](int shift) {
    return static_cast<std::uint32_t>(descriptor >> shift & 0x3fff) << 4;
  };
  const int mode = static_cast<int>(descriptor >> 62);  // 0: none, then 128, 64 and 32 bytes
  return {bytes(0), bytes(16), bytes(32), static_cast<std::uint32_t>(descriptor >> 49 & 7),
          mode == 0 ? 0 : 4 - mode};
}

std::uint32_t chunk_address(const Matrix& matrix, int row, int chunk) {
  const std::uint32_t group = matrix.start + row / kCoreRows * matrix.stride;
  const std::uint32_t in_group = row % kCoreRows;
  if (matrix.bits == 0) return group + in_group * kChunk + chunk * matrix.leading;
  const std::uint32_t row_bytes = kChunk << matrix.bits;
  return swizzled(group + in_group * row_bytes + chunk * kChunk, matrix.bits, matrix.base);
}

std::uint32_t transposed_chunk_address(const Matrix& matrix, int depth, int chunk) {
  constexpr int kChunks = 8;  // of a row
  const std::uint32_t group = matrix.start + depth / kCoreRows * matrix.stride;
  const std::uint32_t row = group + depth % kCoreRows * (kChunk << matrix.bits);
  return swizzled(row + chunk / kChunks * matrix.leading + chunk % kChunks * kChunk, matrix.bits,
                  matrix.base);
}

}  // namespace host_sim
