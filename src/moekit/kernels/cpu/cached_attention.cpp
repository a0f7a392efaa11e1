// Attention of queries over keys and values as they lie in a cache: any strides, grouped heads, no gradient.
//
// Few queries (decoding) wait for memory: a unit of work is some keys and values of one group, read once for all queries
// of its heads, and the units' parts are put together by their maxima afterwards. Many queries (a prompt) are a matter of
// products: blocks of 64 keys by 64 queries as in attention.cpp (FlashAttention, Dao 2023, arXiv 2307.08691), transposed,
// without the blocks that nobody sees. Units depend on sizes alone, so any number of threads gives the same bits.
//
// Shapes: B batch, H query heads, G groups of them, Q queries, K keys, N width of a key, M width of a value (multiples of
// 32). query [B, H, Q, N], key [B, G, K, N], value [B, G, K, M], mask [B, H, Q, K] bool or null, out [B, Q, H, M].
// Query i sees key j where j < first + i + 1 (first = K: all of them) and where the mask, if there is one, says so.

#include "streams.h"
#include "tiles.h"

#include <cmath>
#include <limits>

namespace {

// As _Problem in cached_attention.py. Strides in elements, of batch, head and row; the mask has one of its keys as well.
struct Problem {
  int64_t batch, heads, groups, n_queries, n_keys, width, value_width, first;
  int64_t query_stride[3], key_stride[3], value_stride[3], mask_stride[4];
  const BFloat16 *query, *key, *value;
  const bool* mask;
  BFloat16* out;
  float scale;

  int64_t per_group() const { return heads / groups; }
  int64_t seen(int64_t i) const { return std::min(n_keys, first + i + 1); }
  const BFloat16* query_at(int64_t b, int64_t h, int64_t i) const { return query + b * query_stride[0] + h * query_stride[1] + i * query_stride[2]; }
  const BFloat16* key_at(int64_t b, int64_t g, int64_t j) const { return key + b * key_stride[0] + g * key_stride[1] + j * key_stride[2]; }
  const BFloat16* value_at(int64_t b, int64_t g, int64_t j) const { return value + b * value_stride[0] + g * value_stride[1] + j * value_stride[2]; }
  BFloat16* out_at(int64_t b, int64_t h, int64_t i) const { return out + ((b * n_queries + i) * heads + h) * value_width; }
};

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------- few queries

constexpr int64_t kKeys = 256;      // of a unit
constexpr int64_t kRowsAhead = 16;  // keys between one that is used and one that is asked for

inline void ask_for(const BFloat16* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 32) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
}

// scores[r * kKeys + j] of `n` keys for `n_rows` queries, unscaled; zeros up to a multiple of 16 keys
void few_scores(const BFloat16* key, int64_t stride, int64_t n, const BFloat16* const* query, int64_t n_rows, int64_t width, float* scores) {
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t m = std::min<int64_t>(16, n - j);
    for (int64_t i = 0; i < m; i++) if (j + i + kRowsAhead < n) ask_for(key + (j + i + kRowsAhead) * stride, width);
    for (int64_t r = 0; r < n_rows; r++) {
      __m512 sum[16];
      for (int64_t i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 32) {
        const __m512bh q = Bf16::load(reinterpret_cast<const char*>(query[r] + d));
        for (int64_t i = 0; i < m; i++) sum[i] = Bf16::add(sum[i], q, Bf16::load(reinterpret_cast<const char*>(key + (j + i) * stride + d)));
      }
      _mm512_storeu_ps(scores + r * kKeys + j, sums(sum));
    }
  }
}

// Scores to exp(scale (score - most)), zeros where a key is not seen; gives `most` (scaled) and the sum.
void few_probs(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t from, int64_t n, float* scores, float* most, float* total) {
  const int64_t seen = std::clamp<int64_t>(p.seen(i) - from, 0, n);
  const bool* mask = p.mask ? p.mask + b * p.mask_stride[0] + h * p.mask_stride[1] + i * p.mask_stride[2] + from * p.mask_stride[3] : nullptr;
  const auto see = [&](int64_t j) -> __mmask16 {
    uint32_t bits = seen - j >= 16 ? 0xffff : seen > j ? (1u << (seen - j)) - 1 : 0;
    if (mask) for (int64_t k = 0; k < 16; k++) if (bits >> k & 1 && !mask[(j + k) * p.mask_stride[3]]) bits &= ~(1u << k);
    return bits;
  };
  const __m512 scale = _mm512_set1_ps(p.scale);
  __m512 top = _mm512_set1_ps(kNothing);
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(kNothing), see(j), _mm512_loadu_ps(scores + j), scale);
    _mm512_storeu_ps(scores + j, s);
    top = _mm512_max_ps(s, top);  // in this order a NaN is passed over here, and shows in its probability
  }
  *most = _mm512_reduce_max_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 prob = _mm512_maskz_mov_ps(see(j), exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(*most))));
    _mm512_storeu_ps(scores + j, prob);
    sum = _mm512_add_ps(sum, prob);
  }
  *total = _mm512_reduce_add_ps(sum);
}

// to[r * ld ..] = probabilities of N rows by 16 C columns of `n` values
template <int64_t N, int64_t C>
void few_values(const BFloat16* value, int64_t stride, int64_t n, const float* probs, float* to, int64_t ld) {
  __m512 sum[N][C];
  for (auto& row : sum) for (auto& v : row) v = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j++, value += stride) {
    if (j + kRowsAhead < n) ask_for(value + kRowsAhead * stride, 16 * C);
    __m512 v[C];
    for (int64_t c = 0; c < C; c++) v[c] = to_float(load16(value + 16 * c));
    for (int64_t r = 0; r < N; r++) {
      const __m512 prob = _mm512_set1_ps(probs[r * kKeys + j]);
      for (int64_t c = 0; c < C; c++) sum[r][c] = _mm512_fmadd_ps(prob, v[c], sum[r][c]);
    }
  }
  for (int64_t r = 0; r < N; r++) for (int64_t c = 0; c < C; c++) _mm512_storeu_ps(to + r * ld + 16 * c, sum[r][c]);
}

template <int64_t C>
void few_columns(const BFloat16* value, int64_t stride, int64_t n, int64_t n_rows, const float* probs, float* to, int64_t ld) {
  for (int64_t r = 0; r < n_rows; r += 4, probs += 4 * kKeys, to += 4 * ld) {
    if (n_rows - r == 1) few_values<1, C>(value, stride, n, probs, to, ld);
    else if (n_rows - r == 2) few_values<2, C>(value, stride, n, probs, to, ld);
    else if (n_rows - r == 3) few_values<3, C>(value, stride, n, probs, to, ld);
    else few_values<4, C>(value, stride, n, probs, to, ld);
  }
}

void few(const Problem& p) {
  thread_local Arena arena;  // of the calling thread
  thread_local Parts phases[2];
  const int64_t n_parts = (p.n_keys + kKeys - 1) / kKeys, rows = p.per_group() * p.n_queries, n_units = p.batch * p.groups * n_parts;
  using S = Scratch;
  const int64_t n_threads = at::get_num_threads(), score_size = padded(rows * kKeys, 16);
  arena.reserve(S::bytes<float>(n_units * rows * p.value_width) + 2 * S::bytes<float>(n_units * rows) + S::bytes<float>(n_threads * score_size));
  auto* sum = arena.take<float>(n_units * rows * p.value_width);
  auto* most = arena.take<float>(n_units * rows);
  auto* total = arena.take<float>(n_units * rows);
  auto* all_scores = arena.take<float>(n_threads * score_size);

  const auto part = [&](int64_t unit, float* scores) {
    const int64_t b = unit / n_parts / p.groups, g = unit / n_parts % p.groups, from = unit % n_parts * kKeys, n = std::min(kKeys, p.n_keys - from);
    constexpr int64_t kTogether = 16;  // rows by which a key is multiplied while it is near
    for (int64_t first = 0; first < rows; first += kTogether) {
      const BFloat16* query[kTogether];
      const int64_t n_rows = std::min(kTogether, rows - first);
      for (int64_t r = 0; r < n_rows; r++) query[r] = p.query_at(b, g * p.per_group() + (first + r) / p.n_queries, (first + r) % p.n_queries);
      few_scores(p.key_at(b, g, from), p.key_stride[2], n, query, n_rows, p.width, scores + first * kKeys);
    }
    for (int64_t r = 0; r < rows; r++) {
      few_probs(p, b, g * p.per_group() + r / p.n_queries, r % p.n_queries, from, n, scores + r * kKeys, most + unit * rows + r, total + unit * rows + r);
    }
    for (int64_t c = 0; c < p.value_width; c += 64) {
      const auto columns = p.value_width - c >= 64 ? few_columns<4> : few_columns<2>;
      columns(p.value_at(b, g, from) + c, p.value_stride[2], n, rows, scores, sum + unit * rows * p.value_width + c, p.value_width);
    }
  };

  const auto together = [&](int64_t item) {
    const int64_t b = item / p.groups, g = item % p.groups;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = item * n_parts * rows + r;
      float top = kNothing, all = 0;
      for (int64_t i = 0; i < n_parts; i++) top = std::max(top, most[at + i * rows]);
      for (int64_t i = 0; i < n_parts; i++) {
        float& t = total[at + i * rows];
        // from now on what the part is multiplied by; a part without a visible key has no maximum
        const float shrink = t == 0 ? 0.0f : std::exp(most[at + i * rows] - top);
        all += t * shrink;
        t = shrink;
      }
      const float inverse = all == 0 ? 0.0f : 1.0f / all;
      BFloat16* to = p.out_at(b, g * p.per_group() + r / p.n_queries, r % p.n_queries);
      for (int64_t d = 0; d < p.value_width; d += 16) {
        __m512 v = _mm512_setzero_ps();
        for (int64_t i = 0; i < n_parts; i++) {
          if (total[at + i * rows] == 0) continue;  // of nothing that was seen
          v = _mm512_fmadd_ps(_mm512_set1_ps(total[at + i * rows]), _mm512_loadu_ps(sum + (at + i * rows) * p.value_width + d), v);
        }
        store16(to + d, to_bf16(_mm512_mul_ps(v, _mm512_set1_ps(inverse))));
      }
    }
  };

  Parts* const phase = phases;
  phase[0].reset(n_units, n_threads);
  phase[1].reset(p.batch * p.groups, n_threads);
  at::parallel_for(0, n_threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++) {
      phase[0].run(thread, [&](int64_t unit) { part(unit, all_scores + thread * score_size); });
      phase[0].wait();
      phase[1].run(thread, together);
    }
  });
}

// ---------------------------------------------------------------- many queries

constexpr int64_t kBlock = 64;

void many(const Problem& p) {
  const int64_t rows = padded(p.n_keys, 32), n_blocks = (p.n_queries + kBlock - 1) / kBlock, width = p.width, value_width = p.value_width;
  const bool causal = p.first < p.n_keys;
  // each item packs keys and values of its group anew: enough items for all threads, and no more
  const int64_t groups = p.batch * p.groups, per_group = std::min(n_blocks, (4 * at::get_num_threads() + groups - 1) / groups);
  share_out(groups * per_group, [&] {
    using S = Scratch;
    auto scratch = std::make_shared<S>(S::bytes<BFloat16>(rows * width) + S::bytes<BFloat16>(rows * value_width) + S::bytes<BFloat16>(kBlock * width) +
                                       S::bytes<BFloat16>(kBlock * kBlock) + S::bytes<float>(kBlock * kBlock) + S::bytes<float>(value_width * kBlock) + 2 * S::bytes<float>(kBlock));
    auto release = std::make_shared<ReleaseProducts>();
    auto* keys = scratch->take<BFloat16>(rows * width);
    auto* values_t = scratch->take<BFloat16>(rows * value_width);
    auto* query_t = scratch->take<uint32_t>(kBlock * width / 2);
    auto* probs_t = scratch->take<uint32_t>(kBlock * kBlock / 2);
    auto* tile = scratch->take<float>(kBlock * kBlock);
    auto* sum_t = scratch->take<float>(value_width * kBlock);
    auto* top = scratch->take<float>(kBlock);
    auto* total = scratch->take<float>(kBlock);
    return [=, &p](int64_t item) {
      (void)scratch, (void)release;
      const int64_t b = item / per_group / p.groups, g = item / per_group % p.groups, part = item % per_group;
      const int64_t last_block = part + (n_blocks - 1 - part) / per_group * per_group;
      const int64_t n_seen = p.seen(std::min(p.n_queries, (last_block + 1) * kBlock) - 1), used = padded(n_seen, 32);
      for (int64_t j = 0; j < n_seen; j++) std::memcpy(static_cast<void*>(keys + j * width), p.key_at(b, g, j), width * sizeof(BFloat16));
      std::memset(static_cast<void*>(keys + n_seen * width), 0, (used - n_seen) * width * sizeof(BFloat16));
      transpose_rows(p.value_at(b, g, 0), p.value_stride[2], n_seen, used, value_width, values_t, rows);
      for (int64_t h = g * p.per_group(); h < (g + 1) * p.per_group(); h++) {
        for (int64_t i = part * kBlock; i < p.n_queries; i += per_group * kBlock) {
          const int64_t real = std::min(kBlock, p.n_queries - i), n = padded(real, 32);
          pack_along_width(p.query_at(b, h, i), p.query_stride[2], real, n, width, query_t);
          const __m512 scale = _mm512_set1_ps(p.scale);
          bool fresh = true;
          // from the first key on: every query sees that one, so it has a maximum from the beginning
          for (int64_t j = 0; j < p.seen(i + real - 1); j += kBlock, fresh = false) {
            const int64_t m = std::min(kBlock, used - j);
            const bool whole = j + m <= p.seen(i);
            brgemm(m, n, width, width, n, n, false, keys + j * width, reinterpret_cast<BFloat16*>(query_t), tile, true);
            for (int64_t c = 0; c < n; c += 16) {
              const auto see = [&](int64_t k) -> __mmask16 {
                if (whole) return 0xffff;
                if (j + k >= p.n_keys) return 0;
                const int64_t hidden = j + k - p.first - i - c;  // queries before this one do not see it
                return !causal || hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : 0xffffu << hidden & 0xffff;
              };
              const __m512 before = fresh ? _mm512_set1_ps(kNothing) : _mm512_loadu_ps(top + c);
              __m512 highest = _mm512_set1_ps(kNothing);
              for (int64_t k = 0; k < m; k++) highest = _mm512_mask_max_ps(highest, see(k), _mm512_loadu_ps(tile + k * n + c), highest);
              const __m512 most = _mm512_max_ps(_mm512_mul_ps(highest, scale), before);
              __m512 sum = _mm512_setzero_ps();
              if (!fresh) {
                sum = _mm512_loadu_ps(total + c);
                if (_mm512_cmp_ps_mask(before, most, _CMP_EQ_OQ) != 0xffff) {
                  const __m512 shrink = exp_of(_mm512_sub_ps(before, most));
                  sum = _mm512_mul_ps(sum, shrink);
                  for (int64_t d = 0; d < value_width; d++) _mm512_storeu_ps(sum_t + d * n + c, _mm512_mul_ps(_mm512_loadu_ps(sum_t + d * n + c), shrink));
                }
              }
              for (int64_t k = 0; k < m; k += 2) {
                __m256i pair[2];
                for (int64_t t = 0; t < 2; t++) {
                  const __m512 prob = _mm512_maskz_mov_ps(see(k + t), exp_of(_mm512_fmsub_ps(_mm512_loadu_ps(tile + (k + t) * n + c), scale, most)));
                  sum = _mm512_add_ps(sum, prob);
                  pair[t] = to_bf16(prob);
                }
                _mm512_storeu_si512(probs_t + k / 2 * n + c, pairs(pair[0], pair[1]));
              }
              _mm512_storeu_ps(top + c, most);
              _mm512_storeu_ps(total + c, sum);
            }
            brgemm(value_width, n, m, rows, n, n, !fresh, values_t + j, reinterpret_cast<BFloat16*>(probs_t), sum_t, true);
          }
          each_column(sum_t, value_width, n, real, [&](int64_t c, int64_t d, __m512 v) {
            store16(p.out_at(b, h, i + c) + d, to_bf16(_mm512_div_ps(v, _mm512_set1_ps(total[c]))));
          });
        }
      }
    };
  });
}

}  // namespace

// 0, or 1 where memory ran out. A mask is taken by the kernel of few queries only.
extern "C" int moekit_cached_attention(const Problem* p, int64_t is_few) try {
  if (is_few) few(*p); else many(*p);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
