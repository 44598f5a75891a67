// What the processor's multiply-adds reach when nothing but registers takes part: the peak that
// docs/cpu_kernels.md holds each layer against. benchmarks/layers.py compiles and runs it:
//
//   c++ -O2 -pthread peaks.cpp -o peaks && ./peaks 2
//   {"float32": 5.48e+11, "bfloat16": 1.097e+12}
//
// The argument is the number of threads; operations a second are those of all of them, two a
// multiply-add. bfloat16 is left out where AVX-512 lacks AVX512_BF16, and with AVX2 multiplied as
// float32; both are left out without AVX2.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 1'000'000;
constexpr int kTrials = 300;

constexpr int kPerStep = 12;  // sums: enough to hide the latency of two multiply-adds a cycle

// The sums are named in assembly, or the compiler would notice that they are never read.
#define ONE(instruction, kind, sum) instruction " %%" kind "14, %%" kind "15, %%" kind #sum "\n"
#define STEP(instruction, kind)                                                                  \
  asm volatile(ONE(instruction, kind, 0) ONE(instruction, kind, 1) ONE(instruction, kind, 2)     \
                   ONE(instruction, kind, 3) ONE(instruction, kind, 4) ONE(instruction, kind, 5) \
                       ONE(instruction, kind, 6) ONE(instruction, kind, 7)                       \
                           ONE(instruction, kind, 8) ONE(instruction, kind, 9)                   \
                               ONE(instruction, kind, 10) ONE(instruction, kind, 11)::           \
                                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",     \
                                     "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")
#define MULTIPLY(instruction, kind)                                                  \
  asm volatile("vpxor %%xmm14, %%xmm14, %%xmm14\nvpxor %%xmm15, %%xmm15, %%xmm15" :: \
                   : "xmm14", "xmm15");                                              \
  for (long i = 0; i < kSteps; ++i) STEP(instruction, kind)

__attribute__((target("avx2,fma"))) void multiply_in_avx2() { MULTIPLY("vfmadd231ps", "ymm"); }
__attribute__((target("avx512f"))) void multiply_float32() { MULTIPLY("vfmadd231ps", "zmm"); }
__attribute__((target("avx512f,avx512bf16"))) void multiply_bfloat16() {
  MULTIPLY("vdpbf16ps", "zmm");
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
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const double peak = 2 * 8 * rate(multiply_in_avx2, threads);
    std::printf("\"float32\": %.4g, \"bfloat16\": %.4g", peak, peak);
  }
  std::printf("}\n");
}
