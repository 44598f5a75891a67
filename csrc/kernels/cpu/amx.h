// Whether this process may multiply in tiles (AMX; Intel SDM, volume 1, chapter "Programming with
// Intel AMX"), and how tiles are configured. A processor that has them lets nobody use them before
// the kernel has agreed, since their 8 KB enlarge every signal frame (Linux,
// Documentation/arch/x86/xstate.rst); it refuses where a signal stack is too small for that.
#pragma once

#include <cstdint>

// Compilers that know the instructions: GCC from 11, Clang from 11.
#if defined(__x86_64__) && defined(__GNUC__)
#if __has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>)
#define RESNET_FUSED_AMX
#endif
#endif

#ifdef RESNET_FUSED_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace resnet_fused::cpu {

constexpr int kTileRegisterRows = 16;
constexpr std::int64_t kTileRegisterBytes = 64;  // of a row

#ifdef RESNET_FUSED_AMX
// What LDTILECFG reads: palette 1 has 8 tiles.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Whether the processor has this bit in EDX of CPUID's leaf 7, and tiles (bit 24), and the kernel
// agrees for this process and all of its threads. Asks once.
inline bool may_use_tiles(int bit) {
#ifdef __linux__
  static const unsigned features = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1) != 0;
    if (!has_tiles || syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) d = 0;
    return d;
  }();
  return (features >> bit & 1) != 0;
#else
  (void)bit;
  return false;
#endif
}

inline bool has_amx_bf16() { return may_use_tiles(22); }
inline bool has_amx_int8() { return may_use_tiles(25); }
#else
inline bool has_amx_bf16() { return false; }
inline bool has_amx_int8() { return false; }
#endif

}  // namespace resnet_fused::cpu
