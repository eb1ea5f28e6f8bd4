// `norm_backward`; see `kernels.interface`. Two passes over the rows: what it subtracts are sums
// over all of them.

#include "common.cuh"

__device__ inline Normalization load_normalization(const float* mean, const float* inv_std,
                                                   const float* gamma, const float* beta,
                                                   int channel, float negative_slope) {
  return {load(mean + channel), load(inv_std + channel), load(gamma + channel),
          load(beta + channel), negative_slope};
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    partial_gradients(const Element* __restrict__ z,            // (rows, C), and the next one
                      const Element* __restrict__ grad_output,  // dL/dh
                      float* __restrict__ partial,  // (2, chunks, C): of dL/dgamma, and of dL/dbeta
                      const float* __restrict__ mean,  // (C,), and the next three
                      const float* __restrict__ inv_std, const float* __restrict__ gamma,
                      const float* __restrict__ beta, float negative_slope, int num_rows,
                      int rows_of_a_chunk, int num_channels) {
  const int channel = first_channel();
  const int begin = blockIdx.x * rows_of_a_chunk;
  const int end = min(begin + rows_of_a_chunk, num_rows);
  float sums[2 * VECTOR] = {};
  if (channel < num_channels) {
    const Normalization norm =
        load_normalization(mean, inv_std, gamma, beta, channel, negative_slope);
    for (int first = begin + threadIdx.y; first < end; first += kBatch * blockDim.y) {
      Values values[kBatch], grad_h[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = min(first + b * static_cast<int>(blockDim.y), end - 1);
        const long long place = static_cast<long long>(i) * num_channels + channel;
        values[b] = load(z + place);
        grad_h[b] = load(grad_output + place);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool is_row = first + b * blockDim.y < end;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          const float xh = norm.normalized(values[b].of[j], j);
          const float slope = norm.slope(norm.before_activation(xh, j));
          const float grad_v = is_row ? slope * grad_h[b].of[j] : 0.0f;
          sums[j] += is_row ? grad_v * xh : 0.0f;
          sums[VECTOR + j] += grad_v;
        }
      }
    }
  }
  sum_over_slots(sums);
  if (threadIdx.y > 0 || channel >= num_channels) return;
  const long long step = static_cast<long long>(gridDim.x) * num_channels;
  float* place = partial + static_cast<long long>(blockIdx.x) * num_channels + channel;
  Values of_gamma, of_beta;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    of_gamma.of[j] = sums[j];
    of_beta.of[j] = sums[VECTOR + j];
  }
  store(place, of_gamma);
  store(place + step, of_beta);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sum_gradients(const float* __restrict__ partial, float* __restrict__ grad_gamma,
                  float* __restrict__ grad_beta, int num_chunks, int num_channels) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_channel = channel < num_channels;
  const float* place = partial + (is_channel ? channel : 0);
  const long long step = static_cast<long long>(num_chunks) * num_channels;
  float sums[2] = {};
  for (int first = threadIdx.y; first < num_chunks; first += kBatch * blockDim.y) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int chunk = first + b * blockDim.y;
      const bool is_chunk = chunk < num_chunks;
      const float* of_chunk = place + static_cast<long long>(is_chunk ? chunk : 0) * num_channels;
      const float of_gamma = of_chunk[0], of_beta = of_chunk[step];
      sums[0] += is_chunk ? of_gamma : 0.0f;
      sums[1] += is_chunk ? of_beta : 0.0f;
    }
  }
  sum_over_slots(sums);
  if (threadIdx.y == 0 && is_channel) {
    grad_gamma[channel] = sums[0];
    grad_beta[channel] = sums[1];
  }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    norm_backward(Element* z,                               // (rows, C); becomes dL/dz
                  const Element* __restrict__ grad_output,  // dL/dh, (rows, C)
                  const float* __restrict__ mean,           // (C,), and the next five
                  const float* __restrict__ inv_std, const float* __restrict__ gamma,
                  const float* __restrict__ beta, const float* __restrict__ grad_gamma,
                  const float* __restrict__ grad_beta, float negative_slope, float inverse_n,
                  int num_rows, int num_channels) {
  const int channel = first_channel();
  if (channel >= num_channels) return;
  const Normalization norm =
      load_normalization(mean, inv_std, gamma, beta, channel, negative_slope);
  const Values to_gamma = load(grad_gamma + channel), to_beta = load(grad_beta + channel);

  const int first = blockIdx.x * kBatch * blockDim.y + threadIdx.y;
  Values values[kBatch], grad_h[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    const int i = min(first + b * static_cast<int>(blockDim.y), num_rows - 1);
    const long long place = static_cast<long long>(i) * num_channels + channel;
    values[b] = load(z + place);
    grad_h[b] = load(grad_output + place);
  }
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    const int i = first + b * blockDim.y;
    if (i >= num_rows) break;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const float xh = norm.normalized(values[b].of[j], j);
      const float d = norm.slope(norm.before_activation(xh, j));
      const float mean_grad = fmaf(xh, to_gamma.of[j], to_beta.of[j]) * inverse_n;
      values[b].of[j] = norm.gamma.of[j] * norm.inv_std.of[j] * (d * grad_h[b].of[j] - mean_grad);
    }
    store(z + static_cast<long long>(i) * num_channels + channel, values[b]);
  }
}
