// Metal and CUDA spellings on a CPU. The threads of a threadgroup are coroutines that run one after the other; a barrier or
// a shuffle parks a thread until all of its threadgroup, or of its 32, stand at the same one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ucontext.h>

typedef unsigned int uint;
typedef unsigned short ushort;
struct uint3 { uint x, y, z; };
struct alignas(16) float4 {
    float x, y, z, w;
    float4() = default;
    float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}
};

// ---- 16-bit floats, rounded to the nearest even value as the hardware does ----
struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) {
        uint32_t wide;
        memcpy(&wide, &value, 4);
        bits = std::isnan(value) ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    }
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
};
typedef _Float16 float16_t;
typedef bfloat16_t __nv_bfloat16;
typedef float16_t __half;

// ---- threads ----
enum Place { RUNNING, AT_BARRIER, AT_SHUFFLE, DONE };
const int MOST_THREADS = 1024, STACK = 1 << 15;
static ucontext_t scheduler, contexts[MOST_THREADS];
alignas(16) static char stacks[MOST_THREADS][STACK];
static Place places[MOST_THREADS];
static const void *sites[MOST_THREADS];
static float exchange[2][MOST_THREADS];
static int shuffles[MOST_THREADS];
static uint now;

static void park(Place place, const void *site) {
    places[now] = place;
    sites[now] = site;
    swapcontext(&contexts[now], &scheduler);
}
// Two buffers in turn: a thread can be at most one shuffle ahead of a neighbour that has still to read.
static float __attribute__((noinline)) shuffle_xor(float x, uint mask) {
    const uint self = now, turn = shuffles[self]++ & 1;
    exchange[turn][self] = x;
    park(AT_SHUFFLE, __builtin_return_address(0));
    return exchange[turn][self ^ mask];
}

// ---- spellings ----
// Threadgroup memory goes into a section of its own, whose size is checked and which is filled with NaN before each group.
#define GROUP_MEMORY static __attribute__((section("group_memory")))
extern char __start_group_memory[], __stop_group_memory[];
#define device
#define constant
#define threadgroup  // of a pointer; declarations say SHARED, which the harness makes GROUP_MEMORY
#define __device__ static
namespace metal {
inline float exp(float x) { return expf(x); }
inline float log(float x) { return logf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float4 make_float4(float x, float y, float z, float w) { return float4(x, y, z, w); }
struct mem_flags { enum Kind { mem_threadgroup }; };
inline __attribute__((always_inline)) void threadgroup_barrier(mem_flags::Kind) {
    here: park(AT_BARRIER, &&here);
}
inline __attribute__((always_inline)) void __syncthreads() {
    here: park(AT_BARRIER, &&here);
}
#define simd_shuffle_xor(x, mask) shuffle_xor(x, mask)
#define __shfl_xor_sync(all, x, mask) shuffle_xor(x, mask)

static uint3 threadgroup_position_in_grid, blockIdx, *positions;
#define thread_position_in_threadgroup (uint3{now, 0, 0})
#define threadIdx (uint3{now, 0, 0})

// ---- running ----
typedef void (*Body)();
static Body body;
static void start() {
    body();
    places[now] = DONE;
    setcontext(&scheduler);
}

// True when every thread of [first, first + count) that still runs stands at one place of the given kind.
static bool together(uint first, uint count, Place kind) {
    const void *site = nullptr;
    uint waiting = 0;
    for (uint i = first; i < first + count; ++i) {
        if (places[i] != kind) return false;
        if (waiting++ && sites[i] != site) return false;
        site = sites[i];
    }
    return true;
}

// 0 done, 1 threads stand at different barriers or have left others waiting, 2 too much threadgroup memory
static int run_groups(uint3 groups, uint threads, bool backwards, Body kernel) {
    const size_t memory = __stop_group_memory - __start_group_memory;
    if (memory > 32768) return 2;
    body = kernel;
    for (uint z = 0; z < groups.z; ++z) for (uint y = 0; y < groups.y; ++y) for (uint x = 0; x < groups.x; ++x) {
        threadgroup_position_in_grid = blockIdx = {x, y, z};
        memset(__start_group_memory, 0xff, memory);
        for (uint i = 0; i < threads; ++i) {
            places[i] = RUNNING;
            shuffles[i] = 0;
            getcontext(&contexts[i]);
            contexts[i].uc_stack.ss_sp = stacks[i];
            contexts[i].uc_stack.ss_size = STACK;
            contexts[i].uc_link = nullptr;
            makecontext(&contexts[i], start, 0);
        }
        // Each 32 threads run as far ahead of the others as the barriers allow, which is when a missing one shows.
        for (uint done = 0; done < threads;) {
            bool moved = false;
            for (uint i = 0; i < threads; i += 32) {
                const uint first = backwards ? threads - 32 - i : i;
                for (bool again = true; again;) {
                    for (uint j = 0; j < 32; ++j) {
                        now = first + (backwards ? 31 - j : j);
                        if (places[now] != RUNNING) continue;
                        moved = true;
                        swapcontext(&scheduler, &contexts[now]);
                        done += places[now] == DONE;
                    }
                    again = together(first, 32, AT_SHUFFLE);
                    if (again) for (uint j = first; j < first + 32; ++j) places[j] = RUNNING;
                }
            }
            if (together(0, threads, AT_BARRIER)) {
                for (uint i = 0; i < threads; ++i) places[i] = RUNNING;
                moved = true;
            }
            if (!moved) return 1;
        }
    }
    return 0;
}
