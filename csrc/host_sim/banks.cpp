#include "host_sim/banks.h"

#include <algorithm>

namespace host_sim {

void Banks::start(int warps) { warps_.assign(warps, Warp{}); }

void Banks::access(int warp, int lane, const void* site, std::uint32_t offset,
                   std::uint32_t bytes) {
  Warp& of = warps_[warp];
  std::vector<Site>& sites = of.sites;
  std::size_t place = of.next < sites.size() ? of.next : 0;
  if (place >= sites.size() || sites[place].place != site) {
    place =
        std::find_if(sites.begin(), sites.end(), [&](const Site& s) { return s.place == site; }) -
        sites.begin();
    if (place == sites.size()) {
      sites.emplace_back();
      sites.back().place = site;
    }
  }
  of.next = place + 1;
  Site& at = sites[place];
  const std::uint32_t number = at.counts[lane]++;
  if (number >= at.requests.size()) at.requests.resize(number + 1);
  Request& request = at.requests[number];
  request.lanes |= 1u << lane;
  request.bytes = std::max(request.bytes, bytes);
  request.offsets[lane] = offset;
}

void Banks::together(int warp) {
  for (Site& site : warps_[warp].sites) {
    for (const Request& request : site.requests) count(request);
    site.requests.clear();
    std::fill(std::begin(site.counts), std::end(site.counts), 0);
  }
}

void Banks::count(const Request& request) {
  constexpr std::uint32_t kBanks = 32, kWord = 4;
  ++requests;
  const int parts = static_cast<int>(std::max(request.bytes, kWord) / kWord);
  const int lanes = kLanes / parts;
  for (int part = 0; part < parts; ++part) {
    std::uint32_t words[kLanes];
    int count = 0;
    for (int lane = part * lanes; lane < (part + 1) * lanes; ++lane) {
      if ((request.lanes >> lane & 1) == 0) continue;
      const std::uint32_t first = request.offsets[lane] / kWord;
      for (int k = 0; k < parts; ++k) words[count++] = first + k;
    }
    std::sort(words, words + count);
    count = static_cast<int>(std::unique(words, words + count) - words);
    int in_bank[kBanks] = {}, fullest = 0;
    for (int k = 0; k < count; ++k) fullest = std::max(fullest, ++in_bank[words[k] % kBanks]);
    conflicts += std::max(fullest - 1, 0);
  }
}

}  // namespace host_sim
