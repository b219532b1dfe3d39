// Memory for large results that are made anew in every step and freed soon after, such as the gradient of tables. Fresh
// pages are zeroed by the system, which costs as much as computing that gradient; so a freed block waits for the next
// result of its size. Meanwhile the system may take its pages when memory runs short (MADV_FREE). The blocks that wait
// are a sixteenth of the machine's memory at most, the longest unused go first; all of them go when a block cannot be
// had, or when somebody asks for it (`release`).
#pragma once

#include "bindings/common.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>

namespace pyrepr {

class Block {
 public:
  explicit Block(int64_t bytes) : size_((bytes + kPage - 1) / kPage * kPage), data_(take(size_)) {}
  ~Block() { give(data_, size_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void* data() const { return data_; }
  int64_t size() const { return size_; }

  // Bytes of the blocks that wait, and how many those may be at most.
  static int64_t waiting() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    return pool().bytes;
  }
  static int64_t limit() { return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 16; }
  static void release() { pool().shrink(0); }

 private:
  static constexpr int64_t kPage = int64_t(2) << 20;
  struct Kept {
    void* data;
    int64_t size;
  };
  struct Pool {
    std::mutex mutex;
    std::vector<Kept> kept;  // the longest unused first
    int64_t bytes = 0;

    void shrink(int64_t most) {
      const std::lock_guard<std::mutex> lock(mutex);
      size_t gone = 0;
      for (; bytes > most; gone++) {
        munmap(kept[gone].data, static_cast<size_t>(kept[gone].size));
        bytes -= kept[gone].size;
      }
      kept.erase(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(gone));
    }
  };
  static Pool& pool() {
    static Pool& pool = *new Pool;  // outlives every block
    return pool;
  }

  static void* take(int64_t size) {
    {
      const std::lock_guard<std::mutex> lock(pool().mutex);
      std::vector<Kept>& kept = pool().kept;
      for (size_t i = kept.size(); i-- > 0;)
        if (kept[i].size == size) {
          void* const data = kept[i].data;
          kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(i));
          pool().bytes -= size;
          return data;
        }
    }
    // A page more than needed, of which what does not belong to whole pages goes back.
    void* all = map(size + kPage);
    if (all == MAP_FAILED) {
      release();
      all = map(size + kPage);
    }
    if (all == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(all), page = static_cast<uintptr_t>(kPage);
    const uintptr_t start = (address + page - 1) / page * page, end = start + static_cast<uintptr_t>(size);
    if (start > address) munmap(all, start - address);
    if (address + size + page > end) munmap(reinterpret_cast<void*>(end), address + size + page - end);
    huge_pages(start, size, false);
    return reinterpret_cast<void*>(start);
  }

  static void* map(int64_t size) {
    return mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  static void give(void* data, int64_t size) {
    madvise(data, static_cast<size_t>(size), MADV_FREE);
    {
      const std::lock_guard<std::mutex> lock(pool().mutex);
      pool().kept.push_back({data, size});
      pool().bytes += size;
    }
    pool().shrink(limit());
  }

  const int64_t size_;
  void* const data_;
};

}  // namespace pyrepr
#endif
