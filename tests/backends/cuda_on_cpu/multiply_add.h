// mma.sync.aligned.m16n8k16.row.col with .f32 sums and .bf16 or .f16 factors, for the host. The places of the elements
// follow the PTX ISA manual ("Matrix Fragments for mma.m16n8k16 with floating point type") and not the kernels:
//   groupID = lane / 4, threadID_in_group = lane % 4
//   a0 ... a7: row groupID for i in {0, 1, 4, 5} and groupID + 8 otherwise,
//              column threadID_in_group * 2 + (i & 1), and 8 more for i >= 4
//   b0 ... b3: row threadID_in_group * 2 + (i & 1), and 8 more for i >= 2, column groupID
//   c0 ... c3: row groupID for i < 2 and groupID + 8 otherwise, column threadID_in_group * 2 + (i & 1)
// Two elements share a register, the first one in its lower half. Included by cuda_on_cpu.h.
//
// A device rounds the sums inside of a product in a way that the manual leaves open. Here they are exact but for one
// rounding at the end.
#pragma once

namespace cuda_on_cpu {

template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  LaneValue own;
  std::memcpy(own.data(), a, sizeof a);
  std::memcpy(own.data() + 2, b, sizeof b);
  const auto lanes = all_lanes(0xffffffffu, own);
  // Element i of the operands of a lane: a0 ... a7, then b0 ... b3.
  const auto element = [&](int lane, int i) {
    std::uint16_t halves[12];
    std::memcpy(halves, (*lanes)[lane].data(), sizeof halves);
    return static_cast<double>(cuda_on_cpu::widen(T{halves[i]}));
  };
  const auto a_at = [&](int row, int column) {
    for (int i = 0; i < 8; ++i) {
      const bool upper = i < 2 || (i >= 4 && i < 6);
      if ((row < 8) == upper && (column >= 8) == (i >= 4) && column % 2 == (i & 1))
        return element(row % 8 * 4 + column % 8 / 2, i);
    }
    std::abort();
  };
  const auto b_at = [&](int row, int column) {
    for (int i = 0; i < 4; ++i)
      if ((row >= 8) == (i >= 2) && row % 2 == (i & 1)) return element(column * 4 + row % 8 / 2, 8 + i);
    std::abort();
  };
  for (int i = 0; i < 4; ++i) {
    const int group = static_cast<int>(lane()) / 4, in_group = static_cast<int>(lane()) % 4;
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += a_at(row, k) * b_at(k, column);
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace cuda_on_cpu
