// Memory of training's activations and of the kernels' packed weights, kept for the next step:
// fresh pages from the system cost more than what is then done with them.
#pragma once

#include <cstddef>

namespace resnet_fused::cpu {

// At least `bytes`, aligned to pages; what an earlier step gave back if it fits. Threads may share
// it. Throws std::bad_alloc.
void* take_memory(std::size_t bytes);

// Gives back what take_memory returned for as many bytes. It is kept for the next taker as long as
// less than an eighth of the machine's memory is.
void give_memory(void* memory, std::size_t bytes) noexcept;

// Returns to the system what is kept and in nobody's use.
void release_memory() noexcept;

// Bytes that are kept and in nobody's use.
std::size_t kept_memory() noexcept;

// Some of it for the duration of a scope.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : data_(take_memory(bytes)), bytes_(bytes) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { give_memory(data_, bytes_); }

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_;
};

}  // namespace resnet_fused::cpu
