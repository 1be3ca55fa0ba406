// Memory for results, kept between calls. The first access to a fresh page causes a page fault, and the system clears
// the page. Together these cost several times the kernel's own time. A block that a freed tensor returned has no such
// cost. Large blocks are aligned to huge pages and marked with MADV_HUGEPAGE, which makes address translation cheaper.
#pragma once

#include <cstddef>

namespace bnkern {

struct PoolBlock {
  void* data;
  std::size_t size;  // the request, rounded up by pool_take()
};

// Returns a block of at least `bytes`, uninitialised. Throws std::bad_alloc.
PoolBlock pool_take(std::size_t bytes);
// Returns a block to the pool. If the idle blocks exceed the limit, those unused for longest go back to the system.
void pool_give(PoolBlock block);
// The number of idle bytes, and its limit: BNKERN_POOL_MB, or an eighth of the memory.
std::size_t pool_idle();
std::size_t pool_limit();
// Returns all idle blocks to the system.
void pool_clear();

}  // namespace bnkern
