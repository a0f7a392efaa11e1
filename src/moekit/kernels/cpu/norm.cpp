// Root-mean-square norm of bfloat16 rows in one pass over memory, for inference.
//
// Shapes: T rows, D width (a multiple of 16). x, y [T, D] bfloat16; weight [D] bfloat16 or float.

#include "common.h"

#include <cmath>

namespace {

constexpr int64_t kGrain = 32 << 10;  // values below which another thread costs more than it saves

inline __m512 scale_at(const float* w, int64_t d) { return _mm512_loadu_ps(w + d); }
inline __m512 scale_at(const BFloat16* w, int64_t d) { return to_float(load16(w + d)); }

// y = x r (offset + weight), r = (mean(x^2) + eps)^-1/2; `early` rounds x r first, as transformers' Llama does
template <class W>
void norm(const BFloat16* x, const W* weight, BFloat16* y, int64_t n_rows, int64_t width, float eps, float offset, bool early) {
  at::parallel_for(0, n_rows, std::max<int64_t>(1, kGrain / width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const BFloat16* from = x + row * width;
      __m512 squares = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 16) {
        const __m512 v = to_float(load16(from + d));
        squares = _mm512_fmadd_ps(v, v, squares);
      }
      const __m512 r = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps)), more = _mm512_set1_ps(offset);
      for (int64_t d = 0; d < width; d += 16) {
        __m512 v = _mm512_mul_ps(to_float(load16(from + d)), r);
        if (early) v = to_float(to_bf16(v));
        store16(y + row * width + d, to_bf16(_mm512_mul_ps(v, _mm512_add_ps(more, scale_at(weight, d)))));
      }
    }
  });
}

}  // namespace

extern "C" void moekit_rms_norm(const void* x, const void* weight, int64_t float_weight, void* y, int64_t n_rows, int64_t width, float eps,
                                float offset, int64_t early) {
  const auto* from = static_cast<const BFloat16*>(x);
  auto* to = static_cast<BFloat16*>(y);
  if (float_weight) norm(from, static_cast<const float*>(weight), to, n_rows, width, eps, offset, early);
  else norm(from, static_cast<const BFloat16*>(weight), to, n_rows, width, eps, offset, early);
}
