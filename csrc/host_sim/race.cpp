#include "host_sim/race.h"

#include <algorithm>

namespace host_sim {

void Races::start(int threads, std::size_t shared_bytes) {
  words_.resize(std::max(words_.size(), (shared_bytes + kWord - 1) / kWord));
  for (Word& word : words_) {
    word.written = {};
    word.by_proxy = false;
    word.reads.clear();
  }
  threads_.assign(threads, Thread{});
  for (Thread& thread : threads_) thread.view = nothing_;
  actors_ = threads;
  for (View* view : {&merged_from_[0], &merged_from_[1], &merged_, &learnt_from_, &learnt_}) {
    view->reset();
  }
}

Actor Races::add_agent() { return actors_++; }

Actor Races::copy_agent(int thread) {
  Actor& agent = threads_[thread].copies;
  if (agent < 0) agent = add_agent();
  return agent;
}

void Races::raise(std::vector<Time>& times, Actor actor, Time time) {
  if (static_cast<std::size_t>(actor) >= times.size()) times.resize(actor + 1);
  times[actor] = std::max(times[actor], time);
}

void Races::raise(std::vector<Time>& times, const std::vector<Time>& other) {
  if (times.size() < other.size()) times.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) times[i] = std::max(times[i], other[i]);
}

View Races::publish(int thread) {
  Thread& self = threads_[thread];
  auto view = std::make_shared<Knowledge>(*self.view);
  raise(view->seen, thread, self.time++);
  if (self.copied > 0) raise(view->seen, self.copies, self.copied);
  return view;
}

View Races::merge(const View& a, const View& b) {
  if (a == b || b == nothing_) return a;
  if (a == nothing_) return b;
  if (a != merged_from_[0] || b != merged_from_[1]) {
    auto both = std::make_shared<Knowledge>(*a);
    raise(both->seen, b->seen);
    raise(both->fenced, b->fenced);
    raise(both->past, b->past);
    merged_from_[0] = a;
    merged_from_[1] = b;
    merged_ = std::move(both);
  }
  return merged_;
}

View Races::weakened(const View& view) const {
  if (view == nothing_) return view;
  auto past = std::make_shared<Knowledge>();
  past->past = view->past;
  raise(past->past, view->seen);
  return past;
}

void Races::learn(int thread, const View& view) {
  threads_[thread].view = merge(threads_[thread].view, view);
}

void Races::learn(int thread, Access past) {
  View& view = threads_[thread].view;
  if (at(view->seen, past.who) >= past.time) return;
  if (view != learnt_from_ || past.who != learnt_what_.who || past.time != learnt_what_.time) {
    auto more = std::make_shared<Knowledge>(*view);
    raise(more->seen, past.who, past.time);
    learnt_from_ = view;
    learnt_what_ = past;
    learnt_ = std::move(more);
  }
  view = learnt_;
}

void Races::learn_copies(int thread, Time group) {
  Thread& self = threads_[thread];
  if (self.copies >= 0) self.copied = std::max(self.copied, group);
}

void Races::fence(int thread) {
  Thread& self = threads_[thread];
  auto view = std::make_shared<Knowledge>(*self.view);
  raise(view->fenced, view->seen);
  raise(view->fenced, thread, self.time++);
  if (self.copied > 0) raise(view->fenced, self.copies, self.copied);
  self.view = std::move(view);
}

void Races::join(int first, int count) {
  auto all = std::make_shared<Knowledge>();
  const Knowledge* last = nullptr;
  for (int t = first; t < first + count; ++t) {
    Thread& thread = threads_[t];
    if (thread.view.get() != last) {
      last = thread.view.get();
      raise(all->seen, last->seen);
      raise(all->fenced, last->fenced);
      raise(all->past, last->past);
    }
    raise(all->seen, t, thread.time++);
    if (thread.copied > 0) raise(all->seen, thread.copies, thread.copied);
  }
  const View view = std::move(all);
  for (int t = first; t < first + count; ++t) threads_[t].view = view;
}

bool Races::knows(int thread, Access past) const {
  const Thread& self = threads_[thread];
  return past.who == thread || at(self.view->seen, past.who) >= past.time ||
         (past.who == self.copies && self.copied >= past.time);
}

bool Races::follows(int thread, Access past) const {
  return knows(thread, past) || at(threads_[thread].view->past, past.who) >= past.time;
}

bool Races::unfenced(const Word& word, int issuer) const {
  return word.written.who >= 0 && !word.by_proxy && knows(issuer, word.written) &&
         at(threads_[issuer].view->fenced, word.written.who) < word.written.time;
}

Clash Races::read(Word& word, Access by, int issuer) {
  if (word.written.who >= 0 && !knows(issuer, word.written)) {
    return {Clash::kWithWrite, word.written.who};
  }
  std::vector<Access>& reads = word.reads;
  std::size_t place = word.next < reads.size() ? word.next : 0;
  if (place >= reads.size() || reads[place].who != by.who) {
    const auto found =
        std::find_if(reads.begin(), reads.end(), [&](Access r) { return r.who == by.who; });
    place = found - reads.begin();
    if (found == reads.end()) {
      if (reads.size() == 1 && knows(issuer, reads[0])) {
        place = 0;
      } else {
        reads.emplace_back();
      }
    }
  }
  reads[place] = by;
  word.next = static_cast<std::uint16_t>(place + 1);
  return {};
}

Clash Races::write(Word& word, Access by, int issuer, bool by_proxy) {
  const Access last = word.written;
  if (last.who >= 0 && !(word.by_proxy ? follows(issuer, last) : knows(issuer, last))) {
    return {Clash::kWithWrite, last.who};
  }
  for (const Access& read : word.reads) {
    if (!follows(issuer, read)) return {Clash::kWithRead, read.who};
  }
  word.reads.clear();
  word.written = by;
  word.by_proxy = by_proxy;
  return {};
}

}  // namespace host_sim
