#include "host_sim/ptx.h"

#include "host_sim/ptx_bytes.h"

namespace resnet_fused::ptx {
namespace {

struct Shuffle {
  std::uint32_t value;
  int from;  // lane
  std::uint32_t received;
};

void exchange(void* const* lanes) {
  for (int lane = 0; lane < host_sim::kWarp; ++lane) {
    Shuffle& operands = *static_cast<Shuffle*>(lanes[lane]);
    operands.received = static_cast<const Shuffle*>(lanes[operands.from])->value;
  }
}

struct MatrixLoad {
  std::uint32_t* to;
  std::uint32_t row;
};

void load_matrices(void* const* lanes) {
  host_sim::Statistics& statistics = host_sim::statistics();
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;  // groups of 4 banks, which a 16-byte row fills
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const std::uint32_t offset = static_cast<const MatrixLoad*>(lanes[lane])->row;
      std::uint32_t words[4];
      std::memcpy(words, host_sim::shared_to_read(offset, 16, lane), 16);
      for (int k = 0; k < 4; ++k)
        static_cast<MatrixLoad*>(lanes[4 * row + k])->to[matrix] = words[k];
      banks |= 1u << offset / 16 % 8;
    }
    ++statistics.matrix_loads;
    statistics.bank_conflicts += 8 - __builtin_popcount(banks);
  }
}

// ldmatrix and stmatrix with .trans.
struct TransposedMatrices {
  std::uint32_t* registers;
  int count;
  std::uint32_t row;
};

template <bool kStore>
void move_transposed(void* const* lanes) {
  const auto of = [&](int lane) -> const TransposedMatrices& {
    return *static_cast<const TransposedMatrices*>(lanes[lane]);
  };
  host_sim::Statistics& statistics = host_sim::statistics();
  for (int matrix = 0; matrix < of(0).count; ++matrix) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const std::uint32_t offset = of(lane).row;
      std::uint16_t elements[8];
      const auto held = [&](int i) {
        return reinterpret_cast<std::uint16_t*>(of(4 * i + row / 2).registers + matrix) + row % 2;
      };
      if constexpr (kStore) {
        for (int i = 0; i < 8; ++i) std::memcpy(&elements[i], held(i), 2);
        std::memcpy(host_sim::shared_to_write(offset, 16, lane), elements, 16);
      } else {
        std::memcpy(elements, host_sim::shared_to_read(offset, 16, lane), 16);
        for (int i = 0; i < 8; ++i) std::memcpy(held(i), &elements[i], 2);
      }
      banks |= 1u << offset / 16 % 8;
    }
    ++statistics.matrix_loads;
    statistics.bank_conflicts += 8 - __builtin_popcount(banks);
  }
}

template <typename Value>
struct Product {
  Value* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

float to_float(__half v) { return __half2float(v); }
float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
float low(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair)});
}

template <typename T>
float high(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair >> 16)});
}

// d += a * b, the products added in order of depth. `unpack` puts a lane's operands in their
// places.
template <int kDepth, typename Value = float, typename Unpack>
void multiply(void* const* lanes, const Unpack& unpack) {
  Value a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& registers = *static_cast<const Product<Value>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    unpack(registers, g, t, a, b);
    for (int k = 0; k < 4; ++k) d[g + k / 2 * 8][2 * t + k % 2] = registers.d[k];
  }
  for (int row = 0; row < 16; ++row) {
    for (int depth = 0; depth < kDepth; ++depth) {
      for (int column = 0; column < 8; ++column) {
        d[row][column] += a[row][depth] * b[depth][column];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    Value* to = static_cast<const Product<Value>*>(lanes[lane])->d;
    for (int k = 0; k < 4; ++k) to[k] = d[g + k / 2 * 8][2 * t + k % 2];
  }
  ++host_sim::statistics().products;
}

template <typename T>
void multiply_halves(void* const* lanes) {
  multiply<16>(lanes,
               [](const Product<float>& from, int g, int t, float (&a)[16][16], float (&b)[16][8]) {
                 for (int k = 0; k < 4; ++k) {
                   const int row = g + k % 2 * 8, depth = 2 * t + k / 2 * 8;
                   a[row][depth] = low<T>(from.a[k]);
                   a[row][depth + 1] = high<T>(from.a[k]);
                 }
                 for (int k = 0; k < 2; ++k) {
                   b[2 * t + 8 * k][g] = low<T>(from.b[k]);
                   b[2 * t + 8 * k + 1][g] = high<T>(from.b[k]);
                 }
               });
}

float tf32(std::uint32_t bits) {
  if (bits != round_to_tf32(bits))
    host_sim::fault("multiplies %08x, which is no TF32 number", bits);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void multiply_tf32(void* const* lanes) {
  multiply<8>(lanes,
              [](const Product<float>& from, int g, int t, float (&a)[16][8], float (&b)[8][8]) {
                for (int k = 0; k < 4; ++k) a[g + k % 2 * 8][t + k / 2 * 4] = tf32(from.a[k]);
                for (int k = 0; k < 2; ++k) b[t + 4 * k][g] = tf32(from.b[k]);
              });
}

// Of bytes: sums of the same sign as a's may pass 2^31, and wrap.
template <typename T>
void multiply_bytes(void* const* lanes) {
  using Of = Product<std::uint32_t>;
  const auto byte = [](auto type, std::uint32_t word, int e) {
    return static_cast<std::uint32_t>(static_cast<decltype(type)>(word >> 8 * e & 0xff));
  };
  multiply<32, std::uint32_t>(lanes, [&](const Of& from, int g, int t, std::uint32_t (&a)[16][32],
                                         std::uint32_t (&b)[32][8]) {
    for (int e = 0; e < 4; ++e) {
      for (int k = 0; k < 4; ++k) {
        a[g + k % 2 * 8][4 * t + e + k / 2 * 16] = byte(T{}, from.a[k], e);
      }
      for (int k = 0; k < 2; ++k) b[4 * t + e + 16 * k][g] = byte(std::int8_t{}, from.b[k], e);
    }
  });
}

template <typename T>
void multiply_bytes(const char* name, std::int32_t* d, const std::uint32_t* a,
                    const std::uint32_t* b) {
  Product<std::uint32_t> operands{reinterpret_cast<std::uint32_t*>(d), a, b};
  host_sim::collective(name, &multiply_bytes<T>, &operands);
}

}  // namespace

float shuffle_xor(float value, int mask) {
  if (mask < 0 || mask >= host_sim::kWarp) host_sim::fault("shuffles with lanes ^ %d", mask);
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = shuffle(bits, host_sim::running_thread() % host_sim::kWarp ^ mask);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

std::uint32_t shuffle(std::uint32_t value, int lane) {
  if (lane < 0 || lane >= host_sim::kWarp) host_sim::fault("shuffles with lane %d", lane);
  Shuffle operands{value, lane, 0};
  host_sim::collective("shfl", &exchange, &operands);
  return operands.received;
}

// "max": NaNs become the canonical one, and +0 is larger than -0.
template <typename T>
std::uint32_t max_nan_pair(std::uint32_t a, std::uint32_t b) {
  const auto larger = [](float x, float y, std::uint32_t x_bits, std::uint32_t y_bits) {
    if (x != x || y != y) return 0x7fffu;
    return x == y ? x_bits & y_bits : x > y ? x_bits : y_bits;
  };
  return larger(low<T>(a), low<T>(b), a & 0xffffu, b & 0xffffu) |
         larger(high<T>(a), high<T>(b), a >> 16, b >> 16) << 16;
}
template std::uint32_t max_nan_pair<__half>(std::uint32_t, std::uint32_t);
template std::uint32_t max_nan_pair<__nv_bfloat16>(std::uint32_t, std::uint32_t);

template <typename T>
std::uint32_t positive_pair(std::uint32_t pair) {
  return (low<T>(pair) > 0 ? 0xffffu : 0) | (high<T>(pair) > 0 ? 0xffff0000u : 0);
}
template std::uint32_t positive_pair<__half>(std::uint32_t);
template std::uint32_t positive_pair<__nv_bfloat16>(std::uint32_t);

void ldmatrix_x4(std::uint32_t (&to)[4], std::uint32_t row) {
  MatrixLoad operands{to, row};
  host_sim::collective("ldmatrix", &load_matrices, &operands);
}

void move_matrices_trans(std::uint32_t* registers, int matrices, std::uint32_t row, bool store) {
  TransposedMatrices operands{registers, matrices, row};
  store ? host_sim::collective("stmatrix", &move_transposed<true>, &operands)
        : host_sim::collective("ldmatrix", &move_transposed<false>, &operands);
}

template <>
void mma_m16n8k16<__half>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
  Product<float> operands{d, a, b};
  host_sim::collective("mma.m16n8k16.f16", &multiply_halves<__half>, &operands);
}

template <>
void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t* b) {
  Product<float> operands{d, a, b};
  host_sim::collective("mma.m16n8k16.bf16", &multiply_halves<__nv_bfloat16>, &operands);
}

void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
  Product<float> operands{d, a, b};
  host_sim::collective("mma.m16n8k8.tf32", &multiply_tf32, &operands);
}

template <>
void mma_m16n8k32<std::uint8_t>(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t* b) {
  multiply_bytes<std::uint8_t>("mma.m16n8k32.u8.s8", d, a, b);
}

template <>
void mma_m16n8k32<std::int8_t>(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t* b) {
  multiply_bytes<std::int8_t>("mma.m16n8k32.s8.s8", d, a, b);
}

}  // namespace resnet_fused::ptx
