#define SENSEFLOW_ISA update_avx2
#include "cpu_kernel.inc"
