// y = x W^T + b for few rows of x: the weight is read once, each thread its own contiguous part of it.
//
// Shapes: T rows, D width in (a multiple of 32), O width out (any). x [T, D], weight [O, D], bias [O] or null, y [T, O].

#include "streams.h"

namespace {

constexpr int64_t kUnitBytes = 64 << 10;  // of weights

void linear(const BFloat16* x, const BFloat16* weight, const BFloat16* bias, BFloat16* y, int64_t n_rows, int64_t d, int64_t o) {
  thread_local Parts parts;
  const int64_t unit = std::max<int64_t>(kLane, kUnitBytes / (d * 2) / kLane * kLane), n_units = (o + unit - 1) / unit;
  const auto work = [&](int64_t item) {
    for (int64_t first = item * unit; first < std::min(o, (item + 1) * unit); first += kLane) {
      const int64_t n = std::min(kLane, o - first);
      const __mmask16 real = 0xffffu >> (kLane - n);
      const __m512 start = bias ? to_float(_mm256_maskz_loadu_epi16(real, bias + first)) : _mm512_setzero_ps();
      for (int64_t t = 0; t < n_rows; t += 4) {
        const int64_t rows = std::min<int64_t>(4, n_rows - t);
        __m512 sum[4][kLane];
        for (auto& row : sum) for (auto& v : row) v = _mm512_setzero_ps();
        const char* from[4];
        for (int64_t r = 0; r < rows; r++) from[r] = reinterpret_cast<const char*>(x + (t + r) * d);
        for (int64_t i = 0; i < n; i++) {
          const char* w = reinterpret_cast<const char*>(weight + (first + i) * d);
          if (rows == 1) dot<Bf16, 1>(w, from, d * 2, &sum[0][i]);
          else if (rows == 2) dot<Bf16, 2>(w, from, d * 2, &sum[0][i]);
          else if (rows == 3) dot<Bf16, 3>(w, from, d * 2, &sum[0][i]);
          else dot<Bf16, 4>(w, from, d * 2, &sum[0][i]);
        }
        for (int64_t r = 0; r < rows; r++) {
          _mm256_mask_storeu_epi16(y + (t + r) * o + first, real, to_bf16(_mm512_add_ps(sums(sum[r]), start)));
        }
      }
    }
  };
  const int64_t n_threads = std::min<int64_t>(at::get_num_threads(), n_units);
  Parts* const shared = &parts;  // of the calling thread
  shared->reset(n_units, n_threads);
  at::parallel_for(0, n_threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++) shared->run(thread, work);
  });
}

}  // namespace

extern "C" void moekit_linear(const void* x, const void* weight, const void* bias, void* y, int64_t n_rows, int64_t d, int64_t o) {
  linear(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(weight), static_cast<const BFloat16*>(bias), static_cast<BFloat16*>(y), n_rows, d, o);
}
