// The vector code of batch_norm.cpp, included once per instruction set by for_each_isa.h.
typedef double Doubles __attribute__((vector_size(ISA_LANES * 4)));

template <typename Number>
ISA void read(const Vector& vector, std::int64_t first, std::int64_t count, double* to) {
  const auto* const from = static_cast<const Number*>(vector.data) + first * vector.stride;
  if (vector.stride == 1 && count == kChannels) {
    for (std::int64_t i = 0; i < kChannels; ++i) to[i] = number(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = number(from[i * vector.stride]);
  }
}

// Numbers `first` to before first + count; `absent` where there is no vector.
ISA void read(const Vector& vector, std::int64_t first, std::int64_t count, double absent,
              double* to) {
  if (vector.data == nullptr) {
    std::fill_n(to, count, absent);
    return;
  }
  switch (vector.type) {
    case VectorType::kFloat64:
      return read<double>(vector, first, count, to);
    case VectorType::kFloat32:
      return read<float>(vector, first, count, to);
    case VectorType::kBFloat16:
      return read<BFloat16>(vector, first, count, to);
  }
}

ISA inline Doubles square_root(Doubles v) {
#if ISA_LANES == 16
  return (Doubles)_mm512_sqrt_pd((__m512d)v);
#elif ISA_LANES == 8
  return (Doubles)_mm256_sqrt_pd((__m256d)v);
#else
  return Doubles{std::sqrt(v[0]), std::sqrt(v[1])};
#endif
}

// The terms of channels `first` to before first + count, at most kChannels, as means, scales and
// biases `padded` numbers apart.
ISA void terms(const BatchNorm& bn, std::int64_t first, std::int64_t count, float* values,
               std::int64_t padded) {
  constexpr std::int64_t kAtOnce = sizeof(Doubles) / sizeof(double);
  double mean[kChannels] = {}, var[kChannels] = {}, weight[kChannels] = {}, bias[kChannels] = {};
  read(bn.mean, first, count, 0, mean);
  read(bn.var, first, count, 1, var);
  read(bn.weight, first, count, 1, weight);
  read(bn.bias, first, count, 0, bias);
  double scale[kChannels];
  for (std::int64_t k = 0; k < kChannels; k += kAtOnce) {
    Doubles v, w;
    std::memcpy(&v, var + k, sizeof v);
    std::memcpy(&w, weight + k, sizeof w);
    w /= square_root(v + bn.eps);
    std::memcpy(scale + k, &w, sizeof w);
  }
  for (std::int64_t k = 0; k < count; ++k) {
    values[k] = static_cast<float>(mean[k]);
    values[padded + k] = static_cast<float>(scale[k]);
    values[2 * padded + k] = static_cast<float>(bias[k] - (mean[k] - values[k]) * scale[k]);
  }
}
