// The micro-kernel of the quantised kernels, inside an instruction set's namespace; included first
// by their `*_tile.h`. It keeps kTileRows x kTileColumns sums in registers (AVX-512: 24 of 32 in 4
// vectors a row; AVX2: 12 of 16, in 2), and takes words of 4 activations, broadcast from a row.
//
// With VNNI each word costs one VPDPBUSD with every vector of weights. Without, VPMADDUBSW adds
// pairs of products in 16 bits, VPMADDWD with ones adds those to 32. The first saturates where
// weights of one sign exceed 128 together (255 x 128 < 2^15). A vector of weights in which a pair
// does so in any column is split beforehand, into magnitudes and signs: the sign is applied to
// x - 128, by one exclusive or, and products of up to 128 x 128 fit in pairs. So a multiplication
// never saturates, at 3 instructions for 32 products, or 4 where vectors are split.
#include "vec.h"

typedef std::int32_t Sums __attribute__((vector_size(ISA_LANES * 4)));

#ifdef ISA_AMX
constexpr int kTileRows = kTileRegisterRows;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileColumns = kLanes == 16 ? 64 : 16;

ISA_INLINE Sums splat(std::int32_t value) { return value - Sums{}; }

ISA_INLINE Sums load_sums(const void* p) {
  Sums v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ISA_INLINE void store_sums(std::int32_t* p, Sums v) { std::memcpy(p, &v, sizeof v); }

#ifdef ISA_VNNI
// sum += the products of 4 unsigned and 4 signed bytes, lane by lane.
ISA_INLINE Sums multiply_add(Sums bytes, Sums weights, Sums sum) {
#if ISA_LANES == 16
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)weights);
#else
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)weights);
#endif
}
#else
// A vector of weights as it is read: 32 bytes of magnitudes up to 128 and 32 of masks, or, in a
// plain one, the weights themselves and zeros, which no mask is.
constexpr std::int64_t kVectorBytes = 2 * sizeof(Sums);
constexpr std::int64_t kWordBytes = kVectorBytes * kTileColumns / kLanes;

ISA_INLINE bool is_plain(const std::int8_t* vector) { return vector[sizeof(Sums)] == 0; }

// sum += pairs of 16 bits.
ISA_INLINE Sums add_pairs(__m256i pairs, Sums sum) {
  return sum + (Sums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// sum += the products of 4 unsigned bytes x and 4 plain weights, lane by lane.
ISA_INLINE Sums multiply_plain(Sums x, Sums weights, Sums sum) {
  return add_pairs(_mm256_maddubs_epi16((__m256i)x, (__m256i)weights), sum);
}

// The same with split weights w, but for terms that do not depend on x: the mask makes x - 128 of
// x, and 127 - x where w is negative.
ISA_INLINE Sums multiply_split(Sums x, Sums magnitudes, Sums masks, Sums sum) {
  return add_pairs(_mm256_maddubs_epi16((__m256i)magnitudes, (__m256i)(x ^ masks)), sum);
}

// Whether a pair of weights of one sign exceeds 128.
ISA_INLINE bool may_saturate(Sums weights) {
  const __m256i w = (__m256i)weights, zero = {}, ones = _mm256_set1_epi8(1);
  const __m256i above = _mm256_maddubs_epi16(ones, _mm256_max_epi8(w, zero));
  const __m256i below = _mm256_maddubs_epi16(ones, _mm256_min_epi8(w, zero));
  const __m256i limit = _mm256_set1_epi16(128);
  const __m256i beyond = _mm256_or_si256(_mm256_cmpgt_epi16(above, limit),
                                         _mm256_cmpgt_epi16(_mm256_sub_epi16(zero, limit), below));
  return _mm256_movemask_epi8(beyond) != 0;
}

// Writes `words` words of kTileColumns columns, which lie `pitch` bytes apart, as they are read.
// start: what each column's sum has to begin with, against the terms that do not depend on x.
ISA_INLINE void prepare(const std::int8_t* packed, std::int64_t pitch, std::int64_t words,
                        std::int8_t* to, std::int32_t* start) {
  constexpr int kVecs = kTileColumns / kLanes;
  Sums sum[kVecs] = {};
  for (std::int64_t word = 0; word < words; ++word, packed += pitch) {
    for (int j = 0; j < kVecs; ++j, to += kVectorBytes) {
      const __m256i as_packed = (__m256i)load_sums(packed + j * kLanes * 4);
      // Without a branch, which nothing would predict.
      const __m256i split = _mm256_set1_epi32(-static_cast<int>(may_saturate((Sums)as_packed)));
      const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), as_packed);
      const Sums masks =
          (Sums)_mm256_and_si256(_mm256_xor_si256(negative, _mm256_set1_epi8(-128)), split);
      const Sums weights = (Sums)_mm256_blendv_epi8(as_packed, _mm256_abs_epi8(as_packed), split);
      sum[j] = multiply_split(Sums{}, weights, masks, sum[j]);  // of zeros: those terms
      std::memcpy(to, &weights, sizeof weights);
      std::memcpy(to + sizeof weights, &masks, sizeof masks);
    }
  }
  for (int j = 0; j < kVecs; ++j) store_sums(start + j * kLanes, -sum[j]);
}

template <int kRows>
ISA_INLINE Sums broadcast_word(const std::uint8_t* const (&rows)[kRows], int r, std::int64_t at) {
  std::int32_t word;
  std::memcpy(&word, at_offset(rows[r], at), sizeof word);
  return splat(word);
}

// sum += words of kRows rows * one word of weights, of which vector kSplit alone is split, or none.
// Plain weights are read anew for each row: kept, they would push sums out of registers, and as an
// operand in memory they cost no instruction. And there is one offset to move on, not a pointer a
// row.
template <int kSplit, int kRows, int kVecs>
ISA_INLINE void accumulate_rows(Sums (&sum)[kRows][kVecs], const std::uint8_t* const (&rows)[kRows],
                                std::int64_t& at, const std::int8_t* weights) {
  Sums magnitudes = {};
  if constexpr (kSplit >= 0) magnitudes = load_sums(weights + kSplit * kVectorBytes);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    asm volatile("" : "+r"(at) : : "memory");
    const Sums x = broadcast_word(rows, r, at);
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      const std::int8_t* const from = weights + j * kVectorBytes;
      sum[r][j] = j == kSplit
                      ? multiply_split(x, magnitudes, load_sums(from + sizeof(Sums)), sum[r][j])
                      : multiply_plain(x, load_sums(from), sum[r][j]);
    }
  }
}

// The same, all vectors split, one by one: their masks and magnitudes take the registers.
template <int kRows, int kVecs>
ISA_INLINE void accumulate_split(Sums (&sum)[kRows][kVecs],
                                 const std::uint8_t* const (&rows)[kRows], std::int64_t& at,
                                 const std::int8_t* weights) {
#pragma GCC unroll 2
  for (int j = 0; j < kVecs; ++j, weights += kVectorBytes) {
    asm volatile("" : "+r"(at) : : "memory");
    const Sums magnitudes = load_sums(weights), masks = load_sums(weights + sizeof magnitudes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      sum[r][j] = multiply_split(broadcast_word(rows, r, at), magnitudes, masks, sum[r][j]);
    }
  }
}

template <int kRows, int kVecs>
ISA_INLINE void accumulate_word(Sums (&sum)[kRows][kVecs], const std::uint8_t* const (&rows)[kRows],
                                std::int64_t& at, const std::int8_t* weights) {
  const bool first = is_plain(weights), last = is_plain(weights + (kVecs - 1) * kVectorBytes);
  if (first && last) {
    accumulate_rows<-1>(sum, rows, at, weights);
  } else if (first) {
    accumulate_rows<kVecs - 1>(sum, rows, at, weights);
  } else if (last) {
    accumulate_rows<0>(sum, rows, at, weights);
  } else {
    accumulate_split(sum, rows, at, weights);
  }
}
#endif

// kTileColumns columns of weights as accumulate() reads them, and what their sums start from.
struct Columns {
  const std::int8_t* weights;
  std::int64_t pitch;  // bytes from one word's weights to the next's
  const std::int32_t* start;
};

#ifdef ISA_VNNI
constexpr std::int64_t columns_bytes(std::int64_t) { return 0; }

// Of packed columns, that have `words` words and follow each other `pitch` bytes apart.
ISA_INLINE Columns columns_of(const std::int8_t* packed, std::int64_t pitch, std::int64_t,
                              const std::int32_t* start, std::int8_t*) {
  return {packed, pitch, start};
}
#else
constexpr std::int64_t columns_bytes(std::int64_t words) {
  return words * kWordBytes + kTileColumns * sizeof(std::int32_t);
}

// Likewise, prepared in columns_bytes(words) of memory.
ISA_INLINE Columns columns_of(const std::int8_t* packed, std::int64_t pitch, std::int64_t words,
                              const std::int32_t* start, std::int8_t* memory) {
  auto* const own_start = reinterpret_cast<std::int32_t*>(memory + words * kWordBytes);
  prepare(packed, pitch, words, memory, own_start);
  for (int j = 0; j < kTileColumns; ++j) own_start[j] += start[j];
  return {memory, kWordBytes, own_start};
}
#endif

// Lines of memory that are fetched into L2 meanwhile, one with each word.
struct Lines {
  const char* next = nullptr;
  std::int64_t left = 0;
};

// sum += rows[kRows][words from byte `first` on] * weights[words][kVecs vectors], whose rows lie
// `pitch` bytes apart.
template <int kRows, int kVecs>
ISA_INLINE void accumulate(Sums (&sum)[kRows][kVecs], const std::uint8_t* const (&rows)[kRows],
                           std::int64_t first, std::int64_t words, const std::int8_t* weights,
                           std::int64_t pitch, Lines& ahead) {
#ifndef ISA_VNNI
  pitch = kVecs * kVectorBytes;  // a constant
#endif
  const char* line = ahead.next;
  const std::int64_t step = ahead.left > 0 ? 64 : 0;
  const std::int8_t* const end = weights + words * pitch;
  for (std::int64_t at = first; weights != end; at += 4, weights += pitch, line += step) {
    __builtin_prefetch(line, 0, 2);
#ifdef ISA_VNNI
    Sums columns[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) columns[j] = load_sums(weights + j * kLanes * 4);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      std::int32_t word;
      std::memcpy(&word, at_offset(rows[r], at), sizeof word);
      const Sums bytes = splat(word);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[r][j] = multiply_add(bytes, columns[j], sum[r][j]);
    }
#else
    accumulate_word(sum, rows, at, weights);
#endif
  }
  ahead = {line, ahead.left - step / 64 * words};
}

ISA_INLINE Vec to_float(Sums v) {
#if ISA_LANES == 16
  return (Vec)_mm512_cvtepi32_ps((__m512i)v);
#else
  return (Vec)_mm256_cvtepi32_ps((__m256i)v);
#endif
}

// To the nearest integer, halves to even; what int32 does not hold becomes its least number.
ISA_INLINE Sums rounded(Vec v) {
#if ISA_LANES == 16
  return (Sums)_mm512_cvtps_epi32((__m512)v);
#else
  return (Sums)_mm256_cvtps_epi32((__m256)v);
#endif
}

ISA_INLINE Vec at_most(Vec v, Vec most) {
#if ISA_LANES == 16
  return (Vec)_mm512_min_ps((__m512)v, (__m512)most);
#else
  return (Vec)_mm256_min_ps((__m256)v, (__m256)most);
#endif
}

// rne(float32(sum) * multiplier), at most what the result holds; at least is left to narrowing.
ISA_INLINE Sums requantised(Sums sum, Vec multiplier, Vec most) {
  return rounded(at_most(to_float(sum) * multiplier, most));
}

// kLanes numbers, clamped to uint8 or int8.
ISA_INLINE void store_bytes(std::uint8_t* p, Sums v, bool is_signed) {
#if ISA_LANES == 16
  const __m128i bytes =
      is_signed ? _mm512_cvtsepi32_epi8((__m512i)v)
                : _mm512_cvtusepi32_epi8(_mm512_max_epi32((__m512i)v, _mm512_setzero_si512()));
  std::memcpy(p, &bytes, sizeof bytes);
#else
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i bytes = is_signed ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words);
  std::memcpy(p, &bytes, kLanes);
#endif
}

#if ISA_LANES == 16
// 64 numbers in 4 vectors.
ISA_INLINE void store_line(std::uint8_t* p, const Sums (&v)[4], bool is_signed) {
  const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
  const __m512i bytes = is_signed ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  // Packing takes turns between the vectors in every 128 bits.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}
#endif

#if ISA_LANES == 8
// 16 numbers in 2 vectors.
ISA_INLINE void store_line(std::uint8_t* p, const Sums (&v)[2], bool is_signed) {
  const __m256i words = _mm256_permute4x64_epi64(  // packing takes turns in every 128 bits
      _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), 0xd8);
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  const __m128i bytes = is_signed ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high);
  std::memcpy(p, &bytes, sizeof bytes);
}
#endif

ISA_INLINE Sums load_bytes(const std::uint8_t* p, bool is_signed) {
#if ISA_LANES == 16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Sums)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Sums)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#endif
}

// Zeros follow the first `count`.
ISA_INLINE Sums load_bytes(const std::uint8_t* p, bool is_signed, std::int64_t count) {
  if (count >= kLanes) return load_bytes(p, is_signed);
  std::uint8_t padded[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load_bytes(padded, is_signed);
}

// kVecs vectors of numbers.
template <int kVecs>
ISA_INLINE void load_row(const std::uint8_t* p, Sums (&v)[kVecs], bool is_signed) {
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) v[j] = load_bytes(p + j * kLanes, is_signed);
}

template <int kVecs>
ISA_INLINE void store_row(std::uint8_t* p, const Sums (&v)[kVecs], bool is_signed) {
  if constexpr (kVecs == kTileColumns / kLanes) return store_line(p, v, is_signed);
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) store_bytes(p + j * kLanes, v[j], is_signed);
}

// Sets all rows to the same kVecs vectors.
template <int kRows, int kVecs>
ISA_INLINE void begin(Sums (&sum)[kRows][kVecs], const std::int32_t* from) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = load_sums(from + j * kLanes);
  }
}

// A function for each number of vectors and rows: Tile<kRows, kVecs>::run.
template <typename Function, template <int, int> typename Tile, int kVecs, int... Indices>
constexpr std::array<Function, kTileRows> functions_of(std::integer_sequence<int, Indices...>) {
  return {Tile<Indices + 1, kVecs>::run...};
}

template <typename Function, template <int, int> typename Tile>
struct Tiles {
  static constexpr auto kRowCounts = std::make_integer_sequence<int, kTileRows>{};
#if ISA_LANES == 16
  static constexpr std::array<Function, kTileRows> kFunctions[] = {
      functions_of<Function, Tile, 1>(kRowCounts), functions_of<Function, Tile, 2>(kRowCounts),
      functions_of<Function, Tile, 3>(kRowCounts), functions_of<Function, Tile, 4>(kRowCounts)};
#else
  static constexpr std::array<Function, kTileRows> kFunctions[] = {
      functions_of<Function, Tile, 1>(kRowCounts), functions_of<Function, Tile, 2>(kRowCounts)};
#endif

  // For up to kTileRows rows and kTileColumns columns.
  static Function at(std::int64_t rows, std::int64_t columns) {
    return kFunctions[std::min<std::int64_t>(columns, kTileColumns) / kLanes - 1]
                     [std::min<std::int64_t>(rows, kTileRows) - 1];
  }
};
