// The one description of a tensor that the bindings take, and what they check of it.
//
// Python gives a tuple (address, type, sizes, strides, tensor), built by
// resnet_fused/_extension.py: the type as a number of ScalarType, strides in elements, and the
// tensor itself, or None, which is kept alive for as long as the tuple is.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

enum class ScalarType : int {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kUInt8,
  kInt8,
  kInt32,
  kE4m3
};

constexpr std::int64_t element_size(ScalarType type) {
  constexpr std::int64_t kSizes[] = {4, 2, 2, 8, 1, 1, 4, 1};
  return kSizes[static_cast<int>(type)];
}

constexpr const char* name_of(ScalarType type) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "float64",
                                    "uint8",   "int8",    "int32",    "float8_e4m3fn"};
  return kNames[static_cast<int>(type)];
}

// Bytes from `first` to before `end`.
struct Span {
  std::uintptr_t first = 0, end = 0;

  std::size_t bytes() const { return end - first; }
  bool overlaps(const Span& other) const { return first < other.end && other.first < end; }
  bool contains(const Span& other) const { return first <= other.first && other.end <= end; }
  bool operator==(const Span& other) const { return first == other.first && end == other.end; }
};

struct TensorArg {
  static constexpr int kMaxRank = 4;

  std::uintptr_t address = 0;
  ScalarType type = ScalarType::kFloat32;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> sizes{}, strides{};
  PyObject* tensor = nullptr;  // borrowed from the tuple

  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= sizes[i];
    return count;
  }

  // From the first element to the end of the last one.
  Span span() const {
    if (numel() == 0) return {address, address};
    std::int64_t last = 0;
    for (int i = 0; i < rank; ++i) last += (sizes[i] - 1) * strides[i];
    return {address, address + static_cast<std::uintptr_t>((last + 1) * element_size(type))};
  }

  // Whether the elements lie one after another in the order of `axes`, the slowest first. Strides
  // along sizes of 1 may be any.
  bool dense(std::initializer_list<int> axes) const {
    std::int64_t expected = 1;
    for (auto axis = axes.end(); axis != axes.begin();) {
      --axis;
      if (sizes[*axis] != 1 && strides[*axis] != expected) return false;
      expected *= sizes[*axis];
    }
    return true;
  }
};

[[noreturn]] inline void refuse(const std::string& message) {
  throw pybind11::value_error(message);
}

inline std::string listed(const std::int64_t* sizes, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

inline void check_type(const char* name, const TensorArg& tensor, ScalarType type) {
  if (tensor.type != type) {
    refuse(std::string(name) + " must be " + name_of(type) + ", found " + name_of(tensor.type));
  }
}

inline void check_sizes(const char* name, const TensorArg& tensor,
                        std::initializer_list<std::int64_t> sizes) {
  const int rank = static_cast<int>(sizes.size());
  if (tensor.rank == rank && std::equal(sizes.begin(), sizes.end(), tensor.sizes.begin())) return;
  refuse(std::string(name) + " must be of size " + listed(sizes.begin(), rank) + ", found " +
         listed(tensor.sizes.data(), tensor.rank));
}

inline void check_rank(const char* name, const TensorArg& tensor, int rank) {
  if (tensor.rank != rank) {
    refuse(std::string(name) + " must have " + std::to_string(rank) + " dimensions, found " +
           listed(tensor.sizes.data(), tensor.rank));
  }
}

// Sizes are those of NCHW everywhere; memory is NHWC.
inline void check_nhwc(const char* name, const TensorArg& tensor) {
  check_rank(name, tensor, 4);
  if (!tensor.dense({0, 2, 3, 1})) refuse(std::string(name) + " must be dense and channels_last");
}

inline void check_contiguous(const char* name, const TensorArg& tensor, int rank) {
  check_rank(name, tensor, rank);
  for (std::int64_t expected = 1; rank-- > 0; expected *= tensor.sizes[rank]) {
    if (tensor.sizes[rank] != 1 && tensor.strides[rank] != expected && tensor.numel() > 0) {
      refuse(std::string(name) + " must be contiguous");
    }
  }
}

// An array of that type and those sizes, contiguous.
inline void check_array(const char* name, const TensorArg& tensor, ScalarType type,
                        std::initializer_list<std::int64_t> sizes) {
  check_type(name, tensor, type);
  check_sizes(name, tensor, sizes);
  check_contiguous(name, tensor, static_cast<int>(sizes.size()));
}

// An NHWC tensor of the type and the sizes of `other`.
inline void check_like(const char* name, const TensorArg& tensor, const TensorArg& other) {
  check_nhwc(name, tensor);
  check_type(name, tensor, other.type);
  const auto& [batch, channels, height, width] = other.sizes;
  check_sizes(name, tensor, {batch, channels, height, width});
}

inline void check_apart(const char* a_name, const TensorArg& a, const char* b_name,
                        const TensorArg& b) {
  if (a.span().overlaps(b.span())) refuse(std::string(a_name) + " overlaps " + b_name);
}

// Throws unless `out` is `tensor` itself or apart from it.
inline void check_same_or_apart(const char* out_name, const TensorArg& out, const char* name,
                                const TensorArg& tensor) {
  if (out.address != tensor.address) check_apart(out_name, out, name, tensor);
}

namespace pybind11::detail {

template <>
struct type_caster<TensorArg> {
  PYBIND11_TYPE_CASTER(TensorArg, const_name("TensorArg"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 5) return false;
    PyObject* const fields = source.ptr();
    PyObject* const sizes = PyTuple_GET_ITEM(fields, 2);
    PyObject* const strides = PyTuple_GET_ITEM(fields, 3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t rank = PyTuple_GET_SIZE(sizes);
    if (rank > TensorArg::kMaxRank || PyTuple_GET_SIZE(strides) != rank) return false;
    value.address = PyLong_AsSize_t(PyTuple_GET_ITEM(fields, 0));
    const long type = PyLong_AsLong(PyTuple_GET_ITEM(fields, 1));
    value.rank = static_cast<int>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
      value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    if (PyErr_Occurred()) throw error_already_set();
    if (type < 0 || type > static_cast<long>(ScalarType::kE4m3)) {
      refuse("a tensor has a type of number " + std::to_string(type));
    }
    value.type = static_cast<ScalarType>(type);
    value.tensor = PyTuple_GET_ITEM(fields, 4);
    check_representable();
    return true;
  }

 private:
  // That sizes, offsets and their sums stay far from overflow.
  void check_representable() const {
    constexpr std::int64_t kLimit = std::int64_t{1} << 48;
    std::int64_t count = 1, reach = 1;
    bool empty = false;
    for (int i = 0; i < value.rank; ++i) {
      const std::int64_t size = value.sizes[i];
      if (size < 0) refuse("a tensor has a negative size of " + std::to_string(size));
      empty |= size == 0;
      if (size == 0) continue;
      if (count > kLimit / size) refuse("a tensor has more than 2^48 elements");
      count *= size;
    }
    for (int i = 0; i < value.rank; ++i) {
      const std::int64_t size = value.sizes[i], stride = value.strides[i];
      if (size <= 1) continue;
      if (stride < 0 || stride > kLimit / size) {
        refuse("a tensor has a stride of " + std::to_string(stride));
      }
      reach += (size - 1) * stride;
    }
    if (!empty && reach > kLimit) refuse("a tensor reaches over more than 2^48 elements");
  }
};

}  // namespace pybind11::detail
