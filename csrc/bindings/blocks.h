// Memory for large results that are made anew in every step and freed soon after, such as the gradient of tables. Fresh
// pages are zeroed by the system, which costs as much as computing that gradient; so a freed block waits for the next
// result of its size. Meanwhile the system may take its pages when memory runs short (MADV_FREE).
#pragma once

#include "bindings/common.h"

#if defined(__linux__)
#include <sys/mman.h>

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

 private:
  static constexpr int64_t kPage = int64_t(2) << 20;
  static constexpr size_t kMostKept = 64;
  struct Kept {
    void* data;
    int64_t size;
  };
  struct Pool {
    std::mutex mutex;
    std::vector<Kept> kept;
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
          return data;
        }
    }
    // A page more than needed, of which what does not belong to whole pages goes back.
    void* const all =
        mmap(nullptr, static_cast<size_t>(size + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(all), page = static_cast<uintptr_t>(kPage);
    const uintptr_t start = (address + page - 1) / page * page, end = start + static_cast<uintptr_t>(size);
    if (start > address) munmap(all, start - address);
    if (address + size + page > end) munmap(reinterpret_cast<void*>(end), address + size + page - end);
    huge_pages(start, size, false);
    return reinterpret_cast<void*>(start);
  }

  static void give(void* data, int64_t size) {
    madvise(data, static_cast<size_t>(size), MADV_FREE);
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<Kept>& kept = pool().kept;
    if (kept.size() == kMostKept) {
      munmap(kept.front().data, static_cast<size_t>(kept.front().size));
      kept.erase(kept.begin());
    }
    kept.push_back({data, size});
  }

  const int64_t size_;
  void* const data_;
};

}  // namespace pyrepr
#endif
