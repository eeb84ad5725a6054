#define SENSEFLOW_ISA update_generic
#include "cpu_kernel.inc"
