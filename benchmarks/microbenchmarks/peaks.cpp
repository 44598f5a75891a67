// What the processor's multiply-adds reach when nothing but registers takes part: the peak that
// docs/cpu_kernels.md holds each layer against. benchmarks/layers.py compiles and runs it:
//
//   c++ -O2 -pthread peaks.cpp -o peaks && ./peaks 2
//   {"float32": 5.48e+11, "bfloat16": 1.097e+12}
//
// The argument is the number of threads; operations a second are those of all of them, two a
// multiply-add. A format is left out where the processor has no such instruction (AVX-512 for
// float32, AVX512_BF16 for bfloat16).
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 500'000;
constexpr int kTrials = 300;

// The sums are named in assembly, or the compiler would notice that they are never read.
#define STEP(instruction)                                                                    \
  asm volatile(                                                                              \
      instruction                                                                            \
      " %%zmm30, %%zmm31, %%zmm0\n" instruction " %%zmm30, %%zmm31, %%zmm1\n" instruction    \
      " %%zmm30, %%zmm31, %%zmm2\n" instruction " %%zmm30, %%zmm31, %%zmm3\n" instruction    \
      " %%zmm30, %%zmm31, %%zmm4\n" instruction " %%zmm30, %%zmm31, %%zmm5\n" instruction    \
      " %%zmm30, %%zmm31, %%zmm6\n" instruction " %%zmm30, %%zmm31, %%zmm7\n" instruction    \
      " %%zmm30, %%zmm31, %%zmm8\n" instruction " %%zmm30, %%zmm31, %%zmm9\n" instruction    \
      " %%zmm30, %%zmm31, %%zmm10\n" instruction " %%zmm30, %%zmm31, %%zmm11\n" instruction  \
      " %%zmm30, %%zmm31, %%zmm12\n" instruction " %%zmm30, %%zmm31, %%zmm13\n" instruction  \
      " %%zmm30, %%zmm31, %%zmm14\n" instruction " %%zmm30, %%zmm31, %%zmm15\n" instruction  \
      " %%zmm30, %%zmm31, %%zmm16\n" instruction " %%zmm30, %%zmm31, %%zmm17\n" instruction  \
      " %%zmm30, %%zmm31, %%zmm18\n" instruction " %%zmm30, %%zmm31, %%zmm19\n" instruction  \
      " %%zmm30, %%zmm31, %%zmm20\n" instruction " %%zmm30, %%zmm31, %%zmm21\n" instruction  \
      " %%zmm30, %%zmm31, %%zmm22\n" instruction " %%zmm30, %%zmm31, %%zmm23\n" ::           \
          : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",  \
            "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", \
            "xmm19", "xmm20", "xmm21", "xmm22", "xmm23")

constexpr int kPerStep = 24;  // sums: enough to hide the latency of two multiply-adds a cycle

__attribute__((target("avx512f"))) void multiply_float32() {
  asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31" ::
                   : "xmm30", "xmm31");
  for (long i = 0; i < kSteps; ++i) STEP("vfmadd231ps");
}

__attribute__((target("avx512f,avx512bf16"))) void multiply_bfloat16() {
  asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31" ::
                   : "xmm30", "xmm31");
  for (long i = 0; i < kSteps; ++i) STEP("vdpbf16ps");
}

// Instructions a second of `threads` threads, the best of some trials.
double rate(void (*multiply)(), int threads) {
  double best = 0;
  for (int trial = 0; trial < kTrials; ++trial) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(multiply);
    multiply();
    for (std::thread& other : others) other.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, threads * double(kSteps) * kPerStep / seconds.count());
  }
  return best;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  std::printf("{");
  if (__builtin_cpu_supports("avx512f")) {
    std::printf("\"float32\": %.4g", 2 * 16 * rate(multiply_float32, threads));
    if (__builtin_cpu_supports("avx512bf16")) {
      std::printf(", \"bfloat16\": %.4g", 2 * 32 * rate(multiply_bfloat16, threads));
    }
  }
  std::printf("}\n");
}
