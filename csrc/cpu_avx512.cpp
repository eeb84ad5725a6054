#define SENSEFLOW_ISA update_avx512
#include "cpu_kernel.inc"
