// `augment`; see `kernels.interface`. Here ELEMENT is the images' type, and VECTOR is not used.
//
// Shapes: P pixels of all images, C channels, B images of a batch, H W height and width of a crop.
// A thread makes one pixel, so that neighbours write neighbouring bytes.

#include "common.cuh"

struct Crops {
  const unsigned char* pixels;                  // (P, C)
  const long long *offsets, *heights, *widths;  // (B,)
  const long long *top, *left;                  // (B,)
  const unsigned char* flip;                    // (B,), bool
  const int* box;                               // (B, 4)
};

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    augment(Crops crops,
            const float* __restrict__ mean,  // (C,), and the next one
            const float* __restrict__ std,
            Element* __restrict__ images,  // (B, H, W, C)
            int height, int width, int num_channels) {
  const int position = blockIdx.y * blockDim.x + threadIdx.x;
  if (position >= height * width) return;
  const int b = blockIdx.x, row = position / width, column = position % width;

  const int* box = crops.box + 4 * b;
  const bool is_erased = row >= box[0] && row < box[0] + box[2] &&  //
                         column >= box[1] && column < box[1] + box[3];
  const long long y = crops.top[b] + row;
  const long long x = crops.left[b] + (crops.flip[b] ? width - 1 - column : column);
  const long long image_height = crops.heights[b], image_width = crops.widths[b];
  const bool is_inside = 0 <= y && y < image_height && 0 <= x && x < image_width;
  const unsigned char* pixel =
      crops.pixels + (crops.offsets[b] + y * image_width + x) * num_channels;
  Element* made = images + (static_cast<long long>(b) * height * width + position) * num_channels;
  for (int c = 0; c < num_channels; ++c) {
    // Outside the image is padding, which is black.
    const float value = is_inside ? pixel[c] : 0.0f;
    const float normalized = value * (1.0f / (255.0f * std[c])) - mean[c] / std[c];
    from_float(is_erased ? 0.0f : normalized, made[c]);
  }
}
