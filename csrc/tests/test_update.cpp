// The C interface by itself, no torch: values against formulas in fp64, the instruction sets against each other bit for
// bit, threads, known random numbers, what is refused.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "formulas.h"

using namespace senseflow;

#define CHECK(condition) \
  ((condition) ? (void)0 : (std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition), std::exit(1)))

static uint32_t state = 1;
static float draw() { return (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f; }
static std::vector<float> draws(int64_t n) {
  std::vector<float> values(n);
  for (float& v : values) v = draw();
  return values;
}

static int32_t three_threads(
    int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  CHECK(grain > 0);
  std::vector<std::thread> threads;
  const int64_t share = (end - begin + 2) / 3;
  for (int64_t at = begin; at < end; at += share)
    threads.emplace_back(body, at, at + share < end ? at + share : end, context);
  for (std::thread& t : threads) t.join();
  return 0;
}

static senseflow_row row_of(int64_t n) {
  senseflow_row row{};
  row.n = n;
  return row;
}

static void put(senseflow_row& row, int field, void* data, int dtype = SENSEFLOW_FP32, bool random = false) {
  row.data[field] = data;
  row.kinds |= (int64_t)(dtype | (random ? 8 : 0)) << (4 * field);
}

// Conversions: every half goes to fp32 and back; nearest even between two neighbours.
static void test_halves() {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const bool bf16_nan = (h & 0x7FFF) > 0x7F80, fp16_nan = (h & 0x7FFF) > 0x7C00;
    CHECK(bf16_nan ? to_bf16(from_bf16(h)) == 0x7FC0 : to_bf16(from_bf16(h)) == h);
    CHECK(fp16_nan ? (to_fp16(from_fp16(h)) & 0x7FFF) == 0x7E00 : to_fp16(from_fp16(h)) == h);
    if ((h & 0x7FFF) >= 0x7BFF) continue;
    const double middle = 0.5 * ((double)from_fp16(h) + (double)from_fp16(h + 1));
    CHECK(to_fp16((float)middle) == (h & 1 ? h + 1 : h));  // both fit fp32 exactly
    CHECK(to_fp16(std::nextafter((float)middle, from_fp16(h))) == h);
    CHECK(to_fp16(std::nextafter((float)middle, from_fp16(h + 1))) == h + 1);
  }
  CHECK(from_fp16(0x0001) == 0x1p-24f && from_fp16(0x7BFF) == 65504.0f && std::isinf(from_fp16(0x7C00)));
  CHECK(to_fp16(65519.9f) == 0x7BFF && to_fp16(65520.0f) == 0x7C00);
  for (int i = 0; i < 100000; ++i) {
    const float value = float_of((uint32_t)i * 42949u);
    int16_t low;
    const uint16_t high = split(value, &low);
    CHECK(std::isnan(value) ? std::isnan(joined(high, low)) : bits_of(joined(high, low)) == bits_of(value));
  }
}

// Published known answers are of ten rounds; these are of seven, from the published round in Python's integers.
static void test_philox() {
  uint32_t words[4];
  philox(0x123456789ull, 42, 7, 0xDEADBEEFCAFEull, words);
  CHECK(words[0] == 0xE7380EB8u && words[1] == 0x51D2FC74u && words[2] == 0x6D0AC914u && words[3] == 0x6C597A5Eu);
}

// AdamW, IDA and EMA of one pass against the formulas in fp64.
static void test_one_pass() {
  const int64_t n = 1003;
  std::vector<float> theta = draws(n), grad = draws(n), moment = draws(n), square = draws(n), phi = draws(n), ema = draws(n);
  for (float& v : square) v = std::fabs(v) + 0.1f;  // a tiny root would magnify the rounding of the moment
  std::vector<double> t(n), p(n), e(n);
  const senseflow_scalars s{1e-3, 0.9, 0.99, 1e-8, 0.1, 0.5, 3, 0, 0.03f, 0.001f};
  for (int64_t i = 0; i < n; ++i) {
    const double g = 0.5 * grad[i], m = 0.9 * moment[i] + 0.1 * g, v = 0.99 * square[i] + 0.01 * g * g;
    t[i] = theta[i] * (1 - 1e-3 * 0.1) -
           1e-3 * (m / (1 - std::pow(0.9, 3))) / (std::sqrt(v / (1 - std::pow(0.99, 3))) + 1e-8);
    p[i] = phi[i] + 0.03 * (t[i] - phi[i]);
    e[i] = ema[i] + 0.001 * (t[i] - ema[i]);
  }
  senseflow_row row = row_of(n);
  put(row, THETA, theta.data()), put(row, GRAD, grad.data()), put(row, MOMENT, moment.data());
  put(row, SQUARE, square.data()), put(row, PHI, phi.data()), put(row, EMA, ema.data());
  CHECK(senseflow_update_cpu(&row, 1, &s, nullptr, nullptr) == 0);
  for (int64_t i = 0; i < n; ++i) {  // values below 2, a handful of roundings of 2^-24 of them
    CHECK(std::fabs(theta[i] - t[i]) < 4e-7);
    CHECK(std::fabs(phi[i] - p[i]) < 4e-7);
    CHECK(std::fabs(ema[i] - e[i]) < 4e-7);
  }
}

// A network of odd sizes in every way of keeping a tensor; the bytes that come out.
static std::vector<char> updated(const char* isa, senseflow_parallel_for parallel_for) {
  state = 1;
  std::vector<std::vector<char>> memory;
  std::vector<senseflow_row> rows;
  auto tensor = [&](int64_t n, int dtype) {
    std::vector<char> bytes(n * 4 + 2);
    char* data = bytes.data() + (dtype == SENSEFLOW_FP32 ? 0 : 2);  // halves not even at a multiple of 4
    for (int64_t i = 0; i < n; ++i) {
      const float v = draw() + (dtype == SENSEFLOW_FP32 ? 1.5f : 0.0f);
      const uint16_t half = dtype == SENSEFLOW_FP16 ? to_fp16(v) : to_bf16(v);
      dtype == SENSEFLOW_FP32 ? std::memcpy(data + 4 * i, &v, 4) : std::memcpy(data + 2 * i, &half, 2);
    }
    memory.push_back(std::move(bytes));
    return (void*)(memory.back().data() + (dtype == SENSEFLOW_FP32 ? 0 : 2));
  };
  int64_t parameter = 0;
  for (int64_t n : {0, 1, 7, 8, 513, 1025, 40001})
    for (int kind = 0; kind < 5; ++kind)  // fp32, bf16, fp16, split, at random
      for (bool adam : {false, true}) {
        senseflow_row row = row_of(n);
        const int dtype = kind == 0 ? SENSEFLOW_FP32 : kind == 2 ? SENSEFLOW_FP16 : SENSEFLOW_BF16;
        row.parameter = parameter++, row.start = parameter * 1000000007;
        for (int field : {PHI, THETA}) {
          put(row, field, tensor(n, dtype), dtype, kind == 4);
          if (kind == 3) put(row, field + 1, tensor(n, SENSEFLOW_BF16));
        }
        put(row, EMA, tensor(n, SENSEFLOW_FP32));
        const int moments = kind == 4 ? SENSEFLOW_BF16 : SENSEFLOW_FP32;
        if (adam) {
          put(row, GRAD, tensor(n, dtype), dtype);
          put(row, MOMENT, tensor(n, moments), moments, kind == 4);
          void* square = tensor(n, moments);
          for (int64_t i = 0; moments == SENSEFLOW_BF16 && i < n; ++i) ((uint16_t*)square)[i] &= 0x7FFF;
          put(row, SQUARE, square, moments, kind == 4);
        }
        rows.push_back(row);
      }
  for (float weight : {0.03f, 0.8f}) {
    const senseflow_scalars s{1e-3, 0.9, 0.99, 1e-8, 0.1, 0.5, 3, 1ll << 40 | 5, weight, 0.001f};
    CHECK(senseflow_update_cpu(rows.data(), (int64_t)rows.size(), &s, parallel_for, isa) == 0);
  }
  std::vector<char> out;
  for (const std::vector<char>& m : memory) out.insert(out.end(), m.begin(), m.end());
  return out;
}

static void test_same_bits() {
  const char* best = senseflow_cpu_isa();
  const std::vector<char> alone = updated(best, nullptr);
  CHECK(alone == updated(best, three_threads));
#if defined(__x86_64__)
  CHECK(alone == updated("x86-64", nullptr));
  if (!std::strcmp(best, "avx512")) CHECK(alone == updated("avx2", nullptr));
#endif
}

// Weight 0 leaves every bit, also beside a theta that is not finite.
static void test_nothing_to_do() {
  std::vector<float> phi = draws(100), before = phi, theta(100, INFINITY);
  senseflow_row row = row_of(100);
  put(row, PHI, phi.data()), put(row, THETA, theta.data());
  senseflow_scalars s{};
  CHECK(senseflow_update_cpu(&row, 1, &s, nullptr, nullptr) == 0 && phi == before);
  CHECK(senseflow_update_cpu(&row, 0, &s, nullptr, nullptr) == 0);
}

static void test_refused() {
  std::vector<float> phi(4), theta(4);
  const senseflow_scalars s{};
  auto refused = [&](auto change) {
    senseflow_row row = row_of(4);
    put(row, PHI, phi.data()), put(row, THETA, theta.data());
    CHECK(senseflow_update_cpu(&row, 1, &s, nullptr, nullptr) == 0);
    change(row);
    CHECK(senseflow_update_cpu(&row, 1, &s, nullptr, nullptr) == 1);
  };
  refused([&](senseflow_row& row) { row.n = -1; });
  refused([&](senseflow_row& row) { row.start = -1; });
  refused([&](senseflow_row& row) { row.kinds = 3; });                          // no such dtype
  refused([&](senseflow_row& row) { row.kinds = 8; });                          // fp32 at random
  refused([&](senseflow_row& row) { row.data[PHI_LOW] = theta.data(); });       // a low half beside fp32
  refused([&](senseflow_row& row) { row.data[THETA] = nullptr; });
  refused([&](senseflow_row& row) { row.data[GRAD] = theta.data(); });          // and no moments
  senseflow_row row = row_of(4);
  put(row, THETA, theta.data());
  CHECK(senseflow_update_cpu(&row, 1, &s, nullptr, "no such CPU") == 1);
}

int main() {
  CHECK(senseflow_abi() == SENSEFLOW_ABI);
  test_halves();
  test_philox();
  test_one_pass();
  test_same_bits();
  test_nothing_to_do();
  test_refused();
  std::printf("passed, %s\n", senseflow_cpu_isa());
}
