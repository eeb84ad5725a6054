// Between cpu.cpp, which shares out the work, and cpu_kernel.inc, which does it.
#pragma once

#include "formulas.h"

namespace senseflow {

struct Update {
  const senseflow_scalars* scalars;
  AdamScalars adam;
};

// Elements first ... end - 1 of a row.
typedef void (*Kernel)(const senseflow_row& row, int64_t first, int64_t end, const Update& update);
void update_generic(const senseflow_row& row, int64_t first, int64_t end, const Update& update);
void update_avx512(const senseflow_row& row, int64_t first, int64_t end, const Update& update);
void update_avx2(const senseflow_row& row, int64_t first, int64_t end, const Update& update);

}  // namespace senseflow
