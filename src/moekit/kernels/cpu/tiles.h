// Packing for matrix products in bfloat16: the right factor in pairs along the inner dimension ("VNNI"), the left one
// as rows; and a tile of float results back into rows. Rows beyond the last one read as zeros.

#pragma once

#include <ATen/native/CPUBlas.h>

#include "common.h"

namespace {

using at::native::cpublas::brgemm;

// A matrix unit that was configured for products (AMX) is given back when a thread's worker goes.
struct ReleaseProducts {
  ~ReleaseProducts() { at::native::cpublas::brgemm_release(); }
};

// Rows [n_rows, width], `stride` apart, to pairs along the width: to[width / 2][n]. Multiples: n 16, width 32.
inline void pack_along_width(const BFloat16* from, int64_t stride, int64_t n_rows, int64_t n, int64_t width, uint32_t* to) {
  for (int64_t row = 0; row < n; row += 16) {
    for (int64_t d = 0; d < width / 2; d += 16) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) {
        r[j] = row + j < n_rows ? _mm512_loadu_si512(from + (row + j) * stride + 2 * d) : _mm512_setzero_si512();
      }
      transpose(r);
      for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + (d + j) * n + row, r[j]);
    }
  }
}

// Rows to pairs along the rows: to[n / 2][width]. Multiples: n 2, width 16.
inline void pack_along_rows(const BFloat16* from, int64_t stride, int64_t n_rows, int64_t n, int64_t width, uint32_t* to) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t row = 0; row < n; row += 2, to += width) {
    const BFloat16 *a = from + row * stride, *b = a + stride;
    for (int64_t d = 0; d < width; d += 16) {
      _mm512_storeu_si512(to + d, pairs(row < n_rows ? load16(a + d) : zero, row + 1 < n_rows ? load16(b + d) : zero));
    }
  }
}

// Rows to columns: to[width][ld], the first n of each row. Multiples: n 32, width 16.
inline void transpose_rows(const BFloat16* from, int64_t stride, int64_t n_rows, int64_t n, int64_t width, BFloat16* to, int64_t ld) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t d = 0; d < width; d += 16) {
    for (int64_t row = 0; row < n; row += 32) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) {
        const int64_t at = row + 2 * j;
        const BFloat16* p = from + at * stride + d;
        r[j] = pairs(at < n_rows ? load16(p) : zero, at + 1 < n_rows ? load16(p + stride) : zero);
      }
      transpose(r);
      for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + (d + j) * ld + row, r[j]);
    }
  }
}

// Floats [m][n] to columns, handed over 16 at a time: put(column, first row, values). Multiples: m 16, n 16.
template <class Put>
inline void each_column(const float* tile, int64_t m, int64_t n, int64_t n_columns, const Put& put) {
  for (int64_t c = 0; c < n; c += 16) {
    for (int64_t i = 0; i < m; i += 16) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) r[j] = _mm512_loadu_si512(tile + (i + j) * n + c);
      transpose(r);
      for (int j = 0; j < 16 && c + j < n_columns; j++) put(c + j, i, (__m512)r[j]);
    }
  }
}

}  // namespace
