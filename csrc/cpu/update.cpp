// update: one step of SGD for all parameters, in one pass over the flat tensors.
#include <algorithm>
#include <type_traits>

#include "cpu.h"
#include "storage.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kThreadValues = 16384;  // the least number of values for one more thread
constexpr std::int64_t kPiece = 4096;          // values that a thread updates at a time, a multiple of kSegmentAlign

// Updates 16 values from `i` on. The flat tensors have whole vectors, also at the end of a segment.
template <class A>
void update_lanes(const Update& p, std::int64_t i, Vec<A> gradient, Vec<A> minus_lr) {
  A *const value = static_cast<A*>(p.values) + i, *const before = static_cast<A*>(p.before) + i;
  const Vec<A> parameter = load(value);
  Vec<A> v = decayed_gradient(gradient, Vec<A>::all(static_cast<A>(p.weight_decay)), parameter);
  if (p.velocity) {
    A* const velocity = static_cast<A*>(p.velocity) + i;
    v = next_velocity(Vec<A>::all(static_cast<A>(p.momentum)), load(velocity), v);
    v.store(velocity);
  }
  const Vec<A> next = next_parameter(parameter, minus_lr, v);
  parameter.store(before);
  next.store(value);
  if constexpr (std::is_same_v<A, float>)
    if (i < p.shadow_size) Packed<BFloat16>::of(next).store(p.shadow + i);
}

// Updates the values of a segment from `begin` up to `end`, which are indices in the flat tensors.
template <class A, class G>
void update_segment(const Update& p, const Segment& segment, std::int64_t begin, std::int64_t end, Vec<A> minus_lr) {
  const G* const gradient = static_cast<const G*>(segment.gradient) - segment.first;
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) update_lanes<A>(p, i, load(gradient + i), minus_lr);
  if (i < end) update_lanes<A>(p, i, load_some(gradient + i, static_cast<int>(end - i)), minus_lr);
}

template <class A>
void update_as(const Update& p) {
  if (*p.stop != 0) return;
  const Segment *const first = p.segments, *const last = first + p.segment_count;
  const std::int64_t size = last[-1].first + last[-1].count;
  const std::int64_t useful_threads = 1 + size / kThreadValues;
  const int threads = useful_threads < p.threads ? static_cast<int>(useful_threads) : p.threads;
  const Vec<A> minus_lr = Vec<A>::all(-static_cast<A>(*p.lr));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t begin = 0; begin < size; begin += kPiece) {
    const std::int64_t end = std::min(begin + kPiece, size);
    // The last segment that begins at `begin` or before it.
    const Segment* segment =
        std::upper_bound(first, last, begin, [](std::int64_t i, const Segment& other) { return i < other.first; });
    if (segment != first) --segment;
    for (; segment < last && segment->first < end; ++segment) {
      const std::int64_t from = std::max(begin, segment->first), to = std::min(end, segment->first + segment->count);
      if constexpr (std::is_same_v<A, float>) {
        if (segment->first < p.shadow_size) {
          update_segment<A, BFloat16>(p, *segment, from, to, minus_lr);
          continue;
        }
      }
      update_segment<A, A>(p, *segment, from, to, minus_lr);
    }
  }
}

}  // namespace

void update(const Update& p) { p.dtype == DType::kFloat64 ? update_as<double>(p) : update_as<float>(p); }

}  // namespace bnkern::BNKERN_ISA
