// Which accesses to shared memory are ordered: the happens-before relation, in vector clocks.
//
// Actors are the threads of a cluster and the agents that work for them asynchronously: the copies
// of a thread (cp.async), its bulk stores, the matrix products of a warpgroup, the bulk copies that
// one mbarrier counts. Every actor has a time of its own. A thread's advances with each release;
// an agent's is the number of the group or phase that an operation belongs to. A View says up to
// which time of each actor everything has happened; threads gain one from another through barriers.
// Two accesses to one word, one of them a write, race unless the later actor's view, or the view of
// the thread that issued its operation, holds the earlier one.
//
// What a thread writes is seen by asynchronous operations (but cp.async) only behind a
// fence.proxy.async: PTX ISA, "Proxies". Views hold that apart, as `fenced`. Likewise `past`: what
// has happened, so that the words which it read, or asynchronous operations wrote, may be
// overwritten, but whose writes other blocks need not see, as the release or the acquire had the
// scope of a block: "Memory Consistency Model".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace host_sim {

using Actor = std::int32_t;
using Time = std::uint32_t;

struct Access {
  Actor who = -1;
  Time time = 0;
};

struct Knowledge {
  std::vector<Time> seen, fenced, past;  // by actor; 0 beyond their ends
};
using View = std::shared_ptr<const Knowledge>;  // never null: shared by all who know the same

// Why an access is refused.
struct Clash {
  enum Kind { kNone, kWithWrite, kWithRead, kUnfenced } kind = kNone;
  Actor other = -1;
};

class Races {
 public:
  static constexpr std::uint32_t kWord = 4;  // bytes: the grain

  void start(int threads, std::size_t shared_bytes);
  Actor add_agent();
  // The agent of cp.async, which only its own thread waits for.
  Actor copy_agent(int thread);

  // What `thread` has done and knows, for others to learn; its time moves on.
  View publish(int thread);
  View merge(const View& a, const View& b);
  // All of it as `past`.
  View weakened(const View& view) const;
  void learn(int thread, const View& view);
  void learn(int thread, Access past);
  void learn_copies(int thread, Time group);
  // fence.proxy.async of `thread`.
  void fence(int thread);
  // A barrier of `count` threads from `first` on: all know all that any of them knows or has done.
  void join(int first, int count);

  bool knows(int thread, Access past) const;
  // Likewise, if only as `past`.
  bool follows(int thread, Access past) const;
  Access now(int thread) const { return {thread, threads_[thread].time}; }
  View nothing() const { return nothing_; }

  // Accesses of a thread to one word, and of an operation of `agent` that `issuer` has started.
  Clash read(std::uint32_t word, int thread) { return read(words_[word], now(thread), thread); }
  Clash write(std::uint32_t word, int thread) {
    return write(words_[word], now(thread), thread, false);
  }
  Clash read(std::uint32_t word, Access agent, int issuer) {
    if (unfenced(words_[word], issuer)) return {Clash::kUnfenced, words_[word].written.who};
    return read(words_[word], agent, issuer);
  }
  Clash write(std::uint32_t word, Access agent, int issuer) {
    if (unfenced(words_[word], issuer)) return {Clash::kUnfenced, words_[word].written.who};
    return write(words_[word], agent, issuer, true);
  }
  // The same for cp.async, which is no part of the asynchronous proxy.
  Clash copy(std::uint32_t word, Access agent, int issuer) {
    return write(words_[word], agent, issuer, false);
  }

 private:
  struct Word {
    Access written;
    bool by_proxy = false;
    std::uint16_t next = 0;     // where the next reader is likely to stand
    std::vector<Access> reads;  // since the write; but for those that happened before the only one
  };
  struct Thread {
    Time time = 1;
    View view;
    Actor copies = -1;
    Time copied = 0;  // groups of its own copies that it has waited for
  };

  static Time at(const std::vector<Time>& times, Actor actor) {
    return static_cast<std::size_t>(actor) < times.size() ? times[actor] : 0;
  }
  static void raise(std::vector<Time>& times, Actor actor, Time time);
  static void raise(std::vector<Time>& times, const std::vector<Time>& other);

  bool unfenced(const Word& word, int issuer) const;
  Clash read(Word& word, Access by, int issuer);
  Clash write(Word& word, Access by, int issuer, bool by_proxy);

  std::vector<Word> words_;
  std::vector<Thread> threads_;
  Actor actors_ = 0;
  View nothing_ = std::make_shared<Knowledge>();
  View merged_from_[2], merged_;  // the last merge: the threads of a warp all ask for the same
  View learnt_from_, learnt_;     // likewise
  Access learnt_what_;
};

}  // namespace host_sim
