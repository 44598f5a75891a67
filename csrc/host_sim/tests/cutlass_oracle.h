// What CUTLASS's public headers compute for the layouts and coordinates that the kernels for sm_90a
// use. cutlass_theirs.cpp asks CuTe, over CUDA's headers; cutlass_oracle.cpp asks our kernels and
// the simulator, over the simulator's headers, and compares. tests/test_cutlass_oracle.py compiles
// both for the host, where CUTLASS is at hand; none of it is part of this project.
#pragma once

#include <cstdint>
#include <functional>

namespace oracle {

constexpr int kTileM = 128, kTileK = 64;  // positions and channels of a copy

struct Problem {
  int batch, height, width, channels, out_channels;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  int out_height() const {
    return (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  int out_width() const {
    return (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
  int positions() const { return batch * out_height() * out_width(); }
};

// Arguments of cuTensorMapEncodeIm2col for an image of channels, width, height and batch.
struct PixelMap {
  std::uint64_t size[4], stride[3];  // elements; bytes
  std::int32_t lower[2], upper[2];
  std::uint32_t box[2], step[2];
  int swizzle;
};

// Operands of cp.async.bulk.tensor in im2col mode.
struct PixelCopy {
  std::int32_t c, w, h, n;
  std::uint16_t offset_w, offset_h;
};

// The implicit GEMM of a forward convolution, as cute::make_im2col_tma_copy sees it.
struct Columns {
  PixelMap map;
  std::function<PixelCopy(int position, int r, int s, int channel)> copy;
  // The element of x that is channel 0 of a position under a tap, -1 outside.
  std::function<std::int64_t(int position, int r, int s)> pixel;
  // The element of weight, -1 outside.
  std::function<std::int64_t(int out_channel, int r, int s, int channel)> weight;
};
Columns their_columns(const Problem& problem);

// cute::Swizzle<bits, 4, 3>.
std::uint32_t their_swizzle(int bits, std::uint32_t address);

// A K-major tile of rows x (8 << bits) 16-bit elements, at least 16, at `base` of shared memory:
// cute::SM90::GMMA::Layout_K_*_Atom.
// The address of an element, and the descriptor of 64 rows x 16 elements of it.
std::uint32_t their_address(int bits, std::uint32_t base, int row, int column);
std::uint64_t their_descriptor(int bits, std::uint32_t base, int row_tile, int slice);
constexpr int kOperandRows = 128;

// A tile of kOperandRows x 64 16-bit elements that lies by columns, with the 128-byte swizzle:
// cute::SM90::GMMA::Layout_MN_SW128_Atom. The same of it.
std::uint32_t their_transposed_address(std::uint32_t base, int row, int column);
std::uint64_t their_transposed_descriptor(std::uint32_t base, int slice);

}  // namespace oracle
