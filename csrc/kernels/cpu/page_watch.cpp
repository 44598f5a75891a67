// The kernel marks pages as write-protected and takes a page's mark away, by itself, at the first
// write to it (userfaultfd, UFFD_FEATURE_WP_ASYNC); an ioctl of /proc/self/pagemap tells which
// pages lack it. It sees every write through page tables: the process's own from any library, and
// those that system calls and other processes make in its memory. It does not see writes of devices
// to pages that were pinned for them before, nor other processes' to shared memory or files, so
// that callers leave out what is pinned, and begin() refuses all but anonymous memory; nor that
// memory in use was taken away (MADV_DONTNEED). Asking costs 0.7 ns a page; the first write to a
// page after begin() costs about a microsecond (Zen 5, a guest).
//
// Marks belong to pages, not to whoever asked for them, and setting one anew hides that a page was
// written. So there is one count for the process, the epoch, which moves whenever a begin() has set
// a missing mark: whoever kept an earlier one has to look at the memory again.
//   kept in the epoch that is, and all pages are marked
//     => none was written since the begin() of that epoch, for a mark that was taken away and set
//        again would have moved it.
// Both are looked at under a lock that begin() takes alone.
#include "page_watch.h"

#ifdef __linux__
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <shared_mutex>

namespace resnet_fused::cpu {

#if defined(__linux__) && defined(SYS_userfaultfd)
namespace {

// linux/fs.h and linux/userfaultfd.h of Linux 6.7, which builds are not to need.
struct PageRegion {
  std::uint64_t start, end, categories;
};
struct PageScan {
  std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  std::uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
constexpr unsigned long kPagemapScan = _IOWR('f', 16, PageScan);
constexpr std::uint64_t kOnlyWhereAsync = 1 << 1;                                // of a scan
constexpr std::uint64_t kWritten = 1 << 1, kOfFile = 1 << 2, kPresent = 1 << 3;  // of a page
constexpr std::uint64_t kFeatureAsync = 1 << 15;
constexpr int kUserModeOnly = 1;

// The process's, opened when first asked for.
struct Kernel {
  explicit Kernel(std::uint64_t first_epoch) : epoch(first_epoch) {}

  std::shared_mutex mutex;
  std::uint64_t epoch;
  bool opened = false;
  int faults = -1, pagemap = -1;  // -1: the system has none

  // Calls for a system call that a sandbox may answer by ending the process.
  static bool is_filtered() {
    std::FILE* const status = std::fopen("/proc/self/status", "re");
    if (status == nullptr) return true;
    char line[256];
    bool filtered = false;
    while (std::fgets(line, sizeof line, status) != nullptr) {
      int mode = 0;
      if (std::sscanf(line, "Seccomp: %d", &mode) == 1) filtered = mode != 0;
    }
    std::fclose(status);
    return filtered;
  }

  bool open() {
    if (opened) return faults >= 0;
    opened = true;
    if (is_filtered()) return false;
    faults = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly));
    if (faults < 0) return false;
    uffdio_api api{UFFD_API, kFeatureAsync, 0};
    pagemap = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (ioctl(faults, UFFDIO_API, &api) != 0 || pagemap < 0) close();
    return faults >= 0;
  }

  void close() {
    for (int* const file : {&faults, &pagemap}) {
      if (*file >= 0) ::close(*file);
      *file = -1;
    }
  }
};

alignas(Kernel) unsigned char kernel_memory[sizeof(Kernel)];

Kernel& kernel() {
  static Kernel* const created = [] {
    // In a child its files still mean the parent's memory, and another thread may hold the lock.
    pthread_atfork(nullptr, nullptr, [] {
      Kernel& old = *reinterpret_cast<Kernel*>(kernel_memory);
      old.close();
      new (kernel_memory) Kernel(old.epoch + 1);
    });
    return new (kernel_memory) Kernel(1);
  }();
  return *created;
}

// Looks for a page with all of `categories` and any of `any_of`, those in `inverted` meaning their
// contrary: 0 where there is none, 1 where there is one, -1 where the range is not watched.
int scan(const Kernel& kernel, std::uint64_t first, std::uint64_t last, std::uint64_t categories,
         std::uint64_t any_of = 0, std::uint64_t inverted = 0) {
  PageRegion found;
  PageScan scan = {};
  scan.size = sizeof scan;
  scan.flags = kOnlyWhereAsync;
  scan.start = first;
  scan.end = last;
  scan.vec = reinterpret_cast<std::uintptr_t>(&found);
  scan.vec_len = scan.max_pages = 1;
  scan.category_mask = categories;
  scan.category_anyof_mask = any_of;
  scan.category_inverted = inverted;
  scan.return_mask = categories | any_of;  // of kWritten alone the kernel has a fast path
  return ioctl(kernel.pagemap, kPagemapScan, &scan);
}

}  // namespace

PageWatch::PageWatch(const std::vector<Bytes>& pieces) {
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  for (const auto& [data, size] : pieces) {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const std::uint64_t first = (begin + page - 1) / page * page;
    const std::uint64_t last = std::max((begin + size) / page * page, first);
    if (first >= begin + size || first == last) {
      edges_.push_back({data, size});
      continue;
    }
    ranges_.push_back({first, last});
    edges_.push_back({data, first - begin});
    edges_.push_back({data + (last - begin), begin + size - last});
  }
}

PageWatch::~PageWatch() {
  if (!registered_) return;
  Kernel& system = kernel();
  const std::unique_lock lock(system.mutex);
  if (system.faults < 0) return;
  for (const auto& [first, last] : ranges_) {
    // Of memory that is gone by now it fails; who else watches it begins again.
    uffdio_range range{first, last - first};
    ioctl(system.faults, UFFDIO_UNREGISTER, &range);
  }
}

bool PageWatch::unwritten() const {
  if (kept_.load() == 0) return false;
  Kernel& system = kernel();
  const std::shared_lock lock(system.mutex);
  return kept_.load() == system.epoch &&
         std::all_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
           return scan(system, range.first, range.last, kWritten) == 0;
         });
}

std::optional<std::uint64_t> PageWatch::begin(bool mark) {
  Kernel& system = kernel();
  const std::unique_lock lock(system.mutex);
  if (!system.open()) return std::nullopt;
  for (const auto& [first, last] : ranges_) {
    if (scan(system, first, last, kWritten) == 0) continue;
    if (!mark) return std::nullopt;
    ++system.epoch;
    registered_ = true;
    uffdio_register range{};
    range.range = {first, last - first};
    range.mode = UFFDIO_REGISTER_MODE_WP;
    uffdio_writeprotect protect{{first, last - first}, UFFDIO_WRITEPROTECT_MODE_WP};
    if (ioctl(system.faults, UFFDIO_REGISTER, &range) != 0 ||
        scan(system, first, last, 0, kOfFile | kPresent, kPresent) != 0 ||
        ioctl(system.faults, UFFDIO_WRITEPROTECT, &protect) != 0) {
      return std::nullopt;
    }
  }
  return system.epoch;
}

#else

PageWatch::PageWatch(const std::vector<Bytes>& pieces) : edges_(pieces) {}
PageWatch::~PageWatch() = default;
bool PageWatch::unwritten() const { return false; }
std::optional<std::uint64_t> PageWatch::begin(bool) { return std::nullopt; }

#endif

}  // namespace resnet_fused::cpu
