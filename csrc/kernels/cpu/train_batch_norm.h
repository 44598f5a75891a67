// Batch norm and ReLU in training: the passes between convolutions, forward and backward. Tensors
// are (rows, channels), NHWC memory; vectors of a layer are float32 and named as in
// resnet_fused/backends/training.py. What is computed for a channel does not depend on threads.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "isa.h"
#include "kernels/residual.h"

namespace resnet_fused::cpu {

struct Rows {
  std::int64_t rows, channels;
  Format format;
};

// relu((x - mean) * scale + shift): a pre-BN output and its layer's (6, channels) scale_shift.
struct Activation {
  const void* x;
  const float* scale_shift;
};

// moments (3, channels): mean, sum of squared deviations and count of x.
struct Moments {
  Rows rows;
  const void* x;
  float* moments;
};

// out = relu(main's normalisation + the residual, or + other's normalisation).
struct NormaliseAddRelu {
  Rows rows;
  Activation main;
  Residual residual;
  Activation other;  // x is nullptr: none
  void* out;
};

// g = grad where y > 0, or, without y, where the activation of the first branch is; else 0. For
// each branch the sums (2, channels) of g and of g * (x - mean).
struct ReluGradient {
  Rows rows;
  const void* grad;
  const void* y;
  int branches;  // up to 2
  Activation branch[2];
  float* sums[2];
  void* g;  // may be grad itself
};

// out = a * g + b * (x - mean) + d of coefficients (4, channels): a, b, d, mean. x nullptr: a * g.
struct PreBnGradient {
  Rows rows;
  const void *g, *x;
  const float* coefficients;
  void* out;  // may be g itself
};

// out (batch, height, width, channels) += add at every `stride`-th line and pixel, in the channels
// that add has.
struct AddStrided {
  std::int64_t batch, height, width, channels, stride;
  Format format;
  Residual add;
  void* out;
};

// Square windows with padding that never wins.
struct Pooling {
  std::int64_t batch, height, width, channels;
  std::int64_t kernel, stride, padding, out_height, out_width;
  Format format;
  Activation activation;  // (batch, height, width, channels)
};

// out (batch, out_height, out_width, channels) = max_pool(activation), and where in its window each
// maximum stands, counted along lines: of equal values the first.
struct PoolActivation {
  Pooling pooling;
  void* out;
  std::uint8_t* argmax;
};

// g (batch, height, width, channels): grad of the pooled activation, through pooling and ReLU, and
// its sums (2, channels).
struct PoolGradient {
  Pooling pooling;
  const void* grad;
  const std::uint8_t* argmax;
  void* g;
  float* sums;
};

// scale_shift (6, channels) from the moments (parts, 3, channels), merged in their order in fp64.
struct BnScaleShift {
  const float* moments;
  std::int64_t parts, channels;
  Vector weight, bias;
  double eps;
  float* scale_shift;
};

// coefficients (4, channels) and the gradients of weight and bias (channels), from the sums
// (parts, 2, channels) of this rank and of all.
struct BnBackwardCoefficients {
  const float *sums, *total, *scale_shift;
  std::int64_t parts, total_parts, channels;
  bool frozen;
  float *coefficients, *weight_grad, *bias_grad;
};

void moments(const Moments& op);
void normalise_add_relu(const NormaliseAddRelu& op);
void relu_gradient(const ReluGradient& op);
void pre_bn_gradient(const PreBnGradient& op);
void add_strided(const AddStrided& op);
void pool_activation(const PoolActivation& op);
void pool_gradient(const PoolGradient& op);
void bn_scale_shift(const BnScaleShift& op);
void bn_backward_coefficients(const BnBackwardCoefficients& op);

}  // namespace resnet_fused::cpu
