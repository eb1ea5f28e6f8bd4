// What the kernels share. A launch defines ELEMENT, float, bfloat16 or float16; VECTOR, how many of
// them a thread takes at a time: 16 bytes, or less where the number of channels is no multiple of
// that; MAX_THREADS, of a block; and BATCH, below.
//
// Shapes: N images, C channels, H W height and width, in channels-last memory, (N, H, W, C). A row
// is one position of one image, with all its channels.
//
// A block is a rectangle of threads. x goes along the channels, VECTOR at a time, so that
// neighbours access neighbouring bytes. Each y is a slot, and slots share the positions out; where
// a row is narrower than a warp, a warp takes several slots, which are neighbours in memory too.
#pragma once

#include "half.cuh"

using Element = ELEMENT;

constexpr int kMaxThreads = MAX_THREADS;
constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

// How many positions, rows or parts a thread loads before it uses the first, so that as many
// accesses are under way: the compiler moves none across a store, or the end of a loop that it
// does not know. What is beyond the end is loaded from the last place, and not used.
[[maybe_unused]] constexpr int kBatch = BATCH;

template <typename Type, int kCount>
struct alignas(sizeof(Type) * kCount) Packed {
  Type values[kCount];
};

// VECTOR elements, as they are computed with.
struct Values {
  float of[VECTOR];
};

// How many elements an access takes: float32 beside a 16-bit type takes two of 16 bytes.
template <typename Type>
constexpr int kAccess = VECTOR * sizeof(Type) > 16 ? 16 / sizeof(Type) : VECTOR;

template <typename Type>
__device__ inline Values load(const Type* place) {
  Values loaded;
#pragma unroll
  for (int i = 0; i < VECTOR; i += kAccess<Type>) {
    const auto packed = *reinterpret_cast<const Packed<Type, kAccess<Type>>*>(place + i);
#pragma unroll
    for (int j = 0; j < kAccess<Type>; ++j) loaded.of[i + j] = to_float(packed.values[j]);
  }
  return loaded;
}

template <typename Type>
__device__ inline void store(Type* place, const Values& stored) {
#pragma unroll
  for (int i = 0; i < VECTOR; i += kAccess<Type>) {
    Packed<Type, kAccess<Type>> packed;
#pragma unroll
    for (int j = 0; j < kAccess<Type>; ++j) from_float(stored.of[i + j], packed.values[j]);
    *reinterpret_cast<Packed<Type, kAccess<Type>>*>(place + i) = packed;
  }
}

// The first of this thread's channels.
__device__ inline int first_channel() { return (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR; }

__device__ inline int thread_index() { return threadIdx.y * blockDim.x + threadIdx.x; }

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The sums of kCount values over a block's slots, for each of its columns; every slot gets them.
// The order is always the same: pairs within a warp, then one group of slots after another.
template <int kCount>
__device__ inline void sum_over_slots(float (&values)[kCount]) {
  __shared__ float shared[kCount][kMaxThreads];
  const int num_columns = blockDim.x;
  for (int offset = num_columns; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values[j] += __shfl_xor_sync(kAllLanes, values[j], offset);
    }
  }
  const int slots_of_a_group = num_columns < kWarp ? kWarp / num_columns : 1;
  const int num_groups = blockDim.y / slots_of_a_group;
  if (num_groups == 1) return;
  if (threadIdx.y % slots_of_a_group == 0) {
    const int place = threadIdx.y / slots_of_a_group * num_columns + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kCount; ++j) shared[j][place] = values[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kCount; ++j) values[j] = shared[j][threadIdx.x];
#pragma unroll 1
  for (int group = 1; group < num_groups; ++group) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] += shared[j][group * num_columns + threadIdx.x];
  }
  __syncthreads();
}

__device__ inline float sum_over_warp(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// The sums over all threads of a block; every thread gets them.
template <int kCount>
__device__ inline void sum_over_block(float (&values)[kCount]) {
  __shared__ float shared[kCount][kMaxThreads / kWarp];
  const int num_warps = blockDim.x * blockDim.y / kWarp, warp = thread_index() / kWarp;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    values[j] = sum_over_warp(values[j]);
    if (thread_index() % kWarp == 0) shared[j][warp] = values[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    values[j] = shared[j][0];
#pragma unroll 1
    for (int i = 1; i < num_warps; ++i) values[j] += shared[j][i];
  }
  __syncthreads();
}

// The sums over parts, (parts, 2, C), of which each left two for every channel: one (C,) each. A
// column of threads takes a channel.
__device__ inline void sum_parts(const float* parts, float* first_sum, float* second_sum,
                                 int num_parts, int num_channels) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_channel = channel < num_channels;
  const float* place = parts + (is_channel ? channel : 0);
  float sums[2] = {};
  for (int first = threadIdx.y; first < num_parts; first += kBatch * blockDim.y) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * blockDim.y;
      const bool is_part = i < num_parts;
      const float* part = place + static_cast<long long>(is_part ? i : 0) * 2 * num_channels;
      const float of_first = part[0], of_second = part[num_channels];
      sums[0] += is_part ? of_first : 0.0f;
      sums[1] += is_part ? of_second : 0.0f;
    }
  }
  sum_over_slots(sums);
  if (threadIdx.y == 0 && is_channel) {
    first_sum[channel] = sums[0];
    second_sum[channel] = sums[1];
  }
}

// The first and the second half of twice VECTOR sums, to be stored.
__device__ inline Values half_of(const float (&sums)[2 * VECTOR], int half) {
  Values values;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) values.of[j] = sums[half * VECTOR + j];
  return values;
}

// What normalisation and activation need of a thread's channels, and what they make of an element:
// xh, v and d of the notation in `kernels.interface`.
struct Normalization {
  Values mean, inv_std, gamma, beta;
  float negative_slope;

  __device__ float normalized(float z, int j) const { return (z - mean.of[j]) * inv_std.of[j]; }

  // Rounded once in every kernel, so that all of them see the same sign.
  __device__ float before_activation(float xh, int j) const {
    return fmaf(gamma.of[j], xh, beta.of[j]);
  }

  __device__ float slope(float v) const { return v > 0.0f ? 1.0f : negative_slope; }
};

// Of VECTOR channels; the four are (C,).
__device__ inline Normalization load_normalization(const float* mean, const float* inv_std,
                                                   const float* gamma, const float* beta,
                                                   int channel, float negative_slope) {
  return {load(mean + channel), load(inv_std + channel), load(gamma + channel),
          load(beta + channel), negative_slope};
}

// Positions of one side: from begin to end.
struct Span {
  int begin, end;

  __device__ bool holds(int i) const { return begin <= i && i < end; }
  __device__ int size() const { return end - begin; }
};

// Cell i of num_cells along a side of `size`. Cells overlap where num_cells does not divide it.
__device__ inline Span cell_of(int i, int size, int num_cells) {
  return {i * size / num_cells, ceil_div((i + 1) * size, num_cells)};
}

// What of cell i no later cell holds; these parts of all cells make up the side.
__device__ inline Span own_part_of(int i, int size, int num_cells) {
  return {i * size / num_cells, (i + 1) * size / num_cells};
}

// The cells that hold position i: an inverse of cell_of.
__device__ inline Span cells_that_hold(int i, int size, int num_cells) {
  return {i * num_cells / size, ceil_div((i + 1) * num_cells, size)};
}
