// The C interface of the many-tensor update: AdamW, IDA and EMA of any number of tensors in one pass.
//
// Plain C, no torch: one binary serves every torch. Python (senseflow_kernels/_ext.py) calls it with addresses,
// torch_ops.cpp registers it as torch operators.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#define SENSEFLOW_API __attribute__((visibility("default")))
#else
#define SENSEFLOW_API
#endif

#define SENSEFLOW_ABI 3  // of the structures below; senseflow_abi() and senseflow_cuda_abi() say the library's

// EIGHT: codes of MOMENT and SQUARE alone, whose blocks share an exponent (senseflow_kernels/_eight.py).
enum senseflow_dtype { SENSEFLOW_FP32 = 0, SENSEFLOW_BF16 = 1, SENSEFLOW_FP16 = 2, SENSEFLOW_EIGHT = 3 };

// The tensors of a row, in the order of `data`, `dtype` and `random`. LOW halves are int16 beside bf16, EXPONENTs int8
// [n / block] beside codes.
enum senseflow_field {
  PHI, PHI_LOW, THETA, THETA_LOW, EMA, GRAD, MOMENT, SQUARE, MOMENT_EXPONENT, SQUARE_EXPONENT, SENSEFLOW_FIELDS
};

// One parameter: 15 int64, so that a table of them is an int64 tensor [rows, 15]. An absent tensor is null.
typedef struct {
  void* data[SENSEFLOW_FIELDS];
  int64_t n;          // elements of each
  int64_t start;      // where in the full parameter the first of them lies, >= 0
  int64_t parameter;  // its number
  int64_t kinds;      // bits 4 f and 4 f + 1: senseflow_dtype of field f; bit 4 f + 3: it is rounded at random
  int64_t block;      // elements of a block of codes: 64, 128 or 256, which n and start are multiples of; else 0
} senseflow_row;

// What all rows share. With grad absent from a row, theta is read alone.
typedef struct {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;  // of AdamW
  int64_t step;      // of AdamW, from 1 on, and of the random numbers
  int64_t seed;      // of the random numbers
  float phi_weight;  // 1 - lam; at 0 phi is not touched
  float ema_weight;  // 1 - decay; at 0 the EMA is not touched
} senseflow_scalars;

// torch_parallel_for of torch's stable C ABI, so that the update runs on torch's own threads. Null: on the caller's.
typedef int32_t (*senseflow_parallel_for)(
    int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

SENSEFLOW_API int32_t senseflow_abi(void);
// The instruction set that runs here: "avx512", "avx2", or what every CPU of the platform has ("x86-64", "aarch64", "generic").
SENSEFLOW_API const char* senseflow_cpu_isa(void);
// 0, or 1 where the rows ask for what does not exist (an unknown dtype, random fp32, a low half beside fp32).
// isa: null, or one that this CPU has, to compare.
SENSEFLOW_API int32_t senseflow_update_cpu(
    const senseflow_row* rows, int64_t count, const senseflow_scalars* scalars, senseflow_parallel_for parallel_for,
    const char* isa);

// -- the CUDA library --------------------------------------------------------------------------------------------

// As senseflow_scalars, read on the device at each launch or graph replay. Null: lam and ema_decay as the two
// weights say, grad_scale 1, found_inf 0, step 0; lr is null where no row has a grad. Where *found_inf is not 0 nothing changes.
typedef struct {
  const double *lr, *lam, *ema_decay;  // 1 - lam in fp32 alone would lose most of a small weight
  const float *grad_scale, *found_inf;
  const int64_t* step;
  double beta1, beta2, eps, weight_decay;
  int64_t seed;
  float phi_weight, ema_weight;
} senseflow_device_scalars;

SENSEFLOW_API int32_t senseflow_cuda_abi(void);

#define SENSEFLOW_CUDA_CHUNK 8192  // elements of an entry of the map

// rows, map: on the current device. map: (row, chunk) pairs that cover every row, each row as if it had
// start % 8 more elements. Enqueues one launch on the stream (a cudaStream_t); 0, or the cudaError_t.
SENSEFLOW_API int32_t senseflow_update_cuda(
    const senseflow_row* rows, const int32_t* map, int64_t entries, const senseflow_device_scalars* scalars,
    void* stream);

#ifdef __cplusplus
}
#endif
