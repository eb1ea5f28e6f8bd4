// `channel_stats`; see `kernels.interface`.
//
// Rows are shared out in chunks, a block each. Of a chunk three numbers are left for each channel:
// its first row, the mean deviation from that, and the sum of squared deviations from the mean.
// Chunks are then combined as Chan et al. do (1979). So no value is ever squared before one near it
// is subtracted.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    chunk_stats(const Element* __restrict__ z,  // (rows, C)
                float* __restrict__ partial,    // (chunks, 3, C)
                int num_rows, int rows_of_a_chunk, int num_channels) {
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
  Values near = {}, sum = {}, sum_of_squares = {};
  for (int i = first; i < end; i += kBatch * blockDim.y) {
    Values batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      batch[b] = row(min(i + b * static_cast<int>(blockDim.y), end - 1));
    }
    if (i == first) near = batch[0];
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

  const Values origin = row(begin);
  const float count = first < end ? ceil_div(end - first, blockDim.y) : 0;
  const float inverse_count = 1.0f / fmaxf(count, 1.0f);
  Values deviation, mean, spread;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    const float own_mean = sum.of[j] * inverse_count;
    deviation.of[j] = near.of[j] - origin.of[j] + own_mean;
    spread.of[j] = sum_of_squares.of[j] - sum.of[j] * own_mean;
    mean.of[j] = deviation.of[j] * count;
  }
  sum_over_slots(mean.of);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    mean.of[j] /= end - begin;
    const float apart = deviation.of[j] - mean.of[j];
    spread.of[j] += apart * apart * count;
  }
  sum_over_slots(spread.of);

  if (threadIdx.y > 0 || !is_channel) return;
  float* place = partial + static_cast<long long>(blockIdx.x) * 3 * num_channels + channel;
  store(place, origin);
  store(place + num_channels, mean);
  store(place + 2 * num_channels, spread);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    channel_stats(const float* __restrict__ partial,
                  float* __restrict__ mean,  // (C,), and the next one
                  float* __restrict__ inv_std,
                  float* __restrict__ running_mean,  // (C,), or null: not kept; and the next one
                  float* __restrict__ running_var, float momentum, float eps, int num_rows,
                  int rows_of_a_chunk, int num_chunks, int num_channels) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_channel = channel < num_channels;
  const float* place = partial + (is_channel ? channel : 0);
  const float origin = place[0];
  const auto part = [&](int chunk, int i) {
    chunk = min(chunk, num_chunks - 1);
    return place[(static_cast<long long>(chunk) * 3 + i) * num_channels];
  };
  const auto deviation_of = [&](int chunk) { return part(chunk, 0) - origin + part(chunk, 1); };
  const auto count_of = [&](int chunk) {
    return static_cast<float>(max(0, min(num_rows - chunk * rows_of_a_chunk, rows_of_a_chunk)));
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
  const float mean_deviation = total[0] / num_rows;
  float spread[1] = {};
  for (int first = threadIdx.y; first < num_chunks; first += kBatch * blockDim.y) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int chunk = first + b * blockDim.y;
      const float own = part(chunk, 2), apart = deviation_of(chunk) - mean_deviation;
      spread[0] += (chunk < num_chunks ? own : 0.0f) + apart * apart * count_of(chunk);
    }
  }
  sum_over_slots(spread);

  if (threadIdx.y > 0 || !is_channel) return;
  const float of_channel = origin + mean_deviation;
  mean[channel] = of_channel;
  inv_std[channel] = rsqrtf(spread[0] / num_rows + eps);
  if (running_mean != nullptr) {
    running_mean[channel] += (of_channel - running_mean[channel]) * momentum;
  }
  if (running_var != nullptr) {
    const float unbiased = spread[0] / (num_rows - 1);
    running_var[channel] += (unbiased - running_var[channel]) * momentum;
  }
}
