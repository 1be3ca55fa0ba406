// Picks the instruction set, once, at the first call. Compiled for the baseline: it must run anywhere.
#include <cstdlib>
#include <stdexcept>

#include "cpu.h"

namespace bnkern {
namespace {

struct Candidate {
  CpuKernels kernels;
  bool runs_here;
};

CpuKernels choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  const Candidate candidates[] = {
#ifdef BNKERN_HAS_AVX512
      {{"avx512", avx512::forward, avx512::backward, avx512::augment, avx512::conv_grad_signs, avx512::conv3x3},
       avx512},
#endif
#ifdef BNKERN_HAS_AVX2
      {{"avx2", avx2::forward, avx2::backward, avx2::augment, avx2::conv_grad_signs, avx2::conv3x3}, avx2},
#endif
      {{"generic", generic::forward, generic::backward, generic::augment, generic::conv_grad_signs, generic::conv3x3},
       true},
  };
  const char* const asked = std::getenv("BNKERN_ISA");
  for (const Candidate& candidate : candidates) {
    if (asked && *asked && std::string(asked) != candidate.kernels.isa) continue;
    if (candidate.runs_here) return candidate.kernels;
    if (asked && *asked) throw std::runtime_error(std::string("BNKERN_ISA=") + asked + ": this machine cannot run it");
  }
  throw std::runtime_error(std::string("BNKERN_ISA=") + asked +
                           ": this build has avx512, avx2 (on x86-64) and generic");
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels chosen = choose();
  return chosen;
}

}  // namespace bnkern
