// Blocks by size, of whole huge pages where they are large. A request takes a kept block of its own
// size: the next step asks for the sizes of this one again. Of several it takes the one that came
// back last, of which caches still hold the most.
#include "train_memory.h"

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;

constexpr std::size_t rounded(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePage ? kHugePage : kPage;
  return (bytes + unit - 1) / unit * unit + (bytes == 0 ? unit : 0);
}

constexpr std::align_val_t alignment(std::size_t size) {
  return std::align_val_t{size >= kHugePage ? kHugePage : kPage};
}

std::size_t most_kept() {
#ifdef __linux__
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages > 0 && page > 0) return static_cast<std::size_t>(pages) / 8 * page;
#endif
  return std::size_t{1} << 30;
}

struct Kept {
  std::mutex mutex;
  std::multimap<std::size_t, void*> blocks;
  std::size_t bytes = 0;
  const std::size_t limit = most_kept();
};

// Never destroyed: tensors may outlive every static object.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

}  // namespace

void* take_memory(std::size_t bytes) {
  const std::size_t size = rounded(bytes);
  Kept& all = kept();
  {
    const std::lock_guard lock(all.mutex);
    const auto after = all.blocks.upper_bound(size);
    if (after != all.blocks.begin() && std::prev(after)->first == size) {
      const auto found = std::prev(after);
      void* const block = found->second;
      all.bytes -= size;
      all.blocks.erase(found);
      return block;
    }
  }
  void* const block = ::operator new(size, alignment(size));
#ifdef __linux__
  if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

void give_memory(void* memory, std::size_t bytes) noexcept {
  const std::size_t size = rounded(bytes);
  Kept& all = kept();
  try {
    const std::lock_guard lock(all.mutex);
    if (all.bytes + size <= all.limit) {
      all.blocks.emplace(size, memory);
      all.bytes += size;
      return;
    }
  } catch (const std::bad_alloc&) {  // of the map's node
  }
  ::operator delete(memory, alignment(size));
}

void release_memory() noexcept {
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  for (const auto& [size, block] : all.blocks) ::operator delete(block, alignment(size));
  all.blocks.clear();
  all.bytes = 0;
}

std::size_t kept_memory() noexcept {
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  return all.bytes;
}

}  // namespace resnet_fused::cpu
