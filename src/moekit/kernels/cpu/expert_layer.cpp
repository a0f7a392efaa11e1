// Dispatch, expert MLPs and combine of a sparse layer in bfloat16, forward and backward, without a pass over memory
// between them.
//
// Everything is computed transposed: hidden^T = W x^T. So the weights, stored [out, in] as in torch.nn.Linear, are the
// left factor of each product and are read as they lie; what the matrix instructions want packed in pairs along the
// inner dimension ("VNNI") is the right factor, the activations, and they are packed while they are gathered or
// produced. The row weight multiplies the activation before the down-projection.
//
// Shapes: T tokens, E experts, R rows sorted by expert, D width in, F width of an expert, G 2 for swiglu and else 1,
// O width out. x [T, D], token [R], begin [E + 1], weight [R], w_in [E, G*F, D], w_out [E, O, F], result rows [R, O].
// D and O are multiples of 32, F of 16. A block is up to 64 rows of one expert, padded to a multiple of 16 with zeros.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;
using std::int64_t;

constexpr int64_t kRows = 64;  // rows of a block
constexpr int64_t kTile = 64;  // outputs computed at a time

enum Activation : int64_t { kSwiglu = 0, kGelu = 1, kRelu = 2, kSigmoid = 3 };

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

// The activation a(g, u) and its derivatives by g and u (u only for swiglu).
template <int64_t A>
inline __m512 activate(__m512 g, __m512 u, __m512* by_g, __m512* by_u) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (A == kSwiglu) {
    const __m512 s = sigmoid_of(g), silu = _mm512_mul_ps(s, g);
    if (by_g) {
      *by_g = _mm512_mul_ps(u, _mm512_fmadd_ps(silu, _mm512_sub_ps(one, s), s));
      *by_u = silu;
    }
    return _mm512_mul_ps(silu, u);
  } else if constexpr (A == kGelu) {
    const __m512 phi = normal_cdf(g);
    if (by_g) {
      const __m512 half_square = _mm512_mul_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(-0.5f));
      const __m512 density = _mm512_mul_ps(exp_of(half_square), _mm512_set1_ps(0.3989422804014327f));
      *by_g = _mm512_fmadd_ps(g, density, phi);
    }
    return _mm512_mul_ps(g, phi);
  } else if constexpr (A == kRelu) {
    const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LE_OQ);
    if (by_g) *by_g = _mm512_mask_blend_ps(negative, one, _mm512_setzero_ps());
    return _mm512_mask_blend_ps(negative, g, _mm512_setzero_ps());  // a NaN stays one
  } else {
    const __m512 s = sigmoid_of(g);
    if (by_g) *by_g = _mm512_mul_ps(s, _mm512_sub_ps(one, s));
    return s;
  }
}

// ---------------------------------------------------------------- packing

// Gathered rows, transposed in pairs along their width: [width / 2][n] pairs, zeros beyond the last row.
void pack_transposed(const BFloat16* source, const int64_t* token, int64_t n_rows, int64_t n, int64_t width, void* out) {
  auto* to = static_cast<uint32_t*>(out);
  for (int64_t row = 0; row < n; row += 16) {
    const uint32_t* from[16];
    for (int j = 0; j < 16; j++) {
      from[j] = row + j < n_rows ? reinterpret_cast<const uint32_t*>(source + token[row + j] * width) : nullptr;
    }
    for (int64_t d = 0; d < width / 2; d += 16) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) r[j] = from[j] ? _mm512_loadu_si512(from[j] + d) : _mm512_setzero_si512();
      transpose(r);
      for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + (d + j) * n + row, r[j]);
    }
  }
}

// Gathered rows in pairs along the rows: [n / 2][width] pairs, zeros beyond the last row.
void pack_rows(const BFloat16* source, const int64_t* token, int64_t n_rows, int64_t n, int64_t width, void* out) {
  auto* to = static_cast<uint32_t*>(out);
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t row = 0; row < n; row += 2, to += width) {
    const BFloat16* a = row < n_rows ? source + token[row] * width : nullptr;
    const BFloat16* b = row + 1 < n_rows ? source + token[row + 1] * width : nullptr;
    for (int64_t d = 0; d < width; d += 16) {
      _mm512_storeu_si512(to + d, pairs(a ? load16(a + d) : zero, b ? load16(b + d) : zero));
    }
  }
}

// Columns of a matrix [height, stride] as rows [columns][height]; height is a multiple of 16, columns too.
void transpose_columns(const BFloat16* from, int64_t stride, int64_t height, int64_t columns, BFloat16* to) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += 16) {
    for (int64_t k = 0; k < height; k += 32) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) {
        const BFloat16* p = from + (k + 2 * j) * stride + c;
        r[j] = k + 2 * j < height ? pairs(load16(p), load16(p + stride)) : pairs(zero, zero);
      }
      transpose(r);
      for (int j = 0; j < 16; j++) {
        if (k + 32 <= height) {
          _mm512_storeu_si512(to + (c + j) * height + k, r[j]);
        } else {
          store16(to + (c + j) * height + k, _mm512_castsi512_si256(r[j]));
        }
      }
    }
  }
}

// A tile of results [m][n] floats as bf16 rows: to[row * stride + 0..m) for the first `n_rows` columns.
void store_transposed(const float* tile, int64_t m, int64_t n, int64_t n_rows, BFloat16* to, int64_t stride) {
  for (int64_t c = 0; c < n; c += 16) {
    for (int64_t i = 0; i < m; i += 16) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) r[j] = _mm512_loadu_si512(tile + (i + j) * n + c);
      transpose(r);
      for (int j = 0; j < 16 && c + j < n_rows; j++) store16(to + (c + j) * stride + i, to_bf16((__m512)r[j]));
    }
  }
}

inline void store_gradient(BFloat16* to, __m512 v) { store16(to, to_bf16(v)); }
inline void store_gradient(float* to, __m512 v) { _mm512_storeu_ps(to, v); }

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
    at::native::cpublas::brgemm_release();
  });
}

struct Layer {
  const int64_t *token, *begin;
  int64_t n_experts, d, f, o;
};

// Where each expert's blocks begin in the stored pre-activations, in padded rows.
std::vector<int64_t> stored_begin(const Layer& layer) {
  std::vector<int64_t> at(layer.n_experts + 1, 0);
  for (int64_t e = 0; e < layer.n_experts; e++) at[e + 1] = at[e] + padded(layer.begin[e + 1] - layer.begin[e], 16);
  return at;
}

template <int64_t A>
void forward(const Layer& l, const BFloat16* x, const BFloat16* w_in, const BFloat16* w_out, const float* weight,
             BFloat16* rows, BFloat16* hidden) {
  constexpr int64_t G = A == kSwiglu ? 2 : 1;
  struct Block { int64_t expert, first, n; };
  std::vector<Block> blocks;
  for (int64_t e = 0; e < l.n_experts; e++) {
    for (int64_t r = l.begin[e]; r < l.begin[e + 1]; r += kRows) {
      blocks.push_back({e, r, std::min(kRows, l.begin[e + 1] - r)});
    }
  }
  const auto stored = stored_begin(l);
  share_out(blocks.size(), [&] {
    auto scratch = std::make_shared<Scratch>(Scratch::bytes<BFloat16>(kRows * l.d) + Scratch::bytes<BFloat16>(kRows * padded(l.f, 2)) +
                                             2 * Scratch::bytes<float>(kTile * kRows) + Scratch::bytes<float>(kRows));
    auto* packed = scratch->take<BFloat16>(kRows * l.d);
    auto* inner = scratch->take<uint32_t>(kRows * l.f / 2);
    auto* g = scratch->take<float>(kTile * kRows);
    auto* u = scratch->take<float>(kTile * kRows);
    auto* scale = scratch->take<float>(kRows);
    return [=, &l, &blocks, &stored](int64_t item) {
      (void)scratch;
      const auto [expert, first, n_rows] = blocks[item];
      const int64_t n = padded(n_rows, 16);
      pack_transposed(x, l.token + first, n_rows, n, l.d, packed);
      for (int64_t c = 0; c < n; c++) scale[c] = c < n_rows ? weight[first + c] : 0.0f;
      const BFloat16* up = w_in + expert * G * l.f * l.d;
      BFloat16* kept = hidden ? hidden + (stored[expert] + first - l.begin[expert]) * G * l.f : nullptr;
      for (int64_t f = 0; f < l.f; f += kTile) {
        const int64_t m = std::min(kTile, l.f - f);
        brgemm(m, n, l.d, l.d, n, n, false, up + f * l.d, packed, g, true);
        if (G == 2) brgemm(m, n, l.d, l.d, n, n, false, up + (l.f + f) * l.d, packed, u, true);
        for (int64_t i = 0; i < m; i += 2) {
          for (int64_t c = 0; c < n; c += 16) {
            __m256i a[2];
            for (int k = 0; k < 2; k++) {
              const int64_t at = (i + k) * n + c;
              const __m512 gate = _mm512_loadu_ps(g + at), linear = _mm512_loadu_ps(u + at);
              if (kept) {
                store16(kept + (f + i + k) * n + c, to_bf16(gate));
                if (G == 2) store16(kept + (l.f + f + i + k) * n + c, to_bf16(linear));
              }
              a[k] = to_bf16(_mm512_mul_ps(activate<A>(gate, linear, nullptr, nullptr), _mm512_loadu_ps(scale + c)));
            }
            _mm512_storeu_si512(inner + (f + i) / 2 * n + c, pairs(a[0], a[1]));
          }
        }
      }
      for (int64_t o = 0; o < l.o; o += kTile) {
        const int64_t m = std::min(kTile, l.o - o);
        brgemm(m, n, l.f, l.f, n, n, false, w_out + (expert * l.o + o) * l.f, reinterpret_cast<BFloat16*>(inner), g, true);
        store_transposed(g, m, n, n_rows, rows + first * l.o + o, l.o);
      }
    };
  });
}

template <int64_t A, class Gradient>
void backward(const Layer& l, const BFloat16* x, const BFloat16* w_in, const BFloat16* w_out, const float* weight,
              const BFloat16* hidden, const BFloat16* dy, BFloat16* dx_rows, Gradient* dw_in, Gradient* dw_out, float* dweight) {
  constexpr int64_t G = A == kSwiglu ? 2 : 1;
  const int64_t gf = G * l.f;
  // one expert at a time, the largest first, so that nobody waits long for the last
  std::vector<int64_t> order(l.n_experts);
  for (int64_t e = 0; e < l.n_experts; e++) order[e] = e;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return l.begin[a + 1] - l.begin[a] > l.begin[b + 1] - l.begin[b];
  });
  const auto stored = stored_begin(l);
  const int64_t most = padded(l.begin[order[0] + 1] - l.begin[order[0]], 64);
  const int64_t longest = std::max({l.d, gf, l.o});
  share_out(l.n_experts, [&] {
    using S = Scratch;
    auto scratch = std::make_shared<S>(2 * S::bytes<BFloat16>(most * l.o) + S::bytes<BFloat16>(most * l.d) + 2 * S::bytes<BFloat16>(most * gf) +
                                       S::bytes<BFloat16>(most * l.f) + S::bytes<BFloat16>(kTile * padded(longest, 32)) +
                                       S::bytes<float>(kTile * kTile) + 2 * S::bytes<float>(most));
    auto* dy_t = scratch->take<BFloat16>(most * l.o);    // per block [O / 2][n] pairs
    auto* dy_p = scratch->take<BFloat16>(most * l.o);    // [rows / 2][O] pairs
    auto* x_p = scratch->take<BFloat16>(most * l.d);     // [rows / 2][D] pairs
    auto* dh_t = scratch->take<BFloat16>(most * gf);     // [G F][rows]
    auto* dh_p = scratch->take<BFloat16>(most * gf);     // per block [G F / 2][n] pairs
    auto* act_t = scratch->take<BFloat16>(most * l.f);   // [F][rows]
    auto* columns = scratch->take<BFloat16>(kTile * padded(longest, 32));
    auto* tile = scratch->take<float>(kTile * kTile);
    auto* scale = scratch->take<float>(most);
    auto* dscale = scratch->take<float>(most);
    return [=, &l, &order, &stored](int64_t item) {
      (void)scratch;
      const int64_t e = order[item], first = l.begin[e], n_rows = l.begin[e + 1] - first;
      Gradient *gw_in = dw_in + e * gf * l.d, *gw_out = dw_out + e * l.o * l.f;
      if (n_rows == 0) {
        std::memset(static_cast<void*>(gw_in), 0, gf * l.d * sizeof(Gradient));
        std::memset(static_cast<void*>(gw_out), 0, l.o * l.f * sizeof(Gradient));
        return;
      }
      // `rows` is the inner dimension of the weight gradients; blocks are padded to 16 only
      const int64_t rows = padded(n_rows, 32), in_blocks = padded(n_rows, 16);
      const int64_t* token = l.token + first;
      for (int64_t b = 0; b < in_blocks; b += kRows) {
        const int64_t n = std::min(kRows, in_blocks - b);
        pack_transposed(dy, token + b, n_rows - b, n, l.o, dy_t + b * l.o);
      }
      pack_rows(dy, token, n_rows, rows, l.o, dy_p);
      pack_rows(x, token, n_rows, rows, l.d, x_p);
      for (int64_t c = 0; c < in_blocks; c++) scale[c] = c < n_rows ? weight[first + c] : 0.0f;
      std::fill(dscale, dscale + in_blocks, 0.0f);
      if (rows > in_blocks) {
        for (int64_t f = 0; f < gf; f++) std::memset(static_cast<void*>(dh_t + f * rows + in_blocks), 0, 32);
        for (int64_t f = 0; f < l.f; f++) std::memset(static_cast<void*>(act_t + f * rows + in_blocks), 0, 32);
      }
      for (int64_t f = 0; f < l.f; f += kTile) {
        const int64_t m = std::min(kTile, l.f - f);
        transpose_columns(w_out + e * l.o * l.f + f, l.f, l.o, m, columns);
        for (int64_t b = 0; b < in_blocks; b += kRows) {
          const int64_t n = std::min(kRows, in_blocks - b);
          brgemm(m, n, l.o, l.o, n, n, false, columns, dy_t + b * l.o, tile, true);
          const BFloat16* kept = hidden + (stored[e] + b) * gf;
          auto* out_p = reinterpret_cast<uint32_t*>(dh_p) + b * gf / 2;
          for (int64_t c = 0; c < n; c += 16) {
            const __m512 w = _mm512_loadu_ps(scale + b + c);
            __m512 sum = _mm512_loadu_ps(dscale + b + c);
            for (int64_t i = 0; i < m; i += 2) {
              __m256i dg[2], du[2];
              for (int k = 0; k < 2; k++) {
                const int64_t row = f + i + k;
                const __m512 g = to_float(load16(kept + row * n + c));
                const __m512 u = G == 2 ? to_float(load16(kept + (l.f + row) * n + c)) : g;
                __m512 by_g, by_u = g, da = _mm512_loadu_ps(tile + (i + k) * n + c);
                const __m512 a = activate<A>(g, u, &by_g, &by_u);
                sum = _mm512_fmadd_ps(da, a, sum);
                da = _mm512_mul_ps(da, w);
                store16(act_t + row * rows + b + c, to_bf16(_mm512_mul_ps(a, w)));
                dg[k] = to_bf16(_mm512_mul_ps(da, by_g));
                store16(dh_t + row * rows + b + c, dg[k]);
                if (G == 2) {
                  du[k] = to_bf16(_mm512_mul_ps(da, by_u));
                  store16(dh_t + (l.f + row) * rows + b + c, du[k]);
                }
              }
              _mm512_storeu_si512(out_p + (f + i) / 2 * n + c, pairs(dg[0], dg[1]));
              if (G == 2) _mm512_storeu_si512(out_p + (l.f + f + i) / 2 * n + c, pairs(du[0], du[1]));
            }
            _mm512_storeu_ps(dscale + b + c, sum);
          }
        }
      }
      std::copy(dscale, dscale + n_rows, dweight + first);
      for (int64_t f = 0; f < l.f; f += kTile) {
        const int64_t m = std::min(kTile, l.f - f);
        for (int64_t o = 0; o < l.o; o += kTile) {
          const int64_t n = std::min(kTile, l.o - o);
          brgemm(m, n, rows, rows, l.o, n, false, act_t + f * rows, dy_p + o * 2, tile, true);
          for (int64_t i = 0; i < m; i += 16) {
            for (int64_t j = 0; j < n; j += 16) {
              __m512i r[16];
              for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_si512(tile + (i + k) * n + j);
              transpose(r);
              for (int k = 0; k < 16; k++) store_gradient(gw_out + (o + j + k) * l.f + f + i, (__m512)r[k]);
            }
          }
        }
      }
      for (int64_t f = 0; f < gf; f += kTile) {
        const int64_t m = std::min(kTile, gf - f);
        for (int64_t d = 0; d < l.d; d += kTile) {
          const int64_t n = std::min(kTile, l.d - d);
          brgemm(m, n, rows, rows, l.d, n, false, dh_t + f * rows, x_p + d * 2, tile, true);
          for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n; j += 16) {
              store_gradient(gw_in + (f + i) * l.d + d + j, _mm512_loadu_ps(tile + i * n + j));
            }
          }
        }
      }
      if (dx_rows == nullptr) return;
      for (int64_t d = 0; d < l.d; d += kTile) {
        const int64_t m = std::min(kTile, l.d - d);
        transpose_columns(w_in + e * gf * l.d + d, l.d, gf, m, columns);
        for (int64_t b = 0; b < in_blocks; b += kRows) {
          const int64_t n = std::min(kRows, in_blocks - b);
          brgemm(m, n, gf, gf, n, n, false, columns, dh_p + b * gf, tile, true);
          store_transposed(tile, m, n, n_rows - b, dx_rows + (first + b) * l.d + d, l.d);
        }
      }
    };
  });
}

template <class Call>
void with_activation(int64_t activation, const Call& call) {
  switch (activation) {
    case kSwiglu: return call(std::integral_constant<int64_t, kSwiglu>());
    case kGelu: return call(std::integral_constant<int64_t, kGelu>());
    case kRelu: return call(std::integral_constant<int64_t, kRelu>());
    default: return call(std::integral_constant<int64_t, kSigmoid>());
  }
}

}  // namespace

extern "C" {

// rows [R, O]: each expert's answer to its rows, times the row weight. `hidden` [padded R, G*F] keeps what the
// backward pass needs, or is null.
void moekit_forward(int64_t activation, const int64_t* token, const int64_t* begin, int64_t n_experts, int64_t d, int64_t f, int64_t o,
                    const void* x, const void* w_in, const void* w_out, const float* weight, void* rows, void* hidden) {
  const Layer layer{token, begin, n_experts, d, f, o};
  with_activation(activation, [&](auto a) {
    forward<a()>(layer, static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(w_in), static_cast<const BFloat16*>(w_out), weight,
                 static_cast<BFloat16*>(rows), static_cast<BFloat16*>(hidden));
  });
}

// Gradients of the weights in float32 or bf16, of the row weights, and of each row's token [R, D] (or null).
void moekit_backward(int64_t activation, const int64_t* token, const int64_t* begin, int64_t n_experts, int64_t d, int64_t f, int64_t o,
                     const void* x, const void* w_in, const void* w_out, const float* weight, const void* hidden, const void* dy,
                     void* dx_rows, void* dw_in, void* dw_out, int64_t float_gradients, float* dweight) {
  const Layer layer{token, begin, n_experts, d, f, o};
  with_activation(activation, [&](auto a) {
    const auto *x_ = static_cast<const BFloat16*>(x), *in = static_cast<const BFloat16*>(w_in), *out = static_cast<const BFloat16*>(w_out);
    const auto *h = static_cast<const BFloat16*>(hidden), *dy_ = static_cast<const BFloat16*>(dy);
    auto* dx = static_cast<BFloat16*>(dx_rows);
    if (float_gradients) {
      backward<a()>(layer, x_, in, out, weight, h, dy_, dx, static_cast<float*>(dw_in), static_cast<float*>(dw_out), dweight);
    } else {
      backward<a()>(layer, x_, in, out, weight, h, dy_, dx, static_cast<BFloat16*>(dw_in), static_cast<BFloat16*>(dw_out), dweight);
    }
  });
}

// y [T, O]: the sum of each token's rows, in float32 and in the order of the rows; zeros for a token without one.
void moekit_sum_rows(const int64_t* token, int64_t n_rows, int64_t n_tokens, int64_t width, const void* rows, void* y) {
  std::vector<int64_t> begin(n_tokens + 1, 0), of_token(n_rows);
  for (int64_t r = 0; r < n_rows; r++) begin[token[r] + 1]++;
  for (int64_t t = 0; t < n_tokens; t++) begin[t + 1] += begin[t];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t r = 0; r < n_rows; r++) of_token[next[token[r]]++] = r;
  const auto* from = static_cast<const BFloat16*>(rows);
  auto* to = static_cast<BFloat16*>(y);
  at::parallel_for(0, n_tokens, 64, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      for (int64_t c = 0; c < width; c += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = begin[t]; i < begin[t + 1]; i++) sum = _mm512_add_ps(sum, to_float(load16(from + of_token[i] * width + c)));
        store16(to + t * width + c, to_bf16(sum));
      }
    }
  });
}

}  // extern "C"
