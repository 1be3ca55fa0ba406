// The sign sum and the number of nonzero summands of a convolution's weight gradient, computed with bit planes.
//
// Each channel of dy, and each channel of x once per kernel column, has two bit planes over positions: one of the
// values that are present (not zero), and one of the negative values. A summand is present if both factors are present,
// and negative if exactly one of them is negative. So for each weight
//
//   nonzero = bits(present_dy & present_x),   sign_sum = nonzero - 2 bits((negative_dy ^ negative_x) & both present)
//
// NaN is present for `nonzero` and absent for `sign_sum`, so a block with a NaN is counted twice. If a block of x has
// no negative value, as after a ReLU, the planes of its negative values are neither made nor read.
#include <omp.h>

#include "bit_planes.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kLeastPositions = 2048;   // the least number of positions in a chunk
constexpr std::int64_t kBlockPositions = 8192;   // the largest number of positions in a block
constexpr std::int64_t kBlockBytes = 768 << 10;  // the largest size of a block's planes

// ------------------------------------------------------------------------------- counting bits of a vector

// A vector of kWide words of bits, or of as many counters. `count` adds the number of set bits to the counters.
#if defined(__AVX512F__)
// kNative: counts with vpopcntq. Not every machine with AVX-512 has it, so it is written in assembly, and the compiler
// cannot use it elsewhere.
template <bool kNative>
struct WideBits {
  static constexpr int kWide = 8;
  __m512i v;
  static BNKERN_INLINE WideBits zero() { return {_mm512_setzero_si512()}; }
  static BNKERN_INLINE WideBits load(const Bits* p) { return {_mm512_loadu_si512(p)}; }
  friend BNKERN_INLINE WideBits operator&(WideBits a, WideBits b) { return {_mm512_and_si512(a.v, b.v)}; }
  // (a ^ b) & c
  static BNKERN_INLINE WideBits differing(WideBits a, WideBits b, WideBits c) {
    return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x28)};
  }
  BNKERN_INLINE void count(WideBits bits) {
    __m512i counts;
    if constexpr (kNative) {
      asm("vpopcntq %1, %0" : "=v"(counts) : "v"(bits.v));
    } else {
      const __m512i nibble = _mm512_set1_epi8(15);
      const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
      const __m512i lo = _mm512_shuffle_epi8(table, _mm512_and_si512(bits.v, nibble));
      const __m512i hi = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bits.v, 4), nibble));
      counts = _mm512_sad_epu8(_mm512_add_epi8(lo, hi), _mm512_setzero_si512());
    }
    v = _mm512_add_epi64(v, counts);
  }
  BNKERN_INLINE std::int64_t total() const { return _mm512_reduce_add_epi64(v); }
  // The totals of eight vectors of counters.
  static BNKERN_INLINE void totals(const WideBits* counters, std::int64_t* to) {
    __m512i pairs[4], fours[2];
    for (int k = 0; k < 4; ++k) {
      const __m512i a = counters[2 * k].v, b = counters[2 * k + 1].v;
      pairs[k] = _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    for (int k = 0; k < 2; ++k) {
      const __m512i a = pairs[2 * k], b = pairs[2 * k + 1];
      fours[k] = _mm512_add_epi64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
    }
    const __m512i even = _mm512_shuffle_i64x2(fours[0], fours[1], 0x88);
    const __m512i odd = _mm512_shuffle_i64x2(fours[0], fours[1], 0xdd);
    _mm512_storeu_si512(to, _mm512_add_epi64(even, odd));
  }
};
using PlainBits = WideBits<false>;
#elif defined(__AVX2__)
struct PlainBits {
  static constexpr int kWide = 4;
  __m256i v;
  static BNKERN_INLINE PlainBits zero() { return {_mm256_setzero_si256()}; }
  static BNKERN_INLINE PlainBits load(const Bits* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  friend BNKERN_INLINE PlainBits operator&(PlainBits a, PlainBits b) { return {_mm256_and_si256(a.v, b.v)}; }
  static BNKERN_INLINE PlainBits differing(PlainBits a, PlainBits b, PlainBits c) {
    return {_mm256_and_si256(_mm256_xor_si256(a.v, b.v), c.v)};
  }
  BNKERN_INLINE void count(PlainBits bits) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i lo = _mm256_shuffle_epi8(table, _mm256_and_si256(bits.v, nibble));
    const __m256i hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits.v, 4), nibble));
    v = _mm256_add_epi64(v, _mm256_sad_epu8(_mm256_add_epi8(lo, hi), _mm256_setzero_si256()));
  }
  BNKERN_INLINE std::int64_t total() const {
    alignas(32) std::int64_t lane[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), v);
    return lane[0] + lane[1] + lane[2] + lane[3];
  }
  static BNKERN_INLINE void totals(const PlainBits* counters, std::int64_t* to) {
    for (int k = 0; k < 8; ++k) to[k] = counters[k].total();
  }
};
#else
struct PlainBits {
  static constexpr int kWide = 1;
  Bits v;
  static BNKERN_INLINE PlainBits zero() { return {0}; }
  static BNKERN_INLINE PlainBits load(const Bits* p) { return {*p}; }
  friend BNKERN_INLINE PlainBits operator&(PlainBits a, PlainBits b) { return {a.v & b.v}; }
  static BNKERN_INLINE PlainBits differing(PlainBits a, PlainBits b, PlainBits c) { return {(a.v ^ b.v) & c.v}; }
  BNKERN_INLINE void count(PlainBits bits) { v += __builtin_popcountll(bits.v); }
  BNKERN_INLINE std::int64_t total() const { return static_cast<std::int64_t>(v); }
  static BNKERN_INLINE void totals(const PlainBits* counters, std::int64_t* to) {
    for (int k = 0; k < 8; ++k) to[k] = counters[k].total();
  }
};
#endif

// ---------------------------------------------------------------------------------------------------- counting

// The planes of an operand's present values. `step` is the distance between channels, and `negative` the distance to
// the planes of negative values.
struct Operand {
  const Bits* present;
  std::int64_t step, negative;
};

template <int kCount, class Wide>
BNKERN_INLINE void totals(const Wide* counters, std::int64_t* to) {
  if constexpr (kCount == 8)
    Wide::totals(counters, to);
  else
    for (int k = 0; k < kCount; ++k) to[k] = counters[k].total();
}

// Results are stored tile by tile, so those of a tile are contiguous: [four outputs][two channels][kernel row][column]
// [4][2].
constexpr std::int64_t kTileOutputs = 4, kTileChannels = 2, kTileSize = 8;

// Adds to a tile of sign_sum and of nonzero if they are not null. kAlike: the values of all outputs are present at the
// same positions, for example if the gradient has no zeros. They are counted once. kPositive: x has no negative value.
template <class Wide, bool kAlike, bool kPositive, int kO, int kI>
BNKERN_INLINE void count_tile(const Operand& dy, const Operand& x, std::int64_t words, std::int32_t* sign_sum,
                              std::int32_t* nonzero) {
  constexpr int kCounted = kAlike ? 1 : kO;
  Wide present[kCounted][kI], differing[kO][kI];
  for (int i = 0; i < kI; ++i) {
    for (int o = 0; o < kCounted; ++o) present[o][i] = Wide::zero();
    for (int o = 0; o < kO; ++o) differing[o][i] = Wide::zero();
  }
  for (std::int64_t k = 0; k < words; k += Wide::kWide) {
    Wide x_present[kI], x_negative[kI], both[kI];
    for (int i = 0; i < kI; ++i) {
      x_present[i] = Wide::load(x.present + i * x.step + k);
      if (!kPositive) x_negative[i] = Wide::load(x.present + i * x.step + x.negative + k);
    }
    for (int o = 0; o < kO; ++o) {
      if (o < kCounted) {
        const Wide dy_present = Wide::load(dy.present + o * dy.step + k);
        for (int i = 0; i < kI; ++i) {
          both[i] = dy_present & x_present[i];
          present[o][i].count(both[i]);
        }
      }
      const Wide dy_negative = Wide::load(dy.present + o * dy.step + dy.negative + k);
      for (int i = 0; i < kI; ++i)
        differing[o][i].count(kPositive ? dy_negative & both[i] : Wide::differing(dy_negative, x_negative[i], both[i]));
    }
  }
  std::int64_t counts[kCounted * kI], differences[kO * kI];
  totals<kCounted * kI>(present[0], counts), totals<kO * kI>(differing[0], differences);
  std::int32_t nonzeros[kO * kI], sign_sums[kO * kI];
  for (int k = 0; k < kO * kI; ++k) {
    nonzeros[k] = static_cast<std::int32_t>(counts[k % (kCounted * kI)]);
    sign_sums[k] = nonzeros[k] - 2 * static_cast<std::int32_t>(differences[k]);
  }
  const auto add = [](const std::int32_t* summands, std::int32_t* results) __attribute__((always_inline)) {
    for (int k = 0; k < kO * kI; ++k) results[k / kI * kTileChannels + k % kI] += summands[k];
  };
  if (nonzero) add(nonzeros, nonzero);
  if (sign_sum) add(sign_sums, sign_sum);
}

// Counts the tiles of several outputs. `step` is the distance between the results of two adjacent tiles of four
// outputs.
template <class Wide, bool kAlike, bool kPositive, int kI>
void count_outputs(const Operand& dy, const Operand& x, std::int64_t words, std::int64_t outputs, std::int64_t step,
                   std::int32_t* sign_sum, std::int32_t* nonzero) {
  const auto tile = [](std::int32_t* results, std::int64_t offset) { return results ? results + offset : nullptr; };
  std::int64_t o = 0, offset = 0;
  for (; o + kTileOutputs <= outputs; o += kTileOutputs, offset += step)
    count_tile<Wide, kAlike, kPositive, kTileOutputs, kI>({dy.present + o * dy.step, dy.step, dy.negative}, x, words,
                                                          tile(sign_sum, offset), tile(nonzero, offset));
  for (; o < outputs; ++o, offset += kTileChannels)
    count_tile<Wide, kAlike, kPositive, 1, kI>({dy.present + o * dy.step, dy.step, dy.negative}, x, words,
                                               tile(sign_sum, offset), tile(nonzero, offset));
}

// Adds the counts of a block to the results, for the outputs of dy's planes.
template <class Wide>
void count_block(const ConvGradSigns& p, const Planes& x_planes, const Planes& dy_planes, const Bits* x, const Bits* dy,
                 bool positive, std::int32_t* sign_sum, std::int32_t* nonzero) {
  const std::int64_t words = dy_planes.plane();
  const std::int64_t step = divide_up(p.x.c, kTileChannels) * p.kernel_h * p.kernel_w * kTileSize;
  const Operand outputs{dy, dy_planes.offset(1, 0, 0), dy_planes.size()};
  bool alike = true;
  for (std::int64_t o = 1; o < dy_planes.channels; ++o) alike &= std::equal(dy, dy + words, dy + o * outputs.step);
  const auto pairs = positive ? alike ? count_outputs<Wide, true, true, 2> : count_outputs<Wide, false, true, 2>
                     : alike  ? count_outputs<Wide, true, false, 2>
                              : count_outputs<Wide, false, false, 2>;
  const auto single = positive ? alike ? count_outputs<Wide, true, true, 1> : count_outputs<Wide, false, true, 1>
                      : alike  ? count_outputs<Wide, true, false, 1>
                               : count_outputs<Wide, false, false, 1>;
  std::int64_t offset = 0;
  for (std::int64_t c = 0; c < p.x.c; c += kTileChannels)
    for (std::int64_t k = 0; k < p.kernel_h; ++k)
      for (std::int64_t q = 0; q < p.kernel_w; ++q, offset += kTileSize) {
        const Bits* const first = x + x_planes.offset(c, q, k % p.stride_h) + k / p.stride_h * x_planes.row_words;
        const Operand channels{first, x_planes.offset(1, 0, 0), x_planes.size()};
        const auto count = c + kTileChannels <= p.x.c ? pairs : single;
        count(outputs, channels, words, dy_planes.channels, step, sign_sum ? sign_sum + offset : nullptr,
              nonzero ? nonzero + offset : nullptr);
      }
}

using CountBlock = decltype(&count_block<PlainBits>);

CountBlock best_count() {
#if defined(__AVX512F__)
  if (with_extensions() && __builtin_cpu_supports("avx512vpopcntdq")) return count_block<WideBits<true>>;
#endif
  return count_block<PlainBits>;
}

// ------------------------------------------------------------------------------------------------------ summation

template <class T>
class ConvSigns final : public Summation {
  using A = Accumulator<T>;

 public:
  explicit ConvSigns(const ConvGradSigns& p)
      : p_(p),
        area_(p.kernel_h * p.kernel_w),
        fours_(divide_up(p.dy.c, kTileOutputs)),
        pairs_(divide_up(p.x.c, kTileChannels)),
        size_(fours_ * pairs_ * area_ * kTileSize),
        chunks_(chunks_of(p, kLeastPositions, size_ * static_cast<std::int64_t>(sizeof(std::int32_t)))),
        outputs_(outputs_per_task(p, chunks_.count())),
        pool_(2 * (chunks_.count() * size_ * static_cast<std::int64_t>(sizeof(std::int32_t)) + 64)) {
    // The bits of a position in all planes, without the padding of rows to whole words.
    const std::int64_t position_bits = 2 * (p.x.c * p.kernel_w * std::min(p.stride_h, p.kernel_h) + p.dy.c);
    positions_ = std::min(kBlockPositions, 8 * kBlockBytes / position_bits);
    for (std::int64_t k = 0; k < chunks_.count(); ++k) {
      const Pieces blocks = blocks_of(p, chunks_[k], positions_);
      const Rectangle block{0, blocks.images, 0, blocks.rows};
      const std::int64_t words = x_planes(block).row_words;
      x_size_ = std::max(x_size_, 2 * x_planes(block).size() + kWords);  // the last plane is read in whole vectors
      dy_size_ = std::max(dy_size_, 2 * dy_planes(block, outputs_).size());
      transposed_size_ = std::max(transposed_size_, transposed_size(words, p.kernel_w));
      marks_size_ = std::max(marks_size_, 2 * x_columns(p) + 2 * p.kernel_w * words * kWordBits);
    }
    values_size_ = std::max(x_columns(p), p.dy.w) * kLanes + kLanes;
    char* space = pool_.data();
    sign_sum_ = p.sign_sum ? take<std::int32_t>(space, chunks_.count() * size_) : nullptr;
    nonzero_ = p.nonzero ? take<std::int32_t>(space, chunks_.count() * size_) : nullptr;
  }

  std::int64_t tasks() const override { return chunks_.count() * divide_up(p_.dy.c, outputs_); }

  std::int64_t scratch_bytes() const override {
    return static_cast<std::int64_t>((x_size_ + dy_size_ + transposed_size_) * sizeof(Bits) + values_size_ * sizeof(A) +
                                     marks_size_ * sizeof(std::uint16_t)) +
           320;
  }

  void run(std::int64_t task, char* scratch) override {
    static const CountBlock count = best_count();
    Bits* const x = take<Bits>(scratch, x_size_);
    Bits* const dy = take<Bits>(scratch, dy_size_);
    Bits* const transposed = take<Bits>(scratch, transposed_size_);
    A* const values = take<A>(scratch, values_size_);
    std::uint16_t* const marks = take<std::uint16_t>(scratch, marks_size_);
    const std::int64_t parts = divide_up(p_.dy.c, outputs_), chunk = task / parts, output = task % parts * outputs_;
    const std::int64_t own_outputs = std::min(outputs_, p_.dy.c - output), four = size_ / fours_;
    const std::int64_t offset = chunk * size_ + output / kTileOutputs * four;
    std::int32_t* const sign_sum = sign_sum_ ? sign_sum_ + offset : nullptr;
    std::int32_t* const nonzero = nonzero_ ? nonzero_ + offset : nullptr;
    for (std::int32_t* const results : {sign_sum, nonzero})
      if (results) std::fill_n(results, divide_up(own_outputs, kTileOutputs) * four, 0);
    const Pieces blocks = blocks_of(p_, chunks_[chunk], positions_);
    for (std::int64_t b = 0; b < blocks.count(); ++b) {
      const Rectangle block = blocks[b];
      const Planes of_x = x_planes(block), of_dy = dy_planes(block, own_outputs);
      const Lattice x_lattice{
          block.row * p_.stride_h - p_.padding_h, p_.stride_h, p_.stride_w, p_.padding_w, p_.dy.w, x_columns(p_)};
      const Lattice dy_lattice{block.row, 1, 1, 0, p_.dy.w, p_.dy.w};
      const auto count_once = [&](bool with_nan, std::int32_t* signs, std::int32_t* nonzeros) {
        const Contents x_has = make_planes<T>(p_.x, block, x_lattice, of_x, 0, with_nan, x, values, marks, transposed);
        const Contents dy_has =
            make_planes<T>(p_.dy, block, dy_lattice, of_dy, output, with_nan, dy, values, marks, transposed);
        if (!dy_has.negative) std::fill_n(dy + of_dy.size(), of_dy.size(), Bits{0});
        const bool any_nan = x_has.nan || dy_has.nan;
        count(p_, of_x, of_dy, x, dy, !x_has.negative, signs, any_nan && !with_nan ? nullptr : nonzeros);
        return any_nan;
      };
      if (count_once(false, sign_sum, nonzero) && nonzero) count_once(true, nullptr, nonzero);
    }
  }

  void join() override {
    if (sign_sum_) join_partials(sign_sum_, p_.sign_sum);
    if (nonzero_) join_partials(nonzero_, p_.nonzero);
  }

 private:
  Planes x_planes(const Rectangle& block) const {
    return {p_.x.c, p_.kernel_w, std::min(p_.stride_h, p_.kernel_h), block.rows + (p_.kernel_h - 1) / p_.stride_h,
            divide_up(block.images * p_.dy.w, kWordBits)};
  }
  Planes dy_planes(const Rectangle& block, std::int64_t own_outputs) const {
    return {own_outputs, 1, 1, block.rows, divide_up(block.images * p_.dy.w, kWordBits)};
  }

  void join_partials(const std::int32_t* partials, std::int32_t* result) const {
#pragma omp for schedule(static) nowait
    for (std::int64_t unit = 0; unit < fours_ * pairs_; ++unit) {
      const std::int64_t first_output = unit / pairs_ * kTileOutputs, first_channel = unit % pairs_ * kTileChannels;
      for (std::int64_t tap = 0; tap < area_; ++tap) {
        std::int32_t totals[kTileSize] = {};
        for (std::int64_t chunk = 0; chunk < chunks_.count(); ++chunk)
          for (int k = 0; k < kTileSize; ++k)
            totals[k] += partials[chunk * size_ + (unit * area_ + tap) * kTileSize + k];
        for (int k = 0; k < kTileSize; ++k)
          if (const std::int64_t o = first_output + k / kTileChannels, c = first_channel + k % kTileChannels;
              o < p_.dy.c && c < p_.x.c)
            result[(o * p_.x.c + c) * area_ + tap] = totals[k];
      }
    }
  }

  const ConvGradSigns p_;
  // The area of a kernel, the numbers of tiles along outputs and channels, and the size of a chunk's partial result.
  const std::int64_t area_, fours_, pairs_, size_;
  const Pieces chunks_;
  const std::int64_t outputs_;  // of a task
  const PoolSpace pool_;
  std::int64_t positions_ = 0, x_size_ = 0, dy_size_ = 0, transposed_size_ = 0, marks_size_ = 0, values_size_ = 0;
  std::int32_t *sign_sum_, *nonzero_;  // partial results by chunk
};

}  // namespace

std::unique_ptr<Summation> conv_signs(const ConvGradSigns& p) {
  std::unique_ptr<Summation> signs;
  with_dtype(p.dtype, [&](auto* t) { signs = std::make_unique<ConvSigns<std::remove_pointer_t<decltype(t)>>>(p); });
  return signs;
}

}  // namespace bnkern::BNKERN_ISA
