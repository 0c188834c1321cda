// What this machine can do at most, for shares of it: products per second from registers, and bytes per second read from memory.
// Prints "NAME VALUE" lines: fp32, bf16, int8 (operations per second, a multiply-add is two) and read (bytes per second).
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12;  // independent sums: more than latency times throughput of any of these instructions
constexpr std::int64_t kSteps = 12'000'000;
constexpr std::size_t kReadBytes = 192u << 20;  // far beyond the last cache

volatile float sink;

template <class Work>
double seconds_of(int threads, Work work) {
  double best = 1e30;
  for (int round = 0; round < 3; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread) pool.emplace_back(work, thread);
    for (auto& each : pool) each.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

__attribute__((target("avx512f"))) void multiply_fp32(int) {
  __m512 sums[kChains], x = _mm512_set1_ps(0.5f);
  for (auto& sum : sums) sum = _mm512_set1_ps(1.0f);
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_fmadd_ps(sums[chain], x, x);
  }
  for (auto& sum : sums) sink = _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx512f,avx512bf16"))) void multiply_bf16(int) {
  __m512 sums[kChains];
  __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (auto& sum : sums) sum = _mm512_set1_ps(1.0f);
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], x, x);
  }
  for (auto& sum : sums) sink = _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx512f,avx512vnni"))) void multiply_int8(int) {
  __m512i sums[kChains], x = _mm512_set1_epi8(1);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbusd_epi32(sums[chain], x, x);
  }
  for (auto& sum : sums) sink = static_cast<float>(_mm512_reduce_add_epi32(sum));
}

__attribute__((target("avx512f"))) void read_part(const char* data, std::size_t bytes) {
  __m512i sums[8] = {};
  for (std::size_t place = 0; place + 512 <= bytes; place += 512) {
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      _mm_prefetch(data + place + 64 * part + 4096, _MM_HINT_T0);
      sums[part] = _mm512_xor_si512(sums[part], _mm512_loadu_si512(data + place + 64 * part));
    }
  }
  for (auto& sum : sums) sink = static_cast<float>(_mm512_reduce_add_epi32(sum));
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const double vectors = static_cast<double>(kChains) * kSteps * threads;
  if (__builtin_cpu_supports("avx512f")) std::printf("fp32 %.0f\n", vectors * 32 / seconds_of(threads, multiply_fp32));
  if (__builtin_cpu_supports("avx512bf16")) std::printf("bf16 %.0f\n", vectors * 64 / seconds_of(threads, multiply_bf16));
  if (__builtin_cpu_supports("avx512vnni")) std::printf("int8 %.0f\n", vectors * 128 / seconds_of(threads, multiply_int8));
  if (__builtin_cpu_supports("avx512f")) {
    std::vector<char> data(kReadBytes, 1);
    const std::size_t part = kReadBytes / threads;
    const double seconds = seconds_of(threads, [&](int thread) { read_part(data.data() + part * thread, part); });
    std::printf("read %.0f\n", kReadBytes / seconds);
  }
}
