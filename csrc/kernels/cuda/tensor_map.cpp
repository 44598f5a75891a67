#include "kernels/cuda/tensor_map.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

bool is_byte(DType dtype) { return dtype >= DType::kUInt8; }

CUtensorMapDataType map_type(DType dtype) {
  if (is_byte(dtype)) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

int element_bytes(DType dtype) { return is_byte(dtype) ? 1 : 2; }

CUtensorMapSwizzle swizzle_of(int row_bytes) {
  return row_bytes == kMapRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

// A function of the driver, found at run time, so that nothing links libcuda; once, as no two of
// them have one type.
template <typename Function>
cudaError_t driver_function(const char* name, Function** function) {
  static std::atomic<Function*> known{nullptr};
  *function = known.load(std::memory_order_relaxed);
  if (*function != nullptr) return cudaSuccess;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr int kSince = 12000;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, kSince, cudaEnableDefault, &result);
#else
  static_assert(CUDART_VERSION >= kSince);
  const cudaError_t status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess) return take_error(status);
  if (result != cudaDriverEntryPointSuccess) return cudaErrorInsufficientDriver;
  *function = reinterpret_cast<Function*>(found);
  known.store(*function, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t status_of(CUresult result) {
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Bytes from each element to the next in all dimensions but the first.
std::vector<cuuint64_t> bytes_of(DType dtype, Sizes strides, Sizes size) {
  std::vector<cuuint64_t> bytes;
  for (const std::int64_t stride : strides) bytes.push_back(stride * element_bytes(dtype));
  if (!bytes.empty()) return bytes;
  cuuint64_t dense = element_bytes(dtype);
  for (const std::int64_t s : size) bytes.push_back(dense *= s);
  return bytes;
}

}  // namespace

cudaError_t encode_tiles(CUtensorMap* map, DType dtype, const void* data, Sizes size,
                         std::initializer_list<int> box, Sizes strides, int row_bytes) {
  decltype(cuTensorMapEncodeTiled)* encode = nullptr;
  const cudaError_t status = driver_function("cuTensorMapEncodeTiled", &encode);
  if (status != cudaSuccess) return status;
  const std::vector<cuuint64_t> sizes(size.begin(), size.end()),
      bytes = bytes_of(dtype, strides, size);
  std::vector<cuuint32_t> boxes{static_cast<cuuint32_t>(row_bytes / element_bytes(dtype))};
  boxes.insert(boxes.end(), box.begin(), box.end());
  const std::vector<cuuint32_t> steps(sizes.size(), 1);
  return status_of(encode(map, map_type(dtype), static_cast<cuuint32_t>(sizes.size()),
                          const_cast<void*>(data), sizes.data(), bytes.data(), boxes.data(),
                          steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(row_bytes),
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

bool encodable(const PixelBox& box) {
  for (int k = 0; k < 2; ++k) {
    if (std::min(box.lower[k], box.upper[k]) < -128 || std::max(box.lower[k], box.upper[k]) > 127 ||
        box.step[k] > 8) {
      return false;
    }
  }
  return true;
}

cudaError_t encode_pixels(CUtensorMap* map, DType dtype, const void* data, Sizes size,
                          const PixelBox& box, int pixels, Sizes strides, int row_bytes) {
  decltype(cuTensorMapEncodeIm2col)* encode = nullptr;
  const cudaError_t status = driver_function("cuTensorMapEncodeIm2col", &encode);
  if (status != cudaSuccess) return status;
  const std::vector<cuuint64_t> sizes(size.begin(), size.end()),
      bytes = bytes_of(dtype, strides, size);
  const auto step = [&](int k) { return static_cast<cuuint32_t>(box.step[k]); };
  const cuuint32_t steps[] = {1, step(0), step(1), 1};
  return status_of(encode(map, map_type(dtype), static_cast<cuuint32_t>(sizes.size()),
                          const_cast<void*>(data), sizes.data(), bytes.data(), box.lower, box.upper,
                          row_bytes / element_bytes(dtype), static_cast<cuuint32_t>(pixels), steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(row_bytes),
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

}  // namespace resnet_fused
