// `block_backward`; see `kernels.interface`. Also defined: OVERLAP, whether cells may overlap.
//
// A block takes the part of one cell of one image that no later cell holds, and overwrites it.

#include "common.cuh"

// The sum, over the cells that hold a position, of gradient / size.
__device__ inline Values unpooled(const float* grad_image, int y, int x, int height, int width,
                                  int num_channels, int cells_h, int cells_w) {
  Values sum = {};
  const Span holding_y = cells_that_hold(y, height, cells_h);
  const Span holding_x = cells_that_hold(x, width, cells_w);
#pragma unroll 1
  for (int i = holding_y.begin; i < holding_y.end; ++i) {
#pragma unroll 1
    for (int k = holding_x.begin; k < holding_x.end; ++k) {
      const int size = cell_of(i, height, cells_h).size() * cell_of(k, width, cells_w).size();
      const float inverse_size = 1.0f / size;
      const Values grad = load(grad_image + (i * cells_w + k) * num_channels);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sum.of[j] += grad.of[j] * inverse_size;
    }
  }
  return sum;
}

// 2: left to choose, ptxas spills to fit more blocks on a multiprocessor.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 2)
    block_backward(Element* z,                              // (N, H, W, C); becomes dL/dz
                   const float* __restrict__ grad_latents,  // G, (N, cells_h, cells_w, C)
                   const float* __restrict__ mean,          // (C,), and the next five
                   const float* __restrict__ inv_std, const float* __restrict__ gamma,
                   const float* __restrict__ beta, const float* __restrict__ grad_gamma,
                   const float* __restrict__ grad_beta, float negative_slope, float inverse_n,
                   int height, int width, int num_channels, int cells_h, int cells_w) {
  const int channel = first_channel();
  if (channel >= num_channels) return;
  const int cell_x = blockIdx.x % cells_w;
  const int cell_y = blockIdx.x / cells_w % cells_h;
  const long long image = blockIdx.x / (cells_w * cells_h);
  const Span rows = own_part_of(cell_y, height, cells_h);
  const Span columns = own_part_of(cell_x, width, cells_w);
  const int num_positions = rows.size() * columns.size();
  int first = threadIdx.y;
  if (first >= num_positions) return;

  Element* z_image = z + image * height * width * num_channels + channel;
  int y[kBatch], x[kBatch];
  Values batch[kBatch];
  const auto load_batch = [&] {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = min(first + b * static_cast<int>(blockDim.y), num_positions - 1);
      y[b] = rows.begin + i / columns.size();
      x[b] = columns.begin + i % columns.size();
      batch[b] = load(z_image + (y[b] * width + x[b]) * num_channels);
    }
  };
  // Before the constants are waited for.
  load_batch();

  const Normalization norm =
      load_normalization(mean, inv_std, gamma, beta, channel, negative_slope);
  // dL/dz = d signal - (offset + drift xh), where signal is up(G) times gamma inv_std.
  Values rate, offset = load(grad_beta + channel), drift = load(grad_gamma + channel);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    rate.of[j] = norm.gamma.of[j] * norm.inv_std.of[j];
    offset.of[j] *= rate.of[j] * inverse_n;
    drift.of[j] *= rate.of[j] * inverse_n;
  }
  const float* grad_image = grad_latents + image * cells_h * cells_w * num_channels + channel;
  Values signal;
  if (!OVERLAP) {
    const float inverse_size = 1.0f / num_positions;
    signal = load(grad_image + (cell_y * cells_w + cell_x) * num_channels);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) signal.of[j] *= rate.of[j] * inverse_size;
  }

  for (;;) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * blockDim.y >= num_positions) break;
      if (OVERLAP) {
        signal = unpooled(grad_image, y[b], x[b], height, width, num_channels, cells_h, cells_w);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) signal.of[j] *= rate.of[j];
      }
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        const float xh = norm.normalized(batch[b].of[j], j);
        const float d = norm.slope(norm.before_activation(xh, j));
        batch[b].of[j] = d * signal.of[j] - fmaf(drift.of[j], xh, offset.of[j]);
      }
      store(z_image + (y[b] * width + x[b]) * num_channels, batch[b]);
    }
    first += kBatch * blockDim.y;
    if (first >= num_positions) return;
    load_batch();
  }
}
