// What the CPU kernels share: transposes and conversions in registers, activations, scratch memory, sharing out work.
// AVX-512 (F, BW, DQ, VL, BF16) is taken for granted; the Python side checks for it before anything is compiled.

#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using std::int64_t;

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------- registers

// 16 x 16 values of 32 bits, rows to columns
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 4; j++) {
      t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0x88);
      t[8 * i + 4 + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

inline __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store16(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m512i wide(__m256i v) { return _mm512_cvtepu16_epi32(v); }
inline __m512 to_float(__m256i v) { return (__m512)_mm512_slli_epi32(wide(v), 16); }
inline __m256i to_bf16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
// 16 pairs (a, b): what the matrix instructions read of two neighbouring inner indices
inline __m512i pairs(__m256i a, __m256i b) { return _mm512_or_si512(wide(a), _mm512_slli_epi32(wide(b), 16)); }

// Cephes' expf: relative error below 2e-7
inline __m512 exp_of(__m512 x) {
  // in this order a NaN comes through: the instructions answer with their second argument
  x = _mm512_min_ps(_mm512_set1_ps(88.3f), _mm512_max_ps(_mm512_set1_ps(-87.3f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f, _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Phi(x) = (1 + erf(x / sqrt 2)) / 2 by Abramowitz and Stegun 7.1.26: absolute error below 1e-7
inline __m512 normal_cdf(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_abs_ps(z), _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 tail = _mm512_mul_ps(
      _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_mul_ps(p, t)), exp_of(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(negative, _mm512_sub_ps(one, tail), tail);
}

// ---------------------------------------------------------------- activations

// The numbers are those of ACTIVATIONS in kernels/expert_weights.py; the first kGlu take a gate g and a linear part u.
enum Kind : int64_t {
  kSwiglu, kGeglu, kGegluTanh, kClampedSwiglu, kGlu,
  kGelu = kGlu, kGeluTanh, kRelu, kSigmoid, kSilu, kReluSquared, kKinds
};

// kClampedSwiglu (GPT-OSS): g' sigmoid(alpha g') (u' + offset), g' = min(g, limit), u' = clamp(u, -limit, limit)
struct Activation {
  int64_t kind;
  float alpha, limit, offset;
};

// sigma(x) as far as a gate needs it: g * gate_of(g) is silu, gelu or its tanh approximation
template <int64_t A>
inline __m512 gated(__m512 g, float alpha, __m512* slope) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (A == kGeglu || A == kGelu) {
    const __m512 phi = normal_cdf(g);
    if (slope) {
      const __m512 half_square = _mm512_mul_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(-0.5f));
      const __m512 density = _mm512_mul_ps(exp_of(half_square), _mm512_set1_ps(0.3989422804014327f));
      *slope = _mm512_fmadd_ps(g, density, phi);
    }
    return _mm512_mul_ps(g, phi);
  } else if constexpr (A == kGegluTanh || A == kGeluTanh) {
    // (1 + tanh(z)) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
    const __m512 twice = _mm512_set1_ps(1.5957691216057308f), square = _mm512_mul_ps(g, g);
    const __m512 z = _mm512_mul_ps(_mm512_mul_ps(twice, g), _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), one));
    const __m512 s = sigmoid_of(z), value = _mm512_mul_ps(g, s);
    if (slope) {
      const __m512 inner = _mm512_mul_ps(twice, _mm512_fmadd_ps(square, _mm512_set1_ps(3 * 0.044715f), one));
      *slope = _mm512_fmadd_ps(_mm512_mul_ps(value, _mm512_sub_ps(one, s)), inner, s);
    }
    return value;
  } else {
    const __m512 a = _mm512_set1_ps(alpha), s = sigmoid_of(A == kClampedSwiglu ? _mm512_mul_ps(a, g) : g), value = _mm512_mul_ps(g, s);
    if (slope) {
      const __m512 rest = _mm512_mul_ps(value, _mm512_sub_ps(one, s));
      *slope = A == kClampedSwiglu ? _mm512_fmadd_ps(rest, a, s) : _mm512_add_ps(rest, s);
    }
    return value;
  }
}

// The activation a(g, u) and its derivatives by g and u (u only where there is a gate); a NaN stays one.
template <int64_t A>
inline __m512 activate(const Activation& how, __m512 g, __m512 u, __m512* by_g, __m512* by_u) {
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  if constexpr (A == kClampedSwiglu) {
    const __m512 limit = _mm512_set1_ps(how.limit), lowest = _mm512_set1_ps(-how.limit), offset = _mm512_set1_ps(how.offset);
    // the instructions answer with their second argument where one is NaN
    const __m512 gate = _mm512_min_ps(limit, g), linear = _mm512_max_ps(lowest, _mm512_min_ps(limit, u));
    const __m512 up = _mm512_add_ps(linear, offset);
    __m512 slope;
    const __m512 value = gated<A>(gate, how.alpha, by_g ? &slope : nullptr);
    if (by_g) {
      *by_g = _mm512_mask_mov_ps(_mm512_mul_ps(slope, up), _mm512_cmp_ps_mask(g, limit, _CMP_GT_OQ), zero);
      *by_u = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(u, linear, _CMP_NEQ_OQ), zero);
    }
    return _mm512_mul_ps(value, up);
  } else if constexpr (A < kGlu) {
    __m512 slope;
    const __m512 value = gated<A>(g, 1.0f, by_g ? &slope : nullptr);
    if (by_g) {
      *by_g = _mm512_mul_ps(slope, u);
      *by_u = value;
    }
    return _mm512_mul_ps(value, u);
  } else if constexpr (A == kRelu || A == kReluSquared) {
    const __mmask16 negative = _mm512_cmp_ps_mask(g, zero, _CMP_LE_OQ);
    const __m512 value = _mm512_mask_mov_ps(g, negative, zero);
    if (by_g) *by_g = A == kRelu ? _mm512_mask_mov_ps(one, negative, zero) : _mm512_add_ps(value, value);
    return A == kRelu ? value : _mm512_mul_ps(value, value);
  } else if constexpr (A == kSigmoid) {
    const __m512 s = sigmoid_of(g);
    if (by_g) *by_g = _mm512_mul_ps(s, _mm512_sub_ps(one, s));
    return s;
  } else {
    return gated<A>(g, 1.0f, by_g);
  }
}

// Calls `call` with the kind as a compile-time constant.
template <class Call, int64_t A = 0>
void with_kind(int64_t kind, const Call& call) {
  if constexpr (A < kKinds) {
    if (kind == A) return call(std::integral_constant<int64_t, A>());
    with_kind<Call, A + 1>(kind, call);
  }
}

// ---------------------------------------------------------------- scratch memory of a thread

class Scratch {
 public:
  explicit Scratch(size_t bytes) : base_(static_cast<char*>(std::aligned_alloc(64, padded(bytes, 64)))), next_(base_) {
    if (!base_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class V>
  V* take(int64_t n) {
    auto* p = reinterpret_cast<V*>(next_);
    next_ += bytes<V>(n);
    return p;
  }
  template <class V>
  static size_t bytes(int64_t n) { return padded(n * sizeof(V), 64); }

 private:
  char* base_;
  char* next_;
};

// Runs `work(item)` for items 0..n on all threads; whoever is free takes the next. `make` prepares a thread's worker.
template <class Make>
void share_out(int64_t n, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t n_threads = std::min<int64_t>(at::get_num_threads(), n);
  at::parallel_for(0, n_threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t item; (item = next++) < n;) work(item);
  });
}

}  // namespace
