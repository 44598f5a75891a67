// Whether memory was written to, as the system's page tables tell: at next to no cost, where a
// fingerprint reads all of it. Linux 6.7 and later; elsewhere nothing is ever known.
// Implementation and guarantees: page_watch.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "fingerprint.h"

namespace resnet_fused::cpu {

class PageWatch {
 public:
  // Of the whole pages within each of `pieces`; edges() are what is left of them.
  explicit PageWatch(const std::vector<Bytes>& pieces);
  PageWatch(const PageWatch&) = delete;
  PageWatch& operator=(const PageWatch&) = delete;
  ~PageWatch();

  const std::vector<Bytes>& edges() const { return edges_; }

  // Whether nothing was written since the begin() whose number keep() was given. False where that
  // is not known.
  bool unwritten() const;

  // From here on every write is seen. A number for keep(); nothing where the system cannot tell, or
  // where pages would have to be marked, which makes the next write to each dearer, and `mark` does
  // not allow it.
  std::optional<std::uint64_t> begin(bool mark);

  // Says that the memory was found to be as wanted after that begin().
  void keep(std::uint64_t number) { kept_.store(number); }

 private:
  struct Range {
    std::uint64_t first, last;  // addresses
  };

  std::vector<Range> ranges_;
  std::vector<Bytes> edges_;
  std::atomic<std::uint64_t> kept_{0};  // 0: never
  bool registered_ = false;
};

}  // namespace resnet_fused::cpu
