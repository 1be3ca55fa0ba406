#include "bank_conflicts.h"

#include <algorithm>
#include <cstdlib>
#include <set>

namespace cuda_on_cpu {
namespace {

bool counts = false;
long long loads = 0, further_passes = 0;

// The passes of one load by the lanes from `first` on.
int passes(const std::vector<const std::vector<unsigned>*>& lanes, std::size_t first, std::size_t load) {
  std::set<unsigned> words[32];
  for (std::size_t lane = first; lane < std::min(first + 16, lanes.size()); ++lane)
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned word = (*lanes[lane])[load] / 4 + half;
      words[word % 32].insert(word);
    }
  std::size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return static_cast<int>(most);
}

}  // namespace

bool BankConflicts::counted() { return counts; }

void BankConflicts::add(const std::vector<const std::vector<unsigned>*>& lanes) {
  for (const auto* const lane : lanes)
    if (lane->size() != lanes[0]->size()) std::abort();  // not loads of whole warps
  for (std::size_t load = 0; load < lanes[0]->size(); ++load)
    for (std::size_t first = 0; first < lanes.size(); first += 16) {
      ++loads;
      further_passes += passes(lanes, first, load) - 1;
    }
}

}  // namespace cuda_on_cpu

extern "C" {
// Begins or ends a count.
void count_bank_conflicts(bool begin) {
  cuda_on_cpu::counts = begin;
  if (begin) cuda_on_cpu::loads = cuda_on_cpu::further_passes = 0;
}
// The loads of 16 lanes, and the passes beyond one for each of these.
long long bank_conflicts(int which) { return which == 0 ? cuda_on_cpu::loads : cuda_on_cpu::further_passes; }
}
