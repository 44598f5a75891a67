// The half of cutlass_oracle.h that asks CuTe. Shared memory is a region of 256 KiB of the host's.
#include <cstddef>
#include <cstdint>

namespace {
constexpr std::size_t kSharedBytes = std::size_t{1} << 18;
alignas(1 << 18) unsigned char shared[kSharedBytes];
}  // namespace

#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline std::size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const unsigned char*>(pointer) - shared;
}

#include <cuda.h>
#include <cuda_runtime.h>
//
#include <cutlass/half.h>

#include <cute/atom/copy_traits_sm90_im2col.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/conv/collective/detail.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>

#include "host_sim/tests/cutlass_oracle.h"

namespace {
oracle::PixelMap recorded;  // the last map that CuTe has encoded
}

extern "C" cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12000;
  return cudaSuccess;
}

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                           const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                           const cuuint32_t*, CUtensorMapInterleave,
                                           CUtensorMapSwizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank,
                                            void*, const cuuint64_t* size, const cuuint64_t* stride,
                                            const int* lower, const int* upper, cuuint32_t channels,
                                            cuuint32_t pixels, const cuuint32_t* step,
                                            CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 4) return CUDA_ERROR_INVALID_VALUE;
  for (int d = 0; d < 4; ++d) recorded.size[d] = size[d];
  for (int d = 0; d < 3; ++d) recorded.stride[d] = stride[d];
  for (int k = 0; k < 2; ++k) {
    recorded.lower[k] = lower[k];
    recorded.upper[k] = upper[k];
    recorded.step[k] = step[k + 1];
  }
  recorded.box[0] = channels;
  recorded.box[1] = pixels;
  recorded.swizzle = static_cast<int>(swizzle);
  return CUDA_SUCCESS;
}

namespace oracle {
namespace {

using namespace cute;
namespace gmma = cute::SM90::GMMA;
namespace conv = cutlass::conv;
using Element = cutlass::half_t;

template <int kBits>
auto operand(std::uint32_t base) {
  using Atom =
      conditional_t<kBits == 3, gmma::Layout_K_SW128_Atom<Element>,
                    conditional_t<kBits == 2, gmma::Layout_K_SW64_Atom<Element>,
                                  conditional_t<kBits == 1, gmma::Layout_K_SW32_Atom<Element>,
                                                gmma::Layout_K_INTER_Atom<Element>>>>;
  constexpr int kColumns = kBits == 0 ? 16 : 8 << kBits;
  return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared + base)),
                     tile_to_shape(Atom{}, Shape<Int<kOperandRows>, Int<kColumns>>{}));
}

template <int kBits>
std::uint32_t address_of(std::uint32_t base, int row, int column) {
  auto tensor = operand<kBits>(base);
  return static_cast<std::uint32_t>(reinterpret_cast<unsigned char*>(&tensor(row, column)) -
                                    shared);
}

// Of 64 rows all columns, then the next rows.
auto transposed_operand(std::uint32_t base) {
  return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared + base)),
                     tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{},
                                   Shape<Int<kOperandRows>, Int<kTileK>>{}, Step<_2, _1>{}));
}

template <int kBits>
std::uint64_t descriptor_of(std::uint32_t base, int row_tile, int slice) {
  return gmma::make_gmma_desc<gmma::Major::K>(
             local_tile(operand<kBits>(base), Shape<_64, _16>{}, make_coord(row_tile, slice)))
      .desc_;
}

}  // namespace

std::uint32_t their_swizzle(int bits, std::uint32_t address) {
  switch (bits) {
    case 0:
      return Swizzle<0, 4, 3>{}(address);
    case 1:
      return Swizzle<1, 4, 3>{}(address);
    case 2:
      return Swizzle<2, 4, 3>{}(address);
    default:
      return Swizzle<3, 4, 3>{}(address);
  }
}

std::uint32_t their_address(int bits, std::uint32_t base, int row, int column) {
  constexpr decltype(&address_of<0>) kOf[] = {&address_of<0>, &address_of<1>, &address_of<2>,
                                              &address_of<3>};
  return kOf[bits](base, row, column);
}

std::uint64_t their_descriptor(int bits, std::uint32_t base, int row_tile, int slice) {
  constexpr decltype(&descriptor_of<0>) kOf[] = {&descriptor_of<0>, &descriptor_of<1>,
                                                 &descriptor_of<2>, &descriptor_of<3>};
  return kOf[bits](base, row_tile, slice);
}

std::uint32_t their_transposed_address(std::uint32_t base, int row, int column) {
  auto tensor = transposed_operand(base);
  return static_cast<std::uint32_t>(reinterpret_cast<unsigned char*>(&tensor(row, column)) -
                                    shared);
}

std::uint64_t their_transposed_descriptor(std::uint32_t base, int slice) {
  return gmma::make_gmma_desc<gmma::Major::MN>(local_tile(transposed_operand(base),
                                                          Shape<Int<kOperandRows>, _16>{},
                                                          make_coord(0, slice)))
      .desc_;
}

Columns their_columns(const Problem& p) {
  using Shape2d = conv::ConvProblemShape<conv::Operator::kFprop, 2>;
  const Shape2d shape(conv::Mode::kCrossCorrelation, {p.batch, p.height, p.width, p.channels},
                      {p.out_channels, p.kernel_h, p.kernel_w, p.channels},
                      {p.padding_h, p.padding_w}, {p.padding_h, p.padding_w},
                      {p.stride_h, p.stride_w}, {p.dilation_h, p.dilation_w}, 1);
  const std::int64_t line = std::int64_t{p.width} * p.channels, image = p.height * line;
  const auto x = make_tensor(
      make_gmem_ptr(static_cast<const Element*>(nullptr)),
      make_layout(make_shape(make_shape(p.width, p.height, p.batch), p.channels),
                  make_stride(make_stride(std::int64_t{p.channels}, line, image), _1{})));
  const auto tile =
      tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{}, Shape<Int<kTileM>, Int<kTileK>>{});
  // As CollectiveConv of cutlass/conv/collective/sm90_implicit_gemm_gmma_ss_warpspecialized.hpp.
  const auto copy = make_im2col_tma_copy(
      SM90_TMA_LOAD_IM2COL{}, x, tile, product_each(cute::shape(tile)), Int<1>{},
      cute::shape(conv::collective::detail::compute_lower_corner_whd(shape)),
      cute::shape(conv::collective::detail::compute_upper_corner_whd(shape)),
      reverse(cute::shape(shape.lower_padding)), reverse(cute::shape(shape.upper_padding)),
      reverse(cute::shape(shape.traversal_stride)),
      cute::shape(conv::collective::detail::compute_lower_srt(shape)),
      reverse(cute::shape(shape.dilation)));
  const auto columns = copy.get_tma_tensor(
      make_shape(p.positions(), make_shape(p.channels, p.kernel_w, p.kernel_h)));
  const auto weight =
      make_layout(make_shape(p.out_channels, make_shape(p.channels, p.kernel_w, p.kernel_h)),
                  make_stride(p.kernel_h * p.kernel_w * p.channels,
                              make_stride(_1{}, p.channels, p.kernel_w * p.channels)));

  Columns result;
  result.map = recorded;
  result.copy = [columns](int position, int r, int s, int channel) {
    const auto at = columns(position, make_coord(channel, s, r));
    return PixelCopy{
        static_cast<std::int32_t>(get<0>(at)),     static_cast<std::int32_t>(get<1, 0>(at)),
        static_cast<std::int32_t>(get<1, 1>(at)),  static_cast<std::int32_t>(get<2>(at)),
        static_cast<std::uint16_t>(get<3, 0>(at)), static_cast<std::uint16_t>(get<3, 1>(at))};
  };
  result.pixel = [p, copy = result.copy](int position, int r, int s) -> std::int64_t {
    const PixelCopy at = copy(position, r, s, 0);
    const std::int64_t w = at.w + at.offset_w, h = at.h + at.offset_h;
    if (w < 0 || w >= p.width || h < 0 || h >= p.height || at.n >= p.batch) return -1;
    return ((at.n * std::int64_t{p.height} + h) * p.width + w) * p.channels;
  };
  result.weight = [p, weight](int out_channel, int r, int s, int channel) -> std::int64_t {
    if (out_channel >= p.out_channels || channel >= p.channels) return -1;
    return weight(out_channel, make_coord(channel, s, r));
  };
  return result;
}

}  // namespace oracle
