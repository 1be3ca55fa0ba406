// The partition of a tensor, see tiles.h.
#include <algorithm>

#include "tiles.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kRowTiles = 64;    // rows: about this number of tiles, unless they are too small or too large
constexpr std::int64_t kBlockRows = 512;  // rows: the largest number of rows in one of a record's sums
constexpr std::int64_t kBlocks = 16;      // rows: about the least number of blocks, if there are as many tiles

// The smallest factor that makes c a multiple of 16.
std::int64_t factor_to_16(std::int64_t c) {
  std::int64_t factor = kLanes;
  for (; factor > 1 && c % 2 == 0; c /= 2) factor /= 2;
  return factor;
}

}  // namespace

Partition make_partition(const Shape& shape, bool dense) {
  Partition part{};
  part.shape = shape;
  part.dense = dense;
  if (shape.rows) {
    std::int64_t factor = dense ? factor_to_16(shape.c) : 1;
    while (dense && factor * shape.c < kWideRow) factor *= 2;
    part.width = factor * shape.c;
    part.group = factor > 1 || part.width < kGroupChannels ? part.width : kGroupChannels;
    part.groups = divide_up(part.width, part.group);
    const std::int64_t elements = part.count() * shape.c;
    part.rows = dense ? elements / part.width : part.count();
    part.leftover = dense ? elements % part.width : 0;
    // A tile may have up to the size of the second-level cache. The cost to join tiles grows with the number of
    // channels, and large tiles keep it small.
    const std::int64_t tile = std::clamp(elements / kRowTiles, 2 * kTileElements, 8 * kTileElements);
    part.rows_per_tile = tile / part.group < 8 ? 8 : tile / part.group;
    // Tiles of whole samples, if a sample is not larger than a tile. csrc/cpu/conv_norm.h then has the same tiles.
    const std::int64_t sample = shape.s * shape.c / part.width;
    if (dense && shape.s * shape.c % part.width == 0 && sample <= part.rows_per_tile)
      part.rows_per_tile -= part.rows_per_tile % sample;
    part.tiles = divide_up(part.rows, part.rows_per_tile) + (part.leftover > 0);
    // A block's sums are as long as those of a tile of a large tensor, but there are enough blocks for many threads.
    const std::int64_t by_rows = kBlockRows / part.rows_per_tile, by_blocks = part.tiles / kBlocks;
    part.tiles_per_block = std::max<std::int64_t>(1, std::min(by_rows, by_blocks));
  } else {
    part.width = part.groups = shape.c;
    part.group = 1;
    const std::int64_t pieces = divide_up(shape.s, kTileElements);
    part.span = divide_up(divide_up(shape.s, pieces), kLanes) * kLanes;
    part.spans_per_plane = divide_up(shape.s, part.span);
    part.planes_per_tile = pieces > 1 ? 1 : kTileElements / shape.s;
    part.tiles = divide_up(shape.n, part.planes_per_tile) * part.spans_per_plane;
    part.tiles_per_block = 1;
  }
  return part;
}

}  // namespace bnkern::BNKERN_ISA
