// `local_head`; see `kernels.interface`. Also defined: BASIS, what D is, one of the three
// below; ZERO_CROSSING, in units of phase; MAX_FEW_CLASSES.
//
// With few classes a block takes one sample from the moments to G, and keeps the latent in shared
// memory. With many, both products with D are matrix products and the library's: what is before,
// between and behind them are kernels of their own, out of the same parts.
//
// Shapes: N batch, C channels, T latent length, K classes; cells of the moments, one of a linear
// block. A latent goes through a channel's cells first, t = c cells + cell; memory through the
// channels of a cell.

#include "common.cuh"

// Below this norm a latent is treated as zero (F.normalize's own epsilon).
constexpr float kNormEps = 1e-12f;

// A matrix, or a periodic basis that is made where it is needed.
constexpr int kMatrix = 0, kSine = 1, kSquare = 2;

// -- the basis ----------------------------------------------------------------------------------

// Phases are 64-bit integers, 2^64 a turn, so that turns which float32 could not hold fall away by
// overflow, and no sine in double precision is needed.
__device__ inline unsigned long long phase_of(double turns) {
  double fraction = turns - floor(turns);
  if (fraction >= 0.5) fraction -= 1.0;
  return static_cast<unsigned long long>(static_cast<long long>(fraction * 0x1p64));
}

__device__ inline float wave(unsigned long long phase) {
  const bool is_negative = phase >> 63;
  const unsigned long long from_zero = is_negative ? 0 - phase : phase;  // 2^63: half a turn
  if (from_zero < ZERO_CROSSING || from_zero > (1ull << 63) - ZERO_CROSSING) return 0.0f;
  const float sign = is_negative ? -1.0f : 1.0f;
  if (BASIS == kSquare) return sign;
  // 31 bits of the angle, in half turns, from the nearest crossing.
  const int angle = static_cast<int>(from_zero >> 32);
  return sign * sinpif(min(angle, 0x7fffffff - angle) * 0x1p-31f);
}

// D, (K, T).
struct Projection {
  const float* matrix;
  int stride_k, stride_t;
  const double *turns, *first_phase;  // (K,), of a periodic basis
};

// Of a row of a periodic basis.
struct Phases {
  unsigned long long first, increment;
};

__device__ inline Phases phases_of(const Projection& projection, int k) {
  return {phase_of(projection.first_phase[k]), phase_of(projection.turns[k])};
}

__device__ inline float element_of(const Projection& projection, const Phases* phases, int k,
                                   int t) {
  if (BASIS != kMatrix) return wave(phases[k].first + phases[k].increment * t);
  return projection.matrix[static_cast<long long>(k) * projection.stride_k +
                           static_cast<long long>(t) * projection.stride_t];
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    periodic_basis(Projection projection, float* __restrict__ matrix, int length) {
  const Phases phases = phases_of(projection, blockIdx.y);
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= length) return;
  matrix[static_cast<long long>(blockIdx.y) * length + t] =
      wave(phases.first + phases.increment * t);
}

// -- latents and their gradients ----------------------------------------------------------------

// What p = gamma s1 + beta s0 is made of, and how it is flattened.
struct Latents {
  const float *s0, *s1;         // (N, cells, C)
  const float *gamma, *beta;    // (C,)
  int num_channels, num_cells;  // one cell, and T below or above C: pooled along the channels
  int length;                   // T

  __device__ bool is_pooled() const { return length != num_channels * num_cells; }

  __device__ long long begin() const {  // of this block's sample
    return static_cast<long long>(blockIdx.x) * num_cells * num_channels;
  }
};

// Calls write(t, p) for every t of this block's sample, each in one thread.
template <typename Write>
__device__ inline void for_each_latent(const Latents& latents, Write write) {
  const float *s0 = latents.s0 + latents.begin(), *s1 = latents.s1 + latents.begin();
  if (latents.is_pooled()) {
    for (int t = thread_index(); t < latents.length; t += blockDim.x * blockDim.y) {
      const Span features = cell_of(t, latents.num_channels, latents.length);
      float sum = 0.0f;
#pragma unroll 1
      for (int c = features.begin; c < features.end; ++c) {
        sum += latents.gamma[c] * s1[c] + latents.beta[c] * s0[c];
      }
      write(t, sum / features.size());
    }
    return;
  }
  for (int c = threadIdx.x * VECTOR; c < latents.num_channels; c += blockDim.x * VECTOR) {
    const Values gamma = load(latents.gamma + c), beta = load(latents.beta + c);
    for (int cell = threadIdx.y; cell < latents.num_cells; cell += blockDim.y) {
      const int place = cell * latents.num_channels + c;
      const Values of_s0 = load(s0 + place), of_s1 = load(s1 + place);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        write((c + j) * latents.num_cells + cell,
              gamma.of[j] * of_s1.of[j] + beta.of[j] * of_s0.of[j]);
      }
    }
  }
}

// Writes G of this block's sample, where grad_of(t) is dL/dp, and what the sample adds to dL/dgamma
// and dL/dbeta: sums over its cells, (N, 2, C).
template <typename GradOf>
__device__ inline void write_gradients(const Latents& latents, GradOf grad_of, float* grad_latents,
                                       float* sums) {
  const auto grad_at = [&](int c, int cell) {
    if (!latents.is_pooled()) return grad_of(c * latents.num_cells + cell);
    const Span holding = cells_that_hold(c, latents.num_channels, latents.length);
    float grad = 0.0f;
#pragma unroll 1
    for (int t = holding.begin; t < holding.end; ++t) {
      grad += grad_of(t) / cell_of(t, latents.num_channels, latents.length).size();
    }
    return grad;
  };
  float* sums_of_sample = sums + static_cast<long long>(blockIdx.x) * 2 * latents.num_channels;
  for (int first = 0; first < latents.num_channels; first += blockDim.x * VECTOR) {
    const int c = first + threadIdx.x * VECTOR;
    float own[2 * VECTOR] = {};  // of G s1, and of G s0
    for (int cell = threadIdx.y; cell < latents.num_cells && c < latents.num_channels;
         cell += blockDim.y) {
      const long long place = latents.begin() + cell * latents.num_channels + c;
      const Values of_s0 = load(latents.s0 + place), of_s1 = load(latents.s1 + place);
      Values grad;
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        grad.of[j] = grad_at(c + j, cell);
        own[j] += grad.of[j] * of_s1.of[j];
        own[VECTOR + j] += grad.of[j] * of_s0.of[j];
      }
      store(grad_latents + place, grad);
    }
    sum_over_slots(own);
    if (threadIdx.y == 0 && c < latents.num_channels) {
      store(sums_of_sample + c, half_of(own, 0));
      store(sums_of_sample + latents.num_channels + c, half_of(own, 1));
    }
  }
}

__device__ inline float inverse_norm_of(float sum_of_squares) {
  const float norm = sqrtf(sum_of_squares);
  return norm <= kNormEps ? 0.0f : 1.0f / norm;
}

// -- the loss -----------------------------------------------------------------------------------

struct Loss {
  const long long* labels;  // (N,)
  float *logits, *losses;   // (N, K); (N,)
  int* is_correct;          // (N,)
  float temperature, label_smoothing;
  int num_classes;
};

// Logits, loss, whether the highest logit (the first of equals) is the label's, and e of this
// block's sample, by one warp: product_of(k) is <q, D_k>, and write(k, e) is called for every k.
// Returns <q, dL/dq>, which is <e, q D^T>.
template <typename ProductOf, typename Write>
__device__ inline float softmax_error(const Loss& loss, ProductOf product_of, Write write) {
  const int lane = thread_index() % kWarp;
  float* logits = loss.logits + static_cast<long long>(blockIdx.x) * loss.num_classes;
  float highest = __int_as_float(0xff800000);  // minus infinity
#pragma unroll 1
  for (int k = lane; k < loss.num_classes; k += kWarp) {
    const float logit = product_of(k) / loss.temperature;
    logits[k] = logit;
    highest = fmaxf(highest, logit);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, offset));
  }
  float sum = 0.0f;
#pragma unroll 1
  for (int k = lane; k < loss.num_classes; k += kWarp) {
    sum += expf(product_of(k) / loss.temperature - highest);
  }
  const float log_sum = logf(sum_over_warp(sum));

  const long long label = loss.labels[blockIdx.x];
  float own_loss = 0.0f, radial = 0.0f;
  int predicted = loss.num_classes;
#pragma unroll 1
  for (int k = lane; k < loss.num_classes; k += kWarp) {
    const float logit = product_of(k) / loss.temperature;
    const float log_probability = logit - highest - log_sum;
    const float target =
        (k == label ? 1.0f - loss.label_smoothing : 0.0f) + loss.label_smoothing / loss.num_classes;
    const float error = (expf(log_probability) - target) / (gridDim.x * loss.temperature);
    own_loss -= target * log_probability;
    radial += error * product_of(k);
    if (logit == highest) predicted = min(predicted, k);
    write(k, error);
  }
  own_loss = sum_over_warp(own_loss);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    predicted = min(predicted, __shfl_xor_sync(kAllLanes, predicted, offset));
  }
  if (lane == 0) {
    loss.losses[blockIdx.x] = own_loss;
    loss.is_correct[blockIdx.x] = predicted == label;
  }
  return sum_over_warp(radial);
}

// -- few classes --------------------------------------------------------------------------------

// Where t lies in shared memory: one place is left out after every 32, so that at most two of
// neighbouring t, or of neighbouring channels, meet in one bank.
__device__ inline int padded(int t) { return t + t / kWarp; }

// So many at a time are multiplied with the latent.
constexpr int kClasses = 8;

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    local_head(Latents latents, Projection projection, Loss loss, int normalize,
               float* __restrict__ grad_latents,  // (N, cells, C)
               float* __restrict__ sums,          // (N, 2, C)
               float* __restrict__ error_out,     // e, (N, K), and q, (N, T); or null: not kept
               float* __restrict__ q_out) {
  __shared__ Phases phases[MAX_FEW_CLASSES];
  __shared__ float products[MAX_FEW_CLASSES];   // <p, D_k>
  __shared__ float error[MAX_FEW_CLASSES + 1];  // e, and <q, dL/dq> behind it
  extern __shared__ float latent[];             // p, and then dL/dp; (T,), padded
  const int thread = thread_index(), num_threads = blockDim.x * blockDim.y;
  const int num_classes = loss.num_classes;

  if (BASIS != kMatrix && thread < num_classes) phases[thread] = phases_of(projection, thread);
  float squares[1] = {};
  for_each_latent(latents, [&](int t, float p) {
    latent[padded(t)] = p;
    squares[0] += p * p;
  });
  sum_over_block(squares);
  const float inverse_norm = normalize ? inverse_norm_of(squares[0]) : 1.0f;

  for (int first = 0; first < num_classes; first += kClasses) {
    float of_class[kClasses] = {};
    for (int t = thread; t < latents.length; t += num_threads) {
      const float p = latent[padded(t)];
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {  // those beyond the last come to nothing
        of_class[j] += p * element_of(projection, phases, min(first + j, num_classes - 1), t);
      }
    }
    sum_over_block(of_class);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (thread == 0 && first + j < num_classes) products[first + j] = of_class[j];
    }
  }
  __syncthreads();

  if (thread < kWarp) {
    const float radial = softmax_error(
        loss, [&](int k) { return products[k] * inverse_norm; },
        [&](int k, float e) {
          error[k] = e;
          if (error_out != nullptr) {
            error_out[static_cast<long long>(blockIdx.x) * num_classes + k] = e;
          }
        });
    if (thread == 0) error[num_classes] = normalize ? radial : 0.0f;
  }
  __syncthreads();

  for (int t = thread; t < latents.length; t += num_threads) {
    float grad = 0.0f;
#pragma unroll 4
    for (int k = 0; k < num_classes; ++k) {
      grad += error[k] * element_of(projection, phases, k, t);
    }
    const float q = latent[padded(t)] * inverse_norm;
    if (q_out != nullptr) q_out[static_cast<long long>(blockIdx.x) * latents.length + t] = q;
    latent[padded(t)] = (grad - q * error[num_classes]) * inverse_norm;
  }
  __syncthreads();
  write_gradients(latents, [&](int t) { return latent[padded(t)]; }, grad_latents, sums);
}

// -- many classes -------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    directions(Latents latents, int normalize,
               float* __restrict__ q,                // (N, T)
               float* __restrict__ inverse_norms) {  // (N,)
  float inverse_norm = 1.0f;
  if (normalize) {
    float squares[1] = {};
    for_each_latent(latents, [&](int, float p) { squares[0] += p * p; });
    sum_over_block(squares);
    inverse_norm = inverse_norm_of(squares[0]);
  }
  if (thread_index() == 0) inverse_norms[blockIdx.x] = inverse_norm;
  float* of_sample = q + static_cast<long long>(blockIdx.x) * latents.length;
  for_each_latent(latents, [&](int t, float p) { of_sample[t] = p * inverse_norm; });
}

extern "C" __global__ void __launch_bounds__(kWarp)
    errors(Loss loss,
           const float* __restrict__ products,  // q D^T, (N, K)
           float* __restrict__ error,           // e, (N, K)
           float* __restrict__ radials) {       // <q, dL/dq>, (N,)
  const long long begin = static_cast<long long>(blockIdx.x) * loss.num_classes;
  const float radial = softmax_error(
      loss, [&](int k) { return products[begin + k]; },
      [&](int k, float e) { error[begin + k] = e; });
  if (threadIdx.x == 0) radials[blockIdx.x] = radial;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    gradients(Latents latents, int normalize,
              const float* __restrict__ grad_q,  // e D, (N, T), and q
              const float* __restrict__ q,
              const float* __restrict__ inverse_norms,  // (N,), and the next one
              const float* __restrict__ radials,
              float* __restrict__ grad_latents,  // (N, cells, C)
              float* __restrict__ sums) {        // (N, 2, C)
  const long long begin = static_cast<long long>(blockIdx.x) * latents.length;
  const float inverse_norm = inverse_norms[blockIdx.x];
  const float radial = normalize ? radials[blockIdx.x] : 0.0f;
  write_gradients(
      latents, [&](int t) { return (grad_q[begin + t] - q[begin + t] * radial) * inverse_norm; },
      grad_latents, sums);
}

// -- sums over the batch ------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sum_up(const float* __restrict__ sums,    // (N, 2, C)
           const float* __restrict__ losses,  // (N,), and the next one
           const int* __restrict__ is_correct, float* __restrict__ loss,
           long long* __restrict__ num_correct, float* __restrict__ grad_gamma,
           float* __restrict__ grad_beta, int batch_size, int num_channels) {
  sum_parts(sums, grad_gamma, grad_beta, batch_size, num_channels);
  if (blockIdx.x > 0) return;
  float of_batch[2] = {};
  for (int n = thread_index(); n < batch_size; n += blockDim.x * blockDim.y) {
    of_batch[0] += losses[n];
    of_batch[1] += is_correct[n];
  }
  sum_over_block(of_batch);
  if (thread_index() == 0) {
    *loss = of_batch[0] / batch_size;
    *num_correct = of_batch[1];
  }
}
