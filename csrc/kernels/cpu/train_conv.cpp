#include "train_conv.h"

#include <algorithm>
#include <utility>

#include "dgrad.h"
#include "train_memory.h"
#include "train_pack.h"
#include "winograd.h"

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kLeastTiles = 128;
constexpr std::int64_t kSmall = 3;  // height or width

// Whether Winograd's products make up for its larger weights, written and read once a step, and for
// the tiles that reach beyond the image.
bool suits_winograd(const Conv& conv) {
  for (int axis = 0; axis < 2; ++axis) {
    const Window& window = conv.window;
    if (window.kernel[axis] != 3 || window.stride[axis] != 1 || window.padding[axis] != 1 ||
        window.dilation[axis] != 1) {
      return false;
    }
  }
  const std::int64_t tiles = conv.batch * ceil_div(conv.height, 2) * ceil_div(conv.width, 2);
  // The direct kernel computes the taps beyond an image's edge too, which are many of a small one.
  const bool small = std::min(conv.height, conv.width) <= kSmall && tiles >= 2 * kLeastTiles;
  return conv.format == Format::kFloat32 && conv.in_channels % 16 == 0 &&
         conv.out_channels % 16 == 0 && tiles >= kLeastTiles &&
         20 * tiles <= (small ? 9 : 6) * conv.batch * conv.height * conv.width;
}

// `conv` with the weight, turned or not, packed for the kernel that runs it.
void run(Conv conv, const TrainConv& of, bool turned, Isa isa) {
  const auto& s = of.strides;
  Pack pack{of.weight,
            {s[0], s[1], s[2], s[3]},
            conv.out_channels,
            conv.in_channels,
            {conv.window.kernel[0], conv.window.kernel[1]},
            turned,
            of.weight_format,
            of.format,
            conv_strip(isa),
            nullptr};
  if (turned) std::swap(pack.strides[0], pack.strides[1]);
  if (suits_winograd(conv)) {
    const Memory packed(4 * winograd_weight_floats(conv.in_channels, conv.out_channels));
    pack.packed = packed.data();
    pack_for_winograd(pack);
    WinogradConv op{};
    op.x = static_cast<const float*>(conv.x);
    op.packed = static_cast<const float*>(packed.data());
    op.residual = conv.residual;
    op.out = static_cast<float*>(conv.out);
    op.batch = conv.batch;
    op.height = conv.height;
    op.width = conv.width;
    op.in_channels = conv.in_channels;
    op.out_channels = conv.out_channels;
    op.bn = conv.bn;
    op.relu = conv.relu;
    return winograd_conv(op, isa);
  }
  const Memory packed(4 * conv_weight_words(conv.in_channels, conv.out_channels,
                                            pack.kernel[0] * pack.kernel[1], conv.format, isa));
  pack.packed = packed.data();
  pack_for_conv(pack);
  conv.packed = packed.data();
  conv_bn(conv, isa);
}

}  // namespace

bool dgrad_turns(const Window& window) {
  for (int axis = 0; axis < 2; ++axis) {
    if (window.stride[axis] != 1 ||
        window.padding[axis] > window.dilation[axis] * (window.kernel[axis] - 1)) {
      return false;
    }
  }
  return true;
}

void train_conv(const TrainConv& of, Isa isa) {
  Conv conv{};
  conv.x = of.from;
  conv.out = of.to;
  conv.batch = of.batch;
  conv.height = of.height;
  conv.width = of.width;
  conv.in_channels = of.in_channels;
  conv.out_channels = of.out_channels;
  conv.window = of.window;
  conv.format = of.format;
  run(conv, of, false, isa);
}

void train_dgrad(const TrainConv& of, Isa isa) {
  if (dgrad_turns(of.window)) {
    Conv conv{};
    conv.x = of.from;
    conv.residual = of.add;
    conv.out = of.to;
    conv.batch = of.batch;
    conv.height = conv_output_size(of.window, 0, of.height);
    conv.width = conv_output_size(of.window, 1, of.width);
    conv.in_channels = of.out_channels;
    conv.out_channels = of.in_channels;
    conv.window = of.window;
    for (int axis = 0; axis < 2; ++axis) {
      conv.window.padding[axis] =
          of.window.dilation[axis] * (of.window.kernel[axis] - 1) - of.window.padding[axis];
    }
    conv.format = of.format;
    return run(conv, of, true, isa);
  }
  const auto& kernel = of.window.kernel;
  const Memory packed(4 * conv_weight_words(of.out_channels, of.in_channels, kernel[0] * kernel[1],
                                            of.format, isa));
  const auto& s = of.strides;
  pack_for_conv({of.weight,
                 {s[1], s[0], s[2], s[3]},
                 of.in_channels,
                 of.out_channels,
                 {kernel[0], kernel[1]},
                 true,
                 of.weight_format,
                 of.format,
                 conv_strip(isa),
                 packed.data()});
  ConvDgrad conv{};
  conv.grad = of.from;
  conv.packed = packed.data();
  conv.out = of.to;
  conv.batch = of.batch;
  conv.height = of.height;
  conv.width = of.width;
  conv.in_channels = of.in_channels;
  conv.out_channels = of.out_channels;
  conv.window = of.window;
  conv.format = of.format;
  conv.add = of.add.data;
  conv_dgrad(conv, isa);
}

}  // namespace resnet_fused::cpu
