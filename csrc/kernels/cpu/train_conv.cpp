#include "train_conv.h"

#include <algorithm>
#include <utility>

#include "train_memory.h"
#include "train_pack.h"
#include "winograd.h"

namespace resnet_fused::cpu {
namespace {

constexpr float kOne = 1, kZero = 0;
constexpr std::int64_t kLeastTiles = 128;

// Batch norm that changes nothing: (x - 0) * (1 / sqrt(1 + 0)) + 0.
BatchNorm identity() {
  const Vector zeros{&kZero, VectorType::kFloat32, 0}, ones{&kOne, VectorType::kFloat32, 0};
  return {zeros, ones, ones, zeros, 0};
}

// Whether Winograd's products make up for its larger weights, written and read once a step, and for
// the tiles that reach beyond the image.
bool suits_winograd(const TrainConv& conv) {
  const Window& window = conv.window;
  const std::int64_t tiles = conv.batch * ceil_div(conv.height, 2) * ceil_div(conv.width, 2);
  if (tiles < kLeastTiles || 20 * tiles > 6 * conv.batch * conv.height * conv.width) return false;
  for (int axis = 0; axis < 2; ++axis) {
    if (window.kernel[axis] != 3 || window.stride[axis] != 1 || window.padding[axis] != 1 ||
        window.dilation[axis] != 1) {
      return false;
    }
  }
  return conv.format == Format::kFloat32 && conv.in_channels % 16 == 0 &&
         conv.out_channels % 16 == 0;
}

Pack packing(const TrainConv& conv, void* packed) {
  const auto& s = conv.strides;
  Pack pack{conv.weight, {s[0], s[1], s[2], s[3]}, conv.out_channels, conv.in_channels, {},
            conv.turned, conv.weight_format, conv.format, packed};
  if (conv.turned) std::swap(pack.strides[0], pack.strides[1]);
  for (int axis = 0; axis < 2; ++axis) pack.kernel[axis] = conv.window.kernel[axis];
  return pack;
}

}  // namespace

void train_conv(const TrainConv& conv, Isa isa) {
  if (suits_winograd(conv)) {
    const Memory packed(4 * winograd_weight_floats(conv.in_channels, conv.out_channels));
    auto* const words = static_cast<float*>(packed.data());
    pack_for_winograd(packing(conv, words));
    WinogradConv op{};
    op.x = static_cast<const float*>(conv.x);
    op.packed = words;
    op.residual = conv.residual;
    op.out = static_cast<float*>(conv.out);
    op.batch = conv.batch;
    op.height = conv.height;
    op.width = conv.width;
    op.in_channels = conv.in_channels;
    op.out_channels = conv.out_channels;
    op.bn = identity();
    op.relu = false;
    return winograd_conv(op, isa);
  }
  const auto& kernel = conv.window.kernel;
  const Memory packed(4 * conv_weight_words(conv.in_channels, conv.out_channels,
                                            kernel[0] * kernel[1], conv.format));
  pack_for_conv(packing(conv, packed.data()));
  Conv op{};
  op.x = conv.x;
  op.packed = packed.data();
  op.residual = conv.residual;
  op.out = conv.out;
  op.batch = conv.batch;
  op.height = conv.height;
  op.width = conv.width;
  op.in_channels = conv.in_channels;
  op.out_channels = conv.out_channels;
  op.window = conv.window;
  op.bn = identity();
  op.relu = false;
  op.format = conv.format;
  conv_bn(op, isa);
}

}  // namespace resnet_fused::cpu
