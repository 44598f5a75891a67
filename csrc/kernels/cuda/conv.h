// relu?(bn(conv(x)) (+ residual, or + bn(projection(shortcut)))): the arguments, and the choice of
// kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/tensor.h"
#include "kernels/residual.h"

namespace resnet_fused {

// A convolution with zero padding and its batch norm.
struct ConvolutionBn {
  const void* x = nullptr;       // (batch, height, width, channels)
  const void* weight = nullptr;  // (out_channels, kernel_h, kernel_w, channels / groups)
  int height = 0, width = 0;
  int channels = 1;  // at least 1 in each group
  int kernel_h = 1, kernel_w = 1;
  int stride_h = 1, stride_w = 1;
  int padding_h = 0, padding_w = 0;
  int dilation_h = 1, dilation_w = 1;
  BatchNorm bn;  // of out_channels
};

struct ConvBn {
  void* out;          // (batch, out_height, out_width, out_channels) of `dtype`
  Residual residual;  // may be `out` itself; none where there is a projection
  DType dtype;
  std::int64_t batch;
  int out_height, out_width, out_channels;
  int groups;  // 1 where there is a projection
  ConvolutionBn conv;
  ConvolutionBn projection;  // of the shortcut; its x is null where there is none
  bool relu;
  bool tf32;  // whether products of float32 may round their operands to TF32
  // Null, or which values of `out` are positive, a bit each: at each position 8 bytes for every 64
  // channels, whose b-th has in bit j that of channel 8 j + b. Only behind a ReLU.
  std::uint8_t* signs = nullptr;
};

// Output positions x output channels of a block, of the kernel for sm_80 and later or, k...Sm90, of
// the one for sm_90a. kAuto leaves the choice to a heuristic.
enum class ConvTile : int {
  kAuto = 0,
  k64x64 = 1,
  k128x64 = 2,
  k128x128 = 3,
  k128x64Sm90 = 4,
  k128x128Sm90 = 5,
  k128x128Sm90PingPong = 6,  // warpgroups take turns at tiles
  // Of two blocks of a cluster each, at adjacent positions.
  k128x256Sm90Cluster = 7,
  k256x128Sm90Cluster = 8,
  // Of as many blocks of a cluster each, which share the K loop.
  k64x64Sm90Split2 = 9,
  k64x64Sm90Split4 = 10,
  k64x64Sm90Split8 = 11,
  // Of whole lines, for 3 x 3 windows.
  k200x128Sm90Lines = 12,
  k224x128Sm90Lines = 13,
};

// Whether `tile` can implement `arguments`, on a device that it is made for.
bool conv_bn_can_implement(const ConvBn& arguments, ConvTile tile);

// Appends those tiles but kAuto that can implement `arguments` on `device`; where one for sm_90a is
// what kAuto stands for, that one first.
cudaError_t conv_bn_tiles(const ConvBn& arguments, int device, std::vector<ConvTile>* tiles);

// Queues the kernel on `stream`, which belongs to `device`. Leaves `device` current. The status is
// cudaErrorInvalidValue for a tile that cannot implement it and cudaErrorInvalidConfiguration for a
// result too large for one grid.
cudaError_t conv_bn(const ConvBn& arguments, ConvTile tile, int device, cudaStream_t stream);

}  // namespace resnet_fused
