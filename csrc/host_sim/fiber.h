// Cooperative threads: stacks, and the switch from one to another.
#pragma once

#include <cstddef>

namespace host_sim {

// Where a stack that is not running goes on.
struct Context {
  void* stack_pointer = nullptr;
};

// Goes on at `to`; returns when something switches to `from`.
void switch_context(Context& from, const Context& to);

// Equal stacks, each with an inaccessible page below it, so that an overflow stops the program.
class Stacks {
 public:
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  int count() const { return count_; }

  // A context that starts `entry` on stack i. `entry` never returns and lets no exception out.
  Context start(int i, void (*entry)()) const;

 private:
  int count_;
  unsigned char* memory_;
};

}  // namespace host_sim
