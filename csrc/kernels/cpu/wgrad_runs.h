// Where the products of wgrad.cpp and wgrad_winograd.cpp find their operands.
#pragma once

#include <cstdint>

#include "isa.h"

namespace resnet_fused::cpu {

// Pixels at equal distances in both operands: words to the first of x, pixels to that of the
// gradient.
struct Run {
  std::int64_t x, grad, count;
};

struct RunList {
  const Run *begin, *end;
};

// Memory that the next block needs: of each of its pixels some neighbouring cache lines. The same
// line of all pixels is a column; each tile of products fetches one.
class Ahead {
 public:
  struct Column {
    const char* line;
    std::int64_t pitch;
  };

  void clear() { count_ = current_ = 0; }

  void add(const void* first, std::int64_t bytes, std::int64_t pitch) {
    areas_[count_++] = {static_cast<const char*>(first), ceil_div(bytes, 64), pitch};
  }

  // The next column; `any` again and again when there is no more.
  Column next(const void* any) {
    while (current_ < count_ && areas_[current_].lines == 0) ++current_;
    if (current_ == count_) return {static_cast<const char*>(any), 0};
    Area& area = areas_[current_];
    --area.lines;
    const Column column{area.first, area.pitch};
    area.first += 64;
    return column;
  }

 private:
  struct Area {
    const char* first;
    std::int64_t lines, pitch;
  };

  Area areas_[8];
  int count_ = 0, current_ = 0;
};

}  // namespace resnet_fused::cpu
