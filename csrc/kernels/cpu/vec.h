// One vector register of ISA_LANES floats, inside an instruction set's namespace; included first by
// every `*_tile.h`. Partial loads fill with zeros; partial stores leave the rest untouched.
#define ISA_INLINE ISA inline __attribute__((always_inline))

constexpr int kLanes = ISA_LANES;
typedef float Vec __attribute__((vector_size(ISA_LANES * 4)));

ISA_INLINE Vec splat(float value) { return value - Vec{}; }

ISA_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ISA_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

ISA_INLINE Vec load(const float* p, std::int64_t count) {
  if (count >= kLanes) return load(p);
  float padded[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

ISA_INLINE void store(float* p, Vec v, std::int64_t count) {
  if (count >= kLanes) return store(p, v);
  float padded[kLanes];
  store(padded, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// max(v, 0) that keeps NaN, as torch.relu does.
ISA_INLINE Vec relu(Vec v) { return v < Vec{} ? Vec{} : v; }
