// Kernels with and without a fault. test_faults.py tests that the faults are detected.
#include "../../../csrc/cuda/exchange.h"

namespace {

using namespace bnkern;

std::string message;

const char* store(std::string text) {
  message = std::move(text);
  return message.c_str();
}

// out[t] = n - 1 - t, by way of shared memory.
void reverse_kernel(int* out, bool barrier) {
  int* const shared = shared_memory<int>();
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[t] = t;
  if (barrier) __syncthreads();
  out[t] = shared[n - 1 - t];
}

void shift_kernel(int* out, int offset) {
  int* const shared = shared_memory<int>();
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = t;
  __syncthreads();
  out[t] = shared[t + offset];
}

void misaligned_kernel(const char* in, Words* out, int offset) { out[0] = load_words(in + offset); }

// The sum of one value per block: added by each block when it runs, or by the last block in a fixed order.
void sum_kernel(const float* in, float* partial, float* out, unsigned* word, bool in_order) {
  const unsigned b = blockIdx.x;
  partial[b] = in[b];
  if (!in_order) {
    __syncthreads();
    add_acquire_release(word, 1u);  // another block may run next
    *out += partial[b];
  } else if (last_of_blocks(word, gridDim.x)) {
    float sum = 0;
    for (unsigned k = 0; k < gridDim.x; ++k) sum += partial[k];
    *out = sum;
  }
}

void half_barrier_kernel() {
  if (threadIdx.x % 2) __syncthreads();
}

void meet_kernel(unsigned* word) {
  BlocksBarrier barrier(word, gridDim.x);
  barrier.arrive(blockIdx.x == 0);
  barrier.wait();
}

// Each thread reads a value of the other block of its cluster.
void swap_kernel(int* out) {
  int* const shared = shared_memory<int>();
  *shared = static_cast<int>(blockIdx.x);
  arrive_in_cluster();
  wait_in_cluster();
  out[blockIdx.x] = *of_cluster_block(shared, cluster_rank() ^ 1);
  arrive_in_cluster_relaxed();
  wait_in_cluster();  // a block must not exit while another one may read its memory
}

void half_cluster_barrier_kernel(int arrivals, int waits) {
  for (int i = 0; i < arrivals; ++i) arrive_in_cluster();
  for (int i = 0; i < waits; ++i) wait_in_cluster();
}

// The sum over a warp by shuffles, and the ballot of its odd lanes.
void warp_kernel(int* out) {
  int sum = static_cast<int>(threadIdx.x);
  for (unsigned lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2);
  out[threadIdx.x] = sum + (odd == 0xaaaaaaaau) + static_cast<int>(__shfl_down_sync(0xffffffffu, threadIdx.x, 1));
}

// Each lane loads an operand of a product. Four lanes read 32 bytes of a row, and rows are `stride` bytes apart.
void operands_kernel(int stride) {
  char* const shared = shared_memory<char>();
  const int lane = static_cast<int>(threadIdx.x);
  reinterpret_cast<TwoWords*>(shared)[lane] = {};
  __syncthreads();
  load_operand(shared + lane / 4 * stride + lane % 4 * 8);
}

}  // namespace

extern "C" {
const char* fault_reverse(int* out, int threads, bool barrier) {
  return store(launch({"reverse", 1, threads, threads * sizeof(int), 0}, reverse_kernel, out, barrier));
}
const char* fault_shift(int* out, int threads, int offset) {
  return store(launch({"shift", 1, threads, threads * sizeof(int), 0}, shift_kernel, out, offset));
}
const char* fault_misaligned(const char* in, void* out, int offset) {
  return store(launch({"misaligned", 1, 1, 0, 0}, misaligned_kernel, in, static_cast<Words*>(out), offset));
}
const char* fault_sum(const float* in, float* partial, float* out, unsigned* word, int blocks, bool in_order) {
  return store(launch({"sum", blocks, 2, 0, 0}, sum_kernel, in, partial, out, word, in_order));
}
const char* fault_half_barrier() { return store(launch({"half barrier", 1, 4, 0, 0}, half_barrier_kernel)); }
const char* fault_meet(unsigned* word, int blocks, bool resident) {
  const Launch geometry{"meet", blocks, 2, 0, 0};
  if (!resident) return store(launch(geometry, meet_kernel, word));
  std::string error;
  return store(launch_resident(geometry, &error, meet_kernel, word) ? error : "not resident");
}
const char* fault_swap(int* out, int blocks) {
  return store(launch({"swap", blocks, 1, sizeof(int), 0, 2}, swap_kernel, out));
}
const char* fault_half_cluster_barrier(int arrivals, int waits) {
  return store(launch({"half cluster barrier", 2, 1, 0, 0, 2}, half_cluster_barrier_kernel, arrivals, waits));
}
const char* fault_warp(int* out) { return store(launch({"warp", 1, 32, 0, 0}, warp_kernel, out)); }
const char* fault_operands(int stride) {
  return store(launch({"operands", 1, 32, 8 * static_cast<std::size_t>(stride) + 256, 0}, operands_kernel, stride));
}
}
