// `schedulefree_step`; see `kernels.interface`. Also defined: MAX_PARAMETERS, of a launch.

#include "common.cuh"

constexpr int kValuesOfABlock = kMaxThreads * VECTOR;

// Addresses and sizes are arguments, so that no memory of the host takes part.
struct Parameters {
  float* y[MAX_PARAMETERS];
  const float* g[MAX_PARAMETERS];
  float* z[MAX_PARAMETERS];
  float* v[MAX_PARAMETERS];
  long long size[MAX_PARAMETERS];
  int first_block[MAX_PARAMETERS + 1];  // of each parameter, and behind the last
};

// What all values need of this step.
struct Scalars {
  float c, lr, y_rate, bias2;
};

struct Clock {
  double *step, *weight_sum, *lr, *lr_max;
};

// Counts the step. A kernel of its own, since each block of the other reads what this one writes.
extern "C" __global__ void __launch_bounds__(kWarp)
    advance(Clock clock, Scalars* scalars, double beta1, double log_beta2, double warmup_steps,
            double r, double weight_lr_power, int averages_by_bias_correction) {
  const double k = *clock.step + 1;
  const double lr = *clock.lr * (warmup_steps > 0 ? fmin(k / warmup_steps, 1.0) : 1.0);
  const double lr_max = fmax(lr, *clock.lr_max);
  const double bias2 = 1 - exp(k * log_beta2);
  const double weight =
      averages_by_bias_correction ? lr * lr * bias2 : pow(k, r) * pow(lr_max, weight_lr_power);
  const double weight_sum = *clock.weight_sum + weight;
  // A rate of zero weighs nothing; the average then stays where it is.
  const double c = weight_sum > 0 ? weight / weight_sum : 0;

  *clock.step = k;
  *clock.weight_sum = weight_sum;
  *clock.lr_max = lr_max;
  *scalars = {static_cast<float>(c), static_cast<float>(lr),
              static_cast<float>(lr * (beta1 * (1 - c) - 1)), static_cast<float>(bias2)};
}

struct Adam {
  float beta2, one_minus_beta2, eps, weight_decay;
};

__device__ inline void update(float& y, float g, float& z, float& v, const Scalars& step,
                              const Adam& adam) {
  v = adam.beta2 * v + adam.one_minus_beta2 * g * g;
  const float direction = g / (sqrtf(v / step.bias2) + adam.eps) + adam.weight_decay * y;
  y = y + step.c * (z - y) + step.y_rate * direction;
  z = z - step.lr * direction;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    schedulefree_step(const __grid_constant__ Parameters parameters,
                      const Scalars* __restrict__ scalars, Adam adam) {
  int i = 0;
  while (blockIdx.x >= parameters.first_block[i + 1]) ++i;
  const long long block = blockIdx.x - parameters.first_block[i];
  const long long first = block * kValuesOfABlock + threadIdx.x * VECTOR;
  const long long num_left = parameters.size[i] - first;
  float *y = parameters.y[i] + first, *z = parameters.z[i] + first, *v = parameters.v[i] + first;
  const float* g = parameters.g[i] + first;
  const Scalars step = *scalars;
  if (num_left >= VECTOR) {
    Values of_y = load(y), of_z = load(z), of_v = load(v);
    const Values of_g = load(g);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      update(of_y.of[j], of_g.of[j], of_z.of[j], of_v.of[j], step, adam);
    }
    store(y, of_y);
    store(z, of_z);
    store(v, of_v);
  } else {
    for (int j = 0; j < num_left; ++j) update(y[j], g[j], z[j], v[j], step, adam);
  }
}
