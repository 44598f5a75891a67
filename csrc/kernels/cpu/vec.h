// One vector register of ISA_LANES floats, inside an instruction set's namespace; included first by
// every `*_tile.h`. Numbers in memory are fp32 or bfloat16, in registers always fp32. Partial loads
// fill with zeros; partial stores leave the rest untouched.
#define ISA_INLINE ISA inline __attribute__((always_inline))

constexpr int kLanes = ISA_LANES;
typedef float Vec __attribute__((vector_size(ISA_LANES * 4)));
typedef std::uint32_t VecBits __attribute__((vector_size(ISA_LANES * 4)));
typedef BFloat16 VecHalves __attribute__((vector_size(ISA_LANES * 2)));

ISA_INLINE Vec splat(float value) { return value - Vec{}; }

ISA_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ISA_INLINE Vec load(const BFloat16* p) {
  VecHalves halves;
  std::memcpy(&halves, p, sizeof halves);
#if ISA_LANES == 16  // where compilers convert in halves
  return (Vec)((VecBits)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#else
  return (Vec)(__builtin_convertvector(halves, VecBits) << 16);
#endif
}

ISA_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to the nearest, ties to even; NaN stays NaN.
ISA_INLINE void store(BFloat16* p, Vec v) {
#if defined(ISA_BF16) && ISA_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(ISA_BF16) && ISA_LANES == 4
  const bfloat16x4_t halves = vcvt_bf16_f32((float32x4_t)v);
  std::memcpy(p, &halves, sizeof halves);
#else
  const VecBits bits = (VecBits)v;
  const VecBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const VecBits kept = v == v ? rounded : bits >> 16 | 0x40;
  const VecHalves halves = __builtin_convertvector(kept, VecHalves);
  std::memcpy(p, &halves, sizeof halves);
#endif
}

#if ISA_LANES == 16
// Less than all lanes, none for a negative count.
ISA_INLINE __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>((1u << std::max<std::int64_t>(count, 0)) - 1);
}
#endif

template <typename Element>
ISA_INLINE Vec load(const Element* p, std::int64_t count) {
  if (count >= kLanes) return load(p);
#if ISA_LANES == 16
  if constexpr (std::is_same_v<Element, float>) {
    return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p);
  }
#endif
  Element padded[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <typename Element>
ISA_INLINE void store(Element* p, Vec v, std::int64_t count) {
  if (count >= kLanes) return store(p, v);
#if ISA_LANES == 16
  if constexpr (std::is_same_v<Element, float>) {
    return _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
  }
#endif
  Element padded[kLanes];
  store(padded, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// The least result with or without a ReLU.
ISA_INLINE Vec least_result(bool relu) {
  return splat(relu ? 0.0f : -std::numeric_limits<float>::infinity());
}

// max(v, least), where NaN stays NaN, as torch.relu has it.
ISA_INLINE Vec at_least(Vec v, Vec least) {
#if ISA_LANES == 16  // the second operand where either is NaN
  return (Vec)_mm512_max_ps((__m512)least, (__m512)v);
#elif ISA_LANES == 8
  return (Vec)_mm256_max_ps((__m256)least, (__m256)v);
#else
  return v < least ? least : v;
#endif
}

// The batch norm of a vector's channels.
struct NormTerms {
  Vec mean, scale, bias;

  NormTerms() = default;
  ISA_INLINE NormTerms(const TermsAt& terms, int first)
      : mean(load(terms.mean + first)),
        scale(load(terms.scale + first)),
        bias(load(terms.bias + first)) {}

  ISA_INLINE Vec normalise(Vec v) const { return (v - mean) * scale + bias; }
  ISA_INLINE Vec normalise(Vec v, Vec residual) const {
    return (v - mean) * scale + (bias + residual);
  }
};

// max(batch norm of v, plus residual; least).
ISA_INLINE Vec normalise(Vec v, const TermsAt& terms, Vec residual, Vec least) {
  return at_least(NormTerms(terms, 0).normalise(v, residual), least);
}

ISA_INLINE Vec normalise(Vec v, const TermsAt& terms, Vec least) {
  return at_least(NormTerms(terms, 0).normalise(v), least);
}

// Neighbouring vectors at once.
template <typename Element, int kCount>
ISA_INLINE void load_row(const Element* p, Vec (&v)[kCount]) {
#pragma GCC unroll 2
  for (int j = 0; j < kCount; ++j) v[j] = load(p + j * kLanes);
}

template <typename Element, int kCount>
ISA_INLINE void store_row(Element* p, const Vec (&v)[kCount]) {
#pragma GCC unroll 2
  for (int j = 0; j < kCount; ++j) store(p + j * kLanes, v[j]);
}

#if defined(ISA_BF16) && ISA_LANES == 16
ISA_INLINE void store_row(BFloat16* p, const Vec (&v)[2]) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]));
}
#endif

ISA_INLINE Vec load_words(const std::uint32_t* p) {
  return load(reinterpret_cast<const float*>(p));
}

// What a convolution multiplies: 32-bit words, each one fp32 number or a pair of bfloat16 ones.
// AVX2 multiplies no pairs but their numbers, as fp32: the first ones of all words of a tile, then
// the second ones, so that its registers need to hold but one half of each word at a time. There a
// loop over parts hides its pointers from the compiler, which would keep words in registers not to
// read them again.
#if defined(ISA_BF16) && ISA_LANES == 8
constexpr Format kFormat = Format::kBFloat16;
using Element = BFloat16;
constexpr int kParts = 2;

// One number of each pair.
ISA_INLINE Vec part_of(__m256i pairs, int part) {
  return (Vec)(part == 0 ? _mm256_slli_epi32(pairs, 16)
                         : _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}

ISA_INLINE Vec load_factors(const std::uint32_t* p, int part) {
  return part_of((__m256i)load_words(p), part);
}

ISA_INLINE Vec multiply_add(std::uint32_t pair, Vec factors, Vec sum, int part) {
  return sum + part_of(_mm256_set1_epi32(static_cast<int>(pair)), part) * factors;
}
#elif defined(ISA_BF16)
constexpr Format kFormat = Format::kBFloat16;
using Element = BFloat16;
constexpr int kParts = 1;

ISA_INLINE Vec load_factors(const std::uint32_t* p, int) { return load_words(p); }

ISA_INLINE Vec multiply_add(std::uint32_t pair, Vec pairs, Vec sum, int) {
#if ISA_LANES == 16
  const __m512i a = _mm512_set1_epi32(static_cast<int>(pair));
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)pairs);
#else
  const bfloat16x8_t a = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  return (Vec)vbfdotq_f32((float32x4_t)sum, a, vreinterpretq_bf16_f32((float32x4_t)pairs));
#endif
}
#else
constexpr Format kFormat = Format::kFloat32;
using Element = float;
constexpr int kParts = 1;

ISA_INLINE Vec load_factors(const std::uint32_t* p, int) { return load_words(p); }

ISA_INLINE Vec multiply_add(std::uint32_t word, Vec words, Vec sum, int) {
  float factor;
  std::memcpy(&factor, &word, sizeof factor);
  return sum + splat(factor) * words;
}
#endif
