// See meter.h. Empty where nothing is metered.

#if defined(VEERLOSS_METERED)

#include "meter.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulator.h"

// The linker's names for where this library begins, where the variables without a value do (so do all of __shared__), and ends.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, __bss_start, _end;

namespace meter {
namespace {

constexpr int warp_size = 32, sector_bytes = 32, banks = 32, bank_bytes = 4;

enum class Access { read, write, atomic };

struct Event {
  const void* instruction;
  uintptr_t address;
  int size;
  Access access;
  bool shared;
};

struct Launch {
  std::ofstream file;
  const void* kernel;
  int64_t blocks;
  int threads;
  Range stacks, main_stack;
  bool in_atomic = false;
  std::vector<std::vector<Event>> events;  // of each thread since the last barrier
  std::unordered_set<uintptr_t> read, written;
  int64_t requests = 0, sectors = 0, shared = 0, conflicts = 0;
  int64_t atomics = 0, atomic_turns = 0, global_atomics = 0, global_atomic_turns = 0;
};
Launch* launch = nullptr;  // while one is metered

bool holds(const Range& range, const void* address) {
  return address >= range.begin && address < range.end;
}

Range stack_of_this_thread() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &size);
  pthread_attr_destroy(&attributes);
  return {begin, static_cast<char*>(begin) + size};
}

void record(const void* instruction, const void* address, int size, Access access) {
  if (!launch || launch->in_atomic) return;
  using emulator::state;
  if (holds(launch->stacks, address) || holds(launch->main_stack, address) || holds({&state, &state + 1}, address)) return;
  const bool dynamic = holds({state.shared.data(), state.shared.data() + state.shared.size()}, address);
  const bool shared = dynamic || holds({&__bss_start, &_end}, address);
  if (!shared && holds({&__ehdr_start, &_end}, address)) return;  // constants
  launch->events[state.thread.x].push_back({instruction, reinterpret_cast<uintptr_t>(address), size, access, shared});
}

template <class F>
void for_each_unit(const Event& e, int unit, const F& f) {
  for (uintptr_t at = e.address / unit; at <= (e.address + e.size - 1) / unit; ++at) f(at);
}

// The most of one bank's words that a warp wants: distinct ones, or of atomics all.
int turns(const std::vector<Event>& warp) {
  std::array<std::vector<uintptr_t>, banks> words;
  for (const Event& e : warp) for_each_unit(e, bank_bytes, [&](uintptr_t word) { words[word % banks].push_back(word); });
  size_t most = 0;
  for (auto& bank : words) {
    std::sort(bank.begin(), bank.end());
    if (warp[0].access != Access::atomic) bank.erase(std::unique(bank.begin(), bank.end()), bank.end());
    most = std::max(most, bank.size());
  }
  return static_cast<int>(most);
}

int most_on_one_address(const std::vector<Event>& warp) {
  std::map<uintptr_t, int> count;
  int most = 0;
  for (const Event& e : warp) most = std::max(most, ++count[e.address]);
  return most;
}

void add_request(const std::vector<Event>& warp) {
  const Event& first = warp[0];
  const auto lanes = static_cast<int>(warp.size());
  if (first.shared && first.access == Access::atomic) {
    ++launch->atomics;
    launch->atomic_turns += turns(warp);
  } else if (first.shared) {
    ++launch->shared;
    const int least = std::max(1, (lanes * first.size + banks * bank_bytes - 1) / (banks * bank_bytes));
    launch->conflicts += std::max(0, turns(warp) - least);
  } else {
    std::unordered_set<uintptr_t> sectors;
    for (const Event& e : warp) for_each_unit(e, sector_bytes, [&](uintptr_t sector) { sectors.insert(sector); });
    ++launch->requests;
    launch->sectors += static_cast<int64_t>(sectors.size());
    if (first.access != Access::write) launch->read.insert(sectors.begin(), sectors.end());
    if (first.access != Access::read) launch->written.insert(sectors.begin(), sectors.end());
    if (first.access != Access::atomic) return;
    ++launch->global_atomics;
    launch->global_atomic_turns += most_on_one_address(warp);
  }
}

}  // namespace

void begin_launch(const void* kernel, int64_t blocks, int threads, Range stacks) {
  const char* path = std::getenv("VEERLOSS_METER");
  if (!path) return;
  launch = new Launch{std::ofstream(path, std::ios::app), kernel, blocks, threads, stacks, stack_of_this_thread()};
  launch->events.resize(threads);
}

void end_phase() {
  if (!launch) return;
  for (int first = 0; first < launch->threads; first += warp_size) {
    std::map<std::pair<const void*, int>, std::vector<Event>> requests;
    for (int t = first; t < std::min(first + warp_size, launch->threads); ++t) {
      std::unordered_map<const void*, int> times;
      for (const Event& e : launch->events[t]) requests[{e.instruction, times[e.instruction]++}].push_back(e);
      launch->events[t].clear();
    }
    for (const auto& [place, warp] : requests) add_request(warp);
  }
}

void end_launch() {
  if (!launch) return;
  const Launch& l = *launch;
  launch->file << "{\"kernel\": " << static_cast<const char*>(l.kernel) - &__ehdr_start << ", \"blocks\": " << l.blocks
               << ", \"threads\": " << l.threads << ", \"read\": " << sector_bytes * l.read.size()
               << ", \"written\": " << sector_bytes * l.written.size() << ", \"requests\": " << l.requests
               << ", \"sectors\": " << l.sectors << ", \"shared\": " << l.shared << ", \"conflicts\": " << l.conflicts
               << ", \"atomics\": " << l.atomics << ", \"atomic_turns\": " << l.atomic_turns
               << ", \"global_atomics\": " << l.global_atomics << ", \"global_atomic_turns\": " << l.global_atomic_turns
               << "}\n";
  delete launch;
  launch = nullptr;
}

}  // namespace meter

void emulator::begin_atomic(const void* at, int size) {
  meter::record(__builtin_return_address(0), at, size, meter::Access::atomic);
  if (meter::launch) meter::launch->in_atomic = true;
}

void emulator::end_atomic() {
  if (meter::launch) meter::launch->in_atomic = false;
}

// ---- what the compiler calls

#define VEERLOSS_METERED_ACCESS(size)                                           \
  void __tsan_read##size(void* at) {                                            \
    meter::record(__builtin_return_address(0), at, size, meter::Access::read);  \
  }                                                                             \
  void __tsan_write##size(void* at) {                                           \
    meter::record(__builtin_return_address(0), at, size, meter::Access::write); \
  }                                                                             \
  void __tsan_unaligned_read##size(void* at) {                                  \
    meter::record(__builtin_return_address(0), at, size, meter::Access::read);  \
  }                                                                             \
  void __tsan_unaligned_write##size(void* at) {                                 \
    meter::record(__builtin_return_address(0), at, size, meter::Access::write); \
  }

extern "C" {
VEERLOSS_METERED_ACCESS(1)
VEERLOSS_METERED_ACCESS(2)
VEERLOSS_METERED_ACCESS(4)
VEERLOSS_METERED_ACCESS(8)
VEERLOSS_METERED_ACCESS(16)
void __tsan_read_range(void* at, long size) {
  meter::record(__builtin_return_address(0), at, static_cast<int>(size), meter::Access::read);
}
void __tsan_write_range(void* at, long size) {
  meter::record(__builtin_return_address(0), at, static_cast<int>(size), meter::Access::write);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// Of a guard of a static variable.
char __tsan_atomic8_load(const char* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
}

#endif
