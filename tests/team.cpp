// Runs jobs of many sizes on teams of several sizes, with and without spinning; exits with 0 if
// every task was done once, and before its job ended. Compiled by test_cpu_threads.py, also with
// ThreadSanitizer, for which the counts below are no atomics on purpose.
#include "kernels/cpu/team.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

using resnet_fused::cpu::Team;

template <typename Body>
void run(Team& team, std::int64_t tasks, const Body& body) {
  team.run(
      tasks, [](const void* erased, std::int64_t i) { (*static_cast<const Body*>(erased))(i); },
      &body);
}

bool passes(int size, int spins, int jobs) {
  constexpr int kMost = 300;
  Team team(size, spins);
  std::vector<std::thread> members;
  // The last one never comes: its tasks are done by the others.
  for (int i = 1; i < (size > 2 ? size - 1 : size); ++i) {
    members.emplace_back([&team, i] { team.work(i); });
  }
  std::vector<std::int64_t> counts(kMost), expected(kMost);
  bool right = true;
  for (int job = 0; job < jobs; ++job) {
    const int tasks = job % 37 == 0 ? kMost : job % 7 * (job % 5);
    run(team, tasks, [&](std::int64_t i) {
      counts[i] += job;
      for (volatile int k = 0; i % 16 == 0 && k < job % 200; k = k + 1) continue;
    });
    for (int i = 0; i < tasks; ++i) expected[i] += job;
    right = right && counts == expected;
    if (job % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // all sleep
  }
  bool thrown = false;
  try {
    run(team, kMost, [&](std::int64_t i) {
      ++counts[i];
      if (i % 100 == 33) throw std::runtime_error("task");
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  for (std::int64_t& count : expected) ++count;
  right = right && thrown && counts == expected;
  run(team, 9, [&](std::int64_t i) { ++counts[i]; });
  for (int i = 0; i < 9; ++i) ++expected[i];
  right = right && counts == expected;
  // The leader falls asleep before the others are done, and at the end all others sleep.
  const auto leader = std::this_thread::get_id();
  run(team, 2 * size, [&](std::int64_t i) {
    const bool leads = std::this_thread::get_id() == leader;
    std::this_thread::sleep_for(std::chrono::milliseconds(leads ? 1 : 10));
    ++counts[i];
  });
  for (int i = 0; i < 2 * size; ++i) ++expected[i];
  right = right && counts == expected;
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  team.dismiss();
  for (std::thread& member : members) member.join();
  if (!right) std::printf("wrong with %d threads and %d spins\n", size, spins);
  return right;
}

int main() {
  bool right = true;
  for (const int size : {1, 2, 3, 4, 8}) {
    for (const int spins : {0, 200, 4000}) right = passes(size, spins, 2000) && right;
  }
  return right ? 0 : 1;
}
