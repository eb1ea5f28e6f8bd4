// The kernels' 16-bit types where there are no instructions for them; see half.cuh beside them.
#pragma once

#include <cstring>

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  return __uint_as_float(static_cast<unsigned int>(x.bits) << 16);
}

inline float to_float(float16 x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline void from_float(float x, float& y) { y = x; }

inline void from_float(float x, bfloat16& y) {
  unsigned int bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) {
    y.bits = 0x7fff;
  } else {
    y.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, to even between two
  }
}

inline void from_float(float x, float16& y) {
  const _Float16 half = x;
  std::memcpy(&y, &half, sizeof y);
}
