// What the CPU kernels share: which vector instructions this processor has, and scratch memory that
// outlives a call.
//
// A kernel's vector code lives in a `*_tile.h`, written once over GCC/Clang vector extensions and
// compiled once per instruction set by "for_each_isa.h"; every function there carries the target
// attribute ISA, so the build needs no -m flag and the rest of the library stays baseline x86-64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "amx.h"

#if defined(__aarch64__) && defined(__GNUC__)
#define RESNET_FUSED_NEON
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

namespace resnet_fused::cpu {

// AMX is none of the sets to choose the best of: conv_bn alone knows it, and has to be asked for
// it.
enum class Isa { kNone, kNeon, kAvx2, kAvx512, kAmx };
enum class Format { kFloat32, kBFloat16 };  // of activations and weights in memory

using BFloat16 = std::uint16_t;  // its bits

// The best set this processor and operating system offer.
inline Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#elif defined(RESNET_FUSED_NEON)
  return Isa::kNeon;  // part of every AArch64
#endif
  return Isa::kNone;
}

// Whether AVX-512 here has instructions for bfloat16.
inline bool has_avx512_bf16(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  return isa == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  (void)isa;
  return false;
#endif
}

// Whether a convolution can run in this format: bfloat16 needs AVX512_BF16 or Arm's FEAT_BF16, or
// AVX2, which multiplies its numbers as fp32; fp32 any Isa but kNone.
inline bool convolves(Format format, Isa isa) {
  if (isa == Isa::kAmx) return format == Format::kBFloat16 && has_amx_bf16();
#if defined(__x86_64__) && defined(__GNUC__)
  if (format == Format::kBFloat16) return isa == Isa::kAvx2 || has_avx512_bf16(isa);
#elif defined(RESNET_FUSED_NEON) && defined(__linux__)
  if (format == Format::kBFloat16) {
    return isa == Isa::kNeon && (getauxval(AT_HWCAP2) >> 14 & 1) != 0;  // HWCAP2_BF16
  }
#endif
  return format == Format::kFloat32 && isa != Isa::kNone;
}

// Grow-only, page-aligned memory, one per thread and never returned before the thread ends, so
// that repeated calls touch the same, already mapped pages.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  float* floats(std::size_t count) {
    if (count > capacity_) {
      release();
      data_ = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
      capacity_ = count;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{4096};

  void release() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    capacity_ = 0;
  }

  float* data_ = nullptr;
  std::size_t capacity_ = 0;
};

// A thread has three: two for the two inputs of a block's end, and one for a task's own.
inline Scratch& thread_scratch(int index = 0) {
  thread_local Scratch scratch[3];
  return scratch[index];
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace resnet_fused::cpu
