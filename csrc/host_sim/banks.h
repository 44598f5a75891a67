// Bank conflicts of ordinary accesses to shared memory, which threads make one by one here and a
// warp at once on a GPU.
//
// An access is named by where it stands in the compiled code, and the n-th of each lane there since
// the warp's lanes were last known to be together form one request. Shared memory has 32 banks of 4
// bytes; a request of 4 bytes a lane or fewer takes the whole warp together, of 8 half of it, of 16
// a quarter, and each part takes as many turns as there are different words in its fullest bank.
// NVIDIA documents the first ("Shared Memory" of the CUDA C++ programming guide); the parts are
// what profilers show. The compiler for the GPU may merge or split accesses, which is not seen
// here.
#pragma once

#include <cstdint>
#include <vector>

namespace host_sim {

class Banks {
 public:
  static constexpr int kLanes = 32;

  void start(int warps);
  void access(int warp, int lane, const void* site, std::uint32_t offset, std::uint32_t bytes);
  // All lanes of the warp are at one place.
  void together(int warp);

  // Requests so far, and the turns that they took beyond one for each part.
  std::int64_t requests = 0, conflicts = 0;

 private:
  struct Request {
    std::uint32_t lanes = 0, bytes = 0;
    std::uint32_t offsets[kLanes];
  };
  struct Site {
    const void* place;
    std::uint32_t counts[kLanes] = {};  // of accesses, by lane
    std::vector<Request> requests;
  };
  struct Warp {
    std::vector<Site> sites;
    std::size_t next = 0;  // where the next access is likely to stand
  };

  void count(const Request& request);

  std::vector<Warp> warps_;
};

}  // namespace host_sim
