// The tile registers of a thread (AMX), inside an instruction set's namespace.

constexpr std::int64_t kTileWords = kTileRegisterBytes / 4;

// To be called between storing what a tile is loaded from and loading it: the intrinsics do not
// tell the compiler all that they read.
ISA_INLINE void finish_stores(const void* data) { asm volatile("" ::"r"(data) : "memory"); }

// The shapes that they have; they are given back with it. The last kOfWeights of 8 have 16 rows,
// the others as many as a tile has pixels.
template <int kOfWeights>
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ISA ~TileRegisters() { _tile_release(); }

  ISA_INLINE void set_pixels(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = kTileRegisterBytes;
      shapes.rows[i] = static_cast<std::uint8_t>(i < 8 - kOfWeights ? rows : kTileRegisterRows);
    }
    finish_stores(&shapes);
    _tile_loadconfig(&shapes);
  }

 private:
  int rows_ = 0;
};
