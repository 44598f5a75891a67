// AMX's tile intrinsics in plain C++, by the operation that the Intel SDM, volume 2, gives of each
// instruction. Put before a kernel's source with the compiler's -include, it makes the same source
// run on processors without tiles; the sources know nothing of it. What the processor would fault
// on ends the process.
#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace amx_emulation {

// Palette 1: 8 tiles of at most 16 rows of 64 bytes.
struct Tiles {
  bool configured = false;
  int row_bytes[8], rows[8];
  std::uint8_t data[8][16][64];
};

inline thread_local Tiles tiles;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX would fault: %s\n", what);
  std::abort();
}

inline void load_config(const void* memory) {
  std::uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 and start row 0 are all that is used");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes of a configuration are zero");
  for (int i = 0; i < 16; ++i) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    require(i < 8 || (row_bytes == 0 && rows == 0), "palette 1 has 8 tiles");
    require(row_bytes <= 64 && rows <= 16, "a tile has at most 16 rows of 64 bytes");
    require((row_bytes == 0) == (rows == 0), "a tile in use has rows and columns");
    if (i < 8) tiles.row_bytes[i] = row_bytes, tiles.rows[i] = rows;
  }
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = true;
}

inline void release() { tiles.configured = false; }

inline void require_tile(int t) {
  require(tiles.configured && tiles.rows[t] > 0, "a tile is used that is not configured");
}

inline void zero(int t) {
  require_tile(t);
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

inline void load(int t, const void* base, std::int64_t stride) {
  zero(t);
  for (int r = 0; r < tiles.rows[t]; ++r) {
    std::memcpy(tiles.data[t][r], static_cast<const char*>(base) + r * stride, tiles.row_bytes[t]);
  }
}

inline void store(int t, void* base, std::int64_t stride) {
  require_tile(t);
  for (int r = 0; r < tiles.rows[t]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, tiles.data[t][r], tiles.row_bytes[t]);
  }
}

inline void require_shapes(int c, int a, int b) {
  for (const int t : {c, a, b}) require_tile(t);
  require(c != a && c != b && a != b, "the tiles of a product differ");
  require(tiles.rows[c] == tiles.rows[a], "sums have the rows of the first factor");
  require(tiles.row_bytes[c] == tiles.row_bytes[b], "sums have the columns of the second factor");
  require(tiles.row_bytes[a] == 4 * tiles.rows[b], "the factors have the same depth");
}

// DAZ and FTZ.
inline float flushed(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.0f, v) : v; }

inline float bfloat16(int t, int row, int i) {
  std::uint16_t half;
  std::memcpy(&half, tiles.data[t][row] + 2 * i, sizeof half);
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return flushed(v);
}

// TDPBF16PS: even and odd products in sums of their own, by fused multiply-adds that round to the
// nearest, ties to even.
inline void dpbf16ps(int c, int a, int b) {
  require_shapes(c, a, b);
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      float parts[2] = {};
      for (int k = 0; k < tiles.row_bytes[a] / 4; ++k) {
        for (int i = 0; i < 2; ++i) {
          parts[i] =
              flushed(std::fma(bfloat16(a, m, 2 * k + i), bfloat16(b, k, 2 * n + i), parts[i]));
        }
      }
      float sum;
      std::memcpy(&sum, tiles.data[c][m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
      std::memcpy(tiles.data[c][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

// TDPBUSD: products of unsigned and signed bytes, summed in int32 without saturation.
inline void dpbusd(int c, int a, int b) {
  require_shapes(c, a, b);
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      std::uint32_t sum;
      std::memcpy(&sum, tiles.data[c][m] + 4 * n, sizeof sum);
      for (int k = 0; k < tiles.row_bytes[a] / 4; ++k) {
        for (int i = 0; i < 4; ++i) {
          const int weight = static_cast<std::int8_t>(tiles.data[b][k][4 * n + i]);
          sum += static_cast<std::uint32_t>(tiles.data[a][m][4 * k + i] * weight);
        }
      }
      std::memcpy(tiles.data[c][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig amx_emulation::load_config
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbf16ps amx_emulation::dpbf16ps
#define _tile_dpbusd amx_emulation::dpbusd
