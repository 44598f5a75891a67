// The half of cutlass_oracle.h that asks our code: the kernel for sm_90a issues its copies through
// its launcher, over stand-ins that record them; the simulator says which bytes they move. Prints a
// line for each comparison: name, configurations, values compared, differences; the first
// differences go to stderr.
#include "host_sim/tests/cutlass_oracle.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cinttypes>
#include <cstdio>
#include <vector>

#include "host_sim/async.h"
#include "host_sim/layout.h"
#include "kernels/cuda/conv_sm90.h"
#include "kernels/cuda/ptx_sm90.cuh"

namespace {

struct Recorded {
  CUtensorMap map;
  std::uint32_t to;
  std::int32_t at[CUtensorMap::kRanks];
  std::uint16_t offsets[2];
};
std::vector<Recorded> copies;
host_sim::Dim3 thread, block, grid;

}  // namespace

// Thread 0 of each block, which copies operands, runs alone: whatever it waits for is there. What
// the other threads would call stays undefined, and stops the program if thread 0 comes to call it.
namespace host_sim {

void launch(Dim3 blocks, Dim3, std::size_t, const std::function<void()>& kernel, Dim3, bool) {
  grid = blocks;
  thread = Dim3(0, 0, 0);
  for (unsigned i = 0; i < blocks.x; ++i) {
    block = Dim3(i, 0, 0);
    kernel();
  }
}
const Dim3& thread_index() { return thread; }
const Dim3& block_index() { return block; }
const Dim3& grid_dim() { return grid; }
int& capability() {
  static int value = 90;
  return value;
}
void barrier(const char*) {}
void wait_for_earlier_kernels() {}
Address own(std::uint32_t offset) { return offset; }
void mbarrier_init(std::uint32_t, std::uint32_t) {}
void fence_mbarrier_init() {}
void mbarrier_arrive(Address, std::uint32_t, Scope) {}
bool mbarrier_wait(std::uint32_t, unsigned, Scope, bool) { return true; }
void registers_at_launch(int) {}
void decrease_registers(int) {}
void load_tensor(std::uint32_t to, const CUtensorMap& map, std::uint32_t,
                 const std::int32_t* coordinates, const std::uint16_t* offsets) {
  Recorded copy{map, to, {}, {}};
  for (int d = 0; d < map.rank; ++d) copy.at[d] = coordinates[d];
  for (int k = 0; k < 2 && offsets != nullptr; ++k) copy.offsets[k] = offsets[k];
  copies.push_back(copy);
}

}  // namespace host_sim

namespace oracle {
namespace {

namespace ptx = resnet_fused::ptx;
using host_sim::Chunk;
using host_sim::kChunk;

constexpr int kElements = kChunk / 2;

class Comparison {
 public:
  explicit Comparison(const char* name) : name_(name) {}

  void configuration() { ++configurations_; }
  void equal(std::int64_t ours, std::int64_t theirs, const char* what, const Problem* p = nullptr) {
    ++values_;
    if (ours == theirs) return;
    if (++differences_ > 5) return;
    std::fprintf(stderr, "%s: %s is %" PRId64 " here and %" PRId64 " there", name_, what, ours,
                 theirs);
    if (p != nullptr) {
      std::fprintf(stderr,
                   " (batch %d, %d x %d x %d to %d, window %d x %d, stride %d %d, padding %d %d, "
                   "dilation %d %d)",
                   p->batch, p->height, p->width, p->channels, p->out_channels, p->kernel_h,
                   p->kernel_w, p->stride_h, p->stride_w, p->padding_h, p->padding_w, p->dilation_h,
                   p->dilation_w);
    }
    std::fputc('\n', stderr);
  }
  // Prints the line; whether there is any difference.
  bool report() const {
    std::printf("%s: %" PRId64 " configurations, %" PRId64 " values, %" PRId64 " differences\n",
                name_, configurations_, values_, differences_);
    return differences_ > 0;
  }

 private:
  const char* name_;
  std::int64_t configurations_ = 0, values_ = 0, differences_ = 0;
};

constexpr std::uint32_t kSharedBytes = 227 * 1024;  // of a block

bool swizzles() {
  Comparison compare("swizzles");
  for (int bits = 0; bits <= 3; ++bits) {
    compare.configuration();
    for (std::uint32_t address = 0; address < kSharedBytes; ++address) {
      compare.equal(host_sim::swizzled(address, bits), their_swizzle(bits, address), "an address");
    }
  }
  return compare.report();
}

std::uint64_t our_descriptor(int bits, std::uint32_t offset) {
  return bits == 3   ? ptx::matrix_descriptor<128>(offset)
         : bits == 2 ? ptx::matrix_descriptor<64>(offset)
                     : ptx::matrix_descriptor<32>(offset);
}

// Tiles from every multiple of the swizzle's pattern on, every 64 rows x 16 elements of each.
bool descriptors() {
  Comparison compare("descriptors");
  for (int bits = 0; bits <= 3; ++bits) {
    const int columns = bits == 0 ? 16 : kElements << bits;
    const std::uint32_t row_bytes = 2 * columns, step = bits == 0 ? 128 : 8 * row_bytes;
    for (std::uint32_t base = 0; base + kOperandRows * row_bytes <= kSharedBytes; base += step) {
      for (int tile = 0; tile < kOperandRows / 64; ++tile) {
        for (int slice = 0; slice < columns / 16; ++slice) {
          compare.configuration();
          const std::uint64_t theirs = their_descriptor(bits, base, tile, slice);
          if (bits > 0) {  // none of our kernels does without a swizzle
            const std::uint64_t ours = our_descriptor(bits, base + tile * 64 * row_bytes);
            compare.equal(ours + 2 * slice, theirs, "a descriptor");
          }
          const host_sim::Matrix matrix = host_sim::decode(theirs);
          for (int row = 0; row < 64; ++row) {
            for (int chunk = 0; chunk < 2; ++chunk) {
              compare.equal(host_sim::chunk_address(matrix, row, chunk),
                            their_address(bits, base, 64 * tile + row, 16 * slice + 8 * chunk),
                            "a chunk's address");
            }
          }
        }
      }
    }
  }
  return compare.report();
}

// Tiles that lie by columns, from every multiple of the swizzle's pattern on, every 16 columns.
bool transposed_descriptors() {
  Comparison compare("transposed descriptors");
  constexpr std::uint32_t kPanel = 64 * 128, kTile = kOperandRows / 64 * kPanel, kStep = 1024;
  for (std::uint32_t base = 0; base + kTile <= kSharedBytes; base += kStep) {
    for (int slice = 0; slice < kTileK / 16; ++slice) {
      compare.configuration();
      const std::uint64_t theirs = their_transposed_descriptor(base, slice);
      const std::uint32_t rows = 16 * slice * 128;
      compare.equal(ptx::transposed_descriptor(base, kPanel) + rows / ptx::kDescriptorUnit, theirs,
                    "a descriptor");
      const host_sim::Matrix matrix = host_sim::decode(theirs);
      for (int depth = 0; depth < 16; ++depth) {
        for (int chunk = 0; chunk < kOperandRows / 8; ++chunk) {
          compare.equal(host_sim::transposed_chunk_address(matrix, depth, chunk),
                        their_transposed_address(base, 8 * chunk, 16 * slice + depth),
                        "a chunk's address");
        }
      }
    }
  }
  return compare.report();
}

// Boxes at every multiple of 128 bytes within two patterns: where bulk copies put their chunks.
bool boxes() {
  Comparison compare("boxes in shared memory");
  for (int bits = 1; bits <= 3; ++bits) {
    const cuuint32_t columns = kElements << bits;
    const cuuint64_t size[] = {columns, kOperandRows}, stride[] = {2 * columns};
    const cuuint32_t box[] = {columns, kOperandRows}, step[] = {1, 1};
    alignas(16) static unsigned char data[kOperandRows * 128];
    CUtensorMap map;
    const CUresult status = cuTensorMapEncodeTiled(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, data, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(bits),
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    compare.equal(status, CUDA_SUCCESS, "the map's status");
    for (std::uint32_t base = 0; base < 2048; base += 128) {
      compare.configuration();
      const std::int32_t first[] = {0, 0};
      for (const Chunk& chunk : host_sim::tile_chunks(map, first, base)) {
        const std::int64_t element = (chunk.global - data) / 2;
        compare.equal(chunk.shared,
                      their_address(bits, base, static_cast<int>(element / columns),
                                    static_cast<int>(element % columns)),
                      "a chunk's address");
      }
    }
  }
  return compare.report();
}

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Places that nothing is read from.
const auto kX = reinterpret_cast<void*>(std::uintptr_t{1} << 40);
const auto kWeight = reinterpret_cast<void*>(std::uintptr_t{2} << 40);
const auto kOut = reinterpret_cast<void*>(std::uintptr_t{3} << 40);

void issue(const Problem& p, resnet_fused::ConvTile tile) {
  resnet_fused::ConvBn a{};
  a.out = kOut;
  a.dtype = resnet_fused::DType::kFloat16;
  a.batch = p.batch;
  a.out_height = p.out_height();
  a.out_width = p.out_width();
  a.out_channels = p.out_channels;
  a.groups = 1;
  a.conv.x = kX;
  a.conv.weight = kWeight;
  a.conv.height = p.height;
  a.conv.width = p.width;
  a.conv.channels = p.channels;
  a.conv.kernel_h = p.kernel_h;
  a.conv.kernel_w = p.kernel_w;
  a.conv.stride_h = p.stride_h;
  a.conv.stride_w = p.stride_w;
  a.conv.padding_h = p.padding_h;
  a.conv.padding_w = p.padding_w;
  a.conv.dilation_h = p.dilation_h;
  a.conv.dilation_w = p.dilation_w;
  copies.clear();
  if (resnet_fused::conv_bn_sm90(a, tile, 4, nullptr) != cudaSuccess) copies.clear();
}

// Every copy of x and of weight, against what the GEMM's element needs at each place.
void compare_columns(const Problem& p, const Columns& theirs, const Recorded& copy, int position,
                     int r, int s, int channel, Comparison& compare) {
  const auto equal = [&](std::int64_t a, std::int64_t b, const char* w) {
    compare.equal(a, b, w, &p);
  };
  if (copy.map.im2col) {
    const PixelCopy at = theirs.copy(position, r, s, channel);
    equal(copy.at[0], at.c, "a copy's channel");
    equal(copy.at[1], at.w, "a copy's width");
    equal(copy.at[2], at.h, "a copy's height");
    equal(copy.at[3], at.n, "a copy's image");
    equal(copy.offsets[0], at.offset_w, "a copy's offset in width");
    equal(copy.offsets[1], at.offset_h, "a copy's offset in height");
    equal(host_sim::within_box(copy.map, copy.at), 1, "whether the first pixel is in the box");
  }
  const std::vector<Chunk> chunks =
      copy.map.im2col ? host_sim::pixel_chunks(copy.map, copy.at, copy.offsets, copy.to)
                      : host_sim::tile_chunks(copy.map, copy.at, copy.to);
  equal(static_cast<std::int64_t>(chunks.size()), kTileM * kTileK / kElements, "chunks of x");
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    const int row = static_cast<int>(i) / 8, c = channel + static_cast<int>(i) % 8 * kElements;
    const std::int64_t pixel =
        position + row < p.positions() ? theirs.pixel(position + row, r, s) : -1;
    const std::int64_t element = pixel < 0 || c >= p.channels ? -1 : pixel + c;
    const std::int64_t ours =
        chunks[i].bytes == 0
            ? -1
            : static_cast<std::int64_t>(address(chunks[i].global) - address(kX)) / 2;
    equal(ours, element, "an element of x");
  }
}

void compare_weight(const Problem& p, const Columns& theirs, const Recorded& copy, int rows,
                    int out_channel, int r, int s, int channel, Comparison& compare) {
  const std::vector<Chunk> chunks = host_sim::tile_chunks(copy.map, copy.at, copy.to);
  compare.equal(static_cast<std::int64_t>(chunks.size()), rows * 8, "chunks of weight", &p);
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    const int row = static_cast<int>(i) / 8, c = channel + static_cast<int>(i) % 8 * kElements;
    const std::int64_t ours =
        chunks[i].bytes == 0
            ? -1
            : static_cast<std::int64_t>(address(chunks[i].global) - address(kWeight)) / 2;
    compare.equal(ours, theirs.weight(out_channel + row, r, s, c), "an element of weight", &p);
  }
}

void compare_maps(const Problem& p, const CUtensorMap& map, const PixelMap& theirs,
                  Comparison& compare) {
  const auto equal = [&](std::int64_t a, std::int64_t b, const char* w) {
    compare.equal(a, b, w, &p);
  };
  for (int d = 0; d < 4; ++d) equal(map.size[d], theirs.size[d], "a map's size");
  for (int d = 0; d < 3; ++d) equal(map.stride[d + 1], theirs.stride[d], "a map's stride");
  for (int k = 0; k < 2; ++k) {
    equal(map.lower[k], theirs.lower[k], "a map's lower corner");
    equal(map.upper[k], theirs.upper[k], "a map's upper corner");
    equal(map.box[k], theirs.box[k], "a map's box");
    equal(map.step[k], theirs.step[k], "a map's step");
  }
  equal(map.swizzle, theirs.swizzle, "a map's swizzle");
}

void compare_convolution(const Problem& p, Comparison& compare) {
  compare.configuration();
  const bool wide = p.out_channels > 64;
  const int tile_n = wide ? 128 : 64;
  issue(p, wide ? resnet_fused::ConvTile::k128x128Sm90 : resnet_fused::ConvTile::k128x64Sm90);
  const Columns theirs = their_columns(p);
  const int blocks = (p.channels + kTileK - 1) / kTileK, across = (p.out_channels - 1) / tile_n + 1;
  const int tiles = ((p.positions() - 1) / kTileM + 1) * across;
  const int steps = p.kernel_h * p.kernel_w * blocks;
  compare.equal(static_cast<std::int64_t>(copies.size()), std::int64_t{2} * tiles * steps,
                "the number of copies", &p);
  if (copies.size() != std::size_t{2} * tiles * steps) return;
  if (copies[0].map.im2col) compare_maps(p, copies[0].map, theirs.map, compare);

  std::size_t next = 0;
  for (unsigned first = 0; first < grid.x; ++first) {
    for (int tile = static_cast<int>(first); tile < tiles; tile += static_cast<int>(grid.x)) {
      const int position = tile / across * kTileM, out_channel = tile % across * tile_n;
      for (int step = 0; step < steps; ++step, next += 2) {
        const int tap = step / blocks, r = tap / p.kernel_w, s = tap % p.kernel_w;
        const int channel = step % blocks * kTileK;
        compare_columns(p, theirs, copies[next], position, r, s, channel, compare);
        compare_weight(p, theirs, copies[next + 1], tile_n, out_channel, r, s, channel, compare);
      }
    }
  }
}

bool convolutions() {
  Comparison compare("convolutions");
  constexpr int kWindows[] = {1, 2, 3, 5, 7};
  constexpr int kSizes[][3] = {{1, 7, 9}, {3, 14, 5}, {2, 8, 8}};  // batch, height, width
  constexpr int kChannels[][2] = {{8, 72}, {72, 64}, {64, 136}};   // in, out
  int number = 0;
  for (const int kernel_h : kWindows) {
    for (const int kernel_w : kWindows) {
      for (int i = 0; i < 3 * 3 * 4 * 4 * 2 * 2; ++i) {
        const int stride = i % 9, padding = i / 9 % 16, dilation = i / 144;
        const int (&size)[3] = kSizes[number % 3];
        const int (&channels)[2] = kChannels[number / 3 % 3];
        ++number;
        const Problem p{size[0],     size[1],          size[2],         channels[0],    channels[1],
                        kernel_h,    kernel_w,         1 + stride / 3,  1 + stride % 3, padding / 4,
                        padding % 4, 1 + dilation / 2, 1 + dilation % 2};
        const bool fits = p.height + 2 * p.padding_h > p.dilation_h * (p.kernel_h - 1) &&
                          p.width + 2 * p.padding_w > p.dilation_w * (p.kernel_w - 1);
        if (fits) compare_convolution(p, compare);
      }
    }
  }
  return compare.report();
}

}  // namespace
}  // namespace oracle

int main() {
  const bool differ[] = {oracle::swizzles(), oracle::descriptors(),
                         oracle::transposed_descriptors(), oracle::boxes(), oracle::convolutions()};
  for (const bool d : differ) {
    if (d) return 1;
  }
  return 0;
}
