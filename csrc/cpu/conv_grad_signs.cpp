// conv_grad_signs runs its summations side by side, one piece of x and dy after the other. The first summation loads a
// piece into the thread's own cache, and the others read it from there. Each summation has the same pieces as it has
// alone, and so the same bits.
#include <omp.h>

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {

void conv_grad_signs(const ConvGradSigns& p) {
  std::unique_ptr<Summation> summations[3];
  int count = 0;
  if (p.winograd) {
    if (p.sum) summations[count++] = conv3x3_gradient(p, false);
    if (p.abs_sum) summations[count++] = conv3x3_gradient(p, true);
  } else if (p.sum || p.abs_sum) {
    summations[count++] = conv_sums(p);
  }
  if (p.sign_sum || p.nonzero) summations[count++] = conv_signs(p);

  std::int64_t steps = 0, scratch = 0;
  for (int k = 0; k < count; ++k) {
    steps = std::max(steps, summations[k]->tasks());
    scratch = std::max(scratch, round_up(summations[k]->scratch_bytes(), 64));
  }
  if (!steps) return;  // no result is requested
  const int threads = static_cast<int>(std::min<std::int64_t>(steps, p.threads));
  const PoolSpace pool(threads * scratch);
#pragma omp parallel num_threads(threads)
  {
    char* const thread_scratch = pool.data() + omp_get_thread_num() * scratch;
#pragma omp for schedule(dynamic)
    for (std::int64_t step = 0; step < steps; ++step)
      for (int k = 0; k < count; ++k) {
        const std::int64_t tasks = summations[k]->tasks(), end = (step + 1) * tasks / steps;
        for (std::int64_t task = step * tasks / steps; task < end; ++task) summations[k]->run(task, thread_scratch);
      }
    for (int k = 0; k < count; ++k) summations[k]->join();
  }
}

}  // namespace bnkern::BNKERN_ISA
