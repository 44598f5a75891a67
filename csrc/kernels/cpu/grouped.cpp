// Direct convolution of groups, a vector of output channels at a time.
//
// The channels of as many groups as fit one vector of 32-bit words (fp32 numbers or pairs of
// bfloat16 ones) are a unit; a wider group is one by itself, of several vectors. A lane is an
// output channel, and multiplies channel after channel of its own group: where all lanes are of one
// group, a word broadcast from memory, else the lanes' words shuffled out of the unit's vector, so
// that a shuffle serves 16 products and no number of another group is ever multiplied. A
// multiplicand meets up to three taps of a line: about one load or shuffle for three multiply-adds,
// on 14 sums (AVX-512; AVX2: 10) of neighbouring pixels, two lines, or two vectors of one group.
//
// One task is some lines of an image times some units, done by one thread. It copies what it reads
// of x into its own memory (L2), with zeros around, each vector of channels apart and columns and
// lines sorted by their place within a stride: so a tap's operands are neighbours 64 bytes apart
// (AVX2: 32) whatever the stride, and groups of odd size are filled up to whole words. Where the
// processor does not multiply bfloat16, the copy is in fp32. For one vector of output channels
// after the other, whose weights stay in L1, tiles then sum over the whole window and end with
// batch norm, residual and ReLU. fp32 sums of 24 products join the others in memory, so that their
// rounding error does not grow with the number of terms; the order of a sum depends on neither
// tiles nor threads.
//
// Memory traffic: x is read once, but for the lines where tasks meet; the residual is read and out
// is written once; the weights are read once per task.
#include "grouped.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kTaskBytes = 256 << 10;  // of the operand
constexpr std::int64_t kPixelRun = 512;         // bytes of a pixel that a task reads at least
constexpr int kMostTaps = 3;                    // of a run

// Multiplied as pairs of bfloat16.
bool multiplies_pairs(Format format, Isa isa) {
  return format == Format::kBFloat16 && has_avx512_bf16(isa);
}

// How channels are divided among vectors.
struct Channels {
  std::int64_t lanes, group_channels, group_out, groups;
  std::int64_t group_words;  // of a pixel of the operand
  std::int64_t unit_groups, units;
  std::int64_t unit_planes, unit_vecs;  // vectors of words, and of output channels

  Channels(std::int64_t group_channels, std::int64_t out_channels, std::int64_t groups,
           Format format, Isa isa)
      : lanes(isa == Isa::kAvx512 ? 16 : 8),
        group_channels(group_channels),
        group_out(out_channels / groups),
        groups(groups),
        group_words(multiplies_pairs(format, isa) ? ceil_div(group_channels, 2) : group_channels),
        unit_groups(std::clamp<std::int64_t>(lanes / group_words, 1, groups)),
        units(ceil_div(groups, unit_groups)),
        unit_planes(ceil_div(unit_groups * group_words, lanes)),
        unit_vecs(ceil_div(unit_groups * group_out, lanes)) {}

  std::int64_t groups_of(std::int64_t unit) const {
    return std::min(unit_groups, groups - unit * unit_groups);
  }

  // Whether a unit's vector of output channels is of one group.
  bool one_group(std::int64_t unit, std::int64_t vec) const {
    const std::int64_t last = std::min((vec + 1) * lanes, groups_of(unit) * group_out) - 1;
    return vec * lanes / group_out == last / group_out;
  }

  // Two where the next vector is of the same group too.
  std::int64_t vecs_together(std::int64_t unit, std::int64_t vec) const {
    const std::int64_t next = (vec + 1) * lanes;
    return next < groups_of(unit) * group_out && one_group(unit, vec) && one_group(unit, vec + 1) &&
                   vec * lanes / group_out == next / group_out
               ? 2
               : 1;
  }
};

// How the operand is laid out along an axis: a plane for each place within a stride that a tap has,
// in which the window moves by one from output to output.
struct Axis {
  std::int64_t stride, padding, dilation;
  std::int64_t period;  // from a tap to the next of the same plane
  std::int64_t planes;
  std::int64_t reach;  // places of a plane beside one for each output

  Axis(const Window& window, int axis)
      : stride(window.stride[axis]),
        padding(window.padding[axis]),
        dilation(window.dilation[axis]),
        period(stride / std::gcd(stride, dilation)),
        planes(std::min(period, window.kernel[axis])),
        reach(place(window.kernel[axis] - 1)) {}

  // A tap's place for the first output.
  std::int64_t place(std::int64_t tap) const { return tap * dilation / stride; }

  // Where in the image a place of a plane is.
  std::int64_t coordinate(std::int64_t plane, std::int64_t place) const {
    return place * stride + plane * dilation % stride - padding;
  }

  // The first of a plane's places in an image of that size, and the one after the last.
  std::pair<std::int64_t, std::int64_t> inside(std::int64_t plane, std::int64_t size,
                                               std::int64_t places) const {
    const std::int64_t start = coordinate(plane, 0);
    const std::int64_t last = std::clamp<std::int64_t>(
        ceil_div(std::max<std::int64_t>(size - start, 0), stride), 0, places);
    return {std::min(ceil_div(std::max<std::int64_t>(-start, 0), stride), last), last};
  }
};

// Taps of a line of the window that lie next to each other in the operand.
struct Run {
  std::int64_t offset;     // bytes
  std::int64_t first_tap;  // the others follow at the axis' period
  int taps;
};

// What one task computes.
struct Part {
  std::int64_t image, first_row, last_row, first_unit, last_unit;
};

struct Plan {
  const Conv& conv;
  Channels channels;
  std::array<Axis, 2> axes;
  Terms terms;
  std::int64_t out_height, out_width;
  std::int64_t vec_words;  // packed weights of a vector of output channels
  std::int64_t rows_together, row_tasks, units_together, unit_tasks;
  // Of the operand: places of a plane, bytes of a line of all planes, and of a vector's lines.
  std::int64_t columns, lines, line_bytes, vec_bytes;
  std::vector<std::int64_t> row_offsets;  // bytes to where a row of the window begins
  std::vector<Run> runs;

  Plan(const GroupedConv& op, Isa isa);

  std::int64_t tasks() const { return conv.batch * row_tasks * unit_tasks; }

  // Tasks that share weights follow each other.
  Part part(std::int64_t index) const {
    const std::int64_t lines = index % (conv.batch * row_tasks);
    const std::int64_t row = lines % row_tasks * rows_together;
    const std::int64_t unit = index / (conv.batch * row_tasks) * units_together;
    return {lines / row_tasks, row, std::min(row + rows_together, out_height), unit,
            std::min(unit + units_together, channels.units)};
  }

  // The rows of the window that meet the image at one of these output lines.
  std::pair<std::int64_t, std::int64_t> rows_inside(std::int64_t first_y,
                                                    std::int64_t last_y) const {
    const Window& window = conv.window;
    const std::int64_t top = first_y * window.stride[0] - window.padding[0];
    const std::int64_t bottom = last_y * window.stride[0] - window.padding[0];
    const std::int64_t last =
        std::min(ceil_div(std::max<std::int64_t>(conv.height - top, 0), window.dilation[0]),
                 window.kernel[0]);
    const std::int64_t first = ceil_div(std::max<std::int64_t>(-bottom, 0), window.dilation[0]);
    return {std::min(first, last), last};
  }
};

Plan::Plan(const GroupedConv& op, Isa isa)
    : conv(op.conv),
      channels(conv.in_channels / op.groups, conv.out_channels, op.groups, conv.format, isa),
      axes{Axis(conv.window, 0), Axis(conv.window, 1)},
      terms(conv.bn, conv.out_channels, 1),
      out_height(conv_output_size(conv.window, 0, conv.height)),
      out_width(conv_output_size(conv.window, 1, conv.width)) {
  const std::int64_t (&kernel)[2] = conv.window.kernel;
  vec_words = kernel[0] * kernel[1] * channels.group_words * channels.lanes;
  const std::int64_t pixel_bytes = channels.lanes * 4;
  columns = out_width + axes[1].reach;
  line_bytes = axes[1].planes * columns * pixel_bytes;

  const std::int64_t number_bytes = conv.format == Format::kFloat32 ? 4 : 2;
  const std::int64_t unit_line = line_bytes * channels.unit_planes * axes[0].planes;
  const std::int64_t threads = max_threads();
  units_together =
      std::min(ceil_div(kPixelRun, channels.unit_groups * channels.group_channels * number_bytes),
               channels.units);
  rows_together = std::clamp<std::int64_t>(
      kTaskBytes / (unit_line * units_together) - axes[0].reach, 2, out_height);
  const auto count = [&] {
    row_tasks = ceil_div(out_height, rows_together);
    rows_together = ceil_div(out_height, row_tasks);
    rows_together = std::min(rows_together + rows_together % 2, out_height);
    row_tasks = ceil_div(out_height, rows_together);
    unit_tasks = ceil_div(channels.units, units_together);
    return tasks();
  };
  while (count() < 2 * threads) {
    if (rows_together > 8) {
      rows_together /= 2;
    } else if (units_together > 1) {
      units_together = ceil_div(units_together, 2);
    } else if (rows_together > 2) {
      rows_together /= 2;
    } else {
      break;
    }
  }

  lines = rows_together + axes[0].reach;
  vec_bytes = axes[0].planes * lines * line_bytes;
  for (std::int64_t row = 0; row < kernel[0]; ++row) {
    row_offsets.push_back((row % axes[0].period * lines + axes[0].place(row)) * line_bytes);
  }
  const Axis& axis = axes[1];
  const bool adjacent = axis.dilation <= axis.stride && axis.stride % axis.dilation == 0;
  for (std::int64_t plane = 0; plane < axis.planes; ++plane) {
    for (std::int64_t tap = plane; tap < kernel[1];) {
      const std::int64_t left = ceil_div(kernel[1] - tap, axis.period);
      const std::int64_t taps = adjacent ? std::min<std::int64_t>(left, kMostTaps) : 1;
      runs.push_back(
          {(plane * columns + axis.place(tap)) * pixel_bytes, tap, static_cast<int>(taps)});
      tap += taps * axis.period;
    }
  }
}

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "grouped_tile.h"
#define ISA_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const Plan& plan, std::int64_t index);

Task task_for(Format format, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (multiplies_pairs(format, isa)) return avx512bf16::grouped::task<BFloat16>;
  if (isa == Isa::kAvx512) {
    return format == Format::kFloat32 ? avx512::grouped::task<float>
                                      : avx512::grouped::task<BFloat16>;
  }
  return format == Format::kFloat32 ? avx2::grouped::task<float> : avx2::grouped::task<BFloat16>;
#else
  (void)format, (void)isa;
  return nullptr;
#endif
}

}  // namespace

std::int64_t grouped_weight_words(std::int64_t group_channels, std::int64_t out_channels,
                                  std::int64_t taps, std::int64_t groups, Format format, Isa isa) {
  const Channels channels(group_channels, out_channels, groups, format, isa);
  return channels.units * channels.unit_vecs * taps * channels.group_words * channels.lanes;
}

void grouped_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                               std::int64_t group_channels, std::int64_t out_channels,
                               const std::int64_t kernel[2], std::int64_t groups, Format format,
                               Isa isa) {
  const Channels channels(group_channels, out_channels, groups, format, isa);
  const std::int64_t taps = kernel[0] * kernel[1];
  const std::int64_t vec_words = taps * channels.group_words * channels.lanes;
  const bool pairs = multiplies_pairs(format, isa);
  const auto number = [&](std::int64_t at) -> std::uint32_t {  // fp32, or in the lower half
    if (format == Format::kBFloat16) {
      const std::uint32_t bits = static_cast<const BFloat16*>(weight)[at];
      return pairs ? bits : bits << 16;
    }
    std::uint32_t bits;
    std::memcpy(&bits, static_cast<const float*>(weight) + at, sizeof bits);
    return bits;
  };
  parallel_for(channels.units, [&](std::int64_t unit) {
    auto* const to = static_cast<std::uint32_t*>(packed) + unit * channels.unit_vecs * vec_words;
    std::fill_n(to, channels.unit_vecs * vec_words, 0);
    const std::int64_t unit_out = channels.groups_of(unit) * channels.group_out;
    for (std::int64_t k = 0; k < unit_out; ++k) {
      const std::int64_t from = (unit * channels.unit_groups * channels.group_out + k) * strides[0];
      std::uint32_t* const lane = to + k / channels.lanes * vec_words + k % channels.lanes;
      for (std::int64_t y = 0, tap = 0; y < kernel[0]; ++y) {
        for (std::int64_t x = 0; x < kernel[1]; ++x, ++tap) {
          for (std::int64_t c = 0; c < group_channels; ++c) {
            const std::int64_t word = tap * channels.group_words + (pairs ? c / 2 : c);
            lane[word * channels.lanes] |=
                number(from + c * strides[1] + y * strides[2] + x * strides[3])
                << (pairs && c % 2 == 1 ? 16 : 0);
          }
        }
      }
    }
  });
}

void grouped_conv_bn(const GroupedConv& op, Isa isa) {
  const Plan plan(op, isa);
  if (plan.conv.batch * plan.out_height * plan.out_width * plan.conv.out_channels == 0) return;
  const Task task = task_for(op.conv.format, isa);
  parallel_for(plan.tasks(), [&](std::int64_t i) { task(plan, i); });
}

}  // namespace resnet_fused::cpu
