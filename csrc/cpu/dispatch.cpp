// Chooses the instruction set once, at the first call. This file is compiled for the baseline, so it runs on every
// machine.
#include <cstdlib>
#include <stdexcept>

#include "cpu.h"

namespace bnkern {
namespace {

struct Candidate {
  CpuKernels kernels;
  bool supported;
};

CpuKernels choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#define BNKERN_KERNELS(isa)                                                                                \
  {                                                                                                        \
    #isa, isa::forward, isa::backward, isa::augment, isa::conv_grad_signs, isa::conv3x3, isa::conv_direct, \
        isa::conv_norm_forward, isa::conv_norm_backward, isa::update                                       \
  }
  const Candidate candidates[] = {
#ifdef BNKERN_HAS_AVX512
      {BNKERN_KERNELS(avx512), avx512},
#endif
#ifdef BNKERN_HAS_AVX2
      {BNKERN_KERNELS(avx2), avx2},
#endif
      {BNKERN_KERNELS(generic), true},
  };
#undef BNKERN_KERNELS
  const char* const requested = std::getenv("BNKERN_ISA");
  for (const Candidate& candidate : candidates) {
    if (requested && *requested && std::string(requested) != candidate.kernels.isa) continue;
    if (candidate.supported) return candidate.kernels;
    if (requested && *requested)
      throw std::runtime_error(std::string("BNKERN_ISA=") + requested + ": this machine cannot run it");
  }
  throw std::runtime_error(std::string("BNKERN_ISA=") + requested +
                           ": this build has avx512, avx2 (on x86-64) and generic");
}

}  // namespace

bool with_extensions() {
  static const bool allowed = [] {
    const char* const setting = std::getenv("BNKERN_EXTENSIONS");
    return !setting || std::string(setting) != "0";
  }();
  return allowed;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels chosen = choose();
  return chosen;
}

}  // namespace bnkern
