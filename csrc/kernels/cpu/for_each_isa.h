// Includes ISA_SOURCE once per instruction set, inside a namespace of that name, with
//   ISA        the function attribute that turns the instructions on
//   ISA_LANES  floats per vector register
//   ISA_BF16   defined in the extra round with AVX512_BF16 that ISA_WITH_BF16 asks for, and in that
//              with AVX2, whose words are bfloat16 too, that ISA_WITH_BF16_WORDS asks for
//   ISA_AMX    defined in the further round with tiles, of bfloat16 or with ISA_WITH_VNNI of bytes,
//              that ISA_WITH_AMX asks for
//   ISA_VNNI   defined in the rounds with VPDPBUSD, of 8 and 16 lanes, that ISA_WITH_VNNI asks for
//              instead of those with AVX-512
// ISA_WITH_BASELINE asks for a round with what any machine has, NEON on AArch64; ISA_WITH_NEON for
// rounds on AArch64 alone, ISA_WITH_BF16 then for another one with FEAT_BF16.
// No include guard: each kernel includes it for its own source.
#ifdef ISA_WITH_BASELINE
#define ISA
#define ISA_LANES 4
namespace resnet_fused::cpu::baseline {
#include ISA_SOURCE
}
#undef ISA
#undef ISA_LANES
#endif

#if defined(RESNET_FUSED_NEON) && defined(ISA_WITH_NEON)
#define ISA_LANES 4
#define ISA
namespace resnet_fused::cpu::neon {
#include ISA_SOURCE
}
#undef ISA

#ifdef ISA_WITH_BF16
#define ISA __attribute__((target("arch=armv8.2-a+bf16")))
#define ISA_BF16
namespace resnet_fused::cpu::neonbf16 {
#include ISA_SOURCE
}
#undef ISA
#undef ISA_BF16
#endif
#undef ISA_LANES
#endif

#if defined(__x86_64__) && defined(__GNUC__)

#define ISA __attribute__((target("avx2,fma")))
#define ISA_LANES 8
namespace resnet_fused::cpu::avx2 {
#include ISA_SOURCE
}
#ifdef ISA_WITH_BF16_WORDS
#define ISA_BF16
namespace resnet_fused::cpu::avx2bf16 {
#include ISA_SOURCE
}
#undef ISA_BF16
#endif
#undef ISA
#undef ISA_LANES

#ifdef ISA_WITH_VNNI
#define ISA_VNNI
#define ISA __attribute__((target("avx2,fma,avxvnni")))
#define ISA_LANES 8
namespace resnet_fused::cpu::avxvnni {
#include ISA_SOURCE
}
#undef ISA
#undef ISA_LANES

#define ISA __attribute__((target("avx512f,avx512dq,avx512bw,avx512vnni")))
#define ISA_LANES 16
namespace resnet_fused::cpu::avx512vnni {
#include ISA_SOURCE
}
#undef ISA

#if defined(ISA_WITH_AMX) && defined(RESNET_FUSED_AMX)
#define ISA __attribute__((target("avx512f,avx512dq,avx512bw,avx512vnni,amx-tile,amx-int8")))
#define ISA_AMX
namespace resnet_fused::cpu::amx {
#include ISA_SOURCE
}
#undef ISA
#undef ISA_AMX
#endif
#undef ISA_LANES
#undef ISA_VNNI
#else

#define ISA __attribute__((target("avx512f,avx512dq")))
#define ISA_LANES 16
namespace resnet_fused::cpu::avx512 {
#include ISA_SOURCE
}
#undef ISA

#ifdef ISA_WITH_BF16
#define ISA __attribute__((target("avx512f,avx512dq,avx512bf16")))
#define ISA_BF16
namespace resnet_fused::cpu::avx512bf16 {
#include ISA_SOURCE
}
#undef ISA

#if defined(ISA_WITH_AMX) && defined(RESNET_FUSED_AMX)
#define ISA __attribute__((target("avx512f,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define ISA_AMX
namespace resnet_fused::cpu::amx {
#include ISA_SOURCE
}
#undef ISA
#undef ISA_AMX
#endif
#undef ISA_BF16
#endif
#undef ISA_LANES
#endif

#endif
#undef ISA_SOURCE
#undef ISA_WITH_BF16
#undef ISA_WITH_BF16_WORDS
#undef ISA_WITH_AMX
#undef ISA_WITH_NEON
#undef ISA_WITH_VNNI
#undef ISA_WITH_BASELINE
