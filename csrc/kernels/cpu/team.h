// Threads that do one job after another and wait for the next in between.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sched.h>
#endif

namespace resnet_fused::cpu {

// One thread, the leader, posts jobs of equal tasks; the others, members 1 to before size(), work()
// until they are dismissed. Every member has a queue: its share of the job's tasks, the same ones
// for each job of as many tasks, so that what a core has in its caches serves it again. Who is done
// takes from the others' queues. Hence a member that does not run, or does not exist, holds nobody
// up; only one that is interrupted within a task does.
//
// The members must not share one core while others are idle. Linux may put a woken thread behind
// the one that woke it, where the core that it ran on before has gone to sleep (in a virtual
// machine such a core counts as preempted), and leave it there for its whole time slice of some
// milliseconds: longer than a forward. It also takes a thread to a core that is in use when another
// process needs its own for a moment. So a member that finds itself on the leader's core leaves it.
//
// A queue is one number: the tasks left in it. Whoever lowers it from n to n - 1 owns the queue's
// n-th last task, of the job that is posted; the job cannot end, and its description not change,
// before that task is counted as done. So a thread that comes late needs no notice of it.
class Team {
 public:
  using Task = void (*)(const void* body, std::int64_t index);

  // By the leader. `spins`: how often a thread looks again before it lets others run, and then
  // sleeps; 0 where there are fewer cores than threads.
  Team(int size, int spins)
      : size_(size), spins_(spins), queues_(new Queue[size]), leader_core_(current_core()) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // For the leader: task(body, i) for each i from 0 to before `tasks`; takes part, and returns when
  // all are done. Throws what a task threw, the first; the other tasks are done all the same.
  void run(std::int64_t tasks, Task task, const void* body) {
    leader_core_.store(current_core(), std::memory_order_relaxed);
    task_ = task;
    body_ = body;
    tasks_ = tasks;
    pending_.store(tasks);
    for (int member = size_ - 1; member >= 0; --member) {
      queues_[member].left.store(begin_of(member + 1) - begin_of(member));
    }
    wake();
    take_part(0);
    wait([this] { return pending_.load() == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // For every other member: takes part in all jobs until the team is dismissed.
  void work(int member) {
    const auto called = [&] { return queues_[member].left.load() > 0 || dismissed_.load(); };
    ++present_;
    do {
      leave_leader();
      take_part(member);
      wait(called);
    } while (!dismissed_.load());
    --present_;
    wake();
  }

  // For the leader, before the first job: goes on at once where all have come, and else lets run
  // who waits for this core.
  void await() {
    for (int i = 0; i < kArrivalSpins && present_.load() < size_ - 1; ++i) pause();
    if (present_.load() < size_ - 1) std::this_thread::yield();
  }

  // For the leader, behind the last job; returns when nobody works any more. Who is at work then
  // may wait for this core, which whatever comes next may not give up as soon as this does.
  void dismiss() {
    dismissed_.store(true);
    wake();
    wait([this] { return present_.load() == 0; });
  }

 private:
  struct alignas(64) Queue {
    std::atomic<std::int64_t> left{0};
  };

  static constexpr int kYields = 16;
  // About 10 us: longer than a thread that is awake needs to come.
  static constexpr int kArrivalSpins = 500;

  // Tells the processor that this thread only waits.
  static void pause() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#endif
  }

  static int current_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
  }

  // For a member: goes to another core than the leader's.
  void leave_leader() const {
#ifdef __linux__
    const int core = leader_core_.load(std::memory_order_relaxed);
    cpu_set_t allowed;
    if (spins_ == 0 || core < 0 || core >= CPU_SETSIZE || current_core() != core ||
        sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) {
      return;
    }
    cpu_set_t others = allowed;
    CPU_CLR(core, &others);
    if (sched_setaffinity(0, sizeof others, &others) == 0) {
      sched_setaffinity(0, sizeof allowed, &allowed);
    }
#endif
  }

  std::int64_t begin_of(int member) const { return tasks_ * member / size_; }

  void take_part(int member) {
    std::int64_t done = 0;
    for (int i = 0; i < size_; ++i) {
      const int owner = member + i < size_ ? member + i : member + i - size_;
      std::atomic<std::int64_t>& left = queues_[owner].left;
      for (std::int64_t seen = left.load(); seen > 0;) {
        if (!left.compare_exchange_weak(seen, seen - 1)) continue;
        try {
          task_(body_, begin_of(owner + 1) - seen);
        } catch (...) {
          const std::lock_guard lock(mutex_);
          if (!error_) error_ = std::current_exception();
        }
        ++done;
        seen = left.load();
      }
    }
    if (done > 0 && pending_.fetch_sub(done) == done) wake();
  }

  template <typename Condition>
  void wait(const Condition& holds) {
    for (int i = 0; i < spins_; ++i) {
      if (holds()) return;
      pause();
    }
    for (int i = 0; i < kYields; ++i) {
      if (holds()) return;
      std::this_thread::yield();
    }
    std::unique_lock lock(mutex_);
    ++sleepers_;
    changed_.wait(lock, holds);
    --sleepers_;
  }

  // After a change that somebody may wait for. All operations on atomics are sequentially
  // consistent: either this sees the sleeper, or the sleeper's last look sees the change.
  void wake() {
    if (sleepers_.load() == 0) return;
    {
      const std::lock_guard lock(mutex_);
    }
    changed_.notify_all();
  }

  const int size_, spins_;
  const std::unique_ptr<Queue[]> queues_;
  Task task_ = nullptr;  // the posted job
  const void* body_ = nullptr;
  std::int64_t tasks_ = 0;
  std::exception_ptr error_;                          // of the job, under mutex_
  alignas(64) std::atomic<std::int64_t> pending_{0};  // tasks not known to be done
  alignas(64) std::atomic<bool> dismissed_{false};
  std::atomic<int> leader_core_;
  std::atomic<int> present_{0};  // members at work()
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace resnet_fused::cpu
