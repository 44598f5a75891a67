#include "kernels/cuda/conv_int8.h"

#include "kernels/cuda/conv_int8_sm80.h"
#include "kernels/cuda/conv_int8_sm90.h"
#include "kernels/cuda/launch.h"

namespace resnet_fused {
namespace {

bool in_chunks(const ConvolutionBn& conv) {
  return conv.channels % 16 == 0 && aligned(conv.x) && aligned(conv.weight);
}

// Whether the kernel for sm_90a is here, and what both kernels ask of the device.
cudaError_t query(int device, bool* sm90, int* num_sms) {
  const cudaError_t status = runs_sm90(device, sm90);
  return status == cudaSuccess ? get_num_sms(device, num_sms) : status;
}

}  // namespace

bool conv_int8_can_implement(const ConvInt8& int8) {
  const ConvBn& a = int8.conv;
  return a.groups == 1 && a.out_channels % 16 == 0 && aligned(a.out) &&
         (a.residual.channels == 0 || a.residual.in_chunks(16)) && in_chunks(a.conv) &&
         (a.projection.x == nullptr || in_chunks(a.projection));
}

cudaError_t conv_int8_tiles(const ConvInt8& arguments, int device, std::vector<Int8Tile>* found) {
  bool sm90 = false;
  int num_sms = 0;
  const cudaError_t status = query(device, &sm90, &num_sms);
  if (status != cudaSuccess || !conv_int8_can_implement(arguments)) return status;
  if (sm90 && conv_int8_sm90_can_implement(arguments)) {
    *found = conv_int8_sm90_tiles(arguments, num_sms);
  }
  for (const Int8Tile tile : conv_int8_sm80_tiles(arguments, num_sms)) found->push_back(tile);
  return cudaSuccess;
}

cudaError_t conv_int8(const ConvInt8& arguments, Int8Tile tile, int device, cudaStream_t stream) {
  const ConvBn& a = arguments.conv;
  if (a.batch * a.out_height * a.out_width * a.out_channels == 0) return cudaSuccess;
  bool sm90 = false;
  int num_sms = 0;
  cudaError_t status = set_device(device);
  if (status == cudaSuccess) status = query(device, &sm90, &num_sms);
  if (status != cudaSuccess) return status;
  if (!conv_int8_can_implement(arguments)) return cudaErrorInvalidValue;
  if (tile >= Int8Tile::k64x64Sm80) return conv_int8_sm80(arguments, tile, stream);
  if (!sm90 || !conv_int8_sm90_can_implement(arguments)) return cudaErrorInvalidValue;
  return conv_int8_sm90(arguments, tile, num_sms, stream);
}

}  // namespace resnet_fused
