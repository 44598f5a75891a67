#include "host_sim/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#error "the host simulator switches stacks in x86-64 assembly; build it on such a machine"
#endif

// switch(void** save, void* load). The callee-saved registers of the System V ABI stay on the stack
// that is left; the rest the compiler takes for lost at a call.
asm(R"(
.text
.p2align 4
.type resnet_fused_host_sim_switch, @function
resnet_fused_host_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnet_fused_host_sim_switch, .-resnet_fused_host_sim_switch
)");
extern "C" void resnet_fused_host_sim_switch(void** save, void* load);

namespace host_sim {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr int kSavedRegisters = 6;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
std::size_t stride() { return kStackBytes + page_bytes(); }

}  // namespace

void switch_context(Context& from, const Context& to) {
  resnet_fused_host_sim_switch(&from.stack_pointer, to.stack_pointer);
}

Stacks::Stacks(int count) : count_(count) {
  void* memory = mmap(nullptr, count * stride(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  for (int i = 0; i < count; ++i) {
    if (mprotect(memory_ + i * stride(), page_bytes(), PROT_NONE) != 0) {
      munmap(memory_, count * stride());
      throw std::bad_alloc();
    }
  }
}

Stacks::~Stacks() { munmap(memory_, count_ * stride()); }

Context Stacks::start(int i, void (*entry)()) const {
  // The tops are staggered, as equal low address bits would make all stacks share few cache lines.
  unsigned char* end = memory_ + (i + 1) * stride() - i % 32 * 448;
  // As if `entry` had been called: its return address, never used, lies at 8 modulo 16.
  auto* top = reinterpret_cast<void**>(end);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < kSavedRegisters; ++k) *--top = nullptr;
  return {top};
}

}  // namespace host_sim
