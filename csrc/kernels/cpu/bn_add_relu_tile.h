// The vector code of bn_add_relu.cpp, included once per instruction set by for_each_isa.h.
#include "vec.h"

template <typename Number>
ISA_INLINE void finish_pixels(const BnAddRelu& op, const Terms& terms, std::int64_t first,
                              std::int64_t last) {
  for (std::int64_t pixel = first; pixel < last; ++pixel) {
    const std::int64_t offset = pixel * op.channels;
    const Number* const residual =
        static_cast<const Number*>(op.residual.data) + op.residual.offset(pixel);
    for (std::int64_t c = 0; c < op.channels; c += kLanes) {
      const std::int64_t valid = op.channels - c;
      const Vec x = load(static_cast<const Number*>(op.x) + offset + c, valid);
      const Vec added =
          c < op.residual.channels ? load(residual + c, op.residual.channels - c) : Vec{};
      store(static_cast<Number*>(op.out) + offset + c,
            normalise(x, terms.at(c), added, least_result(op.relu)), valid);
    }
  }
}

ISA void bn_add_relu_task(const BnAddRelu& op, const Terms& terms, std::int64_t first,
                          std::int64_t last) {
  if (op.format == Format::kFloat32) {
    finish_pixels<float>(op, terms, first, last);
  } else {
    finish_pixels<BFloat16>(op, terms, first, last);
  }
}
