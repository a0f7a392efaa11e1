// What stands between the matrix products of a transformer layer, in one pass over memory each: residual sum with
// root-mean-square norm, and the gated activation of a dense feed-forward block; forward and backward.
//
// Shapes: T rows, D width (a multiple of 16), F width of the feed-forward block (any).

#include "common.h"

#include <cmath>

namespace {

constexpr int64_t kRows = 64;  // rows of a block; sums over rows go block by block, whatever the number of threads

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const BFloat16* p) { return to_float(load16(p)); }
inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store(BFloat16* p, __m512 v) { store16(p, to_bf16(v)); }

template <class Work>
void each_block(int64_t n_rows, const Work& work) {
  at::parallel_for(0, padded(n_rows, kRows) / kRows, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) work(block, block * kRows, std::min(n_rows, (block + 1) * kRows));
  });
}

// sum = x + delta (or x where there is none), y = sum * inverse * weight, inverse = (mean(sum^2) + eps)^-1/2
template <class Out>
void norm_forward(int64_t n_rows, int64_t width, const float* x, const BFloat16* delta, const float* weight, float eps, float* sum, Out* y, float* inverse) {
  each_block(n_rows, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const int64_t at = row * width;
      __m512 squares = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 16) {
        __m512 v = load(x + at + d);
        if (delta) {
          v = _mm512_add_ps(v, load(delta + at + d));
          store(sum + at + d, v);
        }
        squares = _mm512_fmadd_ps(v, v, squares);
      }
      const float r = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
      const float* from = delta ? sum + at : x + at;
      for (int64_t d = 0; d < width; d += 16) {
        store(y + at + d, _mm512_mul_ps(_mm512_mul_ps(load(from + d), _mm512_set1_ps(r)), load(weight + d)));
      }
      inverse[row] = r;
    }
  });
}

// dx = dsum + r (dy w - xhat mean(dy w xhat)), xhat = x r; dweight [D] = sum of dy xhat
template <class Out>
void norm_backward(int64_t n_rows, int64_t width, const float* x, const float* weight, const float* inverse, const float* dsum, const Out* dy,
                   float* dx, BFloat16* ddelta, float* dweight) {
  const int64_t n_blocks = padded(n_rows, kRows) / kRows;
  std::vector<float> partial(n_blocks * width, 0.0f);
  each_block(n_rows, [&](int64_t block, int64_t first, int64_t last) {
    float* own = partial.data() + block * width;
    for (int64_t row = first; row < last; row++) {
      const int64_t at = row * width;
      const __m512 r = _mm512_set1_ps(inverse[row]);
      __m512 inner = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 16) {
        const __m512 product = _mm512_mul_ps(load(dy + at + d), _mm512_mul_ps(load(x + at + d), r));
        inner = _mm512_fmadd_ps(product, load(weight + d), inner);
        store(own + d, _mm512_add_ps(load(own + d), product));
      }
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(inner) / width);
      for (int64_t d = 0; d < width; d += 16) {
        const __m512 xhat = _mm512_mul_ps(load(x + at + d), r);
        const __m512 g = _mm512_fnmadd_ps(xhat, mean, _mm512_mul_ps(load(dy + at + d), load(weight + d)));
        const __m512 result = dsum ? _mm512_fmadd_ps(g, r, load(dsum + at + d)) : _mm512_mul_ps(g, r);
        store(dx + at + d, result);
        if (ddelta) store(ddelta + at + d, result);
      }
    }
  });
  std::fill_n(dweight, width, 0.0f);
  for (int64_t block = 0; block < n_blocks; block++) {
    for (int64_t d = 0; d < width; d += 16) store(dweight + d, _mm512_add_ps(load(dweight + d), load(partial.data() + block * width + d)));
  }
}

// Calls work(place) for each 16 of `width` values. A row that is no multiple of 16 ends with 16 that overlap the ones
// before (masked stores take far longer than computing those twice).
template <class Work>
inline void each_16(int64_t width, const Work& work) {
  for (int64_t f = 0; f + 16 <= width; f += 16) work(f);
  if (width % 16) work(width - 16);
}

void swiglu_forward(int64_t width, const BFloat16* hidden, BFloat16* out) {
  each_16(width, [&](int64_t f) { store(out + f, activate<kSwiglu>({}, load(hidden + f), load(hidden + width + f), nullptr, nullptr)); });
}

void swiglu_backward(int64_t width, const BFloat16* hidden, const BFloat16* dout, BFloat16* dhidden) {
  each_16(width, [&](int64_t f) {
    __m512 by_gate, by_linear;
    activate<kSwiglu>({}, load(hidden + f), load(hidden + width + f), &by_gate, &by_linear);
    const __m512 g = load(dout + f);
    store(dhidden + f, _mm512_mul_ps(g, by_gate));
    store(dhidden + width + f, _mm512_mul_ps(g, by_linear));
  });
}

}  // namespace

extern "C" {

void moekit_norm_forward(int64_t n_rows, int64_t width, const float* x, const void* delta, const float* weight, float eps, float* sum, void* y,
                         int64_t float_y, float* inverse) {
  const auto* more = static_cast<const BFloat16*>(delta);
  if (float_y) {
    norm_forward(n_rows, width, x, more, weight, eps, sum, static_cast<float*>(y), inverse);
  } else {
    norm_forward(n_rows, width, x, more, weight, eps, sum, static_cast<BFloat16*>(y), inverse);
  }
}

void moekit_norm_backward(int64_t n_rows, int64_t width, const float* x, const float* weight, const float* inverse, const float* dsum, const void* dy,
                          int64_t float_y, float* dx, void* ddelta, float* dweight) {
  auto* more = static_cast<BFloat16*>(ddelta);
  if (float_y) {
    norm_backward(n_rows, width, x, weight, inverse, dsum, static_cast<const float*>(dy), dx, more, dweight);
  } else {
    norm_backward(n_rows, width, x, weight, inverse, dsum, static_cast<const BFloat16*>(dy), dx, more, dweight);
  }
}

// hidden [T, 2F]: gates, then linear parts; F at least 16. out [T, F] = silu(gate) * linear
void moekit_swiglu_forward(int64_t n_rows, int64_t width, const void* hidden, void* out) {
  const auto* from = static_cast<const BFloat16*>(hidden);
  auto* to = static_cast<BFloat16*>(out);
  each_block(n_rows, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) swiglu_forward(width, from + row * 2 * width, to + row * width);
  });
}

void moekit_swiglu_backward(int64_t n_rows, int64_t width, const void* hidden, const void* dout, void* dhidden) {
  const auto *from = static_cast<const BFloat16*>(hidden), *gradient = static_cast<const BFloat16*>(dout);
  auto* to = static_cast<BFloat16*>(dhidden);
  each_block(n_rows, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) swiglu_backward(width, from + row * 2 * width, gradient + row * width, to + row * 2 * width);
  });
}

}  // extern "C"
