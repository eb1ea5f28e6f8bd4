// `block_forward`; see `kernels.interface`. Also defined: MAX_POOL, the max-pool's window and
// stride. A batch is of windows; of several positions, one is a batch by itself.
//
// A block takes the windows that touch one cell of one image: it adds up the cell's positions, and
// writes the windows that begin in the part of the cell which no later cell holds. So z is read
// once, but for what cells and windows share, and each result has one writer and no atomics.

#include "common.cuh"

constexpr int kUnrolledLines = MAX_POOL <= 2 ? MAX_POOL : 1;  // nvcc expands no macro in a pragma

// 2: see block_backward.cu.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 2)
    block_forward(const Element* __restrict__ z,  // (N, H, W, C)
                  Element* __restrict__ output,   // (N, H / MAX_POOL, W / MAX_POOL, C)
                  float* __restrict__ s0,  // (N, cells_h, cells_w, C), or null: the output only
                  float* __restrict__ s1,
                  const float* __restrict__ mean,  // (C,), and the next three
                  const float* __restrict__ inv_std, const float* __restrict__ gamma,
                  const float* __restrict__ beta, float negative_slope, int height, int width,
                  int num_channels, int cells_h, int cells_w) {
  const int cell_x = blockIdx.x % cells_w;
  const int cell_y = blockIdx.x / cells_w % cells_h;
  const long long image = blockIdx.x / (cells_w * cells_h);
  const Span rows = cell_of(cell_y, height, cells_h), columns = cell_of(cell_x, width, cells_w);
  const Span own_rows = own_part_of(cell_y, height, cells_h);
  const Span own_columns = own_part_of(cell_x, width, cells_w);
  const int channel = first_channel();

  float sums[2 * VECTOR] = {};  // of d, and of d xh
  if (channel < num_channels) {
    const Normalization norm =
        load_normalization(mean, inv_std, gamma, beta, channel, negative_slope);
    const int out_height = height / MAX_POOL, out_width = width / MAX_POOL;
    const Element* z_image = z + image * height * width * num_channels + channel;
    Element* output_image = output + image * out_height * out_width * num_channels + channel;

    const Span windows_y = {rows.begin / MAX_POOL, ceil_div(rows.end, MAX_POOL)};
    const Span windows_x = {columns.begin / MAX_POOL, ceil_div(columns.end, MAX_POOL)};
    const int num_windows = windows_y.size() * windows_x.size();
    for (int first = threadIdx.y; first < num_windows; first += kBatch * blockDim.y) {
      int window_y[kBatch], window_x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = min(first + b * static_cast<int>(blockDim.y), num_windows - 1);
        window_y[b] = windows_y.begin + i / windows_x.size();
        window_x[b] = windows_x.begin + i % windows_x.size();
      }
      Values highest[kBatch];
#pragma unroll(kUnrolledLines)
      for (int dy = 0; dy < MAX_POOL; ++dy) {
        Values line[kBatch][MAX_POOL];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          // A window may stick out of the image, and is then no output.
          const int y = min(window_y[b] * MAX_POOL + dy, height - 1);
#pragma unroll
          for (int dx = 0; dx < MAX_POOL; ++dx) {
            const int x = min(window_x[b] * MAX_POOL + dx, width - 1);
            line[b][dx] = load(z_image + (y * width + x) * num_channels);
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const bool is_there =
              first + b * blockDim.y < num_windows && rows.holds(window_y[b] * MAX_POOL + dy);
#pragma unroll
          for (int dx = 0; dx < MAX_POOL; ++dx) {
            const bool is_in_cell = is_there && columns.holds(window_x[b] * MAX_POOL + dx);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
              const float xh = norm.normalized(line[b][dx].of[j], j);
              const float v = norm.before_activation(xh, j);
              const float d = norm.slope(v);
              sums[j] += is_in_cell ? d : 0.0f;
              sums[VECTOR + j] += is_in_cell ? d * xh : 0.0f;
              const float h = v * d;
              float& most = highest[b].of[j];
              // A NaN is the highest, and stays it.
              if ((dy == 0 && dx == 0) || h > most || h != h) most = h;
            }
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int y = window_y[b], x = window_x[b];
        const bool is_own = own_rows.holds(y * MAX_POOL) && own_columns.holds(x * MAX_POOL);
        if (first + b * blockDim.y < num_windows && is_own && y < out_height && x < out_width) {
          store(output_image + (y * out_width + x) * num_channels, highest[b]);
        }
      }
    }
  }

  if (s0 == nullptr) return;
  sum_over_slots(sums);
  if (threadIdx.y == 0 && channel < num_channels) {
    const float inverse_size = 1.0f / (rows.size() * columns.size());
#pragma unroll
    for (int j = 0; j < 2 * VECTOR; ++j) sums[j] *= inverse_size;
    const long long place = static_cast<long long>(blockIdx.x) * num_channels + channel;
    store(s0 + place, half_of(sums, 0));
    store(s1 + place, half_of(sums, 1));
  }
}
