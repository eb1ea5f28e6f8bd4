// `norm_backward`; see `kernels.interface`. Two passes over the rows: what it subtracts are sums
// over all of them.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    partial_gradients(const Element* __restrict__ z,            // (rows, C), and the next one
                      const Element* __restrict__ grad_output,  // dL/dh
                      float* __restrict__ partial,  // (chunks, 2, C): of dL/dgamma, and of dL/dbeta
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
  float* place = partial + static_cast<long long>(blockIdx.x) * 2 * num_channels + channel;
  store(place, half_of(sums, 0));
  store(place + num_channels, half_of(sums, 1));
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sum_gradients(const float* __restrict__ partial, float* __restrict__ grad_gamma,
                  float* __restrict__ grad_beta, int num_chunks, int num_channels) {
  sum_parts(partial, grad_gamma, grad_beta, num_chunks, num_channels);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    norm_backward(Element* z,                      // (rows, C); becomes dL/dz
                  const Element* grad_output,      // dL/dh, (rows, C)
                  const float* __restrict__ mean,  // (C,), and the next five
                  const float* __restrict__ inv_std, const float* __restrict__ gamma,
                  const float* __restrict__ beta, const float* __restrict__ grad_gamma,
                  const float* __restrict__ grad_beta, float negative_slope, float inverse_n,
                  int num_rows, int num_channels) {
  // grad_output is no __restrict__: its loads would then be moved behind the stores, one by one.
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
