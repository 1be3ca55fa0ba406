#include "pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <new>
#include <vector>

namespace bnkern {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct Pool {
  std::mutex mutex;
  std::vector<PoolBlock> idle;  // in the order of their last use
  std::size_t idle_bytes = 0;
};

// Never destroyed, because tensors may outlive static objects at exit.
Pool& pool() {
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

// Sizes are rounded up by at most an eighth, so that a block can be reused for a request of nearly the same size.
std::size_t size_class(std::size_t bytes) {
  std::size_t step = 4096;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

PoolBlock map(std::size_t size) {
  const std::size_t alignment = size >= kHugePage ? kHugePage : 4096;
  const std::size_t mapped = size + alignment;
  void* const raw = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t aligned = (begin + alignment - 1) / alignment * alignment;
  if (aligned > begin) munmap(raw, aligned - begin);
  const std::uintptr_t end = begin + mapped;
  if (end > aligned + size) munmap(reinterpret_cast<void*>(aligned + size), end - aligned - size);
  void* const data = reinterpret_cast<void*>(aligned);
  if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);  // only advice: small pages work too
  return {data, size};
}

// The memory of the machine, or of the container if it has less.
std::size_t memory() {
  const auto machine =
      static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGE_SIZE));
  std::size_t container = 0;  // the file contains "max" if there is no limit; reading a number from it then fails
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> container && container < machine) return container;
  return machine;
}

}  // namespace

std::size_t pool_limit() {
  static const std::size_t limit = [] {
    if (const char* megabytes = std::getenv("BNKERN_POOL_MB"); megabytes && *megabytes)
      return static_cast<std::size_t>(std::strtoull(megabytes, nullptr, 10)) << 20;
    return memory() / 8;
  }();
  return limit;
}

PoolBlock pool_take(std::size_t bytes) {
  const std::size_t size = size_class(bytes);
  Pool& p = pool();
  {
    const std::lock_guard lock(p.mutex);
    // Prefer the most recently used block, which is most likely still in a cache.
    const auto match =
        std::find_if(p.idle.rbegin(), p.idle.rend(), [&](const PoolBlock& block) { return block.size == size; });
    if (match != p.idle.rend()) {
      const PoolBlock block = *match;
      p.idle.erase(std::next(match).base());
      p.idle_bytes -= block.size;
      return block;
    }
  }
  return map(size);
}

void pool_give(PoolBlock block) {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  p.idle.push_back(block);
  p.idle_bytes += block.size;
  while (p.idle_bytes > pool_limit()) {
    const PoolBlock oldest = p.idle.front();
    p.idle.erase(p.idle.begin());
    p.idle_bytes -= oldest.size;
    munmap(oldest.data, oldest.size);
  }
}

std::size_t pool_idle() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  return p.idle_bytes;
}

void pool_clear() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  for (const PoolBlock& block : p.idle) munmap(block.data, block.size);
  p.idle.clear();
  p.idle_bytes = 0;
}

}  // namespace bnkern
