// The input of Winograd's F(2x2, 3x3), forward and for the weight's gradient: V = B^T d B of a 4x4
// tile d. Included by winograd_tile.h and wgrad_winograd_tile.h, after vec.h.

// Where a tile's 2x2 pixels of the result begin.
struct TilePlace {
  std::int64_t image, row, column;
};

// Tiles are counted along lines of tiles and through images.
template <typename Plan>
ISA_INLINE TilePlace place_of(const Plan& plan, std::int64_t tile) {
  const std::int64_t row = tile / plan.tile_columns;
  return {row / plan.tile_rows, row % plan.tile_rows * 2, tile % plan.tile_columns * 2};
}

// Moves on to the next tile.
template <typename Plan>
ISA_INLINE void advance(const Plan& plan, TilePlace& at) {
  if ((at.column += 2) < 2 * plan.tile_columns) return;
  at.column = 0;
  if ((at.row += 2) < 2 * plan.tile_rows) return;
  at.row = 0;
  ++at.image;
}

// x (images, height, width, channels); `zeros` are as many as channels.
struct Input {
  const float* x;
  std::int64_t height, width, channels;
  const float* zeros;
};

// The pixels of a tile, four neighbours in each of four lines.
struct InnerTile {
  const float* line[4];
  std::int64_t channels;

  ISA_INLINE const float* operator()(int i, int j) const { return line[i] + j * channels; }
};

// Those of a tile that reaches over the border, where they are zeros.
struct BorderTile {
  const float* pixel[4][4];

  ISA_INLINE const float* operator()(int i, int j) const { return pixel[i][j]; }
};

// V of one vector of channels, `count` of them, from channel c on.
template <typename Tile>
ISA_INLINE void transform_vector(const Tile& tile, std::int64_t c, std::int64_t count, float* v,
                                 std::int64_t plane) {
  Vec half[4][4];  // B^T d
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec d0 = load(tile(0, j) + c, count), d1 = load(tile(1, j) + c, count);
    const Vec d2 = load(tile(2, j) + c, count), d3 = load(tile(3, j) + c, count);
    half[0][j] = d0 - d2;
    half[1][j] = d1 + d2;
    half[2][j] = d2 - d1;
    half[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, v += 4 * plane) {
    const Vec* h = half[i];
    store(v, h[0] - h[2]);
    store(v + plane, h[1] + h[2]);
    store(v + 2 * plane, h[2] - h[1]);
    store(v + 3 * plane, h[1] - h[3]);
  }
}

template <typename Tile>
ISA_INLINE void transform_channels(const Tile& tile, std::int64_t first, std::int64_t channels,
                                   float* v, std::int64_t plane) {
  std::int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    transform_vector(tile, first + c, kLanes, v + c, plane);
  }
  if (c < channels) transform_vector(tile, first + c, channels - c, v + c, plane);
}

// V of a tile, `channels` channels from `first` on: 16 planes, `plane` numbers apart, of channels
// rounded up to whole vectors.
ISA_INLINE void transform_tile(const Input& of, const TilePlace& place, std::int64_t first,
                               std::int64_t channels, float* v, std::int64_t plane) {
  const std::int64_t row = place.row - 1, column = place.column - 1;
  const std::int64_t at = ((place.image * of.height + row) * of.width + column) * of.channels;
  if (row >= 0 && column >= 0 && row + 4 <= of.height && column + 4 <= of.width) {
    InnerTile tile{{}, of.channels};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) tile.line[i] = of.x + at + i * of.width * of.channels;
    return transform_channels(tile, first, channels, v, plane);
  }
  BorderTile tile;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const bool has_line = row + i >= 0 && row + i < of.height;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const bool has_pixel = has_line && column + j >= 0 && column + j < of.width;
      tile.pixel[i][j] = has_pixel ? of.x + (at + (i * of.width + j) * of.channels) : of.zeros;
    }
  }
  transform_channels(tile, first, channels, v, plane);
}
