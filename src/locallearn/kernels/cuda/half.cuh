// The 16-bit types as their bits, and their conversions. NVRTC has no cuda_bf16.h or cuda_fp16.h
// without a toolkit; each conversion is one instruction of sm_80 and later.
#pragma once

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(bfloat16 x) {
  return __uint_as_float(static_cast<unsigned int>(x.bits) << 16);
}

__device__ inline float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ inline void from_float(float x, float& y) { y = x; }

__device__ inline void from_float(float x, bfloat16& y) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

__device__ inline void from_float(float x, float16& y) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
