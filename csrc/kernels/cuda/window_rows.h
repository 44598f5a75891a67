// A convolution of few channels as one that tensor cores are fed with: each position's line of the
// window, side by side in memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace resnet_fused {

struct WindowRows {
  void* out;           // (lines, out_width, row), 16-bit
  const void* x;       // (lines, width, channels), 16-bit
  std::int64_t lines;  // of all images
  int width, channels;
  int out_width, row;  // row: a multiple of 8, at least kernel * channels
  int kernel, stride, padding;
};

// out[line, q, s * channels + c] = x[line, q * stride - padding + s, c] for s < kernel, zeros
// beside the line and behind that. Queues the kernel on `stream`, which belongs to `device`.
cudaError_t window_rows(const WindowRows& arguments, int device, cudaStream_t stream);

}  // namespace resnet_fused
