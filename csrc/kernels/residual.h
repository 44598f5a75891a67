// What the epilogues of the CPU's and the GPU's kernels add to a result: a tensor of the result's
// batch, height and width that is read where it lies, and counts as zero beyond its own channels.
// The paper's shortcut option A (section 3.3) is one, sampled by its strides.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RESNET_FUSED_HOST_DEVICE __host__ __device__
#else
#define RESNET_FUSED_HOST_DEVICE
#endif

namespace resnet_fused {

struct Residual {
  const void* data = nullptr;
  std::int64_t channels = 0;  // neighbours in memory, at most the result's; 0: nothing is added
  std::int64_t height = 1, width = 1;
  std::int64_t image = 0, line = 0, pixel = 0;  // elements from one to the next

  // Whether all pixels of the batch follow each other at one distance.
  RESNET_FUSED_HOST_DEVICE bool in_line() const {
    return line == width * pixel && image == height * line;
  }

  // Elements from `data` to the pixel of a position that counts through lines and images.
  RESNET_FUSED_HOST_DEVICE std::int64_t offset(std::int64_t position) const {
    if (in_line()) return position * pixel;
    const std::int64_t lines = position / width, images = lines / height;
    return images * image + (lines - images * height) * line + (position - lines * width) * pixel;
  }

  // Whether every pixel is a whole number of aligned 16 bytes, `lanes` elements each.
  RESNET_FUSED_HOST_DEVICE bool in_chunks(int lanes) const {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && channels % lanes == 0 &&
           image % lanes == 0 && line % lanes == 0 && pixel % lanes == 0;
  }
};

}  // namespace resnet_fused
