// Winograd convolution F(2x2, 3x3) in integers, included by quantized_conv_tile.h for AVX2 without
// VNNI, where a product of 16 bits costs no more than one of 8 bits: 2.25 times fewer products than
// the direct sum has, and the same result, bit for bit.
//
// Every 2x2 output tile comes from a 4x4 input tile d and a 3x3 filter g:
//   V = B^T d B     U = (2G) g (2G)^T     M_e = sum over c of V_e[c] U_e[c, k]     4 Y = A^T M A
// with integers throughout, as 2G has no halves. d is of unsigned bytes and g of signed ones, so
// |V| <= 4 * 255 and |U| <= 9 * 128: both fit in 16 bits. What follows is added in 32 bits, where
// it may wrap: the last sum, 4 Y, is right modulo 2^32, so it is right if it fits, which it does
// for any C with 4 * 9 * 255 * 128 * C < 2^31 (C <= 1827; kMostWinogradChannels is less). It is a
// multiple of 4. Pixels outside the image are read from the value of the padding, as int8
// activations are unsigned by adding 128, which the bias takes back.
//
// One task is a run of consecutive tiles (rows and images simply follow each other) times a run of
// strips of columns, done by one thread:
//   1. V of all tiles and channels                              16 * tiles * C * 2 bytes
//   2. for each 16 columns: U from the packed weights           16 * C * 16 * 2 bytes
//      16 matrix products into M, 6 x 16 sums in registers,     tiles * 16 * 16 * 4 bytes
//      a chunk of U (C * 32 bytes) in L1 for all tiles
//      then Y, shortcut and requantisation straight to the output.
// VPMADDWD multiplies pairs of channels and adds the two products: one multiplication and one
// addition for 16 products. Pairs are the even and the odd bytes of a word of 4 channels, which one
// shift or mask takes out of a register of words: of every 32 channels a row of V and of U holds
// first 8 even pairs, then 8 odd ones.
//
// Memory traffic: x (plus the tiles' borders) and the residual are read once, the output is written
// once, and the packed weights are read once per task. V does not fit in L2 where there are many
// channels; its rows are long then, and read in order.
typedef std::int16_t Halves __attribute__((vector_size(32)));

constexpr int kPlanes = 16;
constexpr std::int64_t kPairBytes = 4;                          // of V
constexpr std::int64_t kStepBytes = kPairBytes * kTileColumns;  // of U
constexpr std::int64_t kTileSums = kPlanes * kTileColumns;      // of M
constexpr std::int64_t kSkew = 64;  // bytes between planes: not all in one cache set

ISA_INLINE void store_halves(std::int8_t* p, Halves v) { std::memcpy(p, &v, sizeof v); }

// V of kWinogradChannels channels of one tile.
ISA_INLINE void transform_input(const std::uint8_t* const (&pixels)[kPlanes], std::int64_t c,
                                std::int8_t* v, std::int64_t plane) {
  for (int odd = 0; odd < 2; ++odd, v += sizeof(Halves)) {
    Halves half[4][4];  // B^T d
    for (int j = 0; j < 4; ++j) {
      Halves d[4];
      for (int i = 0; i < 4; ++i) {
        const __m256i bytes = (__m256i)load_sums(pixels[4 * i + j] + c);
        d[i] = (Halves)(odd != 0 ? _mm256_srli_epi16(bytes, 8)
                                 : _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)));
      }
      half[0][j] = d[0] - d[2];
      half[1][j] = d[1] + d[2];
      half[2][j] = d[2] - d[1];
      half[3][j] = d[1] - d[3];
    }
    for (int i = 0; i < 4; ++i) {
      const Halves* h = half[i];
      std::int8_t* const to = v + 4 * i * plane;
      store_halves(to, h[0] - h[2]);
      store_halves(to + plane, h[1] + h[2]);
      store_halves(to + 2 * plane, h[2] - h[1]);
      store_halves(to + 3 * plane, h[1] - h[3]);
    }
  }
}

// 2G g of a column or a row of the filter.
ISA_INLINE void transform_filter(Halves g0, Halves g1, Halves g2, Halves (&u)[4]) {
  const Halves ends = g0 + g2;
  u[0] = g0 + g0;
  u[1] = ends + g1;
  u[2] = ends - g1;
  u[3] = g2 + g2;
}

// U of kTileColumns columns, from packed rows that lie `pitch` bytes apart.
ISA inline __attribute__((noinline)) void transform_weights(const std::int8_t* packed,
                                                            std::int64_t pitch,
                                                            std::int64_t tap_words, std::int8_t* u,
                                                            std::int64_t plane) {
  constexpr std::int64_t kWords = kWinogradChannels / 4;
  for (std::int64_t word = 0; word < tap_words; ++word, packed += pitch) {
    for (int odd = 0; odd < 2; ++odd) {
      const std::int64_t step = 2 * (word - word % kWords) + odd * kWords + word % kWords;
      for (std::int64_t at = 0; at < kStepBytes; at += sizeof(Halves)) {
        Halves half[3][4];  // of each column of the filter
        for (int j = 0; j < 3; ++j) {
          Halves g[3];
          for (int i = 0; i < 3; ++i) {
            const __m256i bytes = (__m256i)load_sums(packed + (3 * i + j) * tap_words * pitch + at);
            g[i] = (Halves)_mm256_srai_epi16(odd != 0 ? bytes : _mm256_slli_epi16(bytes, 8), 8);
          }
          transform_filter(g[0], g[1], g[2], half[j]);
        }
        std::int8_t* to = u + step * kStepBytes + at;
        for (int i = 0; i < 4; ++i) {
          Halves line[4];
          transform_filter(half[0][i], half[1][i], half[2][i], line);
          for (int j = 0; j < 4; ++j, to += plane) store_halves(to, line[j]);
        }
      }
    }
  }
}

// m[kRows][kTileColumns] = v[kRows][pairs] * u[pairs][kTileColumns]; rows of v lie `v_pitch` bytes
// apart, those of m kTileSums numbers.
template <int kRows, int kVecs>
struct WinogradTile {
  ISA static void run(const std::int8_t* v, std::int64_t v_pitch, const std::int8_t* u,
                      std::int64_t pairs, std::int32_t* m) {
    Sums sum[kRows][kVecs] = {};
    const std::int8_t* const end = u + pairs * kStepBytes;
    for (; u != end; u += kStepBytes, v += kPairBytes) {
      Sums columns[kVecs];
      for (int j = 0; j < kVecs; ++j) columns[j] = load_sums(u + j * sizeof(Sums));
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        std::int32_t pair;
        std::memcpy(&pair, v + r * v_pitch, sizeof pair);
        const __m256i both = (__m256i)splat(pair);
        for (int j = 0; j < kVecs; ++j) {
          sum[r][j] += (Sums)_mm256_madd_epi16(both, (__m256i)columns[j]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kVecs; ++j) store_sums(m + r * kTileSums + j * kLanes, sum[r][j]);
    }
  }
};

using WinogradTiles = Tiles<decltype(&WinogradTile<1, 1>::run), WinogradTile>;

// Where a tile lies: image, and first output row and column.
struct TilePlace {
  std::int64_t image, row, column;
};

ISA_INLINE TilePlace place_of(const Shared& shared, std::int64_t tile) {
  const std::int64_t columns = ceil_div(shared.width, 2), rows = ceil_div(shared.height, 2);
  return {tile / columns / rows, tile / columns % rows * 2, tile % columns * 2};
}

// Moves on to the next tile.
ISA_INLINE void advance(const Shared& shared, TilePlace& at) {
  if ((at.column += 2) < shared.width) return;
  at.column = 0;
  if ((at.row += 2) < shared.height) return;
  at.row = 0;
  ++at.image;
}

// V of one tile.
ISA_INLINE void transform_tile(const Shared& shared, const TilePlace& at, std::int8_t* v,
                               std::int64_t plane) {
  const Pass& pass = shared.passes[0];
  const std::uint8_t* const first = pass.place(at.image, at.row, at.column);
  const std::uint8_t* pixels[kPlanes];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const std::int64_t y = at.row - 1 + i, x = at.column - 1 + j;
      const bool inside = y >= 0 && y < shared.height && x >= 0 && x < shared.width;
      pixels[4 * i + j] = inside ? at_offset(first, i * pass.line_bytes + j * pass.pixel_bytes)
                                 : pass.padding_value;
    }
  }
  for (std::int64_t c = 0; c < pass.pixel_bytes; c += kWinogradChannels) {
    transform_input(pixels, c, v + 2 * c, plane);
  }
}

// Y of one tile and kTileColumns columns, and what becomes of it.
ISA_INLINE void finish_tile(const Shared& shared, const QuantizedColumns& columns,
                            const TilePlace& at, const std::int32_t* m) {
  constexpr int kVecs = kTileColumns / kLanes;
  Sums y[2][2][kVecs];
  for (int v = 0; v < kVecs; ++v, m += kLanes) {
    Sums half[2][4];  // A^T M
    for (int j = 0; j < 4; ++j) {
      const std::int32_t* const from = m + j * kTileColumns;
      const Sums m0 = load_sums(from), m1 = load_sums(from + 4 * kTileColumns);
      const Sums m2 = load_sums(from + 8 * kTileColumns), m3 = load_sums(from + 12 * kTileColumns);
      half[0][j] = m0 + m1 + m2;
      half[1][j] = m1 - m2 - m3;
    }
    for (int i = 0; i < 2; ++i) {
      const Sums* h = half[i];
      y[i][0][v] = (h[0] + h[1] + h[2]) >> 2;
      y[i][1][v] = (h[1] - h[2] - h[3]) >> 2;
    }
  }
  const std::int64_t first = (at.image * shared.height + at.row) * shared.width + at.column;
  for (int i = 0; i < 2 && at.row + i < shared.height; ++i) {
    for (int j = 0; j < 2 && at.column + j < shared.width; ++j) {
      const Row row{nullptr, first + i * shared.width + j, 0};
      Sums sum[1][kVecs];
      add_shortcut(sum, shared.op, columns, &row);
      for (int v = 0; v < kVecs; ++v) sum[0][v] += y[i][j][v];
      finish(sum, shared, columns, &row);
    }
  }
}

ISA void quantized_winograd_task(const Shared& shared, std::int64_t tile_task,
                                 std::int64_t strip_task) {
  const Pass& pass = shared.passes[0];
  const std::int64_t tiles = winograd_tiles(shared);
  const std::int64_t begin = tile_task * tiles / shared.pixel_tasks;
  const std::int64_t count = (tile_task + 1) * tiles / shared.pixel_tasks - begin;
  const std::int64_t pairs = pass.pixel_bytes / 2, v_pitch = pairs * kPairBytes;
  const std::int64_t v_plane = count * v_pitch + kSkew, u_plane = pairs * kStepBytes + kSkew;
  auto* const v = reinterpret_cast<std::int8_t*>(thread_scratch(2).floats(
      kPlanes * (v_plane + u_plane) / static_cast<std::int64_t>(sizeof(float)) +
      count * kTileSums));
  std::int8_t* const u = v + kPlanes * v_plane;
  auto* const m = reinterpret_cast<std::int32_t*>(u + kPlanes * u_plane);

  const TilePlace first = place_of(shared, begin);
  TilePlace at = first;
  for (std::int64_t t = 0; t < count; ++t, advance(shared, at)) {
    transform_tile(shared, at, v + t * v_pitch, v_plane);
  }
  const PackedWeights& layout = pass.layout;
  const std::int64_t first_strip = strip_task * layout.strips() / shared.strip_tasks;
  const std::int64_t last_strip = (strip_task + 1) * layout.strips() / shared.strip_tasks;
  for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
    for (std::int64_t j = 0; j < layout.width(strip); j += kTileColumns) {
      const QuantizedColumns columns = columns_at(shared, strip, j);
      transform_weights(columns.weights[0], columns.pitch, pass.tap_words, u, u_plane);
      for (int e = 0; e < kPlanes; ++e) {
        for (std::int64_t t = 0; t < count; t += kTileRows) {
          WinogradTiles::at(count - t, kTileColumns)(v + e * v_plane + t * v_pitch, v_pitch,
                                                     u + e * u_plane, pairs,
                                                     m + t * kTileSums + e * kTileColumns);
        }
      }
      at = first;
      for (std::int64_t t = 0; t < count; ++t, advance(shared, at)) {
        finish_tile(shared, columns, at, m + t * kTileSums);
      }
    }
  }
}
