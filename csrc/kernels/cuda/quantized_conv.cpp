#include "kernels/cuda/quantized_conv.h"

#include <algorithm>
#include <iterator>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/quantized_conv_sm80.h"
#include "kernels/cuda/quantized_conv_sm90.h"

namespace resnet_fused {
namespace {

bool in_chunks(const ConvolutionBn& conv) {
  return conv.channels % 16 == 0 && aligned(conv.x) && aligned(conv.weight);
}

}  // namespace

bool quantized_conv_can_implement(const QuantizedConv& arguments, QuantizedTile tile) {
  const ConvBn& a = arguments.conv;
  return (a.dtype != DType::kE4m3 || tile < QuantizedTile::k128x256Cluster) && a.groups == 1 &&
         a.out_channels % 16 == 0 && aligned(a.out) &&
         (a.residual.channels == 0 || a.residual.in_chunks(16)) && in_chunks(a.conv) &&
         (a.projection.x == nullptr || in_chunks(a.projection));
}

cudaError_t quantized_conv_tiles(const QuantizedConv& arguments, int device,
                                 std::vector<QuantizedTile>* found) {
  Machine machine;
  const cudaError_t status = query(device, &machine);
  if (status != cudaSuccess) return status;
  std::vector<QuantizedTile> tiles;
  if (machine.sm90 && quantized_conv_sm90_can_implement(arguments)) {
    tiles = quantized_conv_sm90_tiles(arguments, machine.num_sms);
  }
  for (const QuantizedTile tile : quantized_conv_sm80_tiles(arguments, machine.num_sms)) {
    tiles.push_back(tile);
  }
  std::copy_if(tiles.begin(), tiles.end(), std::back_inserter(*found),
               [&](QuantizedTile tile) { return quantized_conv_can_implement(arguments, tile); });
  return cudaSuccess;
}

cudaError_t quantized_conv(const QuantizedConv& arguments, QuantizedTile tile, int device,
                           cudaStream_t stream) {
  const ConvBn& a = arguments.conv;
  if (a.batch * a.out_height * a.out_width * a.out_channels == 0) return cudaSuccess;
  Machine machine;
  const cudaError_t status = set_device(device, &machine);
  if (status != cudaSuccess) return status;
  if (!quantized_conv_can_implement(arguments, tile)) return cudaErrorInvalidValue;
  if (tile >= QuantizedTile::k64x64Sm80) return quantized_conv_sm80(arguments, tile, stream);
  if (!machine.sm90 || !quantized_conv_sm90_can_implement(arguments)) return cudaErrorInvalidValue;
  return quantized_conv_sm90(arguments, tile, machine.num_sms, stream);
}

}  // namespace resnet_fused
