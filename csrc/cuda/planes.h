// The plan of a tensor in planes: how it is divided among blocks and threads. A channel has N planes of S adjacent
// elements. Eight adjacent elements are an octet, and the last octet of a plane may have fewer. A channel is divided
// into parts, and each block processes one part. A part is divided into tiles, of which every thread has a few octets.
// Neighbouring threads have adjacent octets, so two octets of one thread are as many octets apart as the block has
// threads. The octets of a thread depend only on the sizes and the plan. Only the width of an access depends on
// alignment.
//
// Offsets have 64 bits everywhere, which costs one instruction for each octet. The index of an octet in its channel has
// 31 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "records.h"
#include "statistics.h"

namespace bnkern {

// The number of octets of a thread in a tile. They are 64 bytes of each tensor.
constexpr int octets_of(std::size_t itemsize) { return itemsize == 4 ? 2 : 4; }
template <class T>
constexpr int kOctets = octets_of(sizeof(T));

constexpr int kMostThreads = 512;
constexpr int kMostParts = 8;    // the largest cluster that every device with clusters supports
constexpr int kReserved = 1024;  // bytes of shared memory before the held tiles

struct Planes {
  Divider per_plane;  // the number of octets of a plane
  std::int64_t length;
  std::uint32_t octets;          // the number of octets of a channel
  std::int64_t octets_of_image;  // of all channels
  Count count;                   // of the values of a channel
  int parts, tiles;              // the parts of a channel, and the tiles of a part
  Divider channel;               // by parts: the channel of a block
  int held;  // the tiles of a part that stay on the chip: the last in registers, the first held - 1 in shared memory
  int step;  // the elements of one access: 16 bytes of them; in narrow kernels 4, or 1

  // Whether the tile is held in shared memory for the second phase.
  BNKERN_DEVICE bool shared(int tile) const { return tile + 1 < held && tile + 1 < tiles; }
};

// The position of an octet and its number of elements. An octet past the end of the channel has none.
struct OctetCoord {
  std::uint32_t n, octet;  // the plane, and the index in it
  int elements;
};

// Kernels are either wide, with accesses of 16 bytes, or narrow, with accesses of 4 elements or 1. kStep is the number
// of adjacent elements of which either all exist or none.
template <class T, bool kWide>
constexpr int kStep = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
template <class T, bool kWide>
BNKERN_DEVICE bool exists(const OctetCoord& coord, int j) {
  return j / kStep<T, kWide> * kStep<T, kWide> < coord.elements;
}

// The position of octet u of a thread's tile. An octet that does not exist has a position outside of the tensor.
template <class T, bool kWide>
BNKERN_DEVICE OctetCoord coord_of(const Planes& planes, int part, int tile, int u) {
  const std::uint32_t octet = (std::uint32_t(part * planes.tiles + tile) * kOctets<T> + u) * blockDim.x + threadIdx.x;
  const std::uint32_t n = planes.per_plane.divide(octet), within = octet - n * planes.per_plane.divisor;
  int elements = 8;
  if constexpr (kStep<T, kWide> != 8) {
    const std::int64_t left = planes.length - std::int64_t(within) * 8;
    if (left < 8) elements = static_cast<int>(left);
  }
  return {n, within, octet < planes.octets ? elements : 0};
}
template <class T, bool kWide>
struct OctetCoords {
  OctetCoord of[kOctets<T>];

  BNKERN_DEVICE OctetCoords(const Planes& planes, int part, int tile) {
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u) of[u] = coord_of<T, kWide>(planes, part, tile, u);
  }
};

// The index of an octet's byte in the mask of the block's channel.
BNKERN_DEVICE std::int64_t mask_byte(const Planes& planes, const OctetCoord& coord) {
  return coord.n * planes.octets_of_image + coord.octet;
}

// Calls f(constant) with the number of elements of an access.
template <class T, bool kWide, class F>
BNKERN_DEVICE void with_step(int step, F f) {
  if constexpr (kWide) {
    f(std::integral_constant<int, kStep<T, true>>{});
  } else if (sizeof(T) < 4 && step == 4) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Loads the octet at `from`. Its number of elements is a multiple of kElements, and the other values are zero.
template <int kElements, class T>
BNKERN_DEVICE Octet<T> load_octet(const T* from, int elements) {
  Octet<T> octet{};
#pragma unroll
  for (int i = 0; i < 8; i += kElements) {
    if (i >= elements) continue;
    if constexpr (kElements * sizeof(T) == 16) {
      octet.words[i / kElements] = load_words(from + i);
    } else if constexpr (kElements == 4) {
      const TwoWords two = *reinterpret_cast<const TwoWords*>(from + i);
      octet.words[0].word[i / 2] = two.word[0], octet.words[0].word[i / 2 + 1] = two.word[1];
    } else if constexpr (sizeof(T) == 4) {
      octet.words[i / 4].word[i % 4] = bits_of(from[i]);
    } else {
      octet.words[0].word[i / 2] |= std::uint32_t(from[i].bits) << (16 * (i % 2));
    }
  }
  return octet;
}

template <int kElements, class T>
BNKERN_DEVICE void store_octet(T* to, const Octet<T>& octet, int elements) {
#pragma unroll
  for (int i = 0; i < 8; i += kElements) {
    if (i >= elements) continue;
    if constexpr (kElements * sizeof(T) == 16) {
      store_words(to + i, octet.words[i / kElements]);
    } else if constexpr (kElements == 4) {
      *reinterpret_cast<TwoWords*>(to + i) = {{octet.words[0].word[i / 2], octet.words[0].word[i / 2 + 1]}};
    } else if constexpr (sizeof(T) == 4) {
      to[i] = float_of(octet.words[i / 4].word[i % 4]);
    } else {
      to[i] = T{static_cast<std::uint16_t>(octet.words[0].word[i / 2] >> (16 * (i % 2)))};
    }
  }
}

// Moves a view to a channel. Kernels do it once, so that the address of an octet costs few instructions. A null view
// stays null.
template <class T>
BNKERN_DEVICE void select_channel(View& view, int channel) {
  if (view) view.data = static_cast<T*>(view.data) + channel * view.inner;
}
template <class Byte>
BNKERN_DEVICE void select_channel(Byte*& mask, const Planes& planes, int channel) {
  if (mask) mask += std::int64_t(channel) * planes.per_plane.divisor;
}
template <class T>
BNKERN_DEVICE T* address(const View& view, const OctetCoord& coord) {
  return static_cast<T*>(view.data) + (coord.n * view.outer + std::int64_t(coord.octet) * 8);
}

// A thread's octets of a tile of one tensor.
template <class T, bool kWide>
struct Tile {
  Octet<T> octets[kOctets<T>];

  BNKERN_DEVICE void load(const View& view, int step, const OctetCoord& coord, int u) {
    with_step<T, kWide>(step, [&](auto elements) {
      octets[u] = load_octet<elements.value>(address<const T>(view, coord), coord.elements);
    });
  }
  BNKERN_DEVICE void load(const View& view, int step, const OctetCoords<T, kWide>& coords) {
    with_step<T, kWide>(step, [&](auto elements) {
#pragma unroll
      for (int u = 0; u < kOctets<T>; ++u)
        octets[u] = load_octet<elements.value>(address<const T>(view, coords.of[u]), coords.of[u].elements);
    });
  }
  BNKERN_DEVICE void store(const View& view, int step, const OctetCoord& coord, int u) const {
    with_step<T, kWide>(
        step, [&](auto elements) { store_octet<elements.value>(address<T>(view, coord), octets[u], coord.elements); });
  }
  // Stores an octet in shared memory, or loads it from there. In a slot, the 16 bytes of neighbouring threads are
  // adjacent.
  BNKERN_DEVICE void hold(int slot, int u) const {
#pragma unroll
    for (int word = 0; word < Octet<T>::kWords; ++word) *held_word(slot, u, word) = octets[u].words[word];
  }
  BNKERN_DEVICE void load_held(int slot, int u) {
#pragma unroll
    for (int word = 0; word < Octet<T>::kWords; ++word) octets[u].words[word] = *held_word(slot, u, word);
  }

 private:
  static BNKERN_DEVICE Words* held_word(int slot, int u, int word) {
    const int before = (slot * kOctets<T> + u) * Octet<T>::kWords + word;
    return shared_memory<Words>(kReserved) + before * blockDim.x + threadIdx.x;
  }
};

// ---- reductions of threads by trees in a fixed order; the first thread has the result

constexpr unsigned kAllLanes = 0xffffffffu;

// Chan's formula, without branches. Two of the three levels that use it have too little other work to hide them.
BNKERN_DEVICE Moments<float> merged(Moments<float> a, Moments<float> b) {
  const float count = a.count + b.count, share = divide_normal(b.count, count);
  Moments<float> both{count, a.mean, a.m2};
  chan_join(&both.mean, &both.m2, b.mean, b.m2, share, a.count * share);
  return b.count == 0 ? a : a.count == 0 ? b : both;
}
BNKERN_DEVICE Moments<float> from_lane(Moments<float> moments, int lanes) {
  return {__shfl_down_sync(kAllLanes, moments.count, lanes), __shfl_down_sync(kAllLanes, moments.mean, lanes),
          __shfl_down_sync(kAllLanes, moments.m2, lanes)};
}
// The same for sum g and sum g * xhat.
BNKERN_DEVICE Pair merged(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
BNKERN_DEVICE Pair from_lane(Pair sums, int lanes) {
  return {__shfl_down_sync(kAllLanes, sums.first, lanes), __shfl_down_sync(kAllLanes, sums.second, lanes)};
}
template <class A>
BNKERN_DEVICE A merge_warp(A value) {
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) value = merged(value, from_lane(value, lanes));
  return value;
}

// Values that the threads of a block exchange, in shared memory before the tiles. A is Moments<float> or Pair.
template <class A>
struct Exchange {
  A warps[kMostThreads / 32];
  Pair part;    // the part of this block, which the other blocks of its cluster read
  Pair result;  // the result of the channel, which all threads read
};
constexpr int kExchanged = 256;  // bytes; the rest of the kReserved bytes is for records
static_assert(sizeof(Exchange<Moments<float>>) <= kExchanged);

// Reduces the values of all threads of the block, which must have whole warps.
template <class A>
BNKERN_DEVICE A merge_block(A value) {
  A* const warps = shared_memory<Exchange<A>>()->warps;
  value = merge_warp(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) value = merge_warp(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : A{});
  return value;
}

// ---- records: the sums of a thread, which has values of one channel only

template <class Sums>
struct ThreadRecord {
  static constexpr int kRows = sizeof(Sums) / sizeof(float);
  Sums sums;

  BNKERN_DEVICE void add(const Sums& addend) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums.row[r] = joined<Sums>(r, addend.row[r], sums.row[r]);
  }
  // Computes the block's part by a tree over the lanes of each warp, and then over the warps in their order. All
  // threads must call it.
  BNKERN_DEVICE void publish(const RecordParts& parts, int part, int channel) const {
    double* const warps = shared_memory<double>(kExchanged);
    constexpr int kWarps = kMostThreads / 32, kAtOnce = 4;  // the number of rows that fit into shared memory at once
    static_assert(kExchanged + kWarps * kAtOnce * sizeof(double) <= kReserved);
    double row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r] = sums.row[r];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        row[r] = joined<Sums>(r, __shfl_down_sync(kAllLanes, row[r], lanes), row[r]);
    }
#pragma unroll
    for (int first = 0; first < kRows; first += kAtOnce) {
      __syncthreads();
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int r = first; r < first + kAtOnce && r < kRows; ++r)
          warps[(r - first) * kWarps + threadIdx.x / 32] = row[r];
      }
      __syncthreads();
      const int r = first + static_cast<int>(threadIdx.x);
      if (threadIdx.x >= kAtOnce || r >= kRows) continue;
      double all = warps[(r - first) * kWarps];
      for (unsigned warp = 1; warp < blockDim.x / 32; ++warp)
        all = joined<Sums>(r, warps[(r - first) * kWarps + warp], all);
      parts.at(part, r, channel) = all;
    }
  }
};

// ---- on the host: the plan of a channel

struct PlanesPlan {
  bool single;  // one launch for both phases, in which the parts of a channel are a cluster, instead of two launches
  int threads, parts, tiles, held;
};

// Makes the plan. It chooses the number of parts with the least estimated time, which is the number of waves in which
// the device runs the blocks or clusters, multiplied by the time of a wave. The time of a wave is the number of tiles
// of a thread, multiplied by the number of threads, plus kFixed for launch, latencies and the exchange. So 16 clusters
// of 8 blocks are chosen only if the device runs all of them at once, and no wave is left with a few blocks. The
// constants have not been tuned by measurements.
//
// For one launch, it compares the numbers of parts up to kMostParts for which the parts fit on the chip and have more
// than kLeast / 2 octets. If none fits and there are blocks for less than half of the multiprocessors, two kernels with
// more parts run instead. For these it compares the largest numbers of parts that fill a few numbers of waves.
//
// `sums` is whether the call has the first phase, and `tensors` is the number of tensors that this phase reads.
inline PlanesPlan plan_planes(const Shape& shape, std::size_t itemsize, int tensors, const CudaDevice& device,
                              Strategy strategy, bool sums) {
  const std::int64_t octets = shape.n * ((shape.s + 7) / 8), each = octets_of(itemsize);
  constexpr std::int64_t kLeast = 512, kFixed = 3;  // kFixed: in tiles of the largest block
  const int most = std::min(kMostThreads, device.threads);
  const auto tiles_of = [&](std::int64_t parts, std::int64_t threads) {
    return (octets + parts * each * threads - 1) / (parts * each * threads);
  };
  const auto threads_of = [&](std::int64_t parts) {
    int threads = std::min(128, most);
    while (threads < most && tiles_of(parts, threads) > 1) threads *= 2;
    return threads;
  };
  const auto room = [&](int threads) {
    return 1 + (device.shared_bytes - kReserved) / static_cast<int>(threads * each * 8 * itemsize * tensors);
  };
  const auto fits = [&](std::int64_t parts) { return tiles_of(parts, threads_of(parts)) <= room(threads_of(parts)); };
  const auto time_of = [&](std::int64_t waves, std::int64_t parts, std::int64_t threads) {
    return waves * (kFixed * most + tiles_of(parts, threads) * threads);
  };
  const auto plan = [&](bool single, int threads, std::int64_t parts) {
    const std::int64_t tiles = tiles_of(parts, threads);
    return PlanesPlan{single, threads, static_cast<int>(parts), static_cast<int>(tiles),
                      static_cast<int>(std::min<std::int64_t>(tiles, room(threads)))};
  };
  if (sums && strategy == Strategy::kSingleRead && device.clusters[0] > 0 && shape.c <= kGroups) {
    std::int64_t best = 0, least = 0, parts = 1;
    for (int i = -1;; ++i, parts *= 2) {
      const std::int64_t at_once = i < 0 ? device.multiprocessors : device.clusters[i];
      if (at_once > 0 && fits(parts)) {
        const std::int64_t time = time_of((shape.c + at_once - 1) / at_once, parts, threads_of(parts));
        if (best == 0 || time < least) best = parts, least = time;
      }
      if (parts == kMostParts || octets <= parts * kLeast) break;
    }
    if (best == 0 && 2 * shape.c * parts >= device.multiprocessors) best = parts;
    if (best > 0) return plan(true, threads_of(best), best);
  }
  // A multiprocessor holds two blocks of 256 threads with 128 registers each.
  constexpr int kBlocks = 2, kMoreWaves = 4;
  const int threads = std::min(256, most);
  const std::int64_t at_once = std::int64_t{kBlocks} * device.multiprocessors, tiles = tiles_of(1, threads);
  const std::int64_t fewest = (shape.c + at_once - 1) / at_once;
  std::int64_t best = 1, least = time_of(fewest, 1, threads);
  for (std::int64_t waves = fewest; waves <= fewest + kMoreWaves && (!sums || shape.c <= kGroups); ++waves) {
    const std::int64_t most_parts = std::min(tiles, waves * at_once / shape.c);
    const std::int64_t parts = tiles_of(1, threads * tiles_of(most_parts, threads));  // the fewest with as many tiles
    if (const std::int64_t time = time_of(waves, parts, threads); time < least) best = parts, least = time;
    if (most_parts == tiles) break;
  }
  return plan(false, threads, best);
}

// The parameters of the kernels for a call's tensors. Null views are ignored.
inline Planes planes_of(const Shape& shape, std::size_t itemsize, const PlanesPlan& plan,
                        std::initializer_list<View> views) {
  const std::int64_t per_plane = (shape.s + 7) / 8;
  std::uint64_t steps = shape.s, addresses = 0;
  for (const View& view : views)
    if (view) {
      steps |= view.outer | view.inner;
      addresses |= reinterpret_cast<std::uintptr_t>(view.data);
    }
  const auto allows = [&](std::uint64_t step) { return steps % step == 0 && addresses % (step * itemsize) == 0; };
  const int vector = static_cast<int>(16 / itemsize);
  return {Divider::of(per_plane),
          shape.s,
          static_cast<std::uint32_t>(shape.n * per_plane),
          per_plane * shape.c,
          Count::of(shape.n * shape.s),
          plan.parts,
          plan.tiles,
          Divider::of(plan.parts),
          plan.held,
          allows(vector) ? vector
          : allows(4)    ? 4
                         : 1};
}

// Whether the wide kernels serve the tensors. The narrow ones are for those that cannot be read by 16 bytes. Some of
// them are compiled once for calls with and without a record, because they are rarely used. The narrow kernel of both
// phases has no record, because there are not enough registers. Two kernels with the same plan, and so the same bits,
// replace it.
template <class T>
bool is_wide(const Planes& planes) {
  return planes.step == kStep<T, true>;
}

// The shared memory of a block that holds `held` tiles of each of `tensors` tensors, the last one in registers.
inline std::size_t shared_of(const PlanesPlan& plan, int held, std::size_t itemsize, int tensors) {
  return kReserved + std::size_t(held - 1) * plan.threads * octets_of(itemsize) * 8 * itemsize * tensors;
}

// Returns "", or the reason why the kernels do not support a call.
inline std::string refused(const char* name, const Shape& shape, DType dtype, const PlanesPlan& plan) {
  if (dtype == DType::kFloat64) return std::string(name) + ": there are no float64 kernels";
  if (shape.n * ((shape.s + 7) / 8) > INT32_MAX || shape.c * plan.parts > INT32_MAX)
    return std::string(name) + ": a channel of more than 2^31 octets, or too many channels";
  return {};
}

}  // namespace bnkern
