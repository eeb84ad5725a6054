// Which instruction set runs, and which thread does what.

#include "cpu.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the random bits of an element are told by their place in a little-endian word"
#endif

namespace senseflow {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements: below it a second thread costs more than it brings

#if defined(__x86_64__)
constexpr char GENERIC[] = "x86-64";
// Every CPU with AVX2 has F16C.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {  // what every server since 2017 (Intel) or 2022 (AMD) has of it
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(__aarch64__)
constexpr char GENERIC[] = "aarch64";
#else
constexpr char GENERIC[] = "generic";
#endif

const char* best_isa() {
#if defined(__x86_64__)
  if (has_avx512()) return "avx512";
  if (has_avx2()) return "avx2";
#endif
  return GENERIC;
}

// Null where this CPU lacks it.
Kernel kernel_of(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512")) return has_avx512() ? update_avx512 : nullptr;
  if (!std::strcmp(isa, "avx2")) return has_avx2() ? update_avx2 : nullptr;
#endif
  return std::strcmp(isa, GENERIC) ? nullptr : update_generic;
}

bool is_valid(const senseflow_row& row) {
  auto dtype = [&](int field) { return int(row.kinds >> (4 * field)) & 3; };
  auto random = [&](int field) { return (row.kinds >> (4 * field) & 8) != 0; };
  if (row.n < 0 || row.start < 0) return false;
  if (row.n == 0) return true;  // an empty tensor may have no address
  if (!row.data[THETA]) return false;
  if (row.data[GRAD] && !(row.data[MOMENT] && row.data[SQUARE])) return false;
  for (int field : {MOMENT, SQUARE}) {
    if (dtype(field) != SENSEFLOW_EIGHT) continue;
    const bool blocks = row.block == 64 || row.block == 128 || row.block == 256;
    if (!row.data[field + 2] || !blocks || row.n % row.block || row.start % row.block) return false;
  }
  for (int field : {PHI, THETA, EMA, GRAD, MOMENT, SQUARE}) {
    const bool has_low = (field == PHI || field == THETA) && row.data[field] && row.data[field + 1];
    if (dtype(field) == SENSEFLOW_EIGHT && field != MOMENT && field != SQUARE) return false;
    if ((has_low || random(field)) && dtype(field) != SENSEFLOW_BF16) return false;
    if (random(field) && (has_low || field == EMA || field == GRAD)) return false;
  }
  return true;
}

struct Share {  // of the elements of all rows, laid end to end
  const senseflow_row* rows;
  const int64_t* firsts;  // [count + 1]: where each row begins
  int64_t count;
  Kernel kernel;
  Update update;
};

void run(int64_t begin, int64_t end, void* context) {
  const Share& share = *(const Share*)context;
  int64_t low = 0, high = share.count;  // the last row that begins at or before `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (share.firsts[middle] <= begin ? low : high) = middle;
  }
  for (int64_t i = low; i < share.count && share.firsts[i] < end; ++i) {
    const senseflow_row& row = share.rows[i];
    int64_t at = begin > share.firsts[i] ? begin - share.firsts[i] : 0;
    int64_t to = end < share.firsts[i + 1] ? end - share.firsts[i] : row.n;
    if (row.block) {  // whole blocks: one belongs to the thread that has its first element
      at = (at + row.block - 1) / row.block * row.block;
      to = (to + row.block - 1) / row.block * row.block;
    }
    if (at < to) share.kernel(row, at, to, share.update);
  }
}

}  // namespace
}  // namespace senseflow

extern "C" int32_t senseflow_abi(void) { return SENSEFLOW_ABI; }

extern "C" const char* senseflow_cpu_isa(void) { return senseflow::best_isa(); }

extern "C" int32_t senseflow_update_cpu(
    const senseflow_row* rows, int64_t count, const senseflow_scalars* s, senseflow_parallel_for parallel_for,
    const char* isa) {
  using namespace senseflow;
  const Kernel kernel = kernel_of(isa ? isa : best_isa());
  int64_t* firsts = new (std::nothrow) int64_t[count + 1];
  bool valid = kernel && firsts;
  int64_t total = 0;
  for (int64_t i = 0; valid && i < count; ++i) {
    firsts[i] = total;
    valid = is_valid(rows[i]);
    total += rows[i].n;
  }
  if (valid && total) {
    firsts[count] = total;
    Share share{rows, firsts, count, kernel, {s, adam_scalars(*s)}};
    if (parallel_for && total > GRAIN)
      valid = parallel_for(0, total, GRAIN, run, &share) == 0;
    else
      run(0, total, &share);
  }
  delete[] firsts;
  return valid ? 0 : 1;
}
