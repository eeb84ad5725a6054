// The update on a GPU: one launch for any number, size and mix of tensors.
//
// A grid as large as the GPU holds at once walks the map of chunks. A thread does eight elements, so bf16 is one
// 128-bit access and fp32 two, and one Philox counter serves it. Addresses are int64.

#include <cuda_runtime.h>

#include "formulas.h"

namespace senseflow {
namespace {

constexpr int THREADS = 256, VECTOR = 8, TILE = THREADS * VECTOR;
static_assert(SENSEFLOW_CUDA_CHUNK % TILE == 0, "a chunk is whole tiles");

struct Scalars {
  AdamScalars adam;
  float phi_weight, ema_weight;
  int64_t step;
  bool skip;
};

__device__ Scalars read_scalars(const senseflow_device_scalars& d) {
  Scalars s{};
  s.step = d.step ? *d.step : 0;
  s.phi_weight = d.lam ? (float)(1.0 - *d.lam) : d.phi_weight;
  s.ema_weight = d.ema_decay ? (float)(1.0 - *d.ema_decay) : d.ema_weight;
  s.skip = d.found_inf && *d.found_inf != 0;
  if (!d.lr) return s;  // no AdamW: its powers in fp64 are not for nothing
  senseflow_scalars given{};
  given.lr = *d.lr, given.grad_scale = d.grad_scale ? *d.grad_scale : 1;
  given.beta1 = d.beta1, given.beta2 = d.beta2, given.eps = d.eps, given.weight_decay = d.weight_decay;
  given.step = s.step;
  s.adam = adam_scalars(given);
  return s;
}

// An address read from a table is global memory's: LDG and STG instead of the generic LD and ST.
template <class T>
__device__ __forceinline__ T* global(void* address) {
  __builtin_assume(__isGlobal(address));
  return (T*)address;
}

// One tensor of a row.
struct Field {
  char* data;
  int16_t* low;
  int dtype;
  bool random;

  __device__ Field(const senseflow_row& row, int field)
      : data((char*)row.data[field]),
        low(field == PHI || field == THETA ? (int16_t*)row.data[field + 1] : nullptr),
        dtype((int)(row.kinds >> (4 * field)) & 3),
        random((row.kinds >> (4 * field) & 8) != 0) {}
};

// Elements at ... at + 7 that lie in [0, n); all of them, at aligned addresses, where WIDE.
template <bool WIDE>
struct Span {
  int64_t at, n;

  __device__ __forceinline__ bool has(int i) const { return WIDE || (at + i >= 0 && at + i < n); }

  __device__ __forceinline__ void halves(void* data, uint16_t out[VECTOR]) const {
    const uint16_t* from = global<uint16_t>(data) + at;
    if (WIDE) {
      const uint4 vector = *(const uint4*)from;
      const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) out[i] = (uint16_t)(words[i / 2] >> (16 * (i % 2)));
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) out[i] = has(i) ? from[i] : 0;
    }
  }

  __device__ __forceinline__ void put_halves(void* data, const uint16_t value[VECTOR]) const {
    uint16_t* to = global<uint16_t>(data) + at;
    if (WIDE) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = value[2 * i] | (uint32_t)value[2 * i + 1] << 16;
      *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        if (has(i)) to[i] = value[i];
    }
  }

  __device__ __forceinline__ void load(const Field& f, float out[VECTOR]) const {
    if (f.dtype == SENSEFLOW_FP32) {
      const float* from = global<float>(f.data) + at;
      if (WIDE) {
        const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
      } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) out[i] = has(i) ? from[i] : 0.0f;
      }
      return;
    }
    uint16_t high[VECTOR], low[VECTOR];
    halves(f.data, high);
    if (f.low) halves(f.low, low);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      out[i] = f.low ? joined(high[i], (int16_t)low[i])
                     : f.dtype == SENSEFLOW_FP16 ? from_fp16(high[i]) : from_bf16(high[i]);
  }

  // value becomes what is kept. stream: of the random bits.
  __device__ __forceinline__ void store(
      const Field& f, float value[VECTOR], const senseflow_row& row, int64_t seed, int64_t step, uint32_t stream) const {
    if (f.dtype == SENSEFLOW_FP32) {
      float* to = global<float>(f.data) + at;
      if (WIDE) {
        ((float4*)to)[0] = make_float4(value[0], value[1], value[2], value[3]);
        ((float4*)to)[1] = make_float4(value[4], value[5], value[6], value[7]);
      } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
          if (has(i)) to[i] = value[i];
      }
      return;
    }
    uint16_t high[VECTOR];
    if (f.low) {
      uint16_t rest[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        int16_t low;
        high[i] = split(value[i], &low);
        rest[i] = (uint16_t)low;
      }
      put_halves(f.low, rest);
    } else if (f.random) {
      uint32_t words[4];
      philox((uint64_t)(row.start + at) / 8, (uint32_t)row.parameter, (uint32_t)step, stream_key(seed, stream), words);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        high[i] = round_at_random(value[i], words[i / 2] >> (16 * (i % 2)) & 0xFFFF);
        value[i] = from_bf16(high[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        high[i] = f.dtype == SENSEFLOW_FP16 ? to_fp16(value[i]) : to_bf16(value[i]);
        value[i] = f.dtype == SENSEFLOW_FP16 ? from_fp16(high[i]) : from_bf16(high[i]);
      }
    }
    put_halves(f.data, high);
  }
};

// A moment in codes: eight of them a thread, and a block of them is 8, 16 or 32 threads of one warp.
template <bool WIDE, int FIELD>
__device__ __forceinline__ void load_eight(const Span<WIDE> span, const senseflow_row& row, float out[VECTOR]) {
  constexpr int MANTISSA = FIELD == MOMENT ? MOMENT_MANTISSA : SQUARE_MANTISSA;
  const uint8_t* from = global<uint8_t>(row.data[FIELD]) + span.at;
  const int32_t base = base_of(global<int8_t>(row.data[FIELD + 2])[span.at / row.block]);
  uint32_t words[2] = {0, 0};
  if (WIDE) {
    const uint2 vector = *(const uint2*)from;
    words[0] = vector.x, words[1] = vector.y;
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) words[i / 4] |= (uint32_t)from[i] << (8 * (i % 4));
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const uint32_t code = words[i / 4] >> (8 * (i % 4)) & 0xFF;
    const float root = from_eight((int32_t)(code & ((16 << MANTISSA) - 1)), base, MANTISSA);
    out[i] = FIELD == SQUARE ? root * root : float_of(bits_of(root) | (code & 0x80) << 24);
  }
}

template <bool WIDE, int FIELD>
__device__ __forceinline__ void store_eight(
    const Span<WIDE> span, const senseflow_row& row, const float value[VECTOR], int64_t seed, int64_t step,
    uint32_t stream) {
  constexpr int MANTISSA = FIELD == MOMENT ? MOMENT_MANTISSA : SQUARE_MANTISSA;
  float size[VECTOR];
  int32_t largest = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const uint32_t bits = bits_of(FIELD == SQUARE ? __fsqrt_rn(value[i]) : value[i]) & 0x7FFFFFFF;
    size[i] = float_of(bits);
    largest = max(largest, (int32_t)bits);
  }
  const int lanes = (int)row.block / VECTOR, lane = threadIdx.x % 32;
  const uint32_t mask = (lanes == 32 ? ~0u : (1u << lanes) - 1) << (lane & ~(lanes - 1));
  for (int apart = lanes / 2; apart; apart /= 2) largest = max(largest, __shfl_xor_sync(mask, largest, apart));
  const int32_t exponent = exponent_of(largest, MANTISSA), base = base_of(exponent);
  if (lane % lanes == 0) global<int8_t>(row.data[FIELD + 2])[span.at / row.block] = (int8_t)exponent;
  uint32_t random[4], words[2] = {0, 0};
  philox((uint64_t)(row.start + span.at) / 8, (uint32_t)row.parameter, (uint32_t)step, stream_key(seed, stream), random);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const uint32_t sign = FIELD == MOMENT ? bits_of(value[i]) >> 24 & 0x80 : 0;
    const int32_t code = to_eight<FIELD == SQUARE>(size[i], base, MANTISSA, random[i / 2] >> (16 * (i % 2)) & 0xFFFF);
    words[i / 4] |= (sign | (uint32_t)code) << (8 * (i % 4));
  }
  uint8_t* to = global<uint8_t>(row.data[FIELD]) + span.at;
  if (WIDE) {
    *(uint2*)to = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) to[i] = (uint8_t)(words[i / 4] >> (8 * (i % 4)));
  }
}

template <bool WIDE>
__device__ __forceinline__ void move(
    const Span<WIDE> span, const Field& f, const float end[VECTOR], float weight, const senseflow_row& row, int64_t seed,
    int64_t step) {
  float value[VECTOR];
  span.load(f, value);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) value[i] = lerp(value[i], end[i], weight);
  span.store(f, value, row, seed, step, 0);
}

template <bool WIDE>
__device__ __forceinline__ void update(const Span<WIDE> span, const senseflow_row& row, const Scalars& s, int64_t seed) {
  float end[VECTOR];
  const Field theta(row, THETA), phi(row, PHI), ema(row, EMA);
  span.load(theta, end);
  if (row.data[GRAD]) {
    float grad[VECTOR], moment[VECTOR], square[VECTOR];
    const Field first(row, MOMENT), second(row, SQUARE);
    span.load(Field(row, GRAD), grad);
    const bool eight = row.block != 0;
    eight ? load_eight<WIDE, MOMENT>(span, row, moment) : span.load(first, moment);
    eight ? load_eight<WIDE, SQUARE>(span, row, square) : span.load(second, square);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) end[i] = adamw(end[i], grad[i], moment + i, square + i, s.adam);
    eight ? store_eight<WIDE, MOMENT>(span, row, moment, seed, s.step, 2)
          : span.store(first, moment, row, seed, s.step, 2);
    eight ? store_eight<WIDE, SQUARE>(span, row, square, seed, s.step, 3)
          : span.store(second, square, row, seed, s.step, 3);
    span.store(theta, end, row, seed, s.step, 1);
  }
  if (ema.data && s.ema_weight != 0) move(span, ema, end, s.ema_weight, row, seed, s.step);
  if (phi.data && s.phi_weight != 0) move(span, phi, end, s.phi_weight, row, seed, s.step);
}

__global__ void __launch_bounds__(THREADS)
    update_kernel(const senseflow_row* rows, const int2* map, int64_t entries, senseflow_device_scalars given) {
  __shared__ Scalars scalars;
  if (threadIdx.x == 0) scalars = read_scalars(given);
  __syncthreads();
  const Scalars s = scalars;
  if (s.skip) return;
  for (int64_t entry = blockIdx.x; entry < entries; entry += gridDim.x) {
    const int2 place = map[entry];
    const senseflow_row& row = rows[place.x];
    const int64_t n = row.n, shift = row.start % VECTOR;  // a thread's elements share a Philox counter
    bool wide = shift == 0;
    for (int f = 0; f < SENSEFLOW_FIELDS; ++f) wide &= (uintptr_t)row.data[f] % 16 == 0;
    const int64_t first = (int64_t)place.y * SENSEFLOW_CUDA_CHUNK + threadIdx.x * VECTOR - shift;
    for (int64_t at = first; at < first + SENSEFLOW_CUDA_CHUNK && at < n; at += TILE) {
      if (wide && at + VECTOR <= n)
        update(Span<true>{at, n}, row, s, given.seed);
      else
        update(Span<false>{at, n}, row, s, given.seed);
    }
  }
}

}  // namespace
}  // namespace senseflow

extern "C" int32_t senseflow_cuda_abi(void) { return SENSEFLOW_ABI; }

extern "C" int32_t senseflow_update_cuda(
    const senseflow_row* rows, const int32_t* map, int64_t entries, const senseflow_device_scalars* scalars,
    void* stream) {
  using namespace senseflow;
  if (entries == 0) return 0;
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, update_kernel, THREADS, 0);
  if (error) return error;
  const int64_t grid = (int64_t)processors * blocks < entries ? (int64_t)processors * blocks : entries;
  update_kernel<<<(unsigned)grid, THREADS, 0, (cudaStream_t)stream>>>(rows, (const int2*)map, entries, *scalars);
  return cudaGetLastError();
}
