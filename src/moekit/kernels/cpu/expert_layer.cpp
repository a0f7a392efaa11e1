// Dispatch, expert MLPs and combine of a sparse layer, forward and backward, without a pass over memory between them;
// in bfloat16 with float32 sums, or in float32.
//
// Everything is computed transposed: hidden^T = W x^T. So the weights, stored [out, in] as in torch.nn.Linear, are the
// left factor of each product and are read as they lie. What bfloat16 instructions want packed in pairs along the inner
// dimension ("VNNI") is the right factor, the activations, and they are packed while they are gathered or produced.
// The row weight multiplies the activation before the down-projection.
//
// Shapes: T tokens, E experts, R rows sorted by expert, D width in, F width of an expert, G 2 with a gate and else 1,
// O width out. x [T, D], token [R], begin [E + 1], weight [R], w_in [E, G*F, D], w_out [E, O, F], result rows [R, O];
// matrices the other way round where `transposed`. D and O are multiples of 32, F of 16.
//
// A block is up to 64 rows of one expert, a chunk several blocks: as many as stay in the second-level cache with their
// hidden state, so that a weight is fetched once per chunk. Rows of a chunk are padded with zeros to a multiple of 16.
// What is kept for the backward pass lies per chunk as [G*F][rows of the chunk], gates first.

#include <sys/mman.h>

#include "tiles.h"

namespace {

constexpr int64_t kRows = 64;  // rows of a block
constexpr int64_t kTile = 64;  // outputs computed at a time

template <class V>
constexpr bool kPairs = sizeof(V) == 2;

// ---------------------------------------------------------------- values of 16 or 32 bits

inline __m512 load(const BFloat16* p) { return to_float(load16(p)); }
inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(BFloat16* p, __m512 v) { store16(p, to_bf16(v)); }
inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

// Two neighbouring inner rows of a right factor of `n` columns: in pairs for bf16, one after the other for float.
inline void store_inner(BFloat16* block, int64_t row, int64_t n, int64_t c, __m512 a, __m512 b) {
  _mm512_storeu_si512(reinterpret_cast<uint32_t*>(block) + row / 2 * n + c, pairs(to_bf16(a), to_bf16(b)));
}
inline void store_inner(float* block, int64_t row, int64_t n, int64_t c, __m512 a, __m512 b) {
  _mm512_storeu_ps(block + row * n + c, a);
  _mm512_storeu_ps(block + (row + 1) * n + c, b);
}

// ---------------------------------------------------------------- products

inline __m512 step_of(__m512 sum, const BFloat16* a, __m512 b) {
  int32_t pair;
  std::memcpy(&pair, a, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
inline __m512 step_of(__m512 sum, const float* a, __m512 b) { return _mm512_fmadd_ps(_mm512_set1_ps(*a), b, sum); }

inline void fetch_line(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// to [m][16 C] (rows `ldc` apart) = left [m][k] (rows `lda` apart) x right; R rows at a time stay in registers. While they
// are computed, the R rows behind them are fetched: a weight is read once per chunk, so it comes from memory.
template <int R, int C, class V>
void columns_of(int64_t m, int64_t k, int64_t lda, const V* left, const char* right, int64_t ldb, float* to, int64_t ldc, bool fetch) {
  constexpr int64_t kStep = kPairs<V> ? 2 : 1, kLine = 64 / sizeof(V);
  for (int64_t i = 0; i < m; i += R, left += R * lda, to += R * ldc) {
    const char* b = right;
    __m512 sum[R][C];
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    }
    const auto steps = [&](int64_t from, int64_t end) __attribute__((always_inline)) {
      for (int64_t j = from; j < end; j += kStep, b += ldb) {
        __m512 columns[C];
        for (int c = 0; c < C; c++) columns[c] = _mm512_loadu_ps(b + c * 64);
        for (int r = 0; r < R; r++) {
          for (int c = 0; c < C; c++) sum[r][c] = step_of(sum[r][c], left + r * lda + j, columns[c]);
        }
      }
    };
    int64_t j = 0;
    for (; j + kLine <= k; j += kLine) {
      if (fetch) {
        for (int r = 0; r < R; r++) fetch_line(left + (R + r) * lda + j);
      }
      steps(j, j + kLine);
    }
    steps(j, k);
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < C; c++) _mm512_storeu_ps(to + r * ldc + c * 16, sum[r][c]);
    }
  }
}

// to [m][n] = left [m][k] x right [k][n] (bf16: in pairs, `ldb` columns apart). n is 16, 32, 48 or 64, m a multiple of 16.
template <class V>
void product(bool amx, int64_t m, int64_t n, int64_t k, int64_t lda, const V* left, const V* right, int64_t ldb, float* to, bool fetch) {
  if (amx && kPairs<V>) return brgemm(m, n, k, lda, ldb, n, false, left, right, to, true);
  const char* b = reinterpret_cast<const char*>(right);
  switch (n) {
    case 64: return columns_of<4, 4>(m, k, lda, left, b, 4 * ldb, to, n, fetch);
    case 48: return columns_of<8, 3>(m, k, lda, left, b, 4 * ldb, to, n, fetch);
    case 32: return columns_of<8, 2>(m, k, lda, left, b, 4 * ldb, to, n, fetch);
    default: return columns_of<16, 1>(m, k, lda, left, b, 4 * ldb, to, n, fetch);
  }
}

// ---------------------------------------------------------------- packing

// Gathered rows, transposed: [width][n], for bf16 in pairs along the width; zeros beyond the last row.
template <class V>
void pack_transposed(const V* source, const int64_t* token, int64_t n_rows, int64_t n, int64_t width, V* out) {
  auto* to = reinterpret_cast<uint32_t*>(out);
  const int64_t words = width * sizeof(V) / 4;
  for (int64_t row = 0; row < n; row += 16) {
    const uint32_t* from[16];
    for (int j = 0; j < 16; j++) {
      from[j] = row + j < n_rows ? reinterpret_cast<const uint32_t*>(source + token[row + j] * width) : nullptr;
    }
    for (int64_t d = 0; d < words; d += 16) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) r[j] = from[j] ? _mm512_loadu_si512(from[j] + d) : _mm512_setzero_si512();
      transpose(r);
      for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + (d + j) * n + row, r[j]);
    }
  }
}

// Gathered rows as a right factor whose inner dimension is the rows; zeros beyond the last one.
void pack_rows(const BFloat16* source, const int64_t* token, int64_t n_rows, int64_t n, int64_t width, BFloat16* out) {
  auto* to = reinterpret_cast<uint32_t*>(out);
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t row = 0; row < n; row += 2, to += width) {
    const BFloat16* a = row < n_rows ? source + token[row] * width : nullptr;
    const BFloat16* b = row + 1 < n_rows ? source + token[row + 1] * width : nullptr;
    for (int64_t d = 0; d < width; d += 16) {
      _mm512_storeu_si512(to + d, pairs(a ? load16(a + d) : zero, b ? load16(b + d) : zero));
    }
  }
}

void pack_rows(const float* source, const int64_t* token, int64_t n_rows, int64_t n, int64_t width, float* out) {
  for (int64_t row = 0; row < n; row++) {
    if (row < n_rows) {
      std::memcpy(out + row * width, source + token[row] * width, width * sizeof(float));
    } else {
      std::memset(out + row * width, 0, width * sizeof(float));
    }
  }
}

// Columns of a matrix [height, stride] as rows [columns][height]; height and columns are multiples of 16.
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

void transpose_columns(const float* from, int64_t stride, int64_t height, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += 16) {
    for (int64_t k = 0; k < height; k += 16) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) r[j] = _mm512_loadu_si512(from + (k + j) * stride + c);
      transpose(r);
      for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + (c + j) * height + k, r[j]);
    }
  }
}

// A tile of results [m][n] as rows: to[row * stride + 0..m) for the first `n_rows` columns, plus weight[row] * bias.
template <class V>
void store_transposed(const float* tile, int64_t m, int64_t n, int64_t n_rows, V* to, int64_t stride, const V* bias, const float* weight) {
  each_column(tile, m, n, n_rows, [&](int64_t c, int64_t i, __m512 v) {
    store(to + c * stride + i, bias ? _mm512_fmadd_ps(_mm512_set1_ps(weight[c]), load(bias + i), v) : v);
  });
}

// A tile of a weight's gradient [m][n] where it belongs: as it is, or as [n][m].
template <class Gradient>
void store_gradient(const float* tile, int64_t m, int64_t n, Gradient* to, int64_t stride, bool turned) {
  if (!turned) {
    for (int64_t i = 0; i < m; i++) {
      for (int64_t j = 0; j < n; j += 16) store(to + i * stride + j, _mm512_loadu_ps(tile + i * n + j));
    }
    return;
  }
  each_column(tile, m, n, n, [&](int64_t j, int64_t i, __m512 v) { store(to + j * stride + i, v); });
}

// ---------------------------------------------------------------- activations over a tile

// What a tile of hidden values is made of and where it goes; rows of the tile are hidden units, columns are rows.
template <class V>
struct Tile {
  int64_t m, n;              // hidden units, rows
  const float *gate, *up;    // products, [m][n]
  const V *gate_bias, *up_bias;
  int64_t bias_step;         // from one unit's bias to the next
  V *kept_gate, *kept_up;    // pre-activations of the chunk, or null
  int64_t kept_stride;
  const float* weight;       // of each row
  V* inner;                  // the block's right factor for the down-projection
  int64_t first;             // number of the first hidden unit
};

template <int64_t A, class V>
void forward_tile(const Activation& how, const Tile<V>& t) {
  constexpr bool gated_kind = A < kGlu;
  for (int64_t i = 0; i < t.m; i += 2) {
    for (int64_t c = 0; c < t.n; c += 16) {
      __m512 a[2];
      for (int k = 0; k < 2; k++) {
        const int64_t at = (i + k) * t.n + c;
        __m512 g = _mm512_loadu_ps(t.gate + at), u = gated_kind ? _mm512_loadu_ps(t.up + at) : g;
        if (t.gate_bias) {
          g = _mm512_add_ps(g, _mm512_set1_ps(static_cast<float>(t.gate_bias[(i + k) * t.bias_step])));
          if (gated_kind) u = _mm512_add_ps(u, _mm512_set1_ps(static_cast<float>(t.up_bias[(i + k) * t.bias_step])));
        }
        if (t.kept_gate) {
          store(t.kept_gate + (i + k) * t.kept_stride + c, g);
          if (gated_kind) store(t.kept_up + (i + k) * t.kept_stride + c, u);
        }
        a[k] = _mm512_mul_ps(activate<A>(how, g, u, nullptr, nullptr), _mm512_loadu_ps(t.weight + c));
      }
      store_inner(t.inner, t.first + i, t.n, c, a[0], a[1]);
    }
  }
}

template <class V>
struct BackTile {
  int64_t m, n;
  const float* da;                 // gradient of the activation over the row weight, [m][n]
  const V *kept_gate, *kept_up;
  int64_t kept_stride;             // also that of act, d_gate, d_up
  const float* weight;
  float* d_weight;                 // of each row, added to
  V *act, *d_gate, *d_up;          // rows of the chunk; d_step from one unit's gradient to the next
  int64_t d_step;
  V* inner;                        // the block's right factor for the tokens' gradient
  int64_t gate_place, up_place;    // rows of `inner`; they alternate where up_place is gate_place + 1
};

template <int64_t A, class V>
void backward_tile(const Activation& how, const BackTile<V>& t) {
  constexpr bool gated_kind = A < kGlu;
  const bool alternate = gated_kind && t.up_place == t.gate_place + 1;
  for (int64_t c = 0; c < t.n; c += 16) {
    const __m512 w = _mm512_loadu_ps(t.weight + c);
    __m512 sum = _mm512_loadu_ps(t.d_weight + c);
    for (int64_t i = 0; i < t.m; i += 2) {
      __m512 dg[2], du[2];
      for (int k = 0; k < 2; k++) {
        const int64_t at = (i + k) * t.kept_stride + c, to = (i + k) * t.d_step + c;
        const __m512 g = load(t.kept_gate + at), u = gated_kind ? load(t.kept_up + at) : g;
        __m512 by_g, by_u = g, da = _mm512_loadu_ps(t.da + (i + k) * t.n + c);
        const __m512 a = activate<A>(how, g, u, &by_g, &by_u);
        sum = _mm512_fmadd_ps(da, a, sum);
        da = _mm512_mul_ps(da, w);
        store(t.act + at, _mm512_mul_ps(a, w));
        dg[k] = _mm512_mul_ps(da, by_g);
        store(t.d_gate + to, dg[k]);
        if (gated_kind) {
          du[k] = _mm512_mul_ps(da, by_u);
          store(t.d_up + to, du[k]);
        }
      }
      if constexpr (kPairs<V>) {  // float32 reads d_gate and d_up themselves
        if (alternate) {
          store_inner(t.inner, t.gate_place + 2 * i, t.n, c, dg[0], du[0]);
          store_inner(t.inner, t.gate_place + 2 * i + 2, t.n, c, dg[1], du[1]);
        } else {
          store_inner(t.inner, t.gate_place + i, t.n, c, dg[0], dg[1]);
          if (gated_kind) store_inner(t.inner, t.up_place + i, t.n, c, du[0], du[1]);
        }
      }
    }
    _mm512_storeu_ps(t.d_weight + c, sum);
  }
}

// ---------------------------------------------------------------- the layer

// Asks for large pages where a result is so large that it comes fresh from the system: each page of 4 KB costs a trap.
void expect(void* from, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kHuge = 2 << 20;
  const auto first = padded(reinterpret_cast<int64_t>(from), kHuge), end = (reinterpret_cast<int64_t>(from) + bytes) / kHuge * kHuge;
  if (from && bytes >= 8 * kHuge) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Scratch memory of a thread that also gives the matrix unit back.
struct Workspace : Scratch {
  using Scratch::Scratch;
  ReleaseProducts release;
};

template <class V>
struct Layer {
  const int64_t *token, *begin;
  const float* weight;
  int64_t n_experts, d, f, o, chunk;
  bool transposed, interleaved, amx;
  Activation how;
  const V *x, *w_in, *w_out, *b_in, *b_out;
  const int64_t* slot;  // where an expert's weights lie in the stacks, or null: each in its own place; forward only
  int64_t gates;  // G
  std::vector<int64_t> stored;  // where each expert's chunks begin, in padded rows

  int64_t gf() const { return gates * f; }
  int64_t at(int64_t e) const { return slot ? slot[e] : e; }
  int64_t rows_of(int64_t e) const { return begin[e + 1] - begin[e]; }
  int64_t padded_rows(int64_t e) const { return stored[e + 1] - stored[e]; }
  // where hidden unit `unit` (part 0 gate, 1 linear) stands among the G*F outputs of w_in
  int64_t place(int64_t part, int64_t unit) const { return interleaved ? 2 * unit + part : part * f + unit; }
  int64_t step() const { return interleaved ? 2 : 1; }

  // `m` outputs from `first` on of a matrix of this layer, as rows over its inputs; through `strip` where it is
  // stored the other way round.
  const V* rows(const V* matrix, int64_t out, int64_t in, bool as_stored, int64_t first, int64_t m, V* strip) const {
    if (as_stored) return matrix + first * in;
    transpose_columns(matrix + first, out, in, m, strip);
    return strip;
  }
};

// A piece of an expert's rows within one chunk.
struct Piece {
  int64_t expert, row, n_rows;  // `row` counts from the expert's first one
};

// All rows in pieces of about `target` ones: chunks, or even parts of them, the largest first.
template <class V>
std::vector<Piece> pieces(const Layer<V>& l, int64_t target) {
  std::vector<Piece> all;
  for (int64_t e = 0; e < l.n_experts; e++) {
    for (int64_t start = 0; start < l.rows_of(e); start += l.chunk) {
      const int64_t n = std::min(l.chunk, l.rows_of(e) - start), parts = std::max<int64_t>(1, (n + target / 2) / target);
      const int64_t size = padded((n + parts - 1) / parts, 16);
      for (int64_t r = 0; r < n; r += size) all.push_back({e, start + r, std::min(size, n - r)});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Piece& a, const Piece& b) { return a.n_rows > b.n_rows; });
  return all;
}

// A piece's chunk: where it is kept (in padded rows), its padded rows, and the piece's column within it.
template <class V>
std::tuple<int64_t, int64_t, int64_t> chunk_of(const Layer<V>& l, const Piece& p) {
  const int64_t start = p.row / l.chunk * l.chunk;
  return {l.stored[p.expert] + start, std::min(l.chunk, l.padded_rows(p.expert) - start), p.row - start};
}

template <class V>
void forward(const Layer<V>& l, V* rows, V* hidden) {
  using S = Scratch;
  expect(hidden, l.stored[l.n_experts] * l.gf() * sizeof(V));
  void (*tile_of)(const Activation&, const Tile<V>&) = nullptr;
  with_kind(l.how.kind, [&](auto kind) { tile_of = forward_tile<kind(), V>; });
  // whole chunks where there are enough for all threads
  const int64_t share = l.begin[l.n_experts] / (8 * at::get_num_threads());
  const auto work = pieces(l, std::clamp(share, kRows, l.chunk));
  share_out(work.size(), [&] {
    const int64_t longest = std::max(l.d, l.f);
    auto scratch = std::make_shared<Workspace>(S::bytes<V>(l.chunk * l.d) + S::bytes<V>(l.chunk * l.f) + S::bytes<V>(2 * kTile * longest) +
                                               2 * S::bytes<float>(kTile * kRows) + S::bytes<float>(l.chunk));
    auto* packed = scratch->template take<V>(l.chunk * l.d);
    auto* inner = scratch->template take<V>(l.chunk * l.f);
    auto* strip = scratch->template take<V>(2 * kTile * longest);
    auto* g = scratch->template take<float>(kTile * kRows);
    auto* u = scratch->template take<float>(kTile * kRows);
    auto* scale = scratch->template take<float>(l.chunk);
    return [=, &l, &work](int64_t item) {
      (void)scratch;
      const Piece p = work[item];
      const auto [kept_at, kept_rows, column] = chunk_of(l, p);
      const int64_t first = l.begin[p.expert] + p.row, n_all = padded(p.n_rows, 16);
      for (int64_t c = 0; c < n_all; c++) scale[c] = c < p.n_rows ? l.weight[first + c] : 0.0f;
      for (int64_t b = 0; b < n_all; b += kRows) {
        pack_transposed(l.x, l.token + first + b, p.n_rows - b, std::min(kRows, n_all - b), l.d, packed + b * l.d);
      }
      const V* up_map = l.w_in + l.at(p.expert) * l.gf() * l.d;
      const V* bias = l.b_in ? l.b_in + l.at(p.expert) * l.gf() : nullptr;
      V* kept = hidden ? hidden + kept_at * l.gf() + column : nullptr;
      for (int64_t f = 0; f < l.f; f += kTile) {
        const int64_t m = std::min(kTile, l.f - f);
        const V *gate_rows, *up_rows = nullptr;
        const int64_t lda = l.step() * l.d;
        if (l.interleaved) {
          gate_rows = l.rows(up_map, l.gf(), l.d, !l.transposed, 2 * f, 2 * m, strip);
          up_rows = gate_rows + l.d;
        } else {
          gate_rows = l.rows(up_map, l.gf(), l.d, !l.transposed, f, m, strip);
          if (l.gates == 2) up_rows = l.rows(up_map, l.gf(), l.d, !l.transposed, l.f + f, m, strip + kTile * l.d);
        }
        for (int64_t b = 0; b < n_all; b += kRows) {
          const int64_t n = std::min(kRows, n_all - b);
          product(l.amx, m, n, l.d, lda, gate_rows, packed + b * l.d, n, g, b == 0 && !l.transposed);
          if (up_rows) product(l.amx, m, n, l.d, lda, up_rows, packed + b * l.d, n, u, b == 0 && !l.transposed);
          tile_of(l.how, {m, n, g, u, bias ? bias + l.place(0, f) : nullptr, bias ? bias + l.place(1, f) : nullptr, l.step(),
                          kept ? kept + f * kept_rows + b : nullptr, kept ? kept + (l.f + f) * kept_rows + b : nullptr, kept_rows,
                          scale + b, inner + b * l.f, f});
        }
      }
      const V* out_bias = l.b_out ? l.b_out + l.at(p.expert) * l.o : nullptr;
      for (int64_t o = 0; o < l.o; o += kTile) {
        const int64_t m = std::min(kTile, l.o - o);
        const V* left = l.rows(l.w_out + l.at(p.expert) * l.o * l.f, l.o, l.f, !l.transposed, o, m, strip);
        for (int64_t b = 0; b < n_all; b += kRows) {
          const int64_t n = std::min(kRows, n_all - b);
          product(l.amx, m, n, l.f, l.f, left, inner + b * l.f, n, g, b == 0 && !l.transposed);
          store_transposed(g, m, n, p.n_rows - b, rows + (first + b) * l.o + o, l.o, out_bias ? out_bias + o : nullptr, scale + b);
        }
      }
    };
  });
}

// Gradients of one chunk's rows: `dh` [G*F][rows] and `act` [F][rows] (activation times row weight) for the weights'
// gradients, the tokens' (unless dx_rows is null) and the row weights'.
template <class V>
class BackwardRows {
 public:
  using S = Scratch;
  static size_t bytes(const Layer<V>& l) {
    return S::bytes<V>(l.chunk * l.o) + S::bytes<V>(kPairs<V> ? l.chunk * l.gf() : 0) + S::bytes<V>(kTile * std::max(l.gf(), l.o)) +
           S::bytes<float>(kTile * kRows) + 2 * S::bytes<float>(l.chunk);
  }
  BackwardRows(const Layer<V>& l, Scratch& scratch)
      : l_(l),
        dy_t_(scratch.take<V>(l.chunk * l.o)),
        inner_(scratch.take<V>(kPairs<V> ? l.chunk * l.gf() : 0)),
        strip_(scratch.take<V>(kTile * std::max(l.gf(), l.o))),
        tile_(scratch.take<float>(kTile * kRows)),
        scale_(scratch.take<float>(l.chunk)),
        d_scale_(scratch.take<float>(l.chunk)) {
    with_kind(l.how.kind, [&](auto kind) { tile_of_ = backward_tile<kind(), V>; });
  }

  void operator()(const Piece& p, const V* hidden, const V* dy, V* dh, V* act, V* dx_rows, float* d_weight) const {
    const Layer<V>& l = l_;
    const int64_t first = l.begin[p.expert] + p.row, n_all = padded(p.n_rows, 16);
    for (int64_t c = 0; c < n_all; c++) scale_[c] = c < p.n_rows ? l.weight[first + c] : 0.0f;
    std::fill(d_scale_, d_scale_ + n_all, 0.0f);
    if (l.b_out) {
      const V* bias = l.b_out + p.expert * l.o;
      for (int64_t c = 0; c < p.n_rows; c++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t o = 0; o < l.o; o += 16) sum = _mm512_fmadd_ps(load(dy + l.token[first + c] * l.o + o), load(bias + o), sum);
        d_scale_[c] = _mm512_reduce_add_ps(sum);
      }
    }
    for (int64_t b = 0; b < n_all; b += kRows) {
      pack_transposed(dy, l.token + first + b, p.n_rows - b, std::min(kRows, n_all - b), l.o, dy_t_ + b * l.o);
    }
    for (int64_t f = 0; f < l.f; f += kTile) {
      const int64_t m = std::min(kTile, l.f - f);
      const V* left = l.rows(l.w_out + p.expert * l.o * l.f, l.f, l.o, l.transposed, f, m, strip_);
      for (int64_t b = 0; b < n_all; b += kRows) {
        const int64_t n = std::min(kRows, n_all - b);
        product(l.amx, m, n, l.o, l.o, left, dy_t_ + b * l.o, n, tile_, b == 0 && l.transposed);
        tile_of_(l.how, {m, n, tile_, hidden + f * n_all + b, hidden + (l.f + f) * n_all + b, n_all, scale_ + b, d_scale_ + b,
                         act + f * n_all + b, dh + l.place(0, f) * n_all + b, dh + l.place(1, f) * n_all + b, l.step() * n_all,
                         inner_ + b * l.gf(), l.place(0, f), l.place(1, f)});
      }
    }
    std::copy(d_scale_, d_scale_ + p.n_rows, d_weight + first);
    if (dx_rows == nullptr) return;
    for (int64_t d = 0; d < l.d; d += kTile) {
      const int64_t m = std::min(kTile, l.d - d);
      const V* left = l.rows(l.w_in + p.expert * l.gf() * l.d, l.d, l.gf(), l.transposed, d, m, strip_);
      for (int64_t b = 0; b < n_all; b += kRows) {
        const int64_t n = std::min(kRows, n_all - b);
        const V* right = kPairs<V> ? inner_ + b * l.gf() : dh + b;
        product(l.amx, m, n, l.gf(), l.gf(), left, right, kPairs<V> ? n : n_all, tile_, b == 0 && l.transposed);
        store_transposed<V>(tile_, m, n, p.n_rows - b, dx_rows + (first + b) * l.d + d, l.d, nullptr, nullptr);
      }
    }
  }

 private:
  const Layer<V>& l_;
  V *dy_t_, *inner_, *strip_;
  float *tile_, *scale_, *d_scale_;
  void (*tile_of_)(const Activation&, const BackTile<V>&) = nullptr;
};

template <class Gradient>
struct WeightGradients {
  Gradient *w_in, *w_out, *b_in, *b_out;
};

// Gradients of one expert's weights from `dh` and `act` of all its chunks; part `part` of `n_parts` of their tiles.
template <class V, class Gradient>
class BackwardWeights {
 public:
  using S = Scratch;
  static size_t bytes(const Layer<V>& l, int64_t most) {
    return S::bytes<V>(most * l.o) + S::bytes<V>(most * l.d) + S::bytes<float>(kTile * kTile) + S::bytes<float>(std::max(l.o, l.gf()));
  }
  BackwardWeights(const Layer<V>& l, int64_t most, Scratch& scratch)
      : l_(l),
        dy_p_(scratch.take<V>(most * l.o)),
        x_p_(scratch.take<V>(most * l.d)),
        tile_(scratch.take<float>(kTile * kTile)),
        sums_(scratch.take<float>(std::max(l.o, l.gf()))) {}

  void operator()(int64_t e, int64_t part, int64_t n_parts, const V* dy, const V* dh, const V* act, const WeightGradients<Gradient>& to) const {
    const Layer<V>& l = l_;
    const int64_t n_rows = l.rows_of(e), rows = l.padded_rows(e), gf = l.gf();
    const int64_t* token = l.token + l.begin[e];
    Gradient *gw_in = to.w_in + e * gf * l.d, *gw_out = to.w_out + e * l.o * l.f;
    pack_rows(dy, token, n_rows, rows, l.o, dy_p_);
    pack_rows(l.x, token, n_rows, rows, l.d, x_p_);
    const auto mine = [&](int64_t tile) { return tile % n_parts == part; };
    for (int64_t f = 0; f < l.f; f += kTile) {
      if (!mine(f / kTile)) continue;
      const int64_t m = std::min(kTile, l.f - f);
      for (int64_t o = 0; o < l.o; o += kTile) {
        const int64_t n = std::min(kTile, l.o - o);
        product(act, l.f, f, m, dy_p_, l.o, o, n, rows);
        Gradient* at = l.transposed ? gw_out + f * l.o + o : gw_out + o * l.f + f;
        store_gradient(tile_, m, n, at, l.transposed ? l.o : l.f, !l.transposed);
      }
    }
    for (int64_t f = 0; f < gf; f += kTile) {
      if (!mine(f / kTile)) continue;
      const int64_t m = std::min(kTile, gf - f);
      for (int64_t d = 0; d < l.d; d += kTile) {
        const int64_t n = std::min(kTile, l.d - d);
        product(dh, gf, f, m, x_p_, l.d, d, n, rows);
        Gradient* at = l.transposed ? gw_in + d * gf + f : gw_in + f * l.d + d;
        store_gradient(tile_, m, n, at, l.transposed ? gf : l.d, l.transposed);
      }
    }
    if (part == 0 && l.b_in) {
      for (int64_t f = 0; f < gf; f++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t start = 0; start < rows; start += l.chunk) {
          const int64_t n = std::min(l.chunk, rows - start);
          for (int64_t c = 0; c < n; c += 16) sum = _mm512_add_ps(sum, load(dh + start * gf + f * n + c));
        }
        to.b_in[e * gf + f] = static_cast<Gradient>(_mm512_reduce_add_ps(sum));
      }
    }
    if (part == 0 && l.b_out) {
      std::fill(sums_, sums_ + l.o, 0.0f);
      for (int64_t r = 0; r < n_rows; r++) {
        const __m512 w = _mm512_set1_ps(l.weight[l.begin[e] + r]);
        for (int64_t o = 0; o < l.o; o += 16) _mm512_storeu_ps(sums_ + o, _mm512_fmadd_ps(w, load(dy + token[r] * l.o + o), _mm512_loadu_ps(sums_ + o)));
      }
      for (int64_t o = 0; o < l.o; o += 16) store(to.b_out + e * l.o + o, _mm512_loadu_ps(sums_ + o));
    }
  }

  void zeros(int64_t e, const WeightGradients<Gradient>& to) const {
    const int64_t gf = l_.gf();
    const auto clear = [](Gradient* p, int64_t n) { std::memset(static_cast<void*>(p), 0, n * sizeof(Gradient)); };
    clear(to.w_in + e * gf * l_.d, gf * l_.d);
    clear(to.w_out + e * l_.o * l_.f, l_.o * l_.f);
    if (l_.b_in) clear(to.b_in + e * gf, gf);
    if (l_.b_out) clear(to.b_out + e * l_.o, l_.o);
  }

 private:
  // tile_ [m][n] = rows `first`.. of the left factor, chunk by chunk as it is kept, times columns `column`.. of the right
  void product(const V* left, int64_t height, int64_t first, int64_t m, const V* right, int64_t width, int64_t column, int64_t n, int64_t rows) const {
    for (int64_t start = 0; start < rows; start += l_.chunk) {
      const int64_t k = std::min(l_.chunk, rows - start);
      brgemm(m, n, k, k, width, n, start > 0, left + start * height + first * k, right + start * width + (kPairs<V> ? 2 : 1) * column, tile_,
             kPairs<V>);
    }
  }

  const Layer<V>& l_;
  V *dy_p_, *x_p_;
  float *tile_, *sums_;
};

template <class V, class Gradient>
void backward(const Layer<V>& l, const V* hidden, const V* dy, V* dx_rows, const WeightGradients<Gradient>& to, float* d_weight) {
  using S = Scratch;
  using Weights = BackwardWeights<V, Gradient>;
  const int64_t n_threads = at::get_num_threads(), total = l.stored[l.n_experts], gf = l.gf();
  expect(to.w_in, l.n_experts * gf * l.d * sizeof(Gradient));
  expect(to.w_out, l.n_experts * l.o * l.f * sizeof(Gradient));
  // the largest first, so that nobody waits long for the last
  std::vector<int64_t> order(l.n_experts);
  for (int64_t e = 0; e < l.n_experts; e++) order[e] = e;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return l.rows_of(a) > l.rows_of(b); });
  const int64_t most = l.padded_rows(order[0]);

  if (n_threads == 1 || most * n_threads <= total) {
    // one expert at a time, rows and then weights, so that what lies between stays in the thread's cache
    share_out(l.n_experts, [&] {
      auto scratch = std::make_shared<Workspace>(BackwardRows<V>::bytes(l) + Weights::bytes(l, most) + S::bytes<V>(most * gf) + S::bytes<V>(most * l.f));
      const BackwardRows<V> of_rows(l, *scratch);
      const Weights of_weights(l, most, *scratch);
      auto* dh = scratch->template take<V>(most * gf);
      auto* act = scratch->template take<V>(most * l.f);
      return [=, &l, &order, &to](int64_t item) {
        (void)scratch;
        const int64_t e = order[item], n_rows = l.rows_of(e);
        if (n_rows == 0) return of_weights.zeros(e, to);
        for (int64_t r = 0; r < n_rows; r += l.chunk) {
          of_rows({e, r, std::min(l.chunk, n_rows - r)}, hidden + (l.stored[e] + r) * gf, dy, dh + r * gf, act + r * l.f, dx_rows, d_weight);
        }
        of_weights(e, 0, 1, dy, dh, act, to);
      };
    });
    return;
  }

  // few experts have most rows, or there are many threads: all rows first, then all weights, both in pieces
  const auto work = pieces(l, l.chunk);
  Scratch shared(S::bytes<V>(total * gf) + S::bytes<V>(total * l.f));
  auto* dh = shared.take<V>(total * gf);
  auto* act = shared.take<V>(total * l.f);
  share_out(work.size(), [&] {
    auto scratch = std::make_shared<Workspace>(BackwardRows<V>::bytes(l));
    const BackwardRows<V> of_rows(l, *scratch);
    return [=, &l, &work](int64_t item) {
      (void)scratch;
      const Piece p = work[item];
      const int64_t at = l.stored[p.expert] + p.row;
      of_rows(p, hidden + at * gf, dy, dh + at * gf, act + at * l.f, dx_rows, d_weight);
    };
  });
  struct Part { int64_t expert, part, n_parts; };
  std::vector<Part> parts;
  for (int64_t e : order) {
    const int64_t n = std::clamp<int64_t>(2 * n_threads * l.padded_rows(e) / std::max<int64_t>(total, 1), 1, padded(l.f, kTile) / kTile);
    for (int64_t part = 0; part < n; part++) parts.push_back({e, part, n});
  }
  share_out(parts.size(), [&] {
    auto scratch = std::make_shared<Workspace>(Weights::bytes(l, most));
    const Weights of_weights(l, most, *scratch);
    return [=, &l, &parts, &to](int64_t item) {
      (void)scratch;
      const auto [e, part, n_parts] = parts[item];
      if (l.rows_of(e) == 0) return of_weights.zeros(e, to);
      of_weights(e, part, n_parts, dy, dh + l.stored[e] * gf, act + l.stored[e] * l.f, to);
    };
  });
}

// y [T, width]: the sum of each token's rows, in float32 and in the order of the rows; zeros for a token without one.
template <class V>
void sum_rows(const int64_t* token, int64_t n_rows, int64_t n_tokens, int64_t width, const V* rows, V* y) {
  std::vector<int64_t> begin(n_tokens + 1, 0), of_token(n_rows);
  for (int64_t r = 0; r < n_rows; r++) begin[token[r] + 1]++;
  for (int64_t t = 0; t < n_tokens; t++) begin[t + 1] += begin[t];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t r = 0; r < n_rows; r++) of_token[next[token[r]]++] = r;
  at::parallel_for(0, n_tokens, 64, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      for (int64_t c = 0; c < width; c += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = begin[t]; i < begin[t + 1]; i++) sum = _mm512_add_ps(sum, load(rows + of_token[i] * width + c));
        store(y + t * width + c, sum);
      }
    }
  });
}

}  // namespace

// ---------------------------------------------------------------- what Python calls

extern "C" {

struct LayerArguments {
  const int64_t *token, *begin;
  const float* weight;
  int64_t n_experts, d, f, o, chunk, transposed, interleaved, amx, kind, is_float;
  double alpha, limit, offset;
  const void *x, *w_in, *w_out, *b_in, *b_out;
  const int64_t* slot;
};
}

namespace {

template <class V>
Layer<V> layer_of(const LayerArguments& a) {
  const auto as = [](const void* p) { return static_cast<const V*>(p); };
  Layer<V> l{a.token, a.begin, a.weight, a.n_experts, a.d, a.f, a.o, a.chunk, a.transposed != 0, a.interleaved != 0, a.amx != 0,
             {a.kind, static_cast<float>(a.alpha), static_cast<float>(a.limit), static_cast<float>(a.offset)},
             as(a.x), as(a.w_in), as(a.w_out), as(a.b_in), as(a.b_out), a.slot, a.kind < kGlu ? 2 : 1, {}};
  l.stored.assign(a.n_experts + 1, 0);
  for (int64_t e = 0; e < a.n_experts; e++) l.stored[e + 1] = l.stored[e] + padded(l.rows_of(e), 16);
  return l;
}

template <class V, class Gradient>
void call_backward(const LayerArguments& a, const void* hidden, const void* dy, void* dx_rows, void* const* to, float* d_weight) {
  const auto as = [&](int i) { return static_cast<Gradient*>(to[i]); };
  backward<V, Gradient>(layer_of<V>(a), static_cast<const V*>(hidden), static_cast<const V*>(dy), static_cast<V*>(dx_rows),
                        {as(0), as(1), as(2), as(3)}, d_weight);
}

}  // namespace

extern "C" {

// rows [R, O]: each expert's answer to its rows, times the row weight. `hidden` [padded R, G*F] keeps what the
// backward pass needs, or is null.
void moekit_forward(const LayerArguments* a, void* rows, void* hidden) {
  if (a->is_float) {
    forward(layer_of<float>(*a), static_cast<float*>(rows), static_cast<float*>(hidden));
  } else {
    forward(layer_of<BFloat16>(*a), static_cast<BFloat16*>(rows), static_cast<BFloat16*>(hidden));
  }
}

// Gradients of each row's token [R, D] (or null), of the weights and biases (`to`: w_in, w_out, b_in, b_out, in float32
// or in the layer's type) and of the row weights.
void moekit_backward(const LayerArguments* a, const void* hidden, const void* dy, void* dx_rows, void* const* to, int64_t float_gradients,
                     float* d_weight) {
  if (a->is_float) {
    call_backward<float, float>(*a, hidden, dy, dx_rows, to, d_weight);
  } else if (float_gradients) {
    call_backward<BFloat16, float>(*a, hidden, dy, dx_rows, to, d_weight);
  } else {
    call_backward<BFloat16, BFloat16>(*a, hidden, dy, dx_rows, to, d_weight);
  }
}

void moekit_sum_rows(const int64_t* token, int64_t n_rows, int64_t n_tokens, int64_t width, int64_t is_float, const void* rows, void* y) {
  if (is_float) {
    sum_rows(token, n_rows, n_tokens, width, static_cast<const float*>(rows), static_cast<float*>(y));
  } else {
    sum_rows(token, n_rows, n_tokens, width, static_cast<const BFloat16*>(rows), static_cast<BFloat16*>(y));
  }
}

}  // extern "C"
