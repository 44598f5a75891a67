// What a GPU's units reach: L2 and DRAM bandwidth, mma.sync and wgmma, as JSON in a file.
//
//   nvcc -std=c++17 -O3 -I csrc -gencode arch=compute_90a,code=sm_90a \
//       benchmarks/microbenchmarks/peaks.cu -o peaks && ./peaks peaks.json
//
// Memory: every block reads the whole of a buffer that fits L2 (or, for DRAM, its part of one that
// is many times larger), 16 bytes a thread, four loads in flight; L1 is passed by (ld.global.cg).
// Products: enough warps to fill every SM, each with independent accumulators, operands as the
// kernels have them: in registers for mma.sync, in swizzled shared memory for wgmma. Values are
// random, since products of zeros draw less power and run faster. Each is the best of 10 launches
// by events; `clock_hz` is the SM's clock during the wgmma launches, cycles over time.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "kernels/cuda/ptx_sm90.cuh"

namespace {

namespace ptx = resnet_fused::ptx;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

constexpr int kThreads = 512;
constexpr int kInFlight = 4;

// Reads a buffer of so many vectors: each block all of it, from another place on, or a part.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* from, std::size_t vectors, bool shared, unsigned* sink) {
  constexpr std::size_t kTaken = std::size_t{kThreads} * kInFlight;
  const std::size_t steps = vectors / kTaken;
  const std::size_t mine = shared ? steps : steps / gridDim.x;
  unsigned sum = 0;
  for (std::size_t step = 0; step < mine; ++step) {
    const std::size_t at =
        shared ? (step + blockIdx.x * (steps / gridDim.x + 1)) % steps : blockIdx.x * mine + step;
    const uint4* place = from + at * kTaken + threadIdx.x;
    uint4 values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) values[i] = __ldcg(place + i * kThreads);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      sum += values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
    }
  }
  if (sum == 0x12345678) *sink = sum;  // so that the loads are not left out
}

__global__ void fill_kernel(unsigned* words, std::size_t count) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    unsigned hash = static_cast<unsigned>(i) * 2654435761u;
    hash ^= hash >> 15;
    // Two bfloat16 of random sign and digits between 0.5 and 2.
    words[i] = (hash & 0x80ff80ffu) | 0x3f003f00u;
  }
}

constexpr int kMmaSteps = 4096;
constexpr int kMmaTiles = 8;  // independent products of a warp

__global__ void __launch_bounds__(256) mma_kernel(const unsigned* words, float* out) {
  std::uint32_t a[2][4], b[4][2];
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = words[threadIdx.x * 8 + i];
  for (int i = 0; i < 8; ++i) b[i / 2][i % 2] = words[4096 + threadIdx.x * 8 + i];
  float d[kMmaTiles][4] = {};
#pragma unroll 1
  for (int step = 0; step < kMmaSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kMmaTiles; ++i) {
      ptx::mma_m16n8k16<__nv_bfloat16>(d[i], a[i % 2], b[i / 2]);
    }
  }
  float sum = 0;
  for (int i = 0; i < 4 * kMmaTiles; ++i) sum += d[i / 4][i % 4];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

constexpr int kWgmmaSteps = 2048;
constexpr int kDepth = 4;       // products of depth 16 in a step, as in rows of 128 bytes
constexpr int kWarpgroups = 2;  // of a block; of blocks, as many as the convolution's tiles have

// Each warpgroup multiplies its own 64 rows with the same kColumns, step by step as the convolution
// does: four products, with the step before still under way.
template <int kColumns>
__global__ void __launch_bounds__(128 * kWarpgroups)
    wgmma_kernel(const unsigned* words, float* out, long long* cycles) {
  constexpr int kA = 64 * 128, kB = kColumns * 128;
  constexpr int kWords = (kWarpgroups * kA + kB) / 4;
  for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
    ptx::store_shared<unsigned>(4 * i, words[i]);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const int group = threadIdx.x / 128;
  const std::uint64_t a = ptx::matrix_descriptor(group * kA);
  const std::uint64_t b = ptx::matrix_descriptor(kWarpgroups * kA);
  float d[kColumns / 2] = {};
  const long long start = clock64();
#pragma unroll 1
  for (int step = 0; step < kWgmmaSteps; ++step) {
    ptx::wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      ptx::wgmma<__nv_bfloat16>(d, a + k * (32 >> 4), b + k * (32 >> 4), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(d);
  }
  ptx::wgmma_wait<0>(d);
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  float sum = 0;
  for (int i = 0; i < kColumns / 2; ++i) sum += d[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Seconds of the fastest of 10 launches, after one that warms up.
double best(const std::function<void()>& launch) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float least = 1e30f;
  for (int i = 0; i < 11; ++i) {
    CHECK(cudaEventRecord(start));
    launch();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (i > 0) least = std::min(least, milliseconds);
  }
  return least / 1e3;
}

template <int kColumns>
double wgmma_flops(int sms, const unsigned* words, float* out, long long* cycles, double* clock) {
  constexpr int kBlocks = kColumns == 64 ? 2 : 1;  // of an SM
  constexpr int kBytes = (kWarpgroups * 64 + kColumns) * 128;
  CHECK(cudaFuncSetAttribute(wgmma_kernel<kColumns>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kBytes));
  const double seconds = best([&] {
    wgmma_kernel<kColumns><<<kBlocks * sms, 128 * kWarpgroups, kBytes>>>(words, out, cycles);
  });
  long long counted = 0;
  CHECK(cudaMemcpy(&counted, cycles, sizeof(counted), cudaMemcpyDeviceToHost));
  *clock = static_cast<double>(counted) / seconds;
  return 2.0 * 64 * kColumns * 16 * kDepth * kWgmmaSteps * kWarpgroups * kBlocks * sms / seconds;
}

}  // namespace

int main(int count, char** arguments) {
  std::FILE* file = count > 1 ? std::fopen(arguments[1], "w") : stdout;
  if (file == nullptr) {
    std::perror(arguments[1]);
    return 1;
  }
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  const int sms = properties.multiProcessorCount;

  constexpr std::size_t kDram = std::size_t{4} << 30;
  const std::size_t in_l2 = std::size_t{16} << 20;  // of 50 MB and more; its half holds copies
  void* buffer = nullptr;
  CHECK(cudaMalloc(&buffer, kDram));
  auto* words = static_cast<unsigned*>(buffer);
  const auto* vectors = static_cast<const uint4*>(buffer);
  fill_kernel<<<8 * sms, 256>>>(words, kDram / 4);
  unsigned* sink = nullptr;
  float* out = nullptr;
  long long* cycles = nullptr;
  CHECK(cudaMalloc(&sink, sizeof(unsigned)));
  CHECK(cudaMalloc(&out, sizeof(float) * 8 * sms * 256));
  CHECK(cudaMalloc(&cycles, sizeof(long long) * 2 * sms));

  const int blocks = 4 * sms;
  const double l2 =
      best([&] { read_kernel<<<blocks, kThreads>>>(vectors, in_l2 / 16, true, sink); });
  const double dram =
      best([&] { read_kernel<<<blocks, kThreads>>>(vectors, kDram / 16, false, sink); });
  const double copy = best([&] {
    CHECK(cudaMemcpyAsync(buffer, words + kDram / 8, kDram / 2, cudaMemcpyDeviceToDevice));
  });
  const double mma = best([&] { mma_kernel<<<8 * sms, 256>>>(words, out); });
  double clock = 0;
  const double wgmma64 = wgmma_flops<64>(sms, words, out, cycles, &clock);
  const double wgmma128 = wgmma_flops<128>(sms, words, out, cycles, &clock);

  // Of DRAM, the vectors that the blocks' parts hold.
  constexpr std::size_t kTaken = std::size_t{kThreads} * kInFlight;
  const std::size_t dram_bytes = kDram / 16 / kTaken / blocks * blocks * kTaken * 16;
  const double l2_rate = static_cast<double>(in_l2) * blocks / l2;
  std::fprintf(file,
               "{\n \"gpu\": \"%s\",\n \"sms\": %d,\n \"l2_bytes\": %d,\n \"clock_hz\": %.6g,\n"
               " \"l2_bytes_per_second\": %.6g,\n \"l2_bytes_per_cycle_and_sm\": %.4g,\n"
               " \"dram_read_bytes_per_second\": %.6g,\n \"dram_copy_bytes_per_second\": %.6g,\n"
               " \"mma_sync_bf16_flops\": %.6g,\n \"wgmma_m64n64_bf16_flops\": %.6g,\n"
               " \"wgmma_m64n128_bf16_flops\": %.6g\n}\n",
               properties.name, sms, properties.l2CacheSize, clock, l2_rate, l2_rate / clock / sms,
               static_cast<double>(dram_bytes) / dram, static_cast<double>(kDram) / copy,
               2.0 * 16 * 8 * 16 * kMmaTiles * kMmaSteps * 8 * 8 * sms / mma, wgmma64, wgmma128);
  std::fclose(file);
  return 0;
}
