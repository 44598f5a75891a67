// The stem in one kernel: the convolution's result stays in shared memory.
//
// Algorithm: a block makes 7 x 7 pooled positions of 64 channels, for which it needs 15 x 15 of the
// convolution's, and for these 35 x 35 pixels. It copies the pixels as 4 channels, the last one
// zero, 8 bytes each: a window's row of 7 pixels is then 56 contiguous bytes from a multiple of 16
// on, as the window moves by two pixels. So ldmatrix takes the rows of the matrix of windows
// straight from the pixels, where they overlap, without bank conflicts; no such matrix is formed. A
// window's row counts as 32 values of depth: 28, and an eighth pixel that is not the window's. Its
// weights are zero, and its values are set to zero as well, so that no infinity of another window's
// enters. 7 x 2 steps of mma.m16n8k16 with fp32 accumulators make 15 rows of 16 positions, the last
// of which is idle, in 8 warps of 2 rows. Then batch norm, ReLU and rounding, minus infinity where
// the position lies outside the convolution's result, and the maximum of 9 neighbours, 8 channels a
// thread. Rounding before the maximum gives what rounding after it would.
//
// Shared memory: pixels, 35 x 38 of 8 bytes; weights, 64 rows of 7 x 64 + 16 bytes, so that 8 rows
// of one chunk meet in no bank; over both, once they are read, the convolution's result, 240 rows
// of 128 + 16 bytes; scale and shift of 64 channels.
//
// Memory: reads x once, and the border that blocks share, half as much again, from L2, as the
// weights; writes the pooled result once, 16 bytes a thread. Writing and reading the convolution's
// result, four times as large, is saved.
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/stem.h"
#include "kernels/cuda/stem_sm90.h"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kWindow = 7, kChannels = 3;
constexpr int kPooled = 7;              // positions of a block, in each direction
constexpr int kConv = 2 * kPooled + 1;  // of the convolution's
constexpr int kPitch = 16;              // from one line of those to the next
constexpr int kRows = kConv * kPitch;
constexpr int kPixelsH = 2 * kConv + 5, kPixelsW = 2 * kPitch + 6;
constexpr int kN = 64;
constexpr int kPixelBytes = 8, kWindowPixels = 8;
constexpr int kPixelRowBytes = kPixelsW * kPixelBytes;
constexpr int kWeightRowBytes = kWindow * kWindowPixels * kPixelBytes + 16;
constexpr int kResultRowBytes = kN * 2 + 16;

constexpr int kWeights = kPixelsH * kPixelRowBytes;
constexpr int kScaleShift = kWeights + kN * kWeightRowBytes;
constexpr int kSharedBytes = kScaleShift + kN * static_cast<int>(kScaleShiftBytes);
static_assert(kPixelRowBytes % 16 == 0 && kRows * kResultRowBytes <= kScaleShift);
static_assert(kRows <= kThreads);  // a warp takes 32 rows

struct Arguments {
  Stem stem;
  int conv_h, conv_w, pooled_h, pooled_w;
  int tiles_h, tiles_w;
};

// Three values and a zero, or four zeros.
template <typename T>
__device__ __forceinline__ Pack<T, 4> load_pixel(const T* from, bool inside) {
  Pack<T, 4> pixel{};
  if (inside) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) pixel.value[c] = ptx::load_global(from + c);
  }
  return pixel;
}

template <typename T, typename X>
__device__ __forceinline__ void copy_pixels(const Stem& a, std::int64_t image, int y, int x) {
  const std::int64_t plane = std::int64_t{a.height} * a.width;
  const std::int64_t channel_apart = a.planar ? plane : 1, pixel_apart = a.planar ? 1 : kChannels;
  const X* const from = static_cast<const X*>(a.x) + image * plane * kChannels;
#pragma unroll 1
  for (int i = threadIdx.x; i < kPixelsH * kPixelsW; i += kThreads) {
    const int row = i / kPixelsW, h = y + row, w = x + i % kPixelsW;
    Pack<T, 4> pixel{};
    if (static_cast<unsigned>(h) < static_cast<unsigned>(a.height) &&
        static_cast<unsigned>(w) < static_cast<unsigned>(a.width)) {
      const X* const at = from + (std::int64_t{h} * a.width + w) * pixel_apart;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const X value = ptx::load_global(at + c * channel_apart);
        if constexpr (std::is_same_v<X, T>) {
          pixel.value[c] = value;
        } else {
          pixel.value[c] = from_float<T>(fmaf(value, a.scale[c], a.shift[c]));
        }
      }
    }
    ptx::store_shared(i * kPixelBytes, pixel);
  }
}

template <typename T>
__device__ __forceinline__ void copy_weights(const Stem& a, int first) {
  constexpr int kPixels = kWindow * kWindowPixels;  // of a window
#pragma unroll 1
  for (int i = threadIdx.x; i < kN * kPixels; i += kThreads) {
    const int n = i / kPixels, pixel = i % kPixels;
    const int r = pixel / kWindowPixels, s = pixel % kWindowPixels;
    const bool inside = first + n < a.out_channels && s < kWindow;
    const int at = (((first + n) * kWindow + r) * kWindow + s) * kChannels;
    const T* const from = static_cast<const T*>(a.weight);
    ptx::store_shared(kWeights + n * kWeightRowBytes + pixel * kPixelBytes,
                      load_pixel(inside ? from + at : from, inside));
  }
}

// A warp's 32 rows x 64 channels, in the layout of mma.m16n8k16.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[2][kN / 8][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  std::uint32_t windows[2];  // of the rows that this lane names
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int line = warp * 2 + i < kConv ? warp * 2 + i : kConv - 1;
    windows[i] = 2 * line * kPixelRowBytes + (lane % kPitch + lane / 16) * 16;
  }
  const std::uint32_t weights =
      kWeights + (lane / 16 * 8 + lane % 8) * kWeightRowBytes + lane / 8 % 2 * 16;
#pragma unroll 1
  for (int r = 0; r < kWindow; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(a[i], windows[i] + r * kPixelRowBytes + half * 32);
        if (half == 1 && lane % 4 >= 2) a[i][2] = a[i][3] = 0;  // the eighth pixel
      }
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) {
        std::uint32_t b[4];
        ptx::ldmatrix_x4(b, weights + 16 * j * kWeightRowBytes + (4 * r + 2 * half) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ptx::mma_m16n8k16<T>(d[i][2 * j], a[i], b);
          ptx::mma_m16n8k16<T>(d[i][2 * j + 1], a[i], b + 2);
        }
      }
    }
  }
}

// Leaves the convolution's result in shared memory, minus infinity where a position lies outside.
template <typename T>
__device__ __forceinline__ void store_conv(const Arguments& a, const float (&d)[2][kN / 8][4],
                                           int h, int w) {
  const Epilogue<T> epilogue(true);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = warp * 32 + 8 * i + lane / 4;
    const bool inside = static_cast<unsigned>(h + row / kPitch) < static_cast<unsigned>(a.conv_h) &&
                        static_cast<unsigned>(w + row % kPitch) < static_cast<unsigned>(a.conv_w);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        y[e] = epilogue.normalise(
            d[i / 2][j][i % 2 * 2 + e],
            ptx::load_shared<ScaleShift>(kScaleShift + (column + e) * kScaleShiftBytes));
      }
      const float outside[2] = {-INFINITY, -INFINITY};
      if (row < kRows) {
        ptx::store_shared(row * kResultRowBytes + column * 2,
                          inside ? epilogue.pack(y) : pack_floats<T>(outside));
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void pool(const Arguments& a, std::int64_t image, int p, int q,
                                     int first) {
  constexpr int kLanes = 8, kAcross = kN / kLanes;
  using Octet = Pack<T, kLanes>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kPooled * kPooled * kAcross; i += kThreads) {
    const int column = i % kAcross * kLanes, place = i / kAcross;
    const int h = place / kPooled, w = place % kPooled;
    if (p + h >= a.pooled_h || q + w >= a.pooled_w || first + column >= a.stem.out_channels) {
      continue;
    }
    float most[kLanes];
#pragma unroll
    for (int e = 0; e < kLanes; ++e) most[e] = -INFINITY;
#pragma unroll
    for (int r = 0; r < 3; ++r) {
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const int row = (2 * h + r) * kPitch + 2 * w + s;
        const Octet values = ptx::load_shared<Octet>(row * kResultRowBytes + column * 2);
#pragma unroll
        for (int e = 0; e < kLanes; ++e) {
          const float value = to_float(values.value[e]);
          if (value > most[e] || value != value) most[e] = value;  // a NaN stays
        }
      }
    }
    Octet result;
#pragma unroll
    for (int e = 0; e < kLanes; ++e) result.value[e] = from_float<T>(most[e]);
    const std::int64_t at =
        ((image * a.pooled_h + p + h) * a.pooled_w + q + w) * a.stem.out_channels + first + column;
    ptx::store_global(reinterpret_cast<Octet*>(static_cast<T*>(a.stem.out) + at), result);
  }
}

// Grid: (images x tiles down x tiles across; tiles of channels).
template <typename T, typename X>
__global__ void __launch_bounds__(kThreads, 2) stem_kernel(const __grid_constant__ Arguments a) {
  const std::int64_t image = blockIdx.x / (a.tiles_h * a.tiles_w);
  const int tile = blockIdx.x % (a.tiles_h * a.tiles_w);
  const int p = tile / a.tiles_w * kPooled, q = tile % a.tiles_w * kPooled;
  const int first = blockIdx.y * kN;
  const int h = 2 * p - 1, w = 2 * q - 1;  // of the convolution's result

  copy_pixels<T, X>(a.stem, image, 2 * h - 3, 2 * w - 3);
  copy_weights<T>(a.stem, first);
  load_scale_shift(kScaleShift, a.stem.bn, first, a.stem.out_channels - first, kN, threadIdx.x,
                   kThreads);
  __syncthreads();
  float d[2][kN / 8][4] = {};
  multiply<T>(d);
  __syncthreads();  // pixels and weights are read
  store_conv<T>(a, d, h, w);
  __syncthreads();
  pool<T>(a, image, p, q, first);
}

template <typename T>
LaunchPlan<Arguments> make_plan(const Stem& stem) {
  Arguments a{};
  a.stem = stem;
  a.conv_h = halved(stem.height);
  a.conv_w = halved(stem.width);
  a.pooled_h = halved(a.conv_h);
  a.pooled_w = halved(a.conv_w);
  a.tiles_h = static_cast<int>(ceil_div(a.pooled_h, kPooled));
  a.tiles_w = static_cast<int>(ceil_div(a.pooled_w, kPooled));
  const std::int64_t tiles = std::int64_t{a.tiles_h} * a.tiles_w;
  const dim3 grid(grid_size(tiles > kMaxGridX ? tiles : stem.batch * tiles),
                  grid_size(ceil_div(stem.out_channels, kN), kMaxGridY));
  return {stem.x_dtype == DType::kUInt8 ? &stem_kernel<T, std::uint8_t> : &stem_kernel<T, T>,
          {grid, dim3(kThreads), kSharedBytes},
          a};
}

}  // namespace

#ifndef RESNET_FUSED_SM90
bool stem_sm90_can_implement(const Stem&) { return false; }
cudaError_t stem_sm90(const Stem&, int, cudaStream_t) { return cudaErrorInvalidValue; }
#endif

cudaError_t stem(const Stem& stem, int device, cudaStream_t stream) {
  if (stem.dtype == DType::kFloat32 || stem.out_channels % 8 != 0) return cudaErrorInvalidValue;
  if (stem.batch == 0 || stem.height == 0 || stem.width == 0 || stem.out_channels == 0) {
    return cudaSuccess;
  }
  Machine machine;
  const cudaError_t status = set_device(device, &machine);
  if (status != cudaSuccess) return status;
  if (machine.sm90 && stem_sm90_can_implement(stem)) {
    return stem_sm90(stem, machine.num_sms, stream);
  }
  return with_half(stem.dtype,
                   [&](auto half) { return launch(make_plan<decltype(half)>(stem), stream); });
}

}  // namespace resnet_fused
