// The vector code of wgrad_winograd.cpp, included once per instruction set by for_each_isa.h.
#include "wgrad_multiply.h"
#include "winograd_input.h"

constexpr std::int64_t kStripLanes = kVecs * kLanes;

// A g A^T of one vector of channels of one tile, to the 16 planes.
ISA_INLINE void transform_grad(const float* const (&pixels)[2][2], std::int64_t k,
                               std::int64_t count, float* to, std::int64_t plane) {
  Vec half[4][2];  // A g
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const Vec g0 = load(pixels[0][j] + k, count), g1 = load(pixels[1][j] + k, count);
    half[0][j] = g0;
    half[1][j] = g0 + g1;
    half[2][j] = g0 - g1;
    half[3][j] = -g1;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += 4 * plane) {
    const Vec* h = half[i];
    store(to, h[0]);
    store(to + plane, h[0] + h[1]);
    store(to + 2 * plane, h[0] - h[1]);
    store(to + 3 * plane, -h[1]);
  }
}

// The same of a tile's channels in the strip that begins at `channel`.
ISA_INLINE void transform_grad_tile(const ConvWgrad& conv, const TilePlace& at,
                                    std::int64_t channel, const float* zeros, float* to,
                                    std::int64_t plane) {
  const std::int64_t channels = conv.out_channels, line = conv.width * channels;
  const auto* const first = static_cast<const float*>(conv.grad) +
                            (at.image * conv.height + at.row) * line + at.column * channels;
  const bool right = at.column + 1 < conv.width, below = at.row + 1 < conv.height;
  const float* const pixels[2][2] = {
      {first, right ? first + channels : zeros},
      {below ? first + line : zeros, right && below ? first + line + channels : zeros}};
  const std::int64_t end = std::min(channel + kStripLanes, channels);
  for (std::int64_t k = channel; k < end; k += kLanes, to += kLanes) {
    if (end - k >= kLanes) {
      transform_grad(pixels, k, kLanes, to, plane);
    } else {
      transform_grad(pixels, k, end - k, to, plane);
    }
  }
}

// The first pixel of a tile's first line, counted through the batch.
ISA_INLINE std::int64_t pixel_of(const ConvWgrad& conv, const Plan& plan, std::int64_t tile) {
  const TilePlace at = place_of(plan, tile);
  return (at.image * conv.height + at.row) * conv.width;
}

// The pixels [first, end) of a tensor, some channels of them, in quarters.
ISA_INLINE void look_ahead(const void* tensor, std::int64_t pixel_floats, std::int64_t first,
                           std::int64_t end, std::int64_t channel, std::int64_t channels,
                           Ahead& ahead) {
  const std::int64_t bytes = pixel_floats * sizeof(float);
  for (int i = 0; i < 4; ++i) {
    const std::int64_t pixel = first + (end - first) * i / 4;
    ahead.add(static_cast<const float*>(tensor) + pixel * pixel_floats + channel,
              channels * sizeof(float), bytes);
  }
}

// G^T of four vectors.
ISA_INLINE void transform_back(const Vec (&u)[4], Vec (&w)[3]) {
  const Vec even = (u[1] + u[2]) * 0.5f;
  w[0] = u[0] + even;
  w[1] = (u[1] - u[2]) * 0.5f;
  w[2] = u[3] + even;
}

// Adds up the parts' dU of up to 16 input channels and one strip, and writes dW. `sums` is the
// first part's, at the first channel.
ISA void winograd_wgrad_merge(const ConvWgrad& conv, const float* sums, std::int64_t plane,
                              std::int64_t parts, std::int64_t part_floats, std::int64_t strip,
                              std::int64_t first_channel, std::int64_t channels) {
  const std::int64_t rows = 9 * conv.in_channels;
  for (int j = 0; j < kVecs; ++j) {
    const std::int64_t k = strip * kStripLanes + j * kLanes;
    if (k >= conv.out_channels) return;
    alignas(64) float taps[9 * 16][kLanes];  // in the order of the result
    for (std::int64_t c = 0; c < channels; ++c) {
      Vec half[3][4];  // G^T dU
      for (int column = 0; column < 4; ++column) {
        Vec u[4], w[3];
        for (int row = 0; row < 4; ++row) {
          const float* from = sums + (4 * row + column) * plane + c * kStripLanes + j * kLanes;
          u[row] = sum_of_parts(from, parts, part_floats);
        }
        transform_back(u, w);
        for (int row = 0; row < 3; ++row) half[row][column] = w[row];
      }
      for (int row = 0; row < 3; ++row) {
        Vec w[3];
        transform_back(half[row], w);
        for (int column = 0; column < 3; ++column) {
          const int tap = 3 * row + column;
          store(taps[conv.channels_last ? tap * channels + c : c * 9 + tap], w[column]);
        }
      }
    }
    const std::int64_t outputs = std::min<std::int64_t>(kLanes, conv.out_channels - k);
    const std::int64_t runs = conv.channels_last ? 9 : 1, run = 9 * channels / runs;
    for (std::int64_t i = 0; i < runs; ++i) {
      const std::int64_t first =
          conv.channels_last ? i * conv.in_channels + first_channel : 9 * first_channel;
      for (std::int64_t m = 0; m < run; m += kLanes) {
        Vec v[kLanes] = {};
        const std::int64_t count = std::min<std::int64_t>(kLanes, run - m);
        for (std::int64_t r = 0; r < count; ++r) v[r] = load(taps[i * run + m + r]);
        transpose(v);
        for (std::int64_t o = 0; o < outputs; ++o) {
          store(static_cast<float*>(conv.out) + (k + o) * rows + first + m, v[o], count);
        }
      }
    }
  }
}

ISA void winograd_wgrad_task(const ConvWgrad& conv, const Plan& plan, float* partials,
                             const TaskPlace& place) {
  const std::int64_t first_channel = place.channel_task * conv.in_channels / plan.channel_tasks;
  const std::int64_t last_channel =
      (place.channel_task + 1) * conv.in_channels / plan.channel_tasks;
  const std::int64_t channels = last_channel - first_channel;
  const std::int64_t x_pitch = round_up(channels, kLanes);
  const std::int64_t x_plane = kTiles * x_pitch + kSkew;
  const std::int64_t grad_plane = kTiles * kStripLanes + kSkew;
  const std::int64_t widest = std::max(conv.in_channels, conv.out_channels);
  const std::int64_t first_strip = place.strip_task * plan.strips / plan.strip_tasks;
  const std::int64_t last_strip = (place.strip_task + 1) * plan.strips / plan.strip_tasks;
  const std::int64_t sums_plane = channels * kStripLanes;
  const std::int64_t own = plan.parts == 1 ? (last_strip - first_strip) * 16 * sums_plane : 0;
  float* const x = thread_scratch().floats(16 * (x_plane + grad_plane) + widest + own);
  float* const grad = x + 16 * x_plane;
  float* const zeros = grad + 16 * grad_plane;
  std::fill_n(zeros, widest, 0.0f);
  const Input input{static_cast<const float*>(conv.x), conv.height, conv.width, conv.in_channels,
                    zeros};
  const std::int64_t begin = place.part * plan.blocks / plan.parts;
  const std::int64_t end = (place.part + 1) * plan.blocks / plan.parts;
  // A strip's dU of these channels, plane by plane.
  const auto sums_of = [&](std::int64_t strip) {
    if (plan.parts == 1) return zeros + widest + (strip - first_strip) * 16 * sums_plane;
    return partials + place.part * plan.partial_floats(conv) +
           16 * kStripLanes * (strip * conv.in_channels + first_channel);
  };
  Ahead ahead;
  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t first = block * plan.tiles / plan.blocks;
    const std::int64_t tiles = (block + 1) * plan.tiles / plan.blocks - first;
    ahead.clear();
    if (block + 1 < end) {
      const std::int64_t next = pixel_of(conv, plan, first + tiles);
      const std::int64_t until = pixel_of(conv, plan, (block + 2) * plan.tiles / plan.blocks);
      look_ahead(conv.x, conv.in_channels, next, until, first_channel, channels, ahead);
      const std::int64_t k = first_strip * kStripLanes;
      look_ahead(conv.grad, conv.out_channels, next, until, k,
                 std::min(last_strip * kStripLanes, conv.out_channels) - k, ahead);
    }
    const TilePlace place_of_first = place_of(plan, first);
    TilePlace at = place_of_first;
    for (std::int64_t t = 0; t < tiles; ++t, advance(plan, at)) {
      transform_tile(input, at, first_channel, channels, x + t * x_pitch, x_plane);
    }
    for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
      const std::int64_t channel = strip * kStripLanes;
      at = place_of_first;
      for (std::int64_t t = 0; t < tiles; ++t, advance(plan, at)) {
        transform_grad_tile(conv, at, channel, zeros, grad + t * kStripLanes, grad_plane);
      }
      const Run run{0, 0, tiles};
      const bool narrow = conv.out_channels - channel <= kLanes;
      for (int e = 0; e < 16; ++e) {
        multiply_rows({&run, &run + 1}, reinterpret_cast<const std::uint32_t*>(x + e * x_plane),
                      x_pitch, reinterpret_cast<const std::uint32_t*>(grad + e * grad_plane),
                      sums_of(strip) + e * sums_plane, channels, narrow, block == begin, ahead);
      }
    }
  }
  if (plan.parts > 1) return;
  for (std::int64_t strip = first_strip; strip < last_strip; ++strip) {
    for (std::int64_t c = 0; c < channels; c += kMergedChannels) {
      winograd_wgrad_merge(conv, sums_of(strip) + c * kStripLanes, sums_plane, 1, 0, strip,
                           first_channel + c, std::min(kMergedChannels, channels - c));
    }
  }
}
