// The scheduler of cuda_on_cpu.h: blocks, fibers, and what each fiber waits for.
#include "cuda_on_cpu.h"

#include "bank_conflicts.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // allocated page by page, when used
constexpr int kWarp = 32;

std::uint64_t seed = 0;
int resident_blocks = 1 << 30;
std::mutex one_launch;
int pause_in_ms = 0;
bool launches_left_out = false;

// A stack, which later launches reuse.
class Stack {
 public:
  Stack() : data_(take()) {}
  ~Stack() { kept().push_back(data_); }
  Stack(const Stack&) = delete;
  char* data() const { return data_; }

 private:
  static std::vector<char*>& kept() {
    static auto* const stacks = new std::vector<char*>;
    return *stacks;
  }
  static char* take() {
    if (kept().empty()) {
      void* const fresh =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fresh == MAP_FAILED) std::abort();
      return static_cast<char*>(fresh);
    }
    char* const data = kept().back();
    kept().pop_back();
    ASAN_UNPOISON_MEMORY_REGION(data, kStackBytes);  // of frames that did not return
    return data;
  }
  char* data_;
};

struct Block;

struct Fiber {
  Place place;
  Block* block = nullptr;
  int index = 0;  // in its block
  const char* waits_for = nullptr;
  int barrier_or = 0;
  unsigned arrivals = 0, waits = 0;  // at cluster barriers
  LaneValue sent{};
  std::shared_ptr<const WarpValues> received;
  std::vector<unsigned> operands;  // offsets in shared memory of the operands that it loaded
  Stack stack;
  ucontext_t context;
  void* fake_stack = nullptr;
};

// Fibers that wait until `expected` of them have arrived.
struct Barrier {
  std::size_t expected = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  unsigned mask = 0, arrived = 0;
  Fiber* waiting[kWarp] = {};
};

struct Cluster {
  std::size_t expected = 0, arrived = 0;
  unsigned completed = 0;  // barriers
  std::vector<Fiber*> waiting;
  std::vector<Block*> blocks;
};

struct Block {
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
  Barrier barrier;
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::size_t live = 0;
};

class Scheduler {
 public:
  Scheduler(const Grid& grid, const std::function<void()>& body) : grid_(grid), body_(body), random_(seed) {}

  std::string run() {
    // Clusters (of one block, if the launch has none) begin in a random order, few or many at a time.
    const std::size_t blocks = std::size_t{grid_.blocks.x} * grid_.blocks.y * grid_.blocks.z;
    for (std::size_t first = 0; first < blocks; first += grid_.cluster) pending_.push_back(first);
    std::shuffle(pending_.begin(), pending_.end(), random_);
    const std::size_t few = 1 + random_() % 4;
    std::size_t at_once = grid_.resident ? pending_.size() : std::min(few, pending_.size());
    while (at_once-- > 0) begin_cluster();
    next();  // returns when no fiber is ready
    if (BankConflicts::counted() && error_.empty()) count_bank_conflicts();
    return error_;
  }

  [[nodiscard]] Fiber& self() const { return *running_; }

  // Puts the running fiber among the ready ones.
  void yield() {
    ready_.push_back(running_);
    next();
  }
  void progress() { idle_ = 0; }
  // The running fiber polled a value that has not changed yet.
  void yield_idle() {
    if (++idle_ > 1000 + 64 * ready_.size()) return fail("waits forever in a loop");
    yield();
  }
  void wait(const char* what) {
    running_->waits_for = what;
    next();
  }
  void wake(Fiber* fiber) {
    fiber->waits_for = nullptr;
    ready_.push_back(fiber);
  }
  void arrive(Barrier& barrier, const char* what) {
    progress();
    barrier.waiting.push_back(running_);
    if (barrier.waiting.size() < barrier.expected) return wait(what);
    for (Fiber* fiber : barrier.waiting) wake(fiber);
    barrier.waiting.clear();
    next();
  }
  void arrive_in_cluster() {
    progress();
    Fiber& self = *running_;
    if (self.arrivals != self.waits) return fail("arrives twice at a cluster barrier");
    ++self.arrivals;
    Cluster& cluster = *self.block->cluster;
    if (++cluster.arrived == cluster.expected) {
      cluster.arrived = 0;
      ++cluster.completed;
      for (Fiber* fiber : cluster.waiting) wake(fiber);
      cluster.waiting.clear();
    }
    yield();
  }
  void wait_in_cluster() {
    Fiber& self = *running_;
    if (self.arrivals == self.waits) return fail("waits at a cluster barrier without an arrival");
    ++self.waits;
    Cluster& cluster = *self.block->cluster;
    if (cluster.completed >= self.arrivals) return yield();
    cluster.waiting.push_back(&self);
    wait("a cluster barrier");
  }
  void fail(const std::string& what) {
    std::ostringstream text;
    const Place& position = running_->place;
    text << grid_.name << ": " << what << ": thread " << position.thread.x << " of block (" << position.block.x << ", "
         << position.block.y << ")" << waiting_threads();
    error_ = text.str();
    leave();
  }

 private:
  void begin_cluster() {
    const std::size_t first = pending_.back();
    pending_.pop_back();
    const dim3 size = grid_.threads;
    const std::size_t threads = std::size_t{size.x} * size.y * size.z;
    clusters_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_.back();
    cluster.expected = threads * grid_.cluster;
    for (std::size_t b = first; b < first + grid_.cluster; ++b) {
      blocks_.push_back(std::make_unique<Block>());
      Block& block = *blocks_.back();
      block.cluster = &cluster;
      block.rank = static_cast<unsigned>(b - first);
      cluster.blocks.push_back(&block);
      // Exactly the requested bytes, so that the sanitizer detects accesses beyond the end.
      block.shared.reset(static_cast<char*>(std::malloc(grid_.shared_bytes)));
      for (std::size_t i = 0; i < grid_.shared_bytes; ++i) block.shared.get()[i] = static_cast<char>(random_());
      block.barrier.expected = block.live = threads;
      block.warps.resize((threads + kWarp - 1) / kWarp);
      for (std::size_t t = 0; t < threads; ++t) {
        block.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *block.fibers.back();
        fiber.block = &block;
        fiber.index = static_cast<int>(t);
        const auto x = [&](std::size_t i, dim3 n) {
          return dim3(static_cast<unsigned>(i % n.x), static_cast<unsigned>(i / n.x % n.y),
                      static_cast<unsigned>(i / n.x / n.y));
        };
        fiber.place = {x(t, size), x(b, grid_.blocks), size, grid_.blocks};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Scheduler::enter, 0);
        ready_.push_back(&fiber);
      }
    }
  }

  static void enter();

  void count_bank_conflicts() const {
    for (const auto& block : blocks_)
      for (std::size_t first = 0; first < block->fibers.size(); first += kWarp) {
        std::vector<const std::vector<unsigned>*> lanes;
        for (std::size_t t = first; t < std::min(first + kWarp, block->fibers.size()); ++t)
          lanes.push_back(&block->fibers[t]->operands);
        BankConflicts::add(lanes);
      }
  }

  void finish() {
    progress();
    Block& block = *running_->block;
    if (running_->arrivals != running_->waits) return fail("ends between the halves of a cluster barrier");
    running_->waits_for = "the end";
    if (--block.live == 0) {
      const auto ended = [](const Block* b) { return b->live == 0; };
      const auto& others = block.cluster->blocks;
      if (!pending_.empty() && std::all_of(others.begin(), others.end(), ended)) begin_cluster();
    }
    next(true);
  }

  // Switches from the running fiber to one of those that are ready, or to run() if there is none.
  void next(bool last_switch = false) {
    if (ready_.empty()) {
      for (const auto& block : blocks_)
        if (block->live && error_.empty()) error_ = std::string(grid_.name) + ": deadlock" + waiting_threads();
      return leave();
    }
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    Fiber* const to = ready_.back();
    ready_.pop_back();
    Fiber* const from = running_;
    running_ = to;
    if (from == to) return;
    ucontext_t* const context = from ? &from->context : &outside_;
    void** const fake = from ? &from->fake_stack : &outside_fake_stack_;
    __sanitizer_start_switch_fiber(last_switch ? nullptr : fake, to->stack.data(), kStackBytes);
    swapcontext(context, &to->context);
    arrived();
  }

  void leave() {
    if (!running_) return;
    Fiber* const from = running_;
    running_ = nullptr;
    __sanitizer_start_switch_fiber(&from->fake_stack, outside_stack_, outside_bytes_);
    swapcontext(&from->context, &outside_);
    std::abort();  // no switch leads back here
  }

  // Must be called first after a switch to another stack.
  void arrived() {
    __sanitizer_finish_switch_fiber(running_ ? running_->fake_stack : outside_fake_stack_, nullptr, nullptr);
  }

  std::string waiting_threads() const {
    std::ostringstream text;
    for (const auto& block : blocks_) {
      std::vector<std::pair<const char*, int>> counts;
      for (const auto& fiber : block->fibers) {
        const char* const what = fiber->waits_for ? fiber->waits_for : "its turn";
        auto entry = std::find_if(counts.begin(), counts.end(), [&](const auto& c) { return c.first == what; });
        if (entry == counts.end()) entry = counts.insert(entry, {what, 0});
        ++entry->second;
      }
      const dim3 b = block->fibers[0]->place.block;
      if (!block->live) continue;
      text << "; block (" << b.x << ", " << b.y << "): threads at";
      for (const auto& [what, count] : counts) text << " " << what << " " << count;
    }
    return text.str();
  }

  const Grid& grid_;
  const std::function<void()>& body_;
  std::mt19937_64 random_;
  std::vector<std::size_t> pending_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Fiber*> ready_;
  Fiber* running_ = nullptr;
  std::size_t idle_ = 0;
  std::string error_;
  ucontext_t outside_;
  void* outside_fake_stack_ = nullptr;
  const void* outside_stack_ = nullptr;
  std::size_t outside_bytes_ = 0;
};

Scheduler* scheduler = nullptr;

void Scheduler::enter() {
  // The switch to the very first fiber comes from outside of all fibers. It records that stack.
  Scheduler& s = *scheduler;
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!s.outside_stack_) s.outside_stack_ = stack, s.outside_bytes_ = bytes;
  s.body_();
  s.finish();
}

}  // namespace

std::string run(const Grid& grid, const void* kernel, const std::function<void()>& body) {
  if (launches_left_out) return {};
  if (grid.shared_bytes > std::size_t(allowed_shared_memory(kernel)))
    return std::string(grid.name) + ": more shared memory than the kernel may have";
  std::string error;
  {
    const std::lock_guard<std::mutex> lock(one_launch);
    Scheduler current(grid, body);
    scheduler = &current;
    error = current.run();
    scheduler = nullptr;
    seed = seed * 6364136223846793005u + 1442695040888963407u;  // the next launch gets another order
  }
  if (pause_in_ms) std::this_thread::sleep_for(std::chrono::milliseconds(pause_in_ms));
  return error;
}

bool fits(const Grid& grid) { return grid.blocks.x * grid.blocks.y * grid.blocks.z <= unsigned(resident_blocks); }

const Place& place() { return scheduler->self().place; }
char* shared_memory() { return scheduler->self().block->shared.get(); }
unsigned cluster_rank() { return scheduler->self().block->rank; }
char* of_cluster_block(char* p, unsigned rank) {
  Block& block = *scheduler->self().block;
  return block.cluster->blocks.at(rank)->shared.get() + (p - block.shared.get());
}

void block_barrier() { scheduler->arrive(scheduler->self().block->barrier, "a block barrier"); }
void arrive_in_cluster() { scheduler->arrive_in_cluster(); }
void wait_in_cluster() { scheduler->wait_in_cluster(); }

int block_barrier_or(int value) {
  Fiber& self = scheduler->self();
  self.barrier_or = value;
  block_barrier();
  int any = 0;
  for (const auto& fiber : self.block->fibers) any |= fiber->barrier_or;
  block_barrier();  // all have read the values
  return any != 0;
}

unsigned atomic_add(unsigned* word, unsigned value) {
  scheduler->progress();
  scheduler->yield();
  const unsigned before = *word;
  *word = before + value;
  return before;
}

unsigned poll(const unsigned* word) {
  scheduler->yield_idle();
  return *word;
}

unsigned lane() { return static_cast<unsigned>(scheduler->self().index % kWarp); }

std::shared_ptr<const WarpValues> all_lanes(unsigned mask, const LaneValue& own_value) {
  Fiber& self = scheduler->self();
  Warp& warp = self.block->warps[self.index / kWarp];
  const unsigned own = 1u << lane();
  if (!(mask & own) || (warp.arrived && warp.mask != mask))
    scheduler->fail("lanes of a warp disagree about which lanes take part");
  scheduler->progress();
  warp.mask = mask;
  warp.arrived |= own;
  warp.waiting[lane()] = &self;
  self.sent = own_value;
  if (warp.arrived != mask) {
    scheduler->wait("a shuffle");
  } else {
    const auto values = std::make_shared<WarpValues>();
    for (int i = 0; i < kWarp; ++i)
      (*values)[i] = mask >> i & 1 ? warp.waiting[i]->sent : LaneValue{~own_value[0], ~own_value[1], ~own_value[2]};
    for (int to = 0; to < kWarp; ++to) {
      if (!(mask >> to & 1)) continue;
      warp.waiting[to]->received = values;
      if (warp.waiting[to] != &self) scheduler->wake(warp.waiting[to]);
    }
    warp.arrived = 0;
    scheduler->yield();
  }
  return std::move(self.received);
}

unsigned ballot(unsigned mask, bool value) {
  const auto values = all_lanes(mask, {value});
  unsigned bits = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) bits |= unsigned((*values)[i][0] & 1) << i;
  return bits;
}

void note_operand(const char* p) {
  Fiber& self = scheduler->self();
  if (BankConflicts::counted()) self.operands.push_back(static_cast<unsigned>(p - self.block->shared.get()));
}

}  // namespace cuda_on_cpu

// Configures the following launches: the seed of the order, and the number of blocks that the device holds at once.
extern "C" void configure(std::uint64_t order, int blocks) {
  cuda_on_cpu::seed = order;
  cuda_on_cpu::resident_blocks = blocks;
}
// Whether launches do nothing, so that the work before them can be timed.
extern "C" void leave_out_launches(bool left_out) { cuda_on_cpu::launches_left_out = left_out; }
// The time that a thread waits after each of its launches, so that others can launch before its next one.
extern "C" void pause_between_launches(int milliseconds) { cuda_on_cpu::pause_in_ms = milliseconds; }
