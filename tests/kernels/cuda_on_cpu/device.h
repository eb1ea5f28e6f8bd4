// What CUDA C++ has and C++ has not, so that a kernel's source runs on a CPU as it is.
//
// Each thread of a block is a fiber. A fiber runs until it waits: at __syncthreads for all threads
// of its block, in a shuffle for all lanes of its warp. A thread that ends while others wait for
// it, threads that wait at different places and a shuffle that leaves lanes out are errors here,
// whatever a device would do. So is what the compiler's own checks find, where it has them: see the
// end of this file.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <deque>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
// Inlined, as on a device: a place to wait at is one of the kernel, not of a function that it calls
// from two places.
#define __device__ __attribute__((always_inline))
#define DEVICE_WAITS __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Dimensions {
  unsigned int x, y, z;
};
inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace device {

constexpr unsigned int kWarp = 32;
constexpr std::size_t kStackBytes = 1 << 17;

enum class State { kReady, kWaitsForBlock, kWaitsForWarp, kEnded };

struct Fiber {
  ucontext_t context;  // to begin a block with; a switch by contexts would ask the system
  jmp_buf resumption;  // where it waits
  bool has_begun;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Dimensions thread;
  State state;
  const void* place;  // in the code, at which it waits
  unsigned int num_shuffles;
};

struct Exchange {
  unsigned long long of[2][kWarp];  // a shuffle may begin before all have read the last one's
};

inline std::deque<Fiber> fibers;  // which stay where they are: a context holds its own address
inline std::vector<Exchange> exchanges;
inline jmp_buf scheduler;
inline unsigned int current;
inline char* dynamic_shared;
inline void (*body)(void**);
inline void** arguments;
inline const char* problem;  // of a single thread; null where there is none

struct Shared {
  void* place;
  std::size_t num_bytes;
};
inline std::vector<Shared> static_shared;

// Of a block, as long as it runs: each finds it all bits, so floats NaN.
inline void poison(const Shared& shared) { std::memset(shared.place, 0xff, shared.num_bytes); }

// Called once for a variable, when the first thread comes to it.
inline bool share(void* place, std::size_t num_bytes) {
  static_shared.push_back({place, num_bytes});
  poison(static_shared.back());
  return true;
}

inline void wait(State state, const void* place) {
  fibers[current].state = state;
  fibers[current].place = place;
  const unsigned int own = current;
  if (!_setjmp(fibers[own].resumption)) _longjmp(scheduler, 1);
}

// Goes no further in this thread.
[[noreturn]] inline void fail(const char* what) {
  problem = what;
  for (;;) wait(State::kEnded, nullptr);
}

inline void begin() {
  body(arguments);
  fibers[current].state = State::kEnded;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned int index) {
  current = index;
  threadIdx = fibers[index].thread;
  fibers[index].state = State::kReady;
  if (_setjmp(scheduler)) return;
  if (fibers[index].has_begun) _longjmp(fibers[index].resumption, 1);
  fibers[index].has_begun = true;
  setcontext(&fibers[index].context);
}

// Runs a block; null, or what its threads did wrong.
inline const char* run_block(bool is_reversed) {
  const unsigned int num_threads = blockDim.x * blockDim.y * blockDim.z;
  if (num_threads % kWarp && num_threads > 1) return "a warp is not full";
  while (fibers.size() < num_threads) {
    Fiber& fiber = fibers.emplace_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, begin, 0);
  }
  exchanges.resize((num_threads + kWarp - 1) / kWarp);
  for (unsigned int i = 0; i < num_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.num_shuffles = 0;
    fiber.state = State::kReady;
    fiber.has_begun = false;
  }
  problem = nullptr;
  const auto count = [&](unsigned int first, unsigned int last, State state) {
    unsigned int found = 0;
    for (unsigned int i = first; i < last; ++i) found += fibers[i].state == state;
    return found;
  };
  const auto are_together = [&](unsigned int first, unsigned int last) {
    for (unsigned int i = first; i < last; ++i) {
      if (fibers[i].place != fibers[first].place) return false;
    }
    return true;
  };
  for (;;) {
    for (unsigned int i = 0; i < num_threads; ++i) {
      const unsigned int index = is_reversed ? num_threads - 1 - i : i;
      if (fibers[index].state == State::kReady) resume(index);
      if (problem) return problem;
    }
    if (count(0, num_threads, State::kEnded) == num_threads) return nullptr;
    if (count(0, num_threads, State::kWaitsForBlock) == num_threads) {
      if (!are_together(0, num_threads)) return "threads wait at different barriers";
      for (unsigned int i = 0; i < num_threads; ++i) fibers[i].state = State::kReady;
      continue;
    }
    bool goes_on = false;
    for (unsigned int first = 0; first < num_threads; first += kWarp) {
      if (count(first, first + kWarp, State::kWaitsForWarp) == kWarp) {
        if (!are_together(first, first + kWarp)) return "lanes wait in different shuffles";
        for (unsigned int i = 0; i < kWarp; ++i) fibers[first + i].state = State::kReady;
        goes_on = true;
      }
    }
    if (!goes_on) return "threads wait for others that have ended, or wait elsewhere";
  }
}

template <typename Kernel>
struct Call;

template <typename... Arguments>
struct Call<void (*)(Arguments...)> {
  template <std::size_t... kIndices>
  static void with(void (*kernel)(Arguments...), void** values, std::index_sequence<kIndices...>) {
    kernel(*static_cast<std::remove_const_t<Arguments>*>(values[kIndices])...);
  }
  static void with(void (*kernel)(Arguments...), void** values) {
    with(kernel, values, std::index_sequence_for<Arguments...>());
  }

  // Of each argument its kind and its size; returns how many there are.
  static int describe(char* kinds, int* sizes) {
    ((*kinds++ = std::is_pointer_v<Arguments>        ? 'p'
                 : std::is_same_v<Arguments, int>    ? 'i'
                 : std::is_same_v<Arguments, float>  ? 'f'
                 : std::is_same_v<Arguments, double> ? 'd'
                 : std::is_class_v<Arguments>        ? 's'
                                                     : '?',
      *sizes++ = sizeof(Arguments)),
     ...);
    return sizeof...(Arguments);
  }
};

// Null, or what went wrong. The order in which blocks and threads run decides nothing.
inline const char* run(void (*call)(void**), void** values, const unsigned int* dimensions,
                       std::size_t num_shared_bytes, bool is_reversed) {
  body = call;
  arguments = values;
  gridDim = {dimensions[0], dimensions[1], dimensions[2]};
  blockDim = {dimensions[3], dimensions[4], dimensions[5]};
  std::vector<double> shared(num_shared_bytes / sizeof(double) + 1);
  dynamic_shared = reinterpret_cast<char*>(shared.data());
  const unsigned int num_blocks = gridDim.x * gridDim.y * gridDim.z;
  for (unsigned int i = 0; i < num_blocks; ++i) {
    const unsigned int block = is_reversed ? num_blocks - 1 - i : i;
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
    std::for_each(static_shared.begin(), static_shared.end(), poison);
    poison({shared.data(), shared.size() * sizeof(double)});
    if (const char* problem = run_block(is_reversed)) return problem;
  }
  return nullptr;
}

}  // namespace device

#define EXPORTED extern "C" __attribute__((visibility("default")))

#define KERNEL(name)                                                                            \
  EXPORTED const char* run_##name(void** values, const unsigned int* dimensions,                \
                                  std::size_t num_shared_bytes, bool is_reversed) {             \
    return device::run([](void** v) { device::Call<decltype(&name)>::with(&name, v); }, values, \
                       dimensions, num_shared_bytes, is_reversed);                              \
  }                                                                                             \
  EXPORTED int describe_##name(char* kinds, int* sizes) {                                       \
    return device::Call<decltype(&name)>::describe(kinds, sizes);                               \
  }

DEVICE_WAITS inline void __syncthreads() {
  device::wait(device::State::kWaitsForBlock, __builtin_return_address(0));
}

template <typename Value>
DEVICE_WAITS Value __shfl_xor_sync(unsigned int lanes, Value value, int offset) {
  static_assert(sizeof(Value) <= sizeof(unsigned long long));
  using namespace device;
  if (lanes != 0xffffffffu) fail("a shuffle leaves lanes out");
  if (offset < 0 || offset >= static_cast<int>(kWarp)) fail("a shuffle beyond the warp");
  const unsigned int own = current, lane = own % device::kWarp;
  auto& exchange = exchanges[own / device::kWarp].of[fibers[own].num_shuffles++ % 2];
  std::memcpy(&exchange[lane], &value, sizeof value);
  wait(State::kWaitsForWarp, __builtin_return_address(0));
  std::memcpy(&value, &exchange[lane ^ offset], sizeof value);
  return value;
}

inline float __uint_as_float(unsigned int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __int_as_float(int bits) { return __uint_as_float(bits); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline float sinpif(float x) { return std::sin(3.14159265358979323846 * x); }

// What code that is compiled with -fsanitize calls where it finds something; the compiler's own
// library would end the process, and the tests with it. The first field of what is passed is where.
namespace device {

struct Place {
  const char* file;
  unsigned int line, column;
};

[[noreturn]] inline void fail_at(const char* what, const void* data) {
  static char text[256];
  const auto& place = *static_cast<const Place*>(data);
  std::snprintf(text, sizeof text, "%s, line %u of what was compiled", what, place.line);
  fail(text);
}

}  // namespace device

#define HANDLER(name, what, ...)                                         \
  extern "C" void __ubsan_handle_##name(const void* data, __VA_ARGS__) { \
    device::fail_at(what, data);                                         \
  }

HANDLER(type_mismatch_v1, "a misaligned access", const void*)
HANDLER(out_of_bounds, "an index beyond an array", const void*)
HANDLER(shift_out_of_bounds, "a shift by too many bits, or of a sign", const void*, const void*)
HANDLER(add_overflow, "an overflow", const void*, const void*)
HANDLER(sub_overflow, "an overflow", const void*, const void*)
HANDLER(mul_overflow, "an overflow", const void*, const void*)
HANDLER(negate_overflow, "an overflow", const void*)
HANDLER(divrem_overflow, "an overflow", const void*, const void*)
