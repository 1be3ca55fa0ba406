// conv_grad_signs: its parts, piece by piece of x and dy side by side, so that the first to look at a piece brings it
// into a thread's own cache and the others find it there. The pieces are those that the parts have alone, and so are
// the bits.
#include <omp.h>

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {

void conv_grad_signs(const ConvGradSigns& p) {
  std::unique_ptr<Summation> parts[3];
  int count = 0;
  if (p.winograd) {
    if (p.sum) parts[count++] = conv3x3_gradient(p, false);
    if (p.abs_sum) parts[count++] = conv3x3_gradient(p, true);
  } else if (p.sum || p.abs_sum) {
    parts[count++] = conv_sums(p);
  }
  if (p.sign_sum || p.nonzero) parts[count++] = conv_signs(p);

  std::int64_t steps = 0, scratch = 0;
  for (int k = 0; k < count; ++k) {
    steps = std::max(steps, parts[k]->tasks());
    scratch = std::max(scratch, round_up(parts[k]->scratch_bytes(), 64));
  }
  if (!steps) return;  // nothing is wanted
  const int threads = static_cast<int>(std::min<std::int64_t>(steps, p.threads));
  const PoolSpace pool(threads * scratch);
#pragma omp parallel num_threads(threads)
  {
    char* const own = pool.data() + omp_get_thread_num() * scratch;
#pragma omp for schedule(dynamic)
    for (std::int64_t step = 0; step < steps; ++step)
      for (int k = 0; k < count; ++k) {
        const std::int64_t tasks = parts[k]->tasks(), end = (step + 1) * tasks / steps;
        for (std::int64_t task = step * tasks / steps; task < end; ++task) parts[k]->run(task, own);
      }
    for (int k = 0; k < count; ++k) parts[k]->join();
  }
}

}  // namespace bnkern::BNKERN_ISA
