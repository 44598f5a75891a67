// What the kernels for sm_90a of a whole bottleneck share: what they can read, and how they part
// the lines of an image.
#pragma once

#include <cstdint>

#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/launch.h"

namespace resnet_fused {

// Whether `device` can run them, and bulk copies and products can take such tensors. Each kernel
// has a limit of its own for sizes.
inline bool can_take(const Bottleneck& a, int device) {
  bool sm90 = false;
  if (runs_sm90(device, &sm90) != cudaSuccess || !sm90) return false;
  for (const void* pointer :
       {a.x, a.conv1.weight, a.conv2.weight, a.conv3.weight, a.projection.weight}) {
    if (!aligned(pointer)) return false;
  }
  return a.dtype != DType::kFloat32 && a.stride == 1 && a.inner % 8 == 0 && a.channels % 8 == 0 &&
         a.out_channels % 8 == 0 &&
         (a.projection.weight != nullptr || a.channels == a.out_channels) &&
         std::int64_t{a.height} * a.width * a.channels < std::int64_t{1} << 39;
}

// Steps of a job, each the same number of lines, of the `steps` from top to bottom of each of
// `columns` (images, or strips of them): with which the busiest of `workers` makes the fewest of
// conv1, of which each job computes `halo` more than of the result.
inline int choose_steps(std::int64_t columns, int steps, int halo, int workers) {
  int chosen = steps;
  std::int64_t least = 0;
  for (int segments = 1; segments <= steps; ++segments) {
    const std::int64_t of_job = ceil_div(steps, segments);
    const std::int64_t jobs = columns * ceil_div(steps, of_job);
    const std::int64_t made = ceil_div(jobs, workers) * (of_job + halo);
    if (segments == 1 || made < least) {
      chosen = static_cast<int>(of_job);
      least = made;
    }
  }
  return chosen;
}

}  // namespace resnet_fused
