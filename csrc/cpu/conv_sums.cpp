// The weight gradient of a convolution and its absolute sum, as sums of outer products.
//
// The lanes of a vector are channels of x. Packed rows have `width` channels side by side. So the values of one row of
// the kernel at one position, kernel_w x width of them, are contiguous: they are a run. A tile keeps the sums of a run
// for several outputs in registers, and iterates over the positions of a block. It needs one broadcast value of dy and
// one fma per vector of x and output. Each sum is one chain of fmas over a block, so its bits depend neither on the
// tiles nor on the width of registers. The sums of blocks are added within a chunk, and those of chunks in double.
#include <omp.h>

#include <type_traits>

#include "conv.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kLeastPositions = 512;    // the least number of positions in a chunk
constexpr std::int64_t kBlockPositions = 256;    // the longest chain; L1 can hold a group's values of as many positions
constexpr std::int64_t kBlockBytes = 512 << 10;  // packed values of a block, which L2 can hold

// The number of vectors of x and of outputs in a tile. The registers limit the number of sums.
#if defined(__AVX512F__)
constexpr int kVectors = 3, kOutputs = 8;
#else
constexpr int kVectors = 1, kOutputs = 4;
#endif

// The groups of channels of x, and the positions of their sums in a chunk's partial result: [group][kernel row][output]
// [run].
struct Groups {
  std::int64_t channels, width, count, rows, outputs, kernel_w;
  std::int64_t width_of(std::int64_t g) const { return std::min(width, channels - g * width); }
  std::int64_t pitch(std::int64_t g) const { return round_up(kernel_w * width_of(g), kLanes); }
  std::int64_t offset(std::int64_t g, std::int64_t p, std::int64_t o) const {
    return g * rows * outputs * round_up(kernel_w * width, kLanes) + (p * outputs + o) * pitch(g);
  }
  std::int64_t size() const { return offset(count - 1, rows, 0); }
};

Groups groups_of(const ConvGradSigns& p) {
  const std::int64_t width = p.kernel_w == 1 ? 2 * kLanes : kLanes;
  return {p.x.c, width, divide_up(p.x.c, width), p.kernel_h, p.dy.c, p.kernel_w};
}

// How a tile iterates over positions: strides of x and dy over images, rows and columns of dy, and the lines to
// prefetch, one for each position.
template <class A>
struct Walk {
  std::int64_t images, rows, columns;
  std::int64_t x_image, x_row, x_column;
  std::int64_t dy_image, dy_row, dy_column;
  std::int64_t magnitudes;  // the offset from dy to its magnitudes, if both sums are requested
  Prefetch prefetch;
  std::int64_t prefetch_image, prefetch_row;  // in bytes
};

// The sums that a tile computes: one sum of its operands, or both sums. Most inputs of convolutions come from a ReLU.
// If a block of x has no negative value, x is its own magnitude. This includes -0.0, because its products change no bit
// of a sum that starts at +0.
enum class Sums { kOne, kBoth, kBothOfPositive };

template <class A, int kV, int kO, Sums kSums>
void tile(const Walk<A>& walk, const A* x, const A* dy, std::int64_t pitch, A* sum, A* abs_sum) {
  constexpr bool kBoth = kSums != Sums::kOne;
  Vec<A> sums[kO][kV], abs_sums[kO][kV];
#pragma GCC unroll 16
  for (int o = 0; o < kO; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) sums[o][v] = abs_sums[o][v] = Vec<A>::all(0);
  for (std::int64_t image = 0; image < walk.images; ++image)
    for (std::int64_t row = 0; row < walk.rows; ++row) {
      const A* x_at = x + image * walk.x_image + row * walk.x_row;
      const A* dy_at = dy + image * walk.dy_image + row * walk.dy_row;
      Prefetch next = walk.prefetch;
      next.row += image * walk.prefetch_image + row * walk.prefetch_row;
      for (std::int64_t column = 0; column < walk.columns; ++column, x_at += walk.x_column, dy_at += walk.dy_column) {
        next.prefetch(column);
        Vec<A> values[kV];
#pragma GCC unroll 16
        for (int v = 0; v < kV; ++v) values[v] = Vec<A>::load(x_at + v * kLanes);
#pragma GCC unroll 16
        for (int o = 0; o < kO; ++o) {
          const Vec<A> g = Vec<A>::all(dy_at[o]);
#pragma GCC unroll 16
          for (int v = 0; v < kV; ++v) sums[o][v] = fma(g, values[v], sums[o][v]);
        }
        if constexpr (kBoth) {
          if constexpr (kSums == Sums::kBoth)
#pragma GCC unroll 16
            for (int v = 0; v < kV; ++v) values[v] = magnitude(values[v]);
#pragma GCC unroll 16
          for (int o = 0; o < kO; ++o) {
            const Vec<A> g = Vec<A>::all(dy_at[walk.magnitudes + o]);
#pragma GCC unroll 16
            for (int v = 0; v < kV; ++v) abs_sums[o][v] = fma(g, values[v], abs_sums[o][v]);
          }
        }
      }
    }
#pragma GCC unroll 16
  for (int o = 0; o < kO; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) {
      A* const out = sum + o * pitch + v * kLanes;
      (Vec<A>::load(out) + sums[o][v]).store(out);
      if constexpr (kBoth) {
        A* const out = abs_sum + o * pitch + v * kLanes;
        (Vec<A>::load(out) + abs_sums[o][v]).store(out);
      }
    }
}

// Adds all sums of a run for `outputs` outputs. Tiles have kO outputs, and half as many, repeatedly, for the rest.
template <class A, int kV, int kO, Sums kSums>
void tiles(const Walk<A>& walk, const A* x, const A* dy, std::int64_t outputs, std::int64_t pitch, A* sum, A* abs_sum) {
  std::int64_t o = 0;
  for (; o + kO <= outputs; o += kO)
    tile<A, kV, kO, kSums>(walk, x, dy + o, pitch, sum + o * pitch, abs_sum + o * pitch);
  if constexpr (kO > 1)
    if (o < outputs)
      tiles<A, kV, kO / 2, kSums>(walk, x, dy + o, outputs - o, pitch, sum + o * pitch, abs_sum + o * pitch);
}

template <class A, Sums kSums>
void run_of_sums(const Walk<A>& walk, const A* x, const A* dy, std::int64_t outputs, std::int64_t pitch, A* sum,
                 A* abs_sum) {
  constexpr int kO = kSums == Sums::kOne ? kOutputs : kOutputs / 2;
  for (std::int64_t v = 0; v < pitch; v += kVectors * kLanes) {
    const std::int64_t vectors = (pitch - v) / kLanes;
    if (kVectors >= 3 && vectors >= 3)
      tiles<A, kVectors, kO, kSums>(walk, x + v, dy, outputs, pitch, sum + v, abs_sum + v);
    else if (kVectors >= 2 && vectors >= 2)
      tiles<A, kVectors >= 2 ? 2 : 1, kO, kSums>(walk, x + v, dy, outputs, pitch, sum + v, abs_sum + v);
    else
      tiles<A, 1, kVectors >= 2 ? 2 * kO : kO, kSums>(walk, x + v, dy, outputs, pitch, sum + v, abs_sum + v);
  }
}

// Whether any of the values is below zero or NaN. `count` is a multiple of 16, or values behind it can be read.
template <class A>
bool below_zero(const A* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes)
    if ((Vec<A>::all(0) - Vec<A>::load(x + i)).above_zero().bits()) return true;
  return false;
}

// Adds a block's sums to those of its chunk, for outputs [output, output + outputs). Meanwhile it prefetches the x of
// the block `next`.
template <class T>
void add_block(const ConvGradSigns& p, const Groups& groups, const Rectangle& block, const Rectangle& next,
               std::int64_t output, std::int64_t outputs, Accumulator<T>* sum, Accumulator<T>* abs_sum,
               Accumulator<T>* x, Accumulator<T>* dy) {
  using A = Accumulator<T>;
  const bool both = sum && abs_sum, absolute = !sum;
  const std::int64_t positions = block.images * block.rows * p.dy.w;
  // dy is read in place if it has the dtype and strides that tiles read. Its magnitudes are computed once, not in each
  // tile.
  const bool dy_in_place = std::is_same_v<T, A> && p.dy.stride_c == 1 && !absolute && !both;
  const std::int64_t magnitudes = both ? positions * outputs : 0;
  for (std::int64_t o = 0; o < outputs && !dy_in_place; o += kLanes) {
    const std::int64_t width = std::min<std::int64_t>(kLanes, outputs - o);
    A* to = dy + o * positions;
    for (std::int64_t image = 0; image < block.images; ++image)
      for (std::int64_t row = 0; row < block.rows; ++row, to += p.dy.w * width) {
        pack_row<T>(p.dy, block.image + image, block.row + row, 0, p.dy.w, output + o, width, absolute, to);
        if (both) convert(to, p.dy.w * width, true, to + magnitudes);
      }
  }
  const std::int64_t rows = x_rows(p, block.rows), columns = x_columns(p);
  const std::int64_t next_row = next.row ? next.row * p.stride_h + p.kernel_h - 1 - p.padding_h : 0;
  for (std::int64_t g = 0; g < groups.count; ++g) {
    const std::int64_t width = groups.width_of(g);
    const bool x_in_place = std::is_same_v<T, A> && p.x.stride_c == 1 && !absolute && p.kernel_w == 1 &&
                            p.padding_h == 0 && p.padding_w == 0 && width % kLanes == 0;
    bool positive = false;
    if (!x_in_place) {
      A* to = x;
      for (std::int64_t image = 0; image < block.images; ++image)
        for (std::int64_t row = 0; row < rows; ++row, to += columns * width)
          pack_row<T>(p.x, block.image + image, block.row * p.stride_h - p.padding_h + row, p.padding_w, columns,
                      g * groups.width, width, absolute, to);
      std::fill_n(to, kLanes, A(0));  // the last vector of the last run may extend behind it
      positive = both && !below_zero(x, to - x);
    }
    std::int64_t part = 0;  // which of stride_h x stride_w lines to prefetch at each position
    for (std::int64_t k = 0; k < p.kernel_h; ++k)
      for (std::int64_t o = 0; o < outputs; o += kLanes, ++part) {
        const std::int64_t dy_width = std::min<std::int64_t>(kLanes, outputs - o);
        Walk<A> walk{};
        walk.images = block.images, walk.rows = block.rows, walk.columns = p.dy.w;
        walk.x_image = x_in_place ? p.x.stride_n : rows * columns * width;
        walk.x_row = p.stride_h * (x_in_place ? p.x.stride_h : columns * width);
        walk.x_column = p.stride_w * (x_in_place ? p.x.stride_w : width);
        walk.dy_image = dy_in_place ? p.dy.stride_n : block.rows * p.dy.w * dy_width;
        walk.dy_row = dy_in_place ? p.dy.stride_h : p.dy.w * dy_width;
        walk.dy_column = dy_in_place ? p.dy.stride_w : dy_width;
        walk.magnitudes = magnitudes;
        walk.prefetch = Prefetch::of<T>(p.x, next.image, g * groups.width, next_row + part / p.stride_w % p.stride_h,
                                        part % p.stride_w * p.dy.w);
        walk.prefetch_image = static_cast<std::int64_t>(sizeof(T)) * p.x.stride_n;
        walk.prefetch_row = static_cast<std::int64_t>(sizeof(T)) * p.x.stride_h * p.stride_h;
        const A* const x_first = x_in_place ? static_cast<const A*>(p.x.data) + block.image * p.x.stride_n +
                                                  (block.row * p.stride_h + k) * p.x.stride_h + g * groups.width
                                            : x + k * columns * width;
        const A* const dy_first = dy_in_place ? static_cast<const A*>(p.dy.data) + block.image * p.dy.stride_n +
                                                    block.row * p.dy.stride_h + output + o
                                              : dy + o * positions;
        const std::int64_t offset = groups.offset(g, k, output + o), pitch = groups.pitch(g);
        if (both)
          (positive
               ? run_of_sums<A, Sums::kBothOfPositive>
               : run_of_sums<A, Sums::kBoth>)(walk, x_first, dy_first, dy_width, pitch, sum + offset, abs_sum + offset);
        else
          run_of_sums<A, Sums::kOne>(walk, x_first, dy_first, dy_width, pitch, (absolute ? abs_sum : sum) + offset, x);
      }
  }
}

// Joins the partial results of chunks in order into result [O, I, kernel_h, kernel_w]. All threads of a parallel region
// call it and divide its loop among them.
template <class A>
void join_partials(const ConvGradSigns& p, const Groups& groups, const A* partials, std::int64_t chunks, A* result) {
  const std::int64_t size = groups.size(), rows = groups.count * p.kernel_h;
#pragma omp for collapse(2) schedule(static) nowait
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t o = 0; o < p.dy.c; ++o) {
      const std::int64_t g = row / p.kernel_h, k = row % p.kernel_h, width = groups.width_of(g);
      for (std::int64_t v = 0; v < groups.pitch(g); v += kLanes) {
        double totals[kLanes] = {};
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
          const A* const partial = partials + chunk * size + groups.offset(g, k, o) + v;
          for (int i = 0; i < kLanes; ++i) totals[i] += static_cast<double>(partial[i]);
        }
        for (std::int64_t i = v; i < std::min(v + kLanes, p.kernel_w * width); ++i) {
          const std::int64_t c = g * groups.width + i % width, q = i / width;
          result[((o * p.x.c + c) * p.kernel_h + k) * p.kernel_w + q] = static_cast<A>(totals[i - v]);
        }
      }
    }
}

template <class T>
class ConvSums final : public Summation {
  using A = Accumulator<T>;

 public:
  explicit ConvSums(const ConvGradSigns& p)
      : p_(p),
        groups_(groups_of(p)),
        chunks_(chunks_of(p, kLeastPositions, groups_.size() * static_cast<std::int64_t>(sizeof(A)))),
        outputs_(outputs_per_task(p, chunks_.count())),
        pool_(((p.sum != nullptr) + (p.abs_sum != nullptr)) *
              (chunks_.count() * groups_.size() * static_cast<std::int64_t>(sizeof(A)) + 64)) {
    // The packed size of a position, without the rows of x that two blocks share.
    const std::int64_t bytes = (p.x.c * p.stride_h * p.stride_w + p.dy.c) * static_cast<std::int64_t>(sizeof(A));
    positions_ = std::min(kBlockPositions, kBlockBytes / bytes);
    for (std::int64_t k = 0; k < chunks_.count(); ++k) {
      const Pieces block = blocks_of(p, chunks_[k], positions_);
      dy_size_ = std::max(dy_size_, block.images * block.rows * p.dy.w * outputs_ * (p.sum && p.abs_sum ? 2 : 1));
      x_size_ = std::max(x_size_, block.images * x_rows(p, block.rows) * x_columns(p) * groups_.width + kLanes);
    }
    char* space = pool_.data();
    const std::int64_t partials = chunks_.count() * groups_.size();
    sum_ = p.sum ? take<A>(space, partials) : nullptr;
    abs_sum_ = p.abs_sum ? take<A>(space, partials) : nullptr;
  }

  std::int64_t tasks() const override { return chunks_.count() * divide_up(p_.dy.c, outputs_); }

  std::int64_t scratch_bytes() const override {
    return (dy_size_ + x_size_) * static_cast<std::int64_t>(sizeof(A)) + 128;
  }

  void run(std::int64_t task, char* scratch) override {
    A* const dy = take<A>(scratch, dy_size_);
    A* const x = take<A>(scratch, x_size_);
    const std::int64_t parts = divide_up(p_.dy.c, outputs_), chunk = task / parts, output = task % parts * outputs_;
    const std::int64_t own_outputs = std::min(outputs_, p_.dy.c - output);
    A* const sum = sum_ ? sum_ + chunk * groups_.size() : nullptr;
    A* const abs_sum = abs_sum_ ? abs_sum_ + chunk * groups_.size() : nullptr;
    for (std::int64_t g = 0; g < groups_.count; ++g)
      for (std::int64_t k = 0; k < p_.kernel_h; ++k)
        for (A* const partial : {sum, abs_sum})
          if (partial) std::fill_n(partial + groups_.offset(g, k, output), own_outputs * groups_.pitch(g), A(0));
    const Pieces blocks = blocks_of(p_, chunks_[chunk], positions_);
    for (std::int64_t b = 0; b < blocks.count(); ++b)
      add_block<T>(p_, groups_, blocks[b], blocks[std::min(b + 1, blocks.count() - 1)], output, own_outputs, sum,
                   abs_sum, x, dy);
  }

  void join() override {
    if (sum_) join_partials(p_, groups_, sum_, chunks_.count(), static_cast<A*>(p_.sum));
    if (abs_sum_) join_partials(p_, groups_, abs_sum_, chunks_.count(), static_cast<A*>(p_.abs_sum));
  }

 private:
  const ConvGradSigns p_;
  const Groups groups_;
  const Pieces chunks_;
  const std::int64_t outputs_;  // of a task
  const PoolSpace pool_;
  std::int64_t positions_ = 0, dy_size_ = 0, x_size_ = 0;  // of a block
  A *sum_, *abs_sum_;                                      // partial results by chunk
};

}  // namespace

std::unique_ptr<Summation> conv_sums(const ConvGradSigns& p) {
  std::unique_ptr<Summation> sums;
  with_dtype(p.dtype, [&](auto* t) { sums = std::make_unique<ConvSums<std::remove_pointer_t<decltype(t)>>>(p); });
  return sums;
}

}  // namespace bnkern::BNKERN_ISA
