// Implicit GEMM: rows are output pixels of the whole batch, columns output channels, and the sum
// runs over the window's numbers, tap by tap and channel by channel.
//
// One task is a run of pixels times a run of strips, each as wide as a tile, done by one thread. It
// reads the pixels' windows where they lie in x if none meets the border, else from its own copy of
// the lines of x with zeros around (L2). For a few strips of packed weights at a time (L2), and for
// each tile of pixels, which stays in L1, the micro-kernel then sums over the whole window and ends
// with batch norm, residual and ReLU: sums never leave the registers in bfloat16, and in fp32 only
// to be added up in runs of kRun words, so that their rounding error grows with kRun + terms /
// kRun, not with the number of terms. Lines of the result, the residual, the next tile and the next
// weights are prefetched one by one meanwhile. The micro-kernel keeps rows x columns of sums in
// registers (AVX-512: 14 x 32, 28 of 32 registers; AVX2: 6 x 16, 12 of 16; NEON: 14 x 8, 28 of 32):
// two vectors of weights are loaded for 14 words broadcast from rows, one vector where no more
// columns are left. A tile's rows are two runs of up to 7 neighbouring pixels, so that maps 7, 14,
// 28 and 56 wide fill it (AVX2: of 3, and those of equal length join across lines: 7 is 3 + 2 + 2),
// and taps outside the image, above, below and at the ends of lines, are skipped. In bfloat16 a
// step is one VDPBF16PS or BFDOT, or on AVX2 two multiply-adds of fp32: exact products, fp32 sums.
// The order of a sum depends on neither tiles nor threads. With AMX the micro-kernel is conv_amx.h:
// two runs of up to 16 pixels, 32 columns.
//
// A projection is a second pass over the same tile, made first: its normalised sums wait in L1, in
// fp32, for the block end's epilogue.
//
// Memory traffic: x and the residual are read and out is written once (a task's copy reads the
// window's reach again from cache), the weights once per task.
#include "conv.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "amx.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#elif defined(RESNET_FUSED_NEON)
#include <arm_neon.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::int64_t kMaxTaskHalves = 72;
// Of a task at most: 224 pixels in tiles of 14, 216 in tiles of 6.
constexpr std::int64_t most_halves(Isa isa) { return isa == Isa::kAvx2 ? kMaxTaskHalves : 32; }
constexpr std::int64_t kTaskBytes = 512 << 10;      // of x
constexpr std::int64_t kTogetherBytes = 256 << 10;  // of weights
constexpr std::int64_t kStreamedColumns = 64;
constexpr std::int64_t kWayBytes = 4096;  // lines this far apart share a set of the L1 cache

constexpr std::int64_t kLongTap = 16;  // words

constexpr int half_rows_of(int lanes) { return lanes == 8 ? 3 : 7; }  // of 16 registers, else of 32

// How a pixel's window lies in memory: rows of `segments` runs of `words` words.
struct Source {
  std::int64_t pixel_pitch;  // bytes from one output pixel's window to its neighbour's
  std::int64_t row_pitch, segment_pitch;
  std::int64_t segments, words;
};

// Some neighbouring pixels of one line of the result.
struct HalfPlace {
  std::int64_t image, y, x, rows;
};

struct Plan {
  std::int64_t out_height, out_width;
  std::int64_t words;  // of one sum
  std::int64_t strips, strips_together;
  std::int64_t halves_per_line, longer_halves, halves;  // some have a pixel more than the others
  std::int64_t images_together;  // two where a line is an odd number of halves: equal rows meet
  std::int64_t half_tasks, strip_tasks;
  bool in_place;
  std::int64_t
      steps[2];  // from one output's window to the next, in lines and pixels of the operand
  std::int64_t pixel_bytes, line_bytes;  // of the operand
  Source source;

  HalfPlace half(const Conv& conv, std::int64_t index) const {
    const std::int64_t line = index / halves_per_line, i = index % halves_per_line;
    const std::int64_t group = line / (images_together * out_height);
    const std::int64_t in_group = line % (images_together * out_height);
    const std::int64_t images = std::min(images_together, conv.batch - group * images_together);
    const std::int64_t rows = out_width / halves_per_line, longer = longer_halves;
    return {group * images_together + in_group % images, in_group / images,
            i * rows + std::min(i, longer), rows + (i < longer)};
  }

  // Moves on to number `i` of the same line.
  void advance(HalfPlace& place, std::int64_t i) const {
    place.x += place.rows;
    if (i == longer_halves) --place.rows;
  }
};

// The rows of the window at output line y that lie in the image.
std::pair<std::int64_t, std::int64_t> rows_inside(const Conv& conv, std::int64_t y) {
  const Window& window = conv.window;
  const std::int64_t top = y * window.stride[0] - window.padding[0];
  const std::int64_t first = std::max<std::int64_t>(ceil_div(-top, window.dilation[0]), 0);
  const std::int64_t last = std::min(
      ceil_div(std::max<std::int64_t>(conv.height - top, 0), window.dilation[0]), window.kernel[0]);
  return {std::min(first, last), last};
}

// The lines of x that a task reads: x itself, or a copy with zeros around.
class Operand {
 public:
  Operand(const Conv& conv, const Plan& plan, std::int64_t begin, std::int64_t end,
          Scratch& scratch)
      : conv_(conv), plan_(plan) {
    if (plan.in_place) return;
    const HalfPlace first = plan.half(conv, begin), last = plan.half(conv, end - 1);
    first_image_ = first.image - first.image % plan.images_together;
    const std::int64_t last_group = last.image / plan.images_together;
    const std::int64_t images =
        std::min((last_group + 1) * plan.images_together, conv.batch) - first_image_;
    // All images get the place of a whole one's lines, the first begins with its first line.
    const std::int64_t reach = (conv.window.kernel[0] - 1) * conv.window.dilation[0];
    first_y_ = images <= plan.images_together ? first.y : 0;
    const std::int64_t last_y = images <= plan.images_together ? last.y : plan.out_height - 1;
    image_bytes_ = ((last_y - first_y_) * plan.steps[0] + reach + 1) * plan.line_bytes;
    copy_ = reinterpret_cast<char*>(scratch.floats(images * image_bytes_ / 4 + 16));
    for (std::int64_t image = first_image_; image < first_image_ + images; ++image) {
      const std::int64_t group = image / plan.images_together;
      const std::int64_t from = group == first.image / plan.images_together ? first.y : 0;
      const std::int64_t to = group == last_group ? last.y : plan.out_height - 1;
      const std::int64_t until = to * plan.steps[0] + reach;
      for (std::int64_t line = from * plan.steps[0]; line <= until; ++line) copy_line(image, line);
    }
  }

  const char* window(const HalfPlace& place) const {
    if (plan_.in_place) {
      return static_cast<const char*>(conv_.x) + place.image * conv_.height * plan_.line_bytes +
             place.y * plan_.steps[0] * plan_.line_bytes +
             place.x * plan_.steps[1] * plan_.pixel_bytes;
    }
    return copy_ + (place.image - first_image_) * image_bytes_ +
           (place.y - first_y_) * plan_.steps[0] * plan_.line_bytes +
           place.x * plan_.steps[1] * plan_.pixel_bytes;
  }

 private:
  // Windows of one row or column are copied as far as they are read, others with all between.
  void copy_line(std::int64_t image, std::int64_t line) {
    const Window& window = conv_.window;
    const std::int64_t size = conv_.format == Format::kFloat32 ? 4 : 2;
    const std::int64_t bytes = conv_.in_channels * size;
    char* to = copy_ + (image - first_image_) * image_bytes_ +
               (line - first_y_ * plan_.steps[0]) * plan_.line_bytes;
    const std::int64_t y =
        line * (window.kernel[0] == 1 ? window.stride[0] : 1) - window.padding[0];
    const std::int64_t pixels = plan_.line_bytes / plan_.pixel_bytes;
    if (y < 0 || y >= conv_.height) {
      std::memset(to, 0, plan_.line_bytes);
      return;
    }
    const char* const from =
        static_cast<const char*>(conv_.x) + (image * conv_.height + y) * conv_.width * bytes;
    const std::int64_t step = window.kernel[1] == 1 ? window.stride[1] : 1;
    std::int64_t x = -window.padding[1];
    if (step == 1 && plan_.pixel_bytes == bytes) {
      const std::int64_t left = std::min(window.padding[1], pixels);
      const std::int64_t inside = std::min(conv_.width, pixels - left);
      std::memset(to, 0, left * bytes);
      std::memcpy(to + left * bytes, from, inside * bytes);
      std::memset(to + (left + inside) * bytes, 0, (pixels - left - inside) * bytes);
      return;
    }
    for (std::int64_t i = 0; i < pixels; ++i, x += step, to += plan_.pixel_bytes) {
      if (x < 0 || x >= conv_.width) {
        std::memset(to, 0, plan_.pixel_bytes);
        continue;
      }
      std::memcpy(to, from + x * bytes, bytes);
      if (bytes % 4 != 0) std::memset(to + bytes, 0, 2);  // the odd half of the last word
    }
  }

  const Conv& conv_;
  const Plan& plan_;
  std::int64_t first_image_ = 0, first_y_ = 0, image_bytes_ = 0;
  char* copy_ = nullptr;
};

}  // namespace
}  // namespace resnet_fused::cpu

namespace resnet_fused::cpu {
namespace {

// The convolution, or its projection, with what all tasks share.
struct Pass {
  Conv conv;
  Plan plan;
  Terms terms;
};

}  // namespace
}  // namespace resnet_fused::cpu

#define ISA_SOURCE "conv_tile.h"
#define ISA_WITH_BF16
#define ISA_WITH_BF16_WORDS
#define ISA_WITH_NEON
#define ISA_WITH_AMX
#include "for_each_isa.h"

namespace resnet_fused::cpu {
namespace {

using Task = void (*)(const Pass* passes, int count, std::int64_t half_task,
                      std::int64_t strip_task);

Task task_for(Format format, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef RESNET_FUSED_AMX
  if (isa == Isa::kAmx) return amx::conv_task;
#endif
  if (isa == Isa::kAvx2) {
    return format == Format::kBFloat16 ? avx2bf16::conv_task : avx2::conv_task;
  }
  return format == Format::kBFloat16 ? avx512bf16::conv_task : avx512::conv_task;
#elif defined(RESNET_FUSED_NEON)
  (void)isa;
  return format == Format::kBFloat16 ? neonbf16::conv_task : neon::conv_task;
#else
  (void)format, (void)isa;
  return nullptr;
#endif
}

constexpr std::int64_t words_of(std::int64_t numbers, Format format) {
  return format == Format::kFloat32 ? numbers : ceil_div(numbers, 2);
}

std::int64_t words_of_window(const Conv& conv) {
  return conv.window.kernel[0] * conv.window.kernel[1] * words_of(conv.in_channels, conv.format);
}

// Whether windows may be read where they lie in x. The 6 pixels of AVX2's tiles find room in one
// set of the L1 cache; in fp32 a copy costs more than it gives.
bool reads_in_place(const Conv& conv, Isa isa) {
  const Window& window = conv.window;
  const std::int64_t pixel_bytes = 4 * words_of(conv.in_channels, conv.format);
  const bool in_one_set = isa == Isa::kAvx2 && conv.format == Format::kFloat32;
  return window.padding[0] + window.padding[1] == 0 &&
         (conv.format == Format::kFloat32 || conv.in_channels % 2 == 0) &&
         (in_one_set || window.stride[1] * pixel_bytes % kWayBytes != 0);
}

// A pointwise convolution as one of a single line: all pixels are neighbours.
Conv flattened(Conv conv, Isa isa) {
  const Window& window = conv.window;
  if (window.kernel[0] * window.kernel[1] * window.stride[0] * window.stride[1] == 1 &&
      reads_in_place(conv, isa) && conv.residual.in_line()) {
    conv.width *= conv.batch * conv.height;
    conv.batch = conv.height = 1;
  }
  return conv;
}

Plan make_plan(const Conv& conv, Isa isa, std::int64_t threads) {
  const Window& window = conv.window;
  Plan plan;
  plan.out_height = conv_output_size(window, 0, conv.height);
  plan.out_width = conv_output_size(window, 1, conv.width);
  const std::int64_t pixel_words = words_of(conv.in_channels, conv.format);
  plan.words = words_of_window(conv);
  const std::int64_t strip = conv_strip(isa);
  plan.strips = ceil_div(conv.out_channels, strip);
  std::int64_t column_words = plan.words;
  // A projection's weights too have to find room in AVX2's smaller L2 caches.
  if (isa == Isa::kAvx2 && conv.projection != nullptr) {
    column_words += words_of_window(*conv.projection);
  }
  plan.strips_together = std::max<std::int64_t>(kTogetherBytes / (column_words * strip * 4), 1);

  const int half_rows =
      isa == Isa::kAmx ? kTileRegisterRows : half_rows_of(isa == Isa::kAvx2 ? 8 : 16);
  plan.halves_per_line = ceil_div(plan.out_width, half_rows);
  plan.longer_halves = plan.out_width % plan.halves_per_line;
  plan.halves = conv.batch * plan.out_height * plan.halves_per_line;
  plan.images_together = plan.halves_per_line % 2 == 1 ? 2 : 1;

  plan.pixel_bytes = 4 * pixel_words;
  plan.in_place = reads_in_place(conv, isa);
  std::int64_t line_pixels = conv.width;
  for (int axis = 0; axis < 2; ++axis) plan.steps[axis] = window.stride[axis];
  if (!plan.in_place) {
    for (int axis = 0; axis < 2; ++axis) {
      if (window.kernel[axis] == 1) plan.steps[axis] = 1;
    }
    line_pixels =
        (plan.out_width - 1) * plan.steps[1] + (window.kernel[1] - 1) * window.dilation[1] + 1;
    if (plan.steps[1] * plan.pixel_bytes % (kWayBytes / 2) == 0) plan.pixel_bytes += 64;
  }
  plan.line_bytes = line_pixels * plan.pixel_bytes;
  // Taps of few words are taken together, of many one by one: then those outside are skipped.
  const bool whole_rows = window.dilation[1] == 1 && plan.pixel_bytes == 4 * pixel_words &&
                          (pixel_words < kLongTap || window.kernel[1] == 1);
  plan.source = {plan.steps[1] * plan.pixel_bytes, window.dilation[0] * plan.line_bytes,
                 window.dilation[1] * plan.pixel_bytes, whole_rows ? 1 : window.kernel[1],
                 whole_rows ? window.kernel[1] * pixel_words : pixel_words};

  // Equal tasks, a multiple of the threads in number. Few pixels: the columns are divided instead,
  // so that each thread reads other weights.
  const std::int64_t half_bytes = half_rows * plan.steps[0] * plan.source.pixel_pitch;
  const std::int64_t most = std::clamp<std::int64_t>(kTaskBytes / half_bytes, 4, most_halves(isa));
  plan.half_tasks = ceil_div(plan.halves, most);
  plan.strip_tasks = 1;
  if (plan.half_tasks <= threads) {
    // A thread reads its weights once, from memory. Those of a round are fetched while the round
    // before is multiplied, the first ones by nobody: so they are few.
    plan.strips_together = std::min(plan.strips_together, kStreamedColumns / strip);
  }
  if (plan.half_tasks >= threads) {
    plan.half_tasks = round_up(plan.half_tasks, threads);
  } else if (plan.half_tasks * plan.strips >= threads) {
    plan.strip_tasks = std::min(plan.strips, threads);
  }
  return plan;
}

}  // namespace

std::int64_t conv_weight_words(std::int64_t in_channels, std::int64_t out_channels,
                               std::int64_t taps, Format format, Isa isa) {
  return taps * words_of(in_channels, format) * round_up(out_channels, conv_strip(isa));
}

void conv_transform_weights(const void* weight, const std::int64_t strides[4], void* packed,
                            std::int64_t in_channels, std::int64_t out_channels,
                            const std::int64_t kernel[2], Format format, Isa isa) {
  const std::size_t size = format == Format::kFloat32 ? 4 : 2;
  const std::int64_t per_word = 4 / size;
  const std::int64_t pixel_words = words_of(in_channels, format);
  const std::int64_t words = kernel[0] * kernel[1] * pixel_words;
  const std::int64_t width = conv_strip(isa), strips = ceil_div(out_channels, width);
  parallel_for(strips, [&](std::int64_t strip) {
    auto* const to = static_cast<unsigned char*>(packed) + 4 * strip * words * width;
    std::memset(to, 0, 4 * words * width);
    for (std::int64_t j = 0; j < std::min(width, out_channels - strip * width); ++j) {
      const auto* const from = static_cast<const unsigned char*>(weight) +
                               (strip * width + j) * strides[0] * std::int64_t(size);
      for (std::int64_t y = 0, tap = 0; y < kernel[0]; ++y) {
        for (std::int64_t x = 0; x < kernel[1]; ++x, ++tap) {
          for (std::int64_t c = 0; c < in_channels; ++c) {
            const std::int64_t word = tap * pixel_words + c / per_word;
            const std::int64_t at = (word * width + j) * per_word + c % per_word;
            const std::int64_t source = c * strides[1] + y * strides[2] + x * strides[3];
            std::memcpy(to + at * size, from + source * std::int64_t(size), size);
          }
        }
      }
    }
  });
}

void conv_bn(const Conv& given, Isa isa) {
  std::vector<Pass> passes;
  for (const Conv* conv = &given; conv != nullptr; conv = conv->projection) {
    // Both divide the result alike, so neither may be flattened alone.
    const Conv flat = given.projection == nullptr ? flattened(*conv, isa) : *conv;
    passes.push_back({flat, make_plan(flat, isa, max_threads()),
                      Terms(conv->bn, conv->out_channels, conv_strip(isa))});
  }
  const Plan& plan = passes.front().plan;
  if (plan.halves * given.out_channels == 0) return;
  const Task task = task_for(given.format, isa);
  const std::int64_t tasks = plan.half_tasks * plan.strip_tasks;
  // Tasks that share weights follow each other.
  parallel_for(tasks, [&](std::int64_t i) {
    task(passes.data(), static_cast<int>(passes.size()), i % plan.half_tasks, i / plan.half_tasks);
  });
}

}  // namespace resnet_fused::cpu
