// Experts for few tokens (decoding): every chosen expert's weights are read once, in long contiguous streams, and
// whatever else there is to do fits between two loads.
//
// One parallel region runs four phases: tokens into the format that the first map multiplies by, first map and
// activation, second map, weighted sum of each token's rows. A phase is a list of units of about equal bytes. Each
// thread owns a contiguous part of the list, so that it reads memory in order, and takes units from the far end of
// another's part when its own is done. A unit's result does not depend on who computes it, so any number of threads
// gives the same bits.
//
// Shapes: T tokens, K rows of each, E experts, D width in, F width of an expert, G 2 for gated kinds and else 1,
// O width out. x [T, D], index [T, K], weight [T, K], w_in [E, G*F, D], w_out [E, O, F] or both transposed, y [T, O].
// D, F, O are multiples of 32.

#include "streams.h"

namespace {

// The numbers are those of FORMATS in decode.py.
enum Format : int64_t { kBf16, kFloat, kInt8, kInt4, kBf16Transposed };

// E matrices [out, in]. Quantised ones lie in blocks of kBlock rows, see moekit/kernels/quantized.py: codes without a sign
// [E, out / kBlock, in / 4, kBlock, 4] (int4: [E, out / kBlock, in / 8, kBlock, 4], inputs 4.. in the high halves), scales bf16
// [E, out / kBlock, in / group, kBlock].
struct Matrix {
  int64_t format;
  const void* data;
  const void* scales;
  int64_t group, n_out, n_in;
};

struct Layer {
  int64_t n_experts, d, f, o, interleaved, float_bias;
  const void *b_in, *b_out;
  Matrix in, out;
  Activation how;
};

constexpr int64_t kBlock = 32;              // outputs of quantised weights that lie together
constexpr int64_t kLargest = 127 * 257;     // of a quantised value: two signed bytes, 256 high + low
constexpr int64_t kTokens = 16;             // rows that share one reading of 16 weight rows
constexpr int64_t kMostOutputs = 256;         // of a unit
constexpr int64_t kColumns = 256;            // of y in a unit of the last phase
constexpr int64_t kUnitBytes = 64 << 10;    // of weights
constexpr int64_t kPairs = 2;               // of rows of transposed weights that are added together
constexpr int64_t kSplitBytes = 1 << 20;    // of weights, transposed: each unit writes its own partial sums

inline bool quantised(int64_t format) { return format == kInt8 || format == kInt4; }

// ---------------------------------------------------------------- right factors: tokens and hidden values

// Rows of values in the format that a matrix is multiplied by: bf16, float, or 16 bits with a scale for each group. Those
// are stored as bytes, of each 4 values the 4 high ones and then the 4 low ones; `starts` makes up for the codes' offset.
struct Values {
  int64_t format, group, width, n_groups;
  char* data = nullptr;
  float* scales = nullptr;
  int32_t* starts = nullptr;

  explicit Values(const Matrix& m) : format(m.format), group(m.group), width(m.n_in), n_groups(quantised(format) ? width / group : 0) {}
  int64_t value_bytes() const { return format == kFloat ? 4 : 2; }
  size_t bytes(int64_t rows) const {
    return Scratch::bytes<char>(rows * width * value_bytes()) + 2 * Scratch::bytes<float>(rows * n_groups);
  }
  char* row(int64_t r) const { return data + r * width * value_bytes(); }
};

// A group with a NaN or an infinity gets the scale NaN, so that it comes out of every product.
void pack_group(const float* from, int64_t n, int32_t offset, char* to, float* scale, int32_t* start) {
  __m512 most = _mm512_setzero_ps(), probe = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(from + i);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    probe = _mm512_fmadd_ps(v, _mm512_setzero_ps(), probe);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const bool finite = _mm512_cmp_ps_mask(probe, probe, _CMP_UNORD_Q) == 0, zero = !finite || largest < 1e-30f;
  const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : kLargest / largest);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i code = zero ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), inverse));
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(code, 24), 24), high = _mm512_srai_epi32(_mm512_sub_epi32(code, low), 8);
    sum = _mm512_add_epi32(sum, code);
    const __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * 2), _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * 2 + 16), _mm_unpackhi_epi32(h, l));
  }
  *scale = finite ? (zero ? 0.0f : largest / kLargest) : __builtin_nanf("");
  *start = -offset * _mm512_reduce_add_epi32(sum);
}

// `n` floats as values first.. of a row; whole groups where quantised
void pack(const Values& v, int64_t row, int64_t first, const float* from, int64_t n) {
  char* to = v.row(row) + first * v.value_bytes();
  if (v.format == kFloat) {
    std::memcpy(to, from, n * 4);
  } else if (quantised(v.format)) {
    const int64_t g = row * v.n_groups + first / v.group;
    for (int64_t i = 0; i < n; i += v.group) {
      pack_group(from + i, v.group, v.format == kInt8 ? 128 : 8, to + i * 2, v.scales + g + i / v.group, v.starts + g + i / v.group);
    }
  } else {
    for (int64_t i = 0; i < n; i += 16) store16(to + i * 2, to_bf16(_mm512_loadu_ps(from + i)));
  }
}

// ---------------------------------------------------------------- 16 weight rows by some tokens

inline int64_t row_bytes(const Matrix& m) {
  return m.format == kFloat ? m.n_in * 4 : m.format == kInt8 ? m.n_in : m.format == kInt4 ? m.n_in / 2 : m.n_in * 2;
}

// to[r * ld + i] = weight row (first + i * step) of expert `e` by values `row[r]`; i below `n_out`, r below `n`, at most kTokens
template <class Type>
void products(const Matrix& m, int64_t e, int64_t first, int64_t step, int64_t n_out, const Values& values, const int64_t* row,
              int64_t n, float* to, int64_t ld) {
  const int64_t bytes = row_bytes(m);
  const char *w = static_cast<const char*>(m.data) + (e * m.n_out + first) * bytes, *x[kTokens];
  for (int64_t i = 0; i < n; i++) x[i] = values.row(row[i]);
  __m512 sum[kTokens][kLane];
  for (int64_t o = 0; o < n_out; o += kLane) {
    for (int64_t k = 0; k < kLane; k++, w += step * bytes) {
      for (int64_t i = 0; i < n; i += 4) {
        __m512* to_sum = &sum[i][k];
        if (n - i == 1) dot<Type, 1>(w, x + i, bytes, to_sum);
        else if (n - i == 2) dot<Type, 2>(w, x + i, bytes, to_sum);
        else if (n - i == 3) dot<Type, 3>(w, x + i, bytes, to_sum);
        else dot<Type, 4>(w, x + i, bytes, to_sum);
      }
    }
    for (int64_t i = 0; i < n; i++) _mm512_storeu_ps(to + i * ld + o, sums(sum[i]));
  }
}

// ---------------------------------------------------------------- 32 quantised weight rows by some tokens

// Codes of 32 rows by N rows of values: every lane is a row, so nothing is summed across lanes and a scale is a lane of a
// vector. Codes have no sign and values are two signed bytes: what the instruction multiplies, four products a lane.
template <int64_t Bits, int64_t N>
void block(const char* w, const BFloat16* scales, const Values& values, const int64_t row[N], int64_t n_in, int64_t group,
           float* to, int64_t ld) {
  constexpr int64_t kStep = 32 / Bits, kParts = kStep / 4;  // inputs of 128 bytes, in groups of four
  __m512 total[N][2];
  for (auto& t : total) t[0] = t[1] = _mm512_setzero_ps();
  const int32_t* x[N];
  for (int64_t n = 0; n < N; n++) x[n] = reinterpret_cast<const int32_t*>(values.row(row[n]));
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < n_in / group; g++, scales += kBlock) {
    __m512i a[N][2][2];  // [half of the rows][high or low bytes of the values]
    for (int64_t n = 0; n < N; n++) {
      a[n][0][0] = a[n][1][0] = _mm512_setzero_si512();
      a[n][0][1] = a[n][1][1] = _mm512_set1_epi32(values.starts[row[n] * values.n_groups + g]);
    }
    for (int64_t i = g * group; i < (g + 1) * group; i += kStep, w += 128) {
      _mm_prefetch(w + kAhead, _MM_HINT_T0);
      _mm_prefetch(w + kAhead + 64, _MM_HINT_T0);
      __m512i v[2][2];
      for (int64_t h = 0; h < 2; h++) {
        v[h][0] = _mm512_loadu_si512(w + h * 64);
        if constexpr (Bits == 4) {
          v[h][1] = _mm512_and_si512(_mm512_srli_epi16(v[h][0], 4), low_half);
          v[h][0] = _mm512_and_si512(v[h][0], low_half);
        }
      }
      for (int64_t n = 0; n < N; n++) {
        for (int64_t p = 0; p < kParts; p++) {
          const __m512i high = _mm512_set1_epi32(x[n][i / 2 + 2 * p]), low = _mm512_set1_epi32(x[n][i / 2 + 2 * p + 1]);
          for (int64_t h = 0; h < 2; h++) {
            a[n][h][0] = _mm512_dpbusd_epi32(a[n][h][0], v[h][p], high);
            a[n][h][1] = _mm512_dpbusd_epi32(a[n][h][1], v[h][p], low);
          }
        }
      }
    }
    for (int64_t h = 0; h < 2; h++) {
      const __m512 s = to_float(load16(scales + 16 * h));
      for (int64_t n = 0; n < N; n++) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(a[n][h][0], 8), a[n][h][1]);
        const __m512 by = _mm512_mul_ps(s, _mm512_set1_ps(values.scales[row[n] * values.n_groups + g]));
        total[n][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, total[n][h]);
      }
    }
  }
  for (int64_t n = 0; n < N; n++) for (int64_t h = 0; h < 2; h++) _mm512_storeu_ps(to + n * ld + 16 * h, total[n][h]);
}

// as `products`, for consecutive rows from a multiple of kBlock on
template <int64_t Bits>
void quantised_products(const Matrix& m, int64_t e, int64_t first, int64_t, int64_t n_out, const Values& values, const int64_t* row,
                        int64_t n, float* to, int64_t ld) {
  for (int64_t o = 0; o < n_out; o += kBlock) {
    const int64_t at = e * m.n_out + first + o;
    const char* w = static_cast<const char*>(m.data) + at * row_bytes(m);
    const auto* scales = static_cast<const BFloat16*>(m.scales) + at * (m.n_in / m.group);
    for (int64_t i = 0; i < n; i += 4) {
      float* answer = to + i * ld + o;
      if (n - i == 1) block<Bits, 1>(w, scales, values, row + i, m.n_in, m.group, answer, ld);
      else if (n - i == 2) block<Bits, 2>(w, scales, values, row + i, m.n_in, m.group, answer, ld);
      else if (n - i == 3) block<Bits, 3>(w, scales, values, row + i, m.n_in, m.group, answer, ld);
      else block<Bits, 4>(w, scales, values, row + i, m.n_in, m.group, answer, ld);
    }
  }
}

using Products = void (*)(const Matrix&, int64_t, int64_t, int64_t, int64_t, const Values&, const int64_t*, int64_t, float*, int64_t);

Products products_of(const Matrix& m) {
  if (m.format == kInt8) return quantised_products<8>;
  if (m.format == kInt4) return quantised_products<4>;
  return m.format == kFloat ? products<Float> : products<Bf16>;
}

// ---------------------------------------------------------------- transposed: rows of weights scaled and added

// kPairs pairs of rows of weights at a time; sums [n_rows][n_out], every 32 columns in the order that unpacking gives.
template <int64_t N>
void add_rows(const BFloat16* w, int64_t n_out, bool fresh, const uint32_t* const x[N], float* const sum[N]) {
  for (int64_t c = 0; c < n_out; c += 32) {
    __m512bh v[2 * kPairs];
    for (int64_t p = 0; p < kPairs; p++) {
      const BFloat16* from = w + 2 * p * n_out + c;
      _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(from + n_out) + kAhead, _MM_HINT_T0);
      const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + n_out);
      v[2 * p] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      v[2 * p + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
    for (int64_t n = 0; n < N; n++) {
      __m512 lo = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sum[n] + c);
      __m512 hi = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sum[n] + c + 16);
      for (int64_t p = 0; p < kPairs; p++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[n][p]);
        lo = _mm512_dpbf16_ps(lo, v[2 * p], pair);
        hi = _mm512_dpbf16_ps(hi, v[2 * p + 1], pair);
      }
      _mm512_storeu_ps(sum[n] + c, lo);
      _mm512_storeu_ps(sum[n] + c + 16, hi);
    }
  }
}

// to[r * ld ..] = inputs first..first + n_in of expert `e` by the same values of `row[r]`
void transposed_products(const Matrix& m, int64_t e, int64_t first, int64_t n_in, const Values& values, const int64_t* row,
                         int64_t n_rows, float* to, int64_t ld) {
  const auto* w = static_cast<const BFloat16*>(m.data) + (e * m.n_in + first) * m.n_out;
  for (int64_t i = 0; i < n_in; i += 2 * kPairs) {
    for (int64_t r = 0; r < n_rows; r += 4) {
      const int64_t n = std::min<int64_t>(4, n_rows - r);
      const uint32_t* x[4];
      float* sum[4];
      for (int64_t j = 0; j < n; j++) {
        x[j] = reinterpret_cast<const uint32_t*>(values.row(row[r + j])) + (first + i) / 2;
        sum[j] = to + (r + j) * ld;
      }
      const BFloat16* from = w + i * m.n_out;
      if (n == 1) add_rows<1>(from, m.n_out, i == 0, x, sum);
      if (n == 2) add_rows<2>(from, m.n_out, i == 0, x, sum);
      if (n == 3) add_rows<3>(from, m.n_out, i == 0, x, sum);
      if (n == 4) add_rows<4>(from, m.n_out, i == 0, x, sum);
    }
  }
}

struct Pair { __m512 first, second; };

// 32 sums of `n_split` parts, from the order that unpacking gives into their own, or even and odd ones apart
inline Pair gathered(const float* from, int64_t n_split, int64_t stride, bool apart) {
  Pair s{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
  for (int64_t i = 1; i < n_split; i++) {
    s.first = _mm512_add_ps(s.first, _mm512_loadu_ps(from + i * stride));
    s.second = _mm512_add_ps(s.second, _mm512_loadu_ps(from + i * stride + 16));
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i a = apart ? even : low, b = _mm512_add_epi32(a, _mm512_set1_epi32(apart ? 1 : 8));
  return {_mm512_permutex2var_ps(s.first, a, s.second), _mm512_permutex2var_ps(s.first, b, s.second)};
}

// ---------------------------------------------------------------- phases

inline __m512 bias_at(const void* b, int64_t is_float, int64_t i) {
  if (is_float) return _mm512_loadu_ps(static_cast<const float*>(b) + i);
  return to_float(load16(static_cast<const BFloat16*>(b) + i));
}

// gates and linear parts of 16 hidden values from f on
inline Pair hidden_bias(const Layer& l, int64_t e, int64_t f, bool gated) {
  const int64_t at = e * (gated ? 2 : 1) * l.f;
  if (!l.b_in) return {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (!gated) return {bias_at(l.b_in, l.float_bias, at + f), _mm512_setzero_ps()};
  if (!l.interleaved) return {bias_at(l.b_in, l.float_bias, at + f), bias_at(l.b_in, l.float_bias, at + l.f + f)};
  const __m512 a = bias_at(l.b_in, l.float_bias, at + 2 * f), b = bias_at(l.b_in, l.float_bias, at + 2 * f + 16);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b)};
}

void take(Arena& arena, Values& v, int64_t rows) {
  v.data = arena.take<char>(rows * v.width * v.value_bytes());
  v.scales = arena.take<float>(rows * v.n_groups);
  v.starts = arena.take<int32_t>(rows * v.n_groups);
}

// `per` in steps of `step`, such that `per` items have about `bytes`
inline int64_t items_of(int64_t bytes, int64_t item_bytes, int64_t step, int64_t most) {
  return std::clamp(bytes / item_bytes / step * step, step, std::max(most, step));
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void decode(const Layer& l, const void* x, int64_t x_float, const int64_t* index, const float* weight, int64_t n_tokens,
            int64_t top_k, const float* start, void* y, int64_t y_float) {
  thread_local Arena arena;
  thread_local Parts phases[4];
  const bool gated = l.how.kind < kGlu, transposed = l.in.format == kBf16Transposed;
  const int64_t n_rows = n_tokens * top_k, gates = gated ? 2 : 1, inner = gates * l.f;
  Values tokens(l.in), hidden(l.out);
  const bool as_it_is = x_float ? l.in.format == kFloat : l.in.format == kBf16 || transposed;

  // a unit of a map: some hidden values or outputs of an expert; transposed: some inputs, all outputs as a partial sum
  const int64_t step = quantised(l.out.format) ? std::max(l.out.group, kBlock) : kBlock;
  const int64_t f_unit = transposed ? items_of(kSplitBytes, inner * 2, 32, l.d)
                                    : items_of(2 * kUnitBytes, gates * row_bytes(l.in), step, kMostOutputs);
  const int64_t o_unit = transposed ? items_of(kSplitBytes, l.o * 2, 32, l.f) : items_of(kUnitBytes, row_bytes(l.out), kBlock, kMostOutputs);
  const int64_t f_units = ceil_div(transposed ? l.d : l.f, f_unit), o_units = ceil_div(transposed ? l.f : l.o, o_unit);
  const int64_t f_split = transposed ? f_units : 0, o_split = transposed ? o_units : 1;
  const int64_t y_units = ceil_div(l.o, kColumns);

  arena.reserve(2 * Scratch::bytes<int64_t>(n_rows) + 3 * Scratch::bytes<int64_t>(l.n_experts + 1) +
                (as_it_is ? 0 : tokens.bytes(n_tokens)) + hidden.bytes(n_rows) + Scratch::bytes<float>(f_split * n_rows * inner) +
                Scratch::bytes<float>(o_split * n_rows * l.o));
  auto* begin = arena.take<int64_t>(l.n_experts + 1);
  auto* next = arena.take<int64_t>(l.n_experts + 1);
  auto* active = arena.take<int64_t>(l.n_experts + 1);
  auto* place = arena.take<int64_t>(n_rows);     // of a row in the experts' order; -1 for one without an expert here
  auto* token_of = arena.take<int64_t>(n_rows);  // of a row in that order
  if (as_it_is) tokens.data = static_cast<char*>(const_cast<void*>(x)); else take(arena, tokens, n_tokens);
  take(arena, hidden, n_rows);
  auto* partial = arena.take<float>(f_split * n_rows * inner);
  auto* answers = arena.take<float>(o_split * n_rows * l.o);

  const auto here = [&](int64_t e) { return e >= 0 && e < l.n_experts; };
  std::memset(begin, 0, (l.n_experts + 1) * sizeof(int64_t));
  for (int64_t r = 0; r < n_rows; r++) if (here(index[r])) begin[index[r] + 1]++;
  int64_t n_active = 0;
  for (int64_t e = 0; e < l.n_experts; e++) {
    if (begin[e + 1]) active[n_active++] = e;
    next[e] = begin[e];
    begin[e + 1] += begin[e];
  }
  for (int64_t r = 0; r < n_rows; r++) {
    place[r] = here(index[r]) ? next[index[r]]++ : -1;
    if (place[r] >= 0) token_of[place[r]] = r / top_k;
  }

  const auto prepare = [&](int64_t t) {
    constexpr int64_t kPart = 128;  // the largest group
    float part[kPart];
    for (int64_t d = 0; d < l.d; d += kPart) {
      const int64_t n = std::min(kPart, l.d - d);
      const float* from = static_cast<const float*>(x) + t * l.d + d;
      if (!x_float) {
        const auto* half = static_cast<const BFloat16*>(x) + t * l.d + d;
        for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(part + i, to_float(load16(half + i)));
        from = part;
      }
      pack(tokens, t, d, from, n);
    }
  };

  const Products in_products = products_of(l.in), out_products = products_of(l.out);
  const auto first_map = [&](int64_t unit) {
    const int64_t e = active[unit / f_units], f = unit % f_units * f_unit, n = std::min(f_unit, l.f - f);
    alignas(64) float g[kTokens * kMostOutputs], u[kTokens * kMostOutputs];
    for (int64_t r = begin[e]; r < begin[e + 1]; r += kTokens) {
      const int64_t rows = std::min(kTokens, begin[e + 1] - r);
      const bool alternating = gated && l.interleaved;
      in_products(l.in, e, alternating ? 2 * f : f, alternating ? 2 : 1, n, tokens, token_of + r, rows, g, kMostOutputs);
      if (gated) in_products(l.in, e, alternating ? 2 * f + 1 : l.f + f, alternating ? 2 : 1, n, tokens, token_of + r, rows, u, kMostOutputs);
      with_kind(l.how.kind, [&](auto kind) {
        for (int64_t j = 0; j < n; j += 16) {
          const Pair bias = hidden_bias(l, e, f + j, gated);
          for (int64_t i = 0; i < rows; i++) {
            float* at = g + i * kMostOutputs + j;
            const __m512 gate = _mm512_add_ps(_mm512_load_ps(at), bias.first);
            const __m512 linear = gated ? _mm512_add_ps(_mm512_load_ps(u + i * kMostOutputs + j), bias.second) : gate;
            _mm512_store_ps(at, activate<kind()>(l.how, gate, linear, nullptr, nullptr));
          }
        }
      });
      for (int64_t i = 0; i < rows; i++) pack(hidden, r + i, f, g + i * kMostOutputs, n);
    }
  };
  const auto second_map = [&](int64_t unit) {
    const int64_t e = active[unit / o_units], o = unit % o_units * o_unit, n = std::min(o_unit, l.o - o);
    for (int64_t r = begin[e]; r < begin[e + 1]; r += kTokens) {
      int64_t row[kTokens];
      const int64_t rows = std::min(kTokens, begin[e + 1] - r);
      for (int64_t i = 0; i < rows; i++) row[i] = r + i;
      out_products(l.out, e, o, 1, n, hidden, row, rows, answers + r * l.o + o, l.o);
    }
  };

  const auto first_map_transposed = [&](int64_t unit) {
    const int64_t e = active[unit / f_units], part = unit % f_units, d = part * f_unit;
    transposed_products(l.in, e, d, std::min(f_unit, l.d - d), tokens, token_of + begin[e], begin[e + 1] - begin[e],
                        partial + (part * n_rows + begin[e]) * inner, inner);
  };
  const auto second_map_transposed = [&](int64_t unit) {
    const int64_t e = active[unit / o_units], part = unit % o_units, f = part * o_unit, n = std::min(o_unit, l.f - f);
    with_kind(l.how.kind, [&](auto kind) {
      for (int64_t r = begin[e]; r < begin[e + 1]; r++) {
        const float* from = partial + r * inner;
        for (int64_t j = f; j < f + n; j += 32) {
          Pair g, u{_mm512_setzero_ps(), _mm512_setzero_ps()};
          if (gated && l.interleaved) {
            const Pair a = gathered(from + 2 * j, f_split, n_rows * inner, true), b = gathered(from + 2 * j + 32, f_split, n_rows * inner, true);
            g = {a.first, b.first};
            u = {a.second, b.second};
          } else {
            g = gathered(from + j, f_split, n_rows * inner, false);
            if (gated) u = gathered(from + l.f + j, f_split, n_rows * inner, false);
          }
          const Pair a = hidden_bias(l, e, j, gated), b = hidden_bias(l, e, j + 16, gated);
          auto* to = hidden.row(r) + j * 2;
          const auto value = [&](__m512 gate, __m512 linear, const Pair& bias) {
            return to_bf16(activate<kind()>(l.how, _mm512_add_ps(gate, bias.first), _mm512_add_ps(linear, bias.second), nullptr, nullptr));
          };
          store16(to, value(g.first, u.first, a));
          store16(to + 32, value(g.second, u.second, b));
        }
      }
    });
    int64_t row[kTokens];
    for (int64_t r = begin[e]; r < begin[e + 1]; r += kTokens) {
      const int64_t rows = std::min(kTokens, begin[e + 1] - r);
      for (int64_t i = 0; i < rows; i++) row[i] = r + i;
      transposed_products(l.out, e, f, n, hidden, row, rows, answers + (part * n_rows + r) * l.o, l.o);
    }
  };

  const auto combine = [&](int64_t unit) {
    const int64_t t = unit / y_units, first = unit % y_units * kColumns, last = std::min(first + kColumns, l.o);
    for (int64_t c = first; c < last; c += 32) {
      __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t i = 0; start && i < 2; i++) sum[i] = _mm512_loadu_ps(start + t * l.o + c + 16 * i);
      for (int64_t r = t * top_k; r < (t + 1) * top_k; r++) {
        if (place[r] < 0) continue;
        const float* from = answers + place[r] * l.o + c;
        Pair a{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
        if (transposed) a = gathered(from, o_split, n_rows * l.o, false);
        if (l.b_out) {
          a.first = _mm512_add_ps(a.first, bias_at(l.b_out, l.float_bias, index[r] * l.o + c));
          a.second = _mm512_add_ps(a.second, bias_at(l.b_out, l.float_bias, index[r] * l.o + c + 16));
        }
        const __m512 w = _mm512_set1_ps(weight[r]);
        sum[0] = _mm512_fmadd_ps(w, a.first, sum[0]);
        sum[1] = _mm512_fmadd_ps(w, a.second, sum[1]);
      }
      for (int64_t i = 0; i < 2; i++) {
        const int64_t at = t * l.o + c + 16 * i;
        if (y_float) _mm512_storeu_ps(static_cast<float*>(y) + at, sum[i]);
        else store16(static_cast<BFloat16*>(y) + at, to_bf16(sum[i]));
      }
    }
  };

  const int64_t n_threads = at::get_num_threads();
  const int64_t units[4] = {as_it_is ? 0 : n_tokens, n_active * f_units, n_active * o_units, n_tokens * y_units};
  Parts* const phase = phases;  // of the calling thread
  for (int i = 0; i < 4; i++) phase[i].reset(units[i], n_threads);
  at::parallel_for(0, n_threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++) {
      phase[0].run(thread, prepare);
      phase[0].wait();
      if (transposed) phase[1].run(thread, first_map_transposed); else phase[1].run(thread, first_map);
      phase[1].wait();
      if (transposed) phase[2].run(thread, second_map_transposed); else phase[2].run(thread, second_map);
      phase[2].wait();
      phase[3].run(thread, combine);
    }
  });
}

// ---------------------------------------------------------------- one quantised map

// y = x W^T + bias by a quantised matrix of any number of rows; its last block may be padded. bias is float or null.
void linear(const Matrix& m, const void* x, int64_t x_float, int64_t n_tokens, const float* bias, void* y, int64_t y_float) {
  thread_local Arena arena;
  thread_local Parts phases[2];
  Values tokens(m);
  arena.reserve(tokens.bytes(n_tokens));
  take(arena, tokens, n_tokens);
  const int64_t unit = items_of(kUnitBytes, row_bytes(m), kBlock, kMostOutputs), n_units = ceil_div(m.n_out, unit);
  const Products by = products_of(m);
  const auto prepare = [&](int64_t t) {
    constexpr int64_t kPart = 128;  // the largest group
    float part[kPart];
    for (int64_t i = 0; i < m.n_in; i += kPart) {
      const int64_t n = std::min(kPart, m.n_in - i);
      const float* from = static_cast<const float*>(x) + t * m.n_in + i;
      if (!x_float) {
        const auto* half = static_cast<const BFloat16*>(x) + t * m.n_in + i;
        for (int64_t j = 0; j < n; j += 16) _mm512_storeu_ps(part + j, to_float(load16(half + j)));
        from = part;
      }
      pack(tokens, t, i, from, n);
    }
  };
  const auto map = [&](int64_t item) {
    const int64_t first = item * unit, n = std::min(unit, m.n_out - first);
    alignas(64) float sums[kTokens * kMostOutputs];
    for (int64_t t = 0; t < n_tokens; t += kTokens) {
      int64_t row[kTokens];
      const int64_t rows = std::min(kTokens, n_tokens - t);
      for (int64_t i = 0; i < rows; i++) row[i] = t + i;
      by(m, 0, first, 1, n, tokens, row, rows, sums, kMostOutputs);
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t o = 0; o < n; o += 16) {
          const __mmask16 real = 0xffffu >> (16 - std::min<int64_t>(16, n - o));
          const __m512 start = bias ? _mm512_maskz_loadu_ps(real, bias + first + o) : _mm512_setzero_ps();
          const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + i * kMostOutputs + o), start);
          const int64_t at = (t + i) * m.n_out + first + o;
          if (y_float) _mm512_mask_storeu_ps(static_cast<float*>(y) + at, real, sum);
          else _mm256_mask_storeu_epi16(static_cast<BFloat16*>(y) + at, real, to_bf16(sum));
        }
      }
    }
  };
  const int64_t n_threads = std::min<int64_t>(at::get_num_threads(), n_units);
  Parts* const phase = phases;  // of the calling thread
  phase[0].reset(n_tokens, n_threads);
  phase[1].reset(n_units, n_threads);
  at::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      phase[0].run(thread, prepare);
      phase[0].wait();
      phase[1].run(thread, map);
    }
  });
}

}  // namespace

// 0, or 1 where memory ran out.
extern "C" int moekit_quantized_linear(const Matrix* matrix, const void* x, int64_t x_float, int64_t n_tokens, const float* bias,
                                       void* y, int64_t y_float) try {
  linear(*matrix, x, x_float, n_tokens, bias, y, y_float);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// `start` float [T, O], what the weighted sums begin with, or null: experts that come one after another, in the order of K,
// give the bits that they give together.
extern "C" int moekit_decode(const Layer* layer, const void* x, int64_t x_float, const int64_t* index, const float* weight,
                             int64_t n_tokens, int64_t top_k, const float* start, void* y, int64_t y_float) try {
  decode(*layer, x, x_float, index, weight, n_tokens, top_k, start, y, y_float);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
