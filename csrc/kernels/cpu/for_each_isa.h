// Includes ISA_SOURCE once per instruction set, inside a namespace of that name, with
//   ISA        the function attribute that turns the instructions on
//   ISA_LANES  floats per vector register
//   ISA_BF16   defined in the extra round with AVX512_BF16 that ISA_WITH_BF16 asks for
//   ISA_VNNI   defined in the rounds with VPDPBUSD, of 8 and 16 lanes, that ISA_WITH_VNNI asks for
//              instead of those with AVX-512
// ISA_WITH_BASELINE asks for a round with what any machine has.
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

#if defined(__x86_64__) && defined(__GNUC__)

#define ISA __attribute__((target("avx2,fma")))
#define ISA_LANES 8
namespace resnet_fused::cpu::avx2 {
#include ISA_SOURCE
}
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
#undef ISA_BF16
#endif
#undef ISA_LANES
#endif

#endif
#undef ISA_SOURCE
#undef ISA_WITH_BF16
#undef ISA_WITH_VNNI
#undef ISA_WITH_BASELINE
