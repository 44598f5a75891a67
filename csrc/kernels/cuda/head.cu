// out = mean over positions(x) * weight^T (+ bias): the head, for few images.
//
// Algorithm, average_pool: of one image, a block takes 16 neighbouring chunks of 16 bytes of
// channels. 16 threads sum every 16th position of a chunk in fp32, then one thread a channel adds
// up their sums, divides, and writes.
// Algorithm, linear: a block computes 8 classes of one image or of 4. Its 256 threads share the
// channels, 16 bytes of a class's weights each, and hold all 8 or 32 sums in fp32. A warp's lanes
// add theirs by halving: at each of 5 steps a lane hands half of its sums to another and takes the
// other half, which leaves it one (31 shuffles for 32 sums). Then 32 threads add up the 8 warps'.
// All orders are fixed, so the same inputs give the same bits.
// Channels that are no whole 16 bytes, or pointers off them, take the same kernels one by one.
//
// Two kernels, because classes are computed by many blocks, each of which would otherwise read x
// again. The means pass between them as fp32, so that 16-bit results are rounded only once.
//
// Shared memory: average_pool 16 x 16 chunks of sums, <= 8 KB; linear 8 x 32 sums, 1 KB.
//
// Memory: x, weight and result once, which is the floor, and 4 bytes a mean twice. Of ResNet-50 in
// 16 bits at batch 1, weight is 4.1 MB and x 0.2 MB: 125 blocks ask for all of weight at once, 16
// bytes of 8 classes a thread. But every block reads its images' means, 8 KB an image, and every 4
// images read weight again, both from L2: 33 MB at batch 16, where the floor is 7 MB. Beyond, x is
// what counts (51 MB at batch 256), which average_pool reads once; the products want tensor cores
// then, and the caller leaves them to cuBLAS.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>

#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/head.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kAcross = 16, kDown = kThreads / kAcross;  // chunks and positions of a pooling block
constexpr int kClasses = 8, kMostImages = 4;             // of a block of products

// What is loaded or stored at once of the fp32 values that belong to V channels.
template <int V>
using Quad = Pack<float, std::min(V, 4)>;

// Grid: images x tiles of channels, the latter first. V channels make a chunk.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) average_pool_kernel(const AveragePool a) {
  ptx::wait_for_earlier_kernels();
  constexpr int kChannels = kAcross * V;
  const int tiles = (a.channels + kChannels - 1) / kChannels;
  const std::int64_t image = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * kChannels;
  const int column = threadIdx.x % kAcross * V, row = threadIdx.x / kAcross;

  Quad<V> sums[(V + 3) / 4] = {};
  if (first + column < a.channels) {
    const T* const x = static_cast<const T*>(a.x) + image * a.positions * a.channels;
#pragma unroll 4
    for (int p = row; p < a.positions; p += kDown) {
      const Pack<T, V> values = ptx::load_global(
          reinterpret_cast<const Pack<T, V>*>(x + std::int64_t{p} * a.channels + first + column));
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e / 4].value[e % 4] += to_float(values.value[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < V; e += 4) {
    ptx::store_shared((row * kChannels + column + e) * sizeof(float), sums[e / 4]);
  }
  __syncthreads();

  const int channel = first + threadIdx.x;
  if (threadIdx.x >= kChannels || channel >= a.channels) return;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kDown; ++k) {
    sum += ptx::load_shared<float>((k * kChannels + threadIdx.x) * sizeof(float));
  }
  const float mean = sum / static_cast<float>(a.positions);
  const std::int64_t at = image * a.channels + channel;
  if (a.out_dtype == DType::kFloat32) {
    ptx::store_global(static_cast<float*>(a.out) + at, mean);
  } else {
    ptx::store_global(static_cast<T*>(a.out) + at, from_float<T>(mean));
  }
}

// Adds each of the sums over the warp's lanes; lane l returns that of sums[l % kCount].
template <int kCount>
__device__ __forceinline__ float sum_over_lanes(float (&sums)[kCount]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (distance >= kCount) {
        sums[k] += ptx::shuffle_xor(sums[k], distance);
      } else if (k < distance) {
        const float kept = upper ? sums[k + distance] : sums[k];
        const float handed = upper ? sums[k] : sums[k + distance];
        sums[k] = kept + ptx::shuffle_xor(handed, distance);
      }
    }
  }
  return sums[0];
}

// Grid: (tiles of classes; tiles of kImages images).
template <typename T, int V, int kImages>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const Linear a) {
  constexpr int kSums = kImages * kClasses;
  static_assert(kSums <= kWarp);
  ptx::wait_for_earlier_kernels();
  const int first_class = blockIdx.x * kClasses;
  const std::int64_t first_image = std::int64_t(blockIdx.y) * kImages;
  const std::int64_t images = a.batch - first_image;  // to come
  // Beyond the last class or image comes that one again, and its sums are dropped.
  const T* weight[kClasses];
#pragma unroll
  for (int k = 0; k < kClasses; ++k) {
    const int row = first_class + k < a.classes ? first_class + k : a.classes - 1;
    weight[k] = static_cast<const T*>(a.weight) + std::int64_t{row} * a.channels;
  }
  const float* x[kImages];
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    x[i] = a.x + (first_image + (i < images ? i : images - 1)) * a.channels;
  }

  float sums[kSums] = {};
#pragma unroll 1
  for (int c = threadIdx.x * V; c < a.channels; c += kThreads * V) {
    Pack<T, V> weights[kClasses];
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      weights[k] = ptx::load_global(reinterpret_cast<const Pack<T, V>*>(weight[k] + c));
    }
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        const auto means = ptx::load_global(reinterpret_cast<const Quad<V>*>(x[i] + c + e));
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
          float& sum = sums[i * kClasses + k];
#pragma unroll
          for (int q = 0; q < V && q < 4; ++q) {
            sum = fmaf(means.value[q], to_float(weights[k].value[e + q]), sum);
          }
        }
      }
    }
  }

  const float sum = sum_over_lanes(sums);
  ptx::store_shared(threadIdx.x * sizeof(float), sum);
  __syncthreads();
  const int image = threadIdx.x / kClasses, column = first_class + threadIdx.x % kClasses;
  if (threadIdx.x >= kSums || image >= images || column >= a.classes) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    total += ptx::load_shared<float>((warp * kWarp + threadIdx.x) * sizeof(float));
  }
  if (a.bias != nullptr)
    total += to_float(ptx::load_global(static_cast<const T*>(a.bias) + column));
  const std::int64_t at = (first_image + image) * a.classes + column;
  ptx::store_global(static_cast<T*>(a.out) + at, from_float<T>(total));
}

// Whether rows of so many channels, all of them, are made of aligned chunks of 16 bytes.
bool whole_chunks(DType dtype, int channels, std::initializer_list<const void*> rows) {
  return channels % (dtype == DType::kFloat32 ? 4 : 8) == 0 &&
         std::all_of(rows.begin(), rows.end(), aligned);
}

template <typename T>
LaunchPlan<AveragePool> plan_of(const AveragePool& a, bool overlaps) {
  constexpr int kLanes = 16 / sizeof(T);
  const bool whole = whole_chunks(a.dtype, a.channels, {a.x});
  const int channels = kAcross * (whole ? kLanes : 1);  // of a block
  return {whole ? &average_pool_kernel<T, kLanes> : &average_pool_kernel<T, 1>,
          {dim3(grid_size(a.batch * ceil_div(a.channels, channels))), dim3(kThreads),
           kDown * channels * sizeof(float), dim3(1), overlaps},
          a};
}

template <typename T>
LaunchPlan<Linear> plan_of(const Linear& a, bool overlaps) {
  constexpr int kLanes = 16 / sizeof(T);
  const bool whole = whole_chunks(a.dtype, a.channels, {a.x, a.weight});
  return {!whole         ? &linear_kernel<T, 1, kMostImages>
          : a.batch == 1 ? &linear_kernel<T, kLanes, 1>
                         : &linear_kernel<T, kLanes, kMostImages>,
          {dim3(grid_size(ceil_div(a.classes, kClasses)),
                grid_size(ceil_div(a.batch, kMostImages), kMaxGridY)),
           dim3(kThreads), kThreads * sizeof(float), dim3(1), overlaps},
          a};
}

template <typename Arguments>
cudaError_t launch_on(const Arguments& a, int device, cudaStream_t stream) {
  cudaError_t status = set_device(device);
  bool overlaps = false;
  if (status == cudaSuccess) status = runs_sm90(device, &overlaps);
  if (status != cudaSuccess) return status;
  switch (a.dtype) {
    case DType::kFloat16:
      return launch(plan_of<__half>(a, overlaps), stream);
    case DType::kBFloat16:
      return launch(plan_of<__nv_bfloat16>(a, overlaps), stream);
    default:
      return launch(plan_of<float>(a, overlaps), stream);
  }
}

}  // namespace

cudaError_t average_pool(const AveragePool& a, int device, cudaStream_t stream) {
  return a.batch == 0 || a.channels == 0 ? cudaSuccess : launch_on(a, device, stream);
}

cudaError_t linear(const Linear& a, int device, cudaStream_t stream) {
  return a.batch == 0 || a.classes == 0 ? cudaSuccess : launch_on(a, device, stream);
}

}  // namespace resnet_fused
