// Compiled for the simulator, and by nvcc for a GPU, with which the simulator is compared.
#include <cuda_runtime_api.h>

#include <cstring>

#include "host_sim/tests/primitives.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace host_sim::tests {
namespace {

namespace ptx = resnet_fused::ptx;
using Quad = resnet_fused::Pack<std::uint32_t, 4>;

constexpr std::size_t kSharedBytes = 1024;
constexpr std::uint32_t kUntouched = 0xffffffffu;

struct Arguments {
  const std::uint32_t* in;
  std::uint32_t* out;
};

__device__ float as_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The value's bits, above them zeros.
template <typename V>
__device__ std::uint32_t as_bits(V value) {
  std::uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}

// in: 32 row offsets, then what shared memory holds. out: 4 registers a lane.
__global__ void ldmatrix(const Arguments a) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    ptx::store_shared(4 * i, ptx::load_global(a.in + 32 + i));
  }
  __syncthreads();
  std::uint32_t registers[4];
  ptx::ldmatrix_x4(registers, ptx::load_global(a.in + threadIdx.x));
  for (int k = 0; k < 4; ++k) ptx::store_global(a.out + 4 * threadIdx.x + k, registers[k]);
}

// in: a float a lane. out: for each mask of one bit, what the lanes receive.
__global__ void shuffle(const Arguments a) {
  const float value = as_float(ptx::load_global(a.in + threadIdx.x));
  for (int k = 0; k < 5; ++k) {
    ptx::store_global(a.out + 32 * k + threadIdx.x, as_bits(ptx::shuffle_xor(value, 1 << k)));
  }
}

// in: two words a lane, 32 lanes after one another. out: the larger of both in each half, then what
// the lanes hold in reverse order.
template <typename T>
__global__ void max_pairs(const Arguments a) {
  const std::uint32_t first = ptx::load_global(a.in + threadIdx.x);
  const std::uint32_t second = ptx::load_global(a.in + 32 + threadIdx.x);
  ptx::store_global(a.out + threadIdx.x, ptx::max_nan_pair<T>(first, second));
  ptx::store_global(a.out + 32 + threadIdx.x, ptx::shuffle(first, 31 - threadIdx.x));
}

// in: a lane's 4 registers of a, 2 of b, 4 of d, lane after lane. out: 4 of d a lane.
template <typename T>
__global__ void mma(const Arguments a) {
  const std::uint32_t* in = a.in + 10 * threadIdx.x;
  std::uint32_t left[4], right[2];
  float d[4];
  for (int k = 0; k < 4; ++k) left[k] = ptx::load_global(in + k);
  for (int k = 0; k < 2; ++k) right[k] = ptx::load_global(in + 4 + k);
  for (int k = 0; k < 4; ++k) d[k] = as_float(ptx::load_global(in + 6 + k));
  ptx::mma_m16n8k16<T>(d, left, right);
  for (int k = 0; k < 4; ++k) ptx::store_global(a.out + 4 * threadIdx.x + k, as_bits(d[k]));
}

// in: as for mma, but a register of a or b is one number, which is rounded.
__global__ void mma_tf32(const Arguments a) {
  const std::uint32_t* in = a.in + 10 * threadIdx.x;
  std::uint32_t left[4], right[2];
  float d[4];
  for (int k = 0; k < 4; ++k) left[k] = ptx::round_to_tf32(ptx::load_global(in + k));
  for (int k = 0; k < 2; ++k) right[k] = ptx::round_to_tf32(ptx::load_global(in + 4 + k));
  for (int k = 0; k < 4; ++k) d[k] = as_float(ptx::load_global(in + 6 + k));
  ptx::mma_m16n8k8(d, left, right);
  for (int k = 0; k < 4; ++k) ptx::store_global(a.out + 4 * threadIdx.x + k, as_bits(d[k]));
}

// A mistake: in, a number a lane, is not rounded.
__global__ void mma_of_no_tf32(const Arguments a) {
  const std::uint32_t left[4] = {ptx::load_global(a.in + threadIdx.x)}, right[2] = {};
  float d[4] = {};
  ptx::mma_m16n8k8(d, left, right);
  ptx::store_global(a.out + threadIdx.x, as_bits(d[0]));
}

__global__ void round_to_tf32(const Arguments a) {
  ptx::store_global(a.out + threadIdx.x, ptx::round_to_tf32(ptx::load_global(a.in + threadIdx.x)));
}

// in: a float a thread. out: each as binary16, as bfloat16, and both back.
__global__ void convert(const Arguments a) {
  const float value = as_float(ptx::load_global(a.in + threadIdx.x));
  const __half half = resnet_fused::from_float<__half>(value);
  const __nv_bfloat16 bfloat = resnet_fused::from_float<__nv_bfloat16>(value);
  std::uint32_t* out = a.out + 4 * threadIdx.x;
  ptx::store_global(out, as_bits(half));
  ptx::store_global(out + 1, as_bits(bfloat));
  ptx::store_global(out + 2, as_bits(resnet_fused::to_float(half)));
  ptx::store_global(out + 3, as_bits(resnet_fused::to_float(bfloat)));
}

// Three groups of one copy each, the second of nothing; each is read once it must have landed.
__global__ void copy_groups(const Arguments a) {
  ptx::cp_async_16(0, a.in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(16, a.in, false);
  ptx::cp_async_commit();
  ptx::cp_async_16(32, a.in + 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<2>();
  ptx::store_global(a.out, ptx::load_shared<std::uint32_t>(0));
  ptx::cp_async_wait<1>();
  ptx::store_global(a.out + 1, ptx::load_shared<std::uint32_t>(16));
  ptx::cp_async_wait<0>();
  ptx::store_global(a.out + 2, ptx::load_shared<std::uint32_t>(44));
}

__global__ void copy_read_one_group_early(const Arguments a) {
  ptx::cp_async_16(0, a.in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(16, a.in + 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::store_global(a.out, ptx::load_shared<std::uint32_t>(16));
}

__global__ void copy_never_awaited(const Arguments a) {
  ptx::cp_async_16(0, a.in, true);
  ptx::cp_async_commit();
}

// A thread waits for its own copies only: without a barrier, the other's may be on the way.
__global__ void copy_of_another_thread(const Arguments a) {
  ptx::cp_async_16(16 * threadIdx.x, a.in, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  const std::uint32_t other = 16 * (threadIdx.x ^ 1);
  ptx::store_global(a.out + threadIdx.x, ptx::load_shared<std::uint32_t>(other));
}

// The block's words in reverse order.
template <bool kBarrier>
__global__ void reverse(const Arguments a) {
  ptx::store_shared(4 * threadIdx.x, ptx::load_global(a.in + threadIdx.x));
  if (kBarrier) __syncthreads();
  const int from = blockDim.x - 1 - threadIdx.x;
  ptx::store_global(a.out + threadIdx.x, ptx::load_shared<std::uint32_t>(4 * from));
}

// Overwrites what neighbours may still be reading.
__global__ void overwrite_too_early(const Arguments a) {
  ptx::store_shared(4 * threadIdx.x, std::uint32_t{threadIdx.x});
  __syncthreads();
  const std::uint32_t next = 4 * ((threadIdx.x + 1) % blockDim.x);
  const std::uint32_t read = ptx::load_shared<std::uint32_t>(next);
  ptx::store_shared(4 * threadIdx.x, read);
  ptx::store_global(a.out + threadIdx.x, read);
}

// Threads that have left are not waited for.
__global__ void barrier_of_the_others(const Arguments a) {
  if (threadIdx.x >= 32) return;
  ptx::store_shared(4 * threadIdx.x, std::uint32_t{threadIdx.x});
  __syncthreads();
  ptx::store_global(a.out + threadIdx.x, ptx::load_shared<std::uint32_t>(4 * (31 - threadIdx.x)));
}

__global__ void barrier_that_one_lane_misses(const Arguments a) {
  std::uint32_t registers[4];
  if (threadIdx.x == 7) {
    ptx::ldmatrix_x4(registers, 0);
  } else {
    __syncthreads();
  }
  ptx::store_global(a.out, registers[0]);
}

__global__ void diverged(const Arguments a) {
  std::uint32_t registers[4] = {};
  float d[4] = {};
  if (threadIdx.x == 3) {
    ptx::mma_m16n8k16<__half>(d, registers, registers);
  } else {
    ptx::ldmatrix_x4(registers, 0);
  }
  ptx::store_global(a.out, registers[0]);
}

// 8 rows of 64 bytes, of which lane 8 j + i reads chunk j of row i; in: their 128 words. A writer
// and a reader that permute the chunks alike find every word, without bank conflicts.
template <bool kWritten, bool kRead>
__global__ void swizzle(const Arguments a) {
  const auto offset = [](int row, int chunk, bool permuted) {
    return 64 * row + 16 * (permuted ? chunk ^ (row / 2 % 4) : chunk);
  };
  const Quad* rows = reinterpret_cast<const Quad*>(a.in);
  const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  ptx::store_shared(offset(row, chunk, kWritten), ptx::load_global(rows + threadIdx.x));
  __syncthreads();
  std::uint32_t registers[4];
  ptx::ldmatrix_x4(registers, offset(threadIdx.x % 8, threadIdx.x / 8, kRead));
  for (int k = 0; k < 4; ++k) ptx::store_global(a.out + 4 * threadIdx.x + k, registers[k]);
}

// out[i] = in[i - 1] + in[i + 1] with zeros around, of 96 words.
template <int kLast>
__global__ void halo(const Arguments a) {
  const int i = threadIdx.x;
  const std::uint32_t left = i > 0 ? ptx::load_global(a.in + i - 1) : 0;
  const std::uint32_t right = i < kLast ? ptx::load_global(a.in + i + 1) : 0;
  ptx::store_global(a.out + i, left + right);
}

__global__ void read_uninitialised(const Arguments a) {
  ptx::store_global(a.out, ptx::load_shared<std::uint32_t>(0));
}

__global__ void shared_out_of_bounds(const Arguments) { ptx::store_shared(1024, 0u); }
__global__ void shared_misaligned(const Arguments) { ptx::store_shared(8, Quad{}); }
__global__ void write_the_input(const Arguments a) {
  ptx::store_global(const_cast<std::uint32_t*>(a.in), 0u);
}

// Each lane reads a V at a stride of bytes: lane l at kStride * l, those with l % kEvery == 0 as
// many times as 1 + l % kTimes says.
template <typename V, int kStride, int kEvery = 1, int kTimes = 1>
__global__ void banks(const Arguments a) {
  const unsigned lane = threadIdx.x;
  std::uint32_t sum = 0;
  if (lane % kEvery == 0) {
    for (unsigned i = 0; i <= lane % kTimes; ++i) {
      const V value = ptx::load_shared<V>(kStride * lane);
      std::uint32_t word = 0;
      memcpy(&word, &value, sizeof(value) < 4 ? sizeof(value) : 4);
      sum += word;
    }
  }
  ptx::store_global(a.out + lane, sum);
}

// The same for a write of 4 bytes.
template <int kStride>
__global__ void written_banks(const Arguments) {
  ptx::store_shared(kStride * threadIdx.x, std::uint32_t{threadIdx.x});
}

template <auto* kKernel, unsigned kThreads, std::size_t kBytes = kSharedBytes>
cudaError_t launch(const std::uint32_t* in, std::uint32_t* out) {
  return resnet_fused::launch(kKernel, {dim3(1), dim3(kThreads), kBytes}, nullptr,
                              Arguments{in, out});
}

using Half = std::uint16_t;
using Word = std::uint32_t;
using Two = resnet_fused::Pack<Word, 2>;

const Tests kTests = {
    {"ldmatrix", &launch<&ldmatrix, 32>},
    {"shuffle", &launch<&shuffle, 32>},
    {"max of pairs f16", &launch<&max_pairs<__half>, 32>},
    {"max of pairs bf16", &launch<&max_pairs<__nv_bfloat16>, 32>},
    {"mma f16", &launch<&mma<__half>, 32>},
    {"mma bf16", &launch<&mma<__nv_bfloat16>, 32>},
    {"mma tf32", &launch<&mma_tf32, 32>},
    {"mma of what is no tf32", &launch<&mma_of_no_tf32, 32>},
    {"round to tf32", &launch<&round_to_tf32, 32>},
    {"convert", &launch<&convert, 1024>},
    {"copy groups", &launch<&copy_groups, 1>},
    {"copy read one group early", &launch<&copy_read_one_group_early, 1>},
    {"copy never awaited", &launch<&copy_never_awaited, 1>},
    {"copy of another thread", &launch<&copy_of_another_thread, 2>},
    {"reverse", &launch<&reverse<true>, 96>},
    {"reverse without barrier", &launch<&reverse<false>, 96>},
    {"overwrite too early", &launch<&overwrite_too_early, 64>},
    {"barrier of the others", &launch<&barrier_of_the_others, 96>},
    {"barrier that one lane misses", &launch<&barrier_that_one_lane_misses, 64>},
    {"diverged", &launch<&diverged, 32>},
    {"swizzle", &launch<&swizzle<true, true>, 32>},
    {"no swizzle", &launch<&swizzle<false, false>, 32>},
    {"swizzle forgotten by the reader", &launch<&swizzle<true, false>, 32>},
    {"halo", &launch<&halo<95>, 96>},
    {"halo off by one", &launch<&halo<96>, 96>},
    {"read uninitialised", &launch<&read_uninitialised, 1>},
    {"shared out of bounds", &launch<&shared_out_of_bounds, 1>},
    {"shared misaligned", &launch<&shared_misaligned, 1>},
    {"write the input", &launch<&write_the_input, 1>},
    {"banks: neighbouring words", &launch<&banks<Word, 4>, 32>},
    {"banks: one word", &launch<&banks<Word, 0>, 32>},
    {"banks: neighbouring halves", &launch<&banks<Half, 2>, 32>},
    {"banks: every other word", &launch<&banks<Word, 8>, 32>},
    {"banks: a column of words", &launch<&banks<Word, 128>, 32, 4096>},
    {"banks: a padded column of words", &launch<&banks<Word, 132>, 32, 8192>},
    {"banks: a column of words, by every fourth lane", &launch<&banks<Word, 128, 4>, 32, 4096>},
    {"banks: every other word, again by odd lanes", &launch<&banks<Word, 8, 1, 2>, 32>},
    {"banks: neighbours of 8 bytes", &launch<&banks<Two, 8>, 32>},
    {"banks: every other one of 8 bytes", &launch<&banks<Two, 16>, 32>},
    {"banks: neighbours of 16 bytes", &launch<&banks<Quad, 16>, 32>},
    {"banks: every other one of 16 bytes", &launch<&banks<Quad, 32>, 32>},
    {"banks: a column of 16 bytes", &launch<&banks<Quad, 128>, 32, 4096>},
    {"banks: a written column of words", &launch<&written_banks<128>, 32, 4096>},
};

Launch test(const std::string& name) {
#ifdef RESNET_FUSED_SM90
  for (const Tests* tests : {&sm90_tests(), &cluster_tests(), &schedule_tests()}) {
    const auto found = tests->find(name);
    if (found != tests->end()) return found->second;
  }
#endif
  return kTests.at(name);
}

}  // namespace

#ifdef RESNET_FUSED_HOST_SIM

std::vector<std::uint32_t> run(const std::string& name, const std::vector<std::uint32_t>& in,
                               std::size_t outputs) {
  const Launch launch = test(name);
  // In whole 16-byte rows, as asynchronous copies want them.
  std::vector<Quad> aligned((in.size() + 3) / 4);
  std::memcpy(aligned.data(), in.data(), in.size() * sizeof(in[0]));
  std::vector<std::uint32_t> out(outputs, kUntouched);
  clear_buffers();
  register_buffer(aligned.data(), in.size() * sizeof(in[0]), false);
  register_buffer(out.data(), out.size() * sizeof(out[0]), true);
  const cudaError_t status =
      launch(reinterpret_cast<const std::uint32_t*>(aligned.data()), out.data());
  if (status != cudaSuccess) throw Fault("the launch of " + name + " fails");
  return out;
}

#else

// On the current GPU, for comparison. Returns CUDA's status.
extern "C" int run_primitive(const char* name, const std::uint32_t* in, std::size_t inputs,
                             std::uint32_t* out, std::size_t outputs) {
  const Launch launch = test(name);
  const std::vector<std::uint32_t> untouched(outputs, kUntouched);
  std::uint32_t* memory = nullptr;
  const std::size_t in_bytes = (inputs + 3) / 4 * sizeof(Quad);
  const std::size_t out_bytes = outputs * sizeof(out[0]);
  cudaError_t status = cudaMalloc(&memory, in_bytes + out_bytes);
  if (status != cudaSuccess) return status;
  std::uint32_t* const result = memory + in_bytes / sizeof(out[0]);
  status = cudaMemcpy(memory, in, inputs * sizeof(in[0]), cudaMemcpyDefault);
  if (status == cudaSuccess) {
    status = cudaMemcpy(result, untouched.data(), out_bytes, cudaMemcpyDefault);
  }
  if (status == cudaSuccess) status = launch(memory, result);
  if (status == cudaSuccess) status = cudaMemcpy(out, result, out_bytes, cudaMemcpyDefault);
  static_cast<void>(cudaFree(memory));
  return status;
}

#endif

}  // namespace host_sim::tests
