// `channel_stats`; see `kernels.interface`.
//
// Rows are shared out in chunks, a block each. Of a chunk three numbers are left for each channel:
// its first row, the mean deviation from that, and the sum of squared deviations from the mean.
// Chunks are then combined as Chan et al. do (1979), by a second kernel where there are several.
// So no value is ever squared before one near it is subtracted.

#include "common.cuh"

struct Running {
  float *mean, *var;  // (C,); null: not kept
  float momentum;
};

__device__ inline void write_stats(int channel, float mean, float spread, int num_rows, float eps,
                                   float* out_mean, float* out_inv_std, const Running& running) {
  out_mean[channel] = mean;
  out_inv_std[channel] = rsqrtf(spread / num_rows + eps);
  if (running.mean != nullptr) {
    running.mean[channel] += (mean - running.mean[channel]) * running.momentum;
  }
  if (running.var != nullptr) {
    const float unbiased = spread / (num_rows - 1);
    running.var[channel] += (unbiased - running.var[channel]) * running.momentum;
  }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads) channel_stats(
    const Element* __restrict__ z,  // (rows, C)
    float* __restrict__ partial,    // (3, chunks, C), or null: one chunk, and so the result at once
    float* __restrict__ mean,       // (C,), and the next one
    float* __restrict__ inv_std, Running running, float eps, int num_rows, int rows_of_a_chunk,
    int num_channels) {
  const int channel = first_channel();
  const int begin = blockIdx.x * rows_of_a_chunk;
  const int end = min(begin + rows_of_a_chunk, num_rows);
  const bool is_channel = channel < num_channels;
  const Element* z_channel = z + (is_channel ? channel : 0);
  const auto row = [&](int i) {
    return load(z_channel + static_cast<long long>(i) * num_channels);
  };

  // Each thread from its own first row.
  const int first = begin + threadIdx.y;
  const Values origin = row(begin), near = row(first < end ? first : begin);
  Values sum = {}, sum_of_squares = {};
  for (int i = first; i < end; i += kBatch * blockDim.y) {
    Values batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      batch[b] = row(min(i + b * static_cast<int>(blockDim.y), end - 1));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool is_row = i + b * blockDim.y < end;
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        const float deviation = is_row ? batch[b].of[j] - near.of[j] : 0.0f;
        sum.of[j] += deviation;
        sum_of_squares.of[j] += deviation * deviation;
      }
    }
  }

  const float count = first < end ? ceil_div(end - first, blockDim.y) : 0;
  float deviation[VECTOR], total[VECTOR], spread[VECTOR];
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    const float own_mean = sum.of[j] / fmaxf(count, 1.0f);
    deviation[j] = near.of[j] - origin.of[j] + own_mean;
    spread[j] = sum_of_squares.of[j] - sum.of[j] * own_mean;
    total[j] = deviation[j] * count;
  }
  sum_over_slots(total);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    total[j] /= end - begin;
    const float apart = deviation[j] - total[j];
    spread[j] += apart * apart * count;
  }
  sum_over_slots(spread);

  if (threadIdx.y > 0 || !is_channel) return;
  if (partial == nullptr) {
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      write_stats(channel + j, origin.of[j] + total[j], spread[j], num_rows, eps, mean, inv_std,
                  running);
    }
    return;
  }
  const long long step = static_cast<long long>(gridDim.x) * num_channels;
  float* place = partial + static_cast<long long>(blockIdx.x) * num_channels + channel;
  Values of_chunk[2];
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    of_chunk[0].of[j] = total[j];
    of_chunk[1].of[j] = spread[j];
  }
  store(place, origin);
  store(place + step, of_chunk[0]);
  store(place + 2 * step, of_chunk[1]);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    combine_chunks(const float* __restrict__ partial, float* __restrict__ mean,
                   float* __restrict__ inv_std, Running running, float eps, int num_rows,
                   int rows_of_a_chunk, int num_chunks, int num_channels) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_channel = channel < num_channels;
  const float* place = partial + (is_channel ? channel : 0);
  const long long step = static_cast<long long>(num_chunks) * num_channels;
  const float origin = place[0];
  const auto count_of = [&](int chunk) {
    return static_cast<float>(max(0, min(num_rows - chunk * rows_of_a_chunk, rows_of_a_chunk)));
  };
  const auto of_chunk = [&](int chunk) {
    return place + static_cast<long long>(min(chunk, num_chunks - 1)) * num_channels;
  };
  const auto deviation_of = [&](int chunk) {
    return of_chunk(chunk)[0] - origin + of_chunk(chunk)[step];
  };

  float total[1] = {};
  for (int first = threadIdx.y; first < num_chunks; first += kBatch * blockDim.y) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int chunk = first + b * blockDim.y;
      total[0] += deviation_of(chunk) * count_of(chunk);
    }
  }
  sum_over_slots(total);
  total[0] /= num_rows;
  float spread[1] = {};
  for (int first = threadIdx.y; first < num_chunks; first += kBatch * blockDim.y) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int chunk = first + b * blockDim.y;
      const float apart = deviation_of(chunk) - total[0];
      const float own = chunk < num_chunks ? of_chunk(chunk)[2 * step] : 0.0f;
      spread[0] += own + apart * apart * count_of(chunk);
    }
  }
  sum_over_slots(spread);
  if (threadIdx.y == 0 && is_channel) {
    write_stats(channel, origin + total[0], spread[0], num_rows, eps, mean, inv_std, running);
  }
}
