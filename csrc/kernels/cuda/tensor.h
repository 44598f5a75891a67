// What the arguments of every CUDA kernel are made of.
#pragma once

#include <cstdint>

namespace resnet_fused {

enum class DType : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kUInt8 = 3,
  kInt8 = 4,
  kE4m3 = 5
};

// One value per channel, of any of the floating types; null means absent.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// (x - mean) / sqrt(var + eps) * weight + bias, computed in fp32 from the live parameters.
struct BatchNorm {
  Vector mean;
  Vector var;
  Vector weight;  // null: 1
  Vector bias;    // null: 0
  float eps = 0.0f;
};

}  // namespace resnet_fused
