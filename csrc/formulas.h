// The formulas, element by element, for every target: what the torch references in senseflow_kernels/_bf16.py, lerp.py
// and adamw.py compute, with the same roundings in the same order.
//
// Everything is static: files built for several instruction sets include this, and the linker must not pick one.
#pragma once

#include <math.h>
#include <stdint.h>

#include "senseflow_csrc.h"

#ifdef __CUDACC__
#define SENSEFLOW_FN static __host__ __device__ __forceinline__
#else
#define SENSEFLOW_FN static inline __attribute__((always_inline))
#endif

namespace senseflow {

SENSEFLOW_FN uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SENSEFLOW_FN float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SENSEFLOW_FN float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// -- fp32 in 16 bits ---------------------------------------------------------------------------------------------

SENSEFLOW_FN float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

// To nearest even; every NaN becomes the quiet one.
SENSEFLOW_FN uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)(value == value ? near : 0x7FC0);
}

SENSEFLOW_FN float from_fp16(uint16_t half) {
  const uint32_t size = half & 0x7FFF;
  const uint32_t normal = (size << 13) + (112u << 23) + (size >= 0x7C00 ? 112u << 23 : 0);  // infinities and NaN: e = 255
  const uint32_t subnormal = bits_of((float)(int32_t)size * 0x1p-24f);                      // exact
  return float_of((size < 0x400 ? subnormal : normal) | (uint32_t)(half & 0x8000) << 16);
}

// To nearest even.
SENSEFLOW_FN uint16_t to_fp16(float value) {
  const uint32_t bits = bits_of(value);
  const int32_t size = (int32_t)(bits & 0x7FFFFFFF);
  const int32_t normal = (int32_t)((uint32_t)size + 0xFFF + (((uint32_t)size >> 13) & 1) - (112u << 23)) >> 13;
  // One step of fp32 at 1/2 is fp16's smallest number, 2^-24: the addition rounds to it.
  const int32_t subnormal = (int32_t)bits_of(float_of((uint32_t)size) + 0.5f) - 0x3F000000;
  const int32_t special = size > 0x7F800000 ? 0x7E00 : 0x7C00;
  const int32_t half = size >= 0x477FF000 ? special : size < 0x38800000 ? subnormal : normal;
  return (uint16_t)(half | (int32_t)(bits >> 16 & 0x8000));
}

// join_fp32
SENSEFLOW_FN float joined(uint16_t high, int16_t low) { return float_of(((uint32_t)high << 16) + (uint32_t)(int32_t)low); }

// split_fp32: the value rounded to bf16, halves away from zero, and what its bits lack.
SENSEFLOW_FN uint16_t split(float value, int16_t* low) {
  const uint32_t given = bits_of(value);
  const uint32_t bits = (given & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : given;
  *low = (int16_t)(uint16_t)bits;  // bits - (high << 16): the low 16 bits, read as signed
  return (uint16_t)((bits + 0x8000) >> 16);
}

// round_stochastic: up in size with the probability of what is cut off; a finite value stays finite.
SENSEFLOW_FN uint16_t round_at_random(float value, uint32_t random16) {
  // Signed, for few CPUs compare unsigned vectors; the sum overflows with a NaN alone.
  const uint32_t bits = bits_of(value);
  const int32_t size = (int32_t)(bits & 0x7FFFFFFF), sum = (int32_t)(((uint32_t)size + random16) >> 16);
  const int32_t up = sum < 0x7F7F ? sum : 0x7F7F;
  const int32_t special = size == 0x7F800000 ? 0x7F80 : 0x7FC0;
  return (uint16_t)((size < 0x7F800000 ? up : special) | (int32_t)(bits >> 16 & 0x8000));
}

// -- moments in 8 bits ---------------------------------------------------------------------------------------------
//
// A code is a float of MANTISSA bits whose exponent is counted from its block's: see senseflow_kernels/_eight.py.

constexpr int MOMENT_MANTISSA = 3, SQUARE_MANTISSA = 4;  // codes of exp_avg have a sign, those of the root have none
constexpr int32_t NOT_FINITE = -128;                     // the exponent of a block that held a NaN or an infinity

// exponent_of. largest: the bits of the block's largest absolute value.
SENSEFLOW_FN int32_t exponent_of(int32_t largest, int mantissa) {
  const int32_t exponent = (int32_t)(((uint32_t)largest + (1u << (23 - mantissa)) - 1) >> 23) - 127;
  const int32_t finite = exponent < -110 ? -110 : exponent > 127 ? 127 : exponent;
  return largest >= 0x7F800000 ? NOT_FINITE : finite;
}

// The bits of code 0 as if it were a number: those of code c are c << (23 - mantissa) above.
SENSEFLOW_FN int32_t base_of(int32_t exponent) { return exponent == NOT_FINITE ? 0 : (exponent + 112) << 23; }

// The absolute value of a code.
SENSEFLOW_FN float from_eight(int32_t code, int32_t base, int mantissa) {
  const float value = float_of((uint32_t)(base + (code << (23 - mantissa))));
  return base == 0 ? float_of(0x7FC00000) : code == 0 ? 0.0f : value;
}

// The code of an absolute value, rounded at random. What lies below the first code goes there or to 0, and to the first
// alone where KEEP: a root that is not 0 never becomes 0.
template <bool KEEP>
SENSEFLOW_FN int32_t to_eight(float value, int32_t base, int mantissa, uint32_t random16) {
  const int cut = 23 - mantissa;
  const int32_t most = (16 << mantissa) - 1, above = (int32_t)bits_of(value) - base, first = 1 << cut;
  const int32_t sum = (int32_t)((uint32_t)above + (random16 << (cut - 16))) >> cut;
  const bool up = KEEP ? value > 0 : (float)(int32_t)random16 * float_of((uint32_t)(base + first)) < value * 65536.0f;
  const int32_t code = above < first ? (up ? 1 : 0) : sum < most ? sum : most;
  return base == 0 ? 0 : code;
}

// -- random bits -------------------------------------------------------------------------------------------------

// phi's numbers are random_bits' own; the others of the same parameter have streams of their own by the key's top bits.
SENSEFLOW_FN uint64_t stream_key(int64_t seed, uint32_t stream) { return (uint64_t)seed ^ (uint64_t)stream << 62; }

// Philox-4x32-7 of one counter: four words, whose halves (low first) belong to eight elements.
SENSEFLOW_FN void philox(uint64_t group, uint32_t parameter, uint32_t step, uint64_t key, uint32_t words[4]) {
  uint32_t c0 = (uint32_t)group, c1 = (uint32_t)(group >> 32), c2 = parameter, c3 = step;
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 7
#endif
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// -- updates -----------------------------------------------------------------------------------------------------

// torch.lerp: exact at both ends.
SENSEFLOW_FN float lerp(float value, float end, float weight) {
  const bool small = (weight < 0 ? -weight : weight) < 0.5f;
  return fused_multiply_add(small ? weight : weight - 1.0f, end - value, small ? value : end);
}

// What AdamW's scalars come to in fp32, as torch.optim.AdamW computes them in fp64.
struct AdamScalars {
  float grad_scale, moment_weight, beta2, square_weight, root_correction, eps, decay, step_size;
};

SENSEFLOW_FN AdamScalars adam_scalars(const senseflow_scalars& s) {
  AdamScalars a;
  a.grad_scale = (float)s.grad_scale;
  a.moment_weight = (float)(1 - s.beta1);
  a.beta2 = (float)s.beta2;
  a.square_weight = (float)(1 - s.beta2);
  a.root_correction = (float)sqrt(1 - pow(s.beta2, (double)s.step));
  a.eps = (float)s.eps;
  a.decay = (float)(1 - s.lr * s.weight_decay);
  a.step_size = (float)-(s.lr / (1 - pow(s.beta1, (double)s.step)));
  return a;
}

// torch.optim.AdamW, one tensor at a time: lerp_, mul_ and addcmul_, sqrt / div / add, addcdiv_.
SENSEFLOW_FN float adamw(float theta, float grad, float* moment, float* square, const AdamScalars& s) {
  const float g = grad * s.grad_scale;
  *moment = lerp(*moment, g, s.moment_weight);
  *square = fused_multiply_add(s.square_weight * g, g, *square * s.beta2);  // as torch's addcmul_ is compiled
#ifdef __CUDA_ARCH__
  const float root = __fdiv_rn(__fsqrt_rn(*square), s.root_correction) + s.eps;
  return theta * s.decay + __fdiv_rn(s.step_size * *moment, root);
#else
  const float root = __builtin_sqrtf(*square) / s.root_correction + s.eps;
  return theta * s.decay + s.step_size * *moment / root;
#endif
}

}  // namespace senseflow
