#include "kernels/cuda/conv.h"

#include "kernels/cuda/conv_sm80.h"
#include "kernels/cuda/conv_sm90.h"
#include "kernels/cuda/conv_training_sm90.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/quantized_conv_sm90.h"
#include "kernels/cuda/wgrad_sm90.h"

namespace resnet_fused {
namespace {

bool for_sm90(ConvTile tile) { return tile >= ConvTile::k128x64Sm90; }

}  // namespace

#ifndef RESNET_FUSED_SM90
bool conv_bn_sm90_can_implement(const ConvBn&, ConvTile) { return false; }
ConvTile conv_bn_sm90_choose(const ConvBn&, int) { return ConvTile::kAuto; }
cudaError_t conv_bn_sm90(const ConvBn&, ConvTile, int, cudaStream_t) {
  return cudaErrorInvalidValue;
}
bool quantized_conv_sm90_can_implement(const QuantizedConv&) { return false; }
std::vector<QuantizedTile> quantized_conv_sm90_tiles(const QuantizedConv&, int) { return {}; }
cudaError_t quantized_conv_sm90(const QuantizedConv&, QuantizedTile, int, cudaStream_t) {
  return cudaErrorInvalidValue;
}
cudaError_t training_tiles(const ConvStats&, int, std::vector<TrainingTile>*) {
  return cudaSuccess;
}
cudaError_t training_tiles(const Dgrad&, int, std::vector<TrainingTile>*) { return cudaSuccess; }
int training_parts(const ConvStats&, TrainingTile) { return 0; }
int training_parts(const Dgrad&, TrainingTile) { return 0; }
cudaError_t conv_stats(const ConvStats&, TrainingTile, int, cudaStream_t) {
  return cudaErrorInvalidValue;
}
cudaError_t dgrad(const Dgrad&, TrainingTile, int, cudaStream_t) { return cudaErrorInvalidValue; }
cudaError_t wgrad_tiles(const Wgrad&, int, std::vector<WgradTile>*) { return cudaSuccess; }
cudaError_t wgrad_parts(const Wgrad&, WgradTile, int, int*) { return cudaErrorInvalidValue; }
cudaError_t wgrad(const Wgrad&, WgradTile, int, cudaStream_t) { return cudaErrorInvalidValue; }
#endif

bool conv_bn_can_implement(const ConvBn& arguments, ConvTile tile) {
  return for_sm90(tile) ? conv_bn_sm90_can_implement(arguments, tile)
                        : arguments.signs == nullptr && conv_bn_sm80_can_implement(arguments, tile);
}

cudaError_t conv_bn_tiles(const ConvBn& arguments, int device, std::vector<ConvTile>* tiles) {
  Machine machine;
  const cudaError_t status = query(device, &machine);
  if (status != cudaSuccess) return status;
  ConvTile chosen = ConvTile::kAuto;
  if (machine.sm90 && conv_bn_sm90_can_implement(arguments, chosen)) {
    chosen = conv_bn_sm90_choose(arguments, machine.num_sms);
    tiles->push_back(chosen);
  }
  for (const ConvTile tile :
       {ConvTile::k64x64, ConvTile::k128x64, ConvTile::k128x128, ConvTile::k128x64Sm90,
        ConvTile::k128x128Sm90, ConvTile::k128x128Sm90PingPong, ConvTile::k256x128Sm90Cluster,
        ConvTile::k128x256Sm90Cluster, ConvTile::k64x64Sm90Split2, ConvTile::k64x64Sm90Split4,
        ConvTile::k64x64Sm90Split8, ConvTile::k200x128Sm90Lines, ConvTile::k224x128Sm90Lines}) {
    if (tile != chosen && (machine.sm90 || !for_sm90(tile)) &&
        conv_bn_can_implement(arguments, tile)) {
      tiles->push_back(tile);
    }
  }
  return cudaSuccess;
}

cudaError_t conv_bn(const ConvBn& arguments, ConvTile tile, int device, cudaStream_t stream) {
  const ConvBn& a = arguments;
  if (a.batch == 0 || a.out_height == 0 || a.out_width == 0 || a.out_channels == 0) {
    return cudaSuccess;
  }
  Machine machine;
  const cudaError_t status = set_device(device, &machine);
  if (status != cudaSuccess) return status;
  const auto& [num_sms, sm90] = machine;
  if (for_sm90(tile) || (tile == ConvTile::kAuto && sm90 && conv_bn_sm90_can_implement(a, tile))) {
    return sm90 ? conv_bn_sm90(a, tile, num_sms, stream) : cudaErrorInvalidValue;
  }
  return conv_bn_sm80(a, tile, num_sms, stream);
}

}  // namespace resnet_fused
