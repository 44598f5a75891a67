// The driver API's tensor maps, under the rules that its documentation gives.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

namespace {

cuuint32_t element_bytes(CUtensorMapDataType type) {
  return type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
}

bool encodes(CUtensorMapDataType type, cuuint32_t rank, const void* data, const cuuint64_t* size,
             const cuuint64_t* strides, CUtensorMap* map) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0) return false;
  *map = {};
  map->data = static_cast<unsigned char*>(const_cast<void*>(data));
  map->rank = static_cast<int>(rank);
  map->stride[0] = element_bytes(type);
  for (cuuint32_t d = 0; d < rank; ++d) {
    map->size[d] = size[d];
    if (size[d] == 0 || size[d] > cuuint64_t{1} << 32) return false;
    if (d == 0) continue;
    map->stride[d] = strides[d - 1];
    if (map->stride[d] % 16 != 0 || map->stride[d] >= cuuint64_t{1} << 40) return false;
    // "Each following dimension specified includes previous dimension stride."
    const cuuint64_t least = d == 1 ? map->stride[0] * size[0] : map->stride[d - 1];
    if (map->stride[d] < least || (d > 1 && map->stride[d] % least != 0)) return false;
  }
  return true;
}

bool inner_fits(CUtensorMapDataType type, cuuint32_t elements, CUtensorMapSwizzle swizzle) {
  const cuuint32_t bytes = element_bytes(type) * elements;
  return bytes % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || bytes <= 16u << swizzle);
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* size, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank < 1 || rank > CUtensorMap::kRanks || !encodes(type, rank, data, size, strides, map) ||
      !inner_fits(type, box[0], swizzle)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  map->swizzle = swizzle;
  for (cuuint32_t d = 0; d < rank; ++d) {
    map->box[d] = box[d];
    // Steps other than 1 are possible, and not modelled.
    if (box[d] < 1 || box[d] > 256 || steps[d] != 1) return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* data, const cuuint64_t* size, const cuuint64_t* strides,
                                 const int* lower, const int* upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave,
                                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  // Ranks 3 and 5 are possible, and not modelled.
  if (rank != 4 || !encodes(type, rank, data, size, strides, map) ||
      !inner_fits(type, channels, swizzle) || channels > 256 || pixels < 1 || pixels > 1024) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  map->swizzle = swizzle;
  map->im2col = true;
  map->box[0] = channels;
  map->box[1] = pixels;
  for (int k = 0; k < 2; ++k) {
    map->lower[k] = lower[k];
    map->upper[k] = upper[k];
    map->step[k] = steps[k + 1];
    const std::int64_t extent = static_cast<std::int64_t>(size[k + 1]) + upper[k] - lower[k];
    if (std::min(lower[k], upper[k]) < -128 || std::max(lower[k], upper[k]) > 127 || extent < 1 ||
        map->step[k] < 1 || map->step[k] > 8) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = name == std::string("cuTensorMapEncodeTiled")
                  ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled)
                  : reinterpret_cast<void*>(&cuTensorMapEncodeIm2col);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
