// What a window covers of its lines, position by position: a stem's 7 x 7 window of 3 channels
// becomes one of 7 x 1 of 24, whose rows bulk copies can take.
//
// Algorithm: a thread writes 16 bytes; neighbours of a position lie one behind the other in a line,
// so that element e of a row is the line's e-th one behind the window's first.
// Memory: x once, its overlaps from L1; the result once.
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/window_rows.h"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256, kLanes = 8;
using Chunk = Pack<std::uint16_t, kLanes>;

__global__ void __launch_bounds__(kThreads) window_rows_kernel(const WindowRows a) {
  ptx::wait_for_earlier_kernels();
  const unsigned chunks = a.row / kLanes;
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.lines * a.out_width * chunks) return;
  const std::int64_t position = i / chunks, line = position / a.out_width;
  const int first = static_cast<int>(i - position * chunks) * kLanes;
  const int w = static_cast<int>(position - line * a.out_width) * a.stride - a.padding;
  const auto* const from = static_cast<const std::uint16_t*>(a.x) + line * a.width * a.channels;
  Chunk chunk{};
#pragma unroll
  for (int e = 0; e < kLanes; ++e) {
    const int element = first + e, at = w * a.channels + element;
    if (element < a.kernel * a.channels && at >= 0 && at < a.width * a.channels) {
      chunk.value[e] = ptx::load_global(from + at);
    }
  }
  ptx::store_global(static_cast<Chunk*>(a.out) + i, chunk);
}

}  // namespace

cudaError_t window_rows(const WindowRows& arguments, int device, cudaStream_t stream) {
  const WindowRows& a = arguments;
  const std::int64_t threads = a.lines * a.out_width * (a.row / kLanes);
  if (threads == 0) return cudaSuccess;
  const cudaError_t status = set_device(device);
  if (status != cudaSuccess) return status;
  const LaunchShape shape{dim3(grid_size(ceil_div(threads, kThreads))), dim3(kThreads), 0, dim3(1),
                          true};
  if (shape.grid.x == 0) return cudaErrorInvalidConfiguration;
  return launch(&window_rows_kernel, shape, stream, arguments);
}

}  // namespace resnet_fused
