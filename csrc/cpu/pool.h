// Memory for results, kept between calls. A fresh page costs a fault and a clearing when first touched,
// several times the kernel's own time; a block that a freed tensor gives back costs nothing. Blocks are
// aligned to huge pages and advised to be such, which spares address translation too.
#pragma once

#include <cstddef>

namespace bnkern {

struct PoolBlock {
  void* data;
  std::size_t size;  // what take() rounded the request up to
};

// At least `bytes`, uninitialised. Throws std::bad_alloc.
PoolBlock pool_take(std::size_t bytes);
// Back to the pool; the blocks longest unused are returned to the system where too much lies idle.
void pool_give(PoolBlock block);
// Idle bytes now, and how many may lie idle: BNKERN_POOL_MB, or an eighth of the machine's memory.
std::size_t pool_idle();
std::size_t pool_limit();
// Returns all idle blocks to the system.
void pool_clear();

}  // namespace bnkern
