// out = relu?((x - mean) * scale + bias (+ residual)),  scale = weight / sqrt(var + eps)
//
// Algorithm: the NHWC tensor is a (rows, channels) matrix. A thread owns V neighbouring channels,
// V * sizeof(T) = 16 bytes, and walks down the rows with their scale and shift in fp32 registers;
// the block computes these once, in shared memory, from the live parameters (batch_norm.cuh).
// Tile: 256 threads = (channel vectors of a row, at most 256) x (rows), 2 rows in flight a thread;
// grid.y covers wider rows, grid.x strides over the rows. Channels that are no multiple of V, or
// pointers off 16 bytes, take the same kernel with V = 1.
// Memory: reads x (and residual) once, writes out once, each access 16 bytes a thread and
// contiguous over a warp; the parameters come from L2. Shared memory: 16 bytes a channel, <= 32 KB.
// A residual is read where it lies if its rows have one distance: to divide rows into lines and
// images for others would take more registers than there are.
// Versus PyTorch's separate ops: 2 or 3 tensors moved instead of 4 (BN, ReLU) or 7 (BN, add, ReLU).
#include <algorithm>
#include <cstddef>

#include "kernels/cuda/bn_add_relu.h"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 2;
constexpr int kResidentBlocks = 3;  // per SM: 80 registers a thread, no spills
constexpr int kBlocksPerSm = 2 * kResidentBlocks;

// The linear index of this thread in its block, and the step that visits all.
__device__ int thread_index() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ int thread_count() { return blockDim.x * blockDim.y; }

template <typename T, int V, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) bn_add_relu_kernel(const BnAddRelu a) {
  using Packed = Pack<T, V>;
  const int stored = blockDim.x * V;
  const std::int64_t first_channel = std::int64_t(blockIdx.y) * stored;
  const std::int64_t left = a.channels - first_channel;
  const int count = left < stored ? static_cast<int>(left) : stored;
  load_scale_shift(0, a.bn, first_channel, count, stored, thread_index(), thread_count());
  __syncthreads();

  const std::int64_t width = a.channels / V;
  const std::int64_t column = std::int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  ScaleShift scale_shift[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    scale_shift[i] = ptx::load_shared<ScaleShift>((threadIdx.x * V + i) * kScaleShiftBytes);
  }
  const Epilogue<T> epilogue(a.relu);

  // Neither pointer is __restrict__: out may be x or residual. A thread reads what it writes.
  const Packed* x = static_cast<const Packed*>(a.x) + column;
  const T* residual = static_cast<const T*>(a.residual.data) + column * V;
  const bool adds = kResidual && column * V < a.residual.channels;
  Packed* out = static_cast<Packed*>(a.out) + column;

  const std::int64_t stride = std::int64_t(gridDim.x) * blockDim.y;
#pragma unroll 1
  for (std::int64_t first = std::int64_t(blockIdx.x) * blockDim.y + threadIdx.y; first < a.rows;
       first += stride * kRowsInFlight) {
    Packed loaded[kRowsInFlight], added[kRowsInFlight];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const std::int64_t row = first + k * stride;
      if (row < a.rows) {
        loaded[k] = ptx::load_global(x + row * width);
        if (adds) {
          added[k] =
              ptx::load_global(reinterpret_cast<const Packed*>(residual + row * a.residual.pixel));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const std::int64_t row = first + k * stride;
      if (row < a.rows) {
        float y[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          y[i] = epilogue.normalise(to_float(loaded[k].value[i]), scale_shift[i]);
        }
        if (adds) epilogue.add(y, added[k]);
        ptx::store_global(out + row * width, epilogue.pack(y));
      }
    }
  }
}

using Kernel = void (*)(BnAddRelu);

template <typename T, int V>
Kernel kernel_for(bool residual) {
  return residual ? &bn_add_relu_kernel<T, V, true> : &bn_add_relu_kernel<T, V, false>;
}

template <typename T>
Kernel kernel_for(bool residual, bool vectorised) {
  return vectorised ? kernel_for<T, 16 / sizeof(T)>(residual) : kernel_for<T, 1>(residual);
}

Kernel kernel_for(DType dtype, bool residual, bool vectorised) {
  switch (dtype) {
    case DType::kFloat16:
      return kernel_for<__half>(residual, vectorised);
    case DType::kBFloat16:
      return kernel_for<__nv_bfloat16>(residual, vectorised);
    default:
      return kernel_for<float>(residual, vectorised);
  }
}

LaunchPlan<BnAddRelu> make_plan(const BnAddRelu& a, int num_sms) {
  const int lanes = a.dtype == DType::kFloat32 ? 4 : 8;
  const bool vectorised =
      a.channels % lanes == 0 && aligned(a.x) && aligned(a.out) && a.residual.in_chunks(lanes);
  const std::int64_t width = vectorised ? a.channels / lanes : a.channels;
  const dim3 block(static_cast<unsigned>(std::min<std::int64_t>(width, kThreads)),
                   static_cast<unsigned>(std::max<std::int64_t>(kThreads / width, 1)));
  const std::int64_t across = ceil_div(width, block.x);
  const std::int64_t useful = ceil_div(a.rows, std::int64_t(block.y) * kRowsInFlight);
  const std::int64_t wanted = ceil_div(std::int64_t(num_sms) * kBlocksPerSm, across);
  const dim3 grid(grid_size(std::min(useful, wanted)), grid_size(across, kMaxGridY));
  return {kernel_for(a.dtype, a.residual.channels > 0, vectorised),
          {grid, block, kScaleShiftBytes * block.x * (vectorised ? lanes : 1)},
          a};
}

}  // namespace

cudaError_t bn_add_relu(const BnAddRelu& arguments, int device, cudaStream_t stream) {
  if (arguments.rows == 0 || arguments.channels == 0) return cudaSuccess;
  int num_sms = 0;
  cudaError_t status = set_device(device);
  if (status == cudaSuccess) status = get_num_sms(device, &num_sms);
  return status == cudaSuccess ? launch(make_plan(arguments, num_sms), stream) : status;
}

cudaError_t bn_add_relu_loadable(int device) {
  const cudaError_t status = set_device(device);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  return take_error(cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(kernel_for(DType::kFloat32, false, true))));
}

}  // namespace resnet_fused
