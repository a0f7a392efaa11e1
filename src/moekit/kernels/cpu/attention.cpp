// Causal self-attention inside documents, with rotary positions and grouped keys and values, forward and backward.
//
// Scores are never held for a whole sequence (FlashAttention, Dao 2023, arXiv 2307.08691): 64 keys by 64 queries at a
// time, and the backward pass computes them again from the log-sum-exp. Everything is transposed, scores^T = K Q^T: a
// register then holds 16 queries, so that maximum and sum need no work across it, and two neighbouring rows of
// probabilities, interleaved, are what the next product wants packed in pairs. Blocks of keys after all queries, or of
// other documents, are skipped.
//
// Shapes: B batch, S tokens, H query heads, G key/value heads, N head width (a multiple of 32). qkv [B, S, (H + 2G) N]:
// queries, keys, values before rotation; cos, sin [S, N / 2]; segment [B, S] or null; out [B, S, H N]; lse [B, H, S].

#include "tiles.h"

#include <cmath>

namespace {

constexpr int64_t kBlock = 64;

struct Problem {
  int64_t batch, length, heads, groups, width;
  const BFloat16* qkv;
  const float *cos, *sin;
  const int32_t* segment;

  int64_t stride() const { return (heads + 2 * groups) * width; }
  int64_t padded_length() const { return padded(length, 32); }
  int64_t rows(int64_t first) const { return std::min(kBlock, padded_length() - first); }
  const BFloat16* query(int64_t b, int64_t h) const { return qkv + b * length * stride() + h * width; }
  const BFloat16* key(int64_t b, int64_t g) const { return query(b, heads + g); }
  const BFloat16* value(int64_t b, int64_t g) const { return query(b, heads + groups + g); }
};

// Rotated rows times `scale`, zeros up to the padded length (halves rotated as in Llama).
void rotate_rows(const Problem& p, const BFloat16* from, float scale, BFloat16* to) {
  const int64_t half = p.width / 2;
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t s = 0; s < p.length; s++, from += p.stride(), to += p.width) {
    for (int64_t d = 0; d < half; d += 16) {
      const __m512 a = to_float(load16(from + d)), b = to_float(load16(from + half + d));
      const __m512 c = _mm512_mul_ps(_mm512_loadu_ps(p.cos + s * half + d), by), n = _mm512_mul_ps(_mm512_loadu_ps(p.sin + s * half + d), by);
      store16(to + d, to_bf16(_mm512_fnmadd_ps(b, n, _mm512_mul_ps(a, c))));
      store16(to + half + d, to_bf16(_mm512_fmadd_ps(a, n, _mm512_mul_ps(b, c))));
    }
  }
  std::memset(static_cast<void*>(to), 0, (p.padded_length() - p.length) * p.width * sizeof(BFloat16));
}

// The gradient of one row before its rotation, from that after it.
void rotate_back(const Problem& p, int64_t s, const float* from, float scale, BFloat16* to) {
  const int64_t half = p.width / 2;
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t d = 0; d < half; d += 16) {
    const __m512 a = _mm512_loadu_ps(from + d), b = _mm512_loadu_ps(from + half + d);
    const __m512 c = _mm512_mul_ps(_mm512_loadu_ps(p.cos + s * half + d), by), n = _mm512_mul_ps(_mm512_loadu_ps(p.sin + s * half + d), by);
    store16(to + d, to_bf16(_mm512_fmadd_ps(b, n, _mm512_mul_ps(a, c))));
    store16(to + half + d, to_bf16(_mm512_fnmadd_ps(a, n, _mm512_mul_ps(b, c))));
  }
}

void copy_rows(const Problem& p, const BFloat16* from, BFloat16* to) {
  for (int64_t s = 0; s < p.length; s++) std::memcpy(static_cast<void*>(to + s * p.width), from + s * p.stride(), p.width * sizeof(BFloat16));
  std::memset(static_cast<void*>(to + p.length * p.width), 0, (p.padded_length() - p.length) * p.width * sizeof(BFloat16));
}

// Documents of one sequence. Padding behind it continues the last one: it is after every real query.
struct Documents {
  std::vector<int32_t> of;
  std::vector<int32_t> least, most;

  Documents(const Problem& p, int64_t b) : of(p.padded_length(), 0) {
    if (p.segment) {
      std::copy_n(p.segment + b * p.length, p.length, of.begin());
      std::fill(of.begin() + p.length, of.end(), p.length ? of[p.length - 1] : 0);
    }
    for (int64_t s = 0; s < p.padded_length(); s += kBlock) {
      const auto [low, high] = std::minmax_element(of.begin() + s, of.begin() + s + p.rows(s));
      least.push_back(*low);
      most.push_back(*high);
    }
  }
  bool apart(int64_t i, int64_t j) const { return least[i] > most[j] || most[i] < least[j]; }
  bool one(int64_t i, int64_t j) const { return least[i] == most[i] && least[j] == most[j] && least[i] == least[j]; }
};

// Which of 16 queries from `first` may see key `k`.
inline __mmask16 visible(const Documents& documents, int64_t k, int64_t first) {
  const __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  const __mmask16 earlier = _mm512_cmple_epi32_mask(_mm512_set1_epi32(k), position);
  return _mm512_mask_cmpeq_epi32_mask(earlier, _mm512_set1_epi32(documents.of[k]), _mm512_loadu_si512(documents.of.data() + first));
}

void forward(const Problem& p, BFloat16* out, float* lse) {
  const int64_t length = p.padded_length(), width = p.width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  share_out(p.batch * p.heads, [&] {
    using S = Scratch;
    auto scratch = std::make_shared<S>(3 * S::bytes<BFloat16>(length * width) + S::bytes<BFloat16>(kBlock * width) +
                                       S::bytes<BFloat16>(kBlock * kBlock) + S::bytes<float>(kBlock * kBlock) + S::bytes<float>(width * kBlock) + 2 * S::bytes<float>(kBlock));
    auto release = std::make_shared<ReleaseProducts>();
    auto* keys = scratch->take<BFloat16>(length * width);
    auto* queries = scratch->take<BFloat16>(length * width);
    auto* values_t = scratch->take<BFloat16>(length * width);
    auto* query_t = scratch->take<uint32_t>(kBlock * width / 2);
    auto* probs_t = scratch->take<uint32_t>(kBlock * kBlock / 2);
    auto* tile = scratch->take<float>(kBlock * kBlock);
    auto* sum_t = scratch->take<float>(width * kBlock);
    auto* top = scratch->take<float>(kBlock);
    auto* total = scratch->take<float>(kBlock);
    return [=, &p](int64_t item) {
      (void)scratch, (void)release;
      const int64_t b = item / p.heads, h = item % p.heads, g = h * p.groups / p.heads;
      const Documents documents(p, b);
      rotate_rows(p, p.query(b, h), scale, queries);
      rotate_rows(p, p.key(b, g), 1.0f, keys);
      transpose_rows(p.value(b, g), p.stride(), p.length, length, width, values_t, length);
      for (int64_t i = 0; i < length; i += kBlock) {
        const int64_t n = p.rows(i);
        pack_along_width(queries + i * width, width, n, n, width, query_t);
        // the block that holds the queries themselves comes first: from then on each has a finite maximum
        for (int64_t j = i; j >= 0; j -= kBlock) {
          if (documents.apart(i / kBlock, j / kBlock)) continue;
          const int64_t m = p.rows(j);
          const bool whole = j < i && documents.one(i / kBlock, j / kBlock), fresh = j == i;
          brgemm(m, n, width, width, n, n, false, keys + j * width, reinterpret_cast<BFloat16*>(query_t), tile, true);
          for (int64_t c = 0; c < n; c += 16) {
            const __m512 before = fresh ? _mm512_set1_ps(-INFINITY) : _mm512_loadu_ps(top + c);
            __m512 most = before;
            for (int64_t k = 0; k < m; k++) {
              const __mmask16 see = whole ? 0xffff : visible(documents, j + k, i + c);
              most = _mm512_mask_max_ps(most, see, _mm512_loadu_ps(tile + k * n + c), most);
            }
            __m512 sum = _mm512_setzero_ps();
            if (!fresh) {
              const __m512 shrink = exp_of(_mm512_sub_ps(before, most));
              sum = _mm512_mul_ps(_mm512_loadu_ps(total + c), shrink);
              for (int64_t d = 0; d < width; d++) _mm512_storeu_ps(sum_t + d * n + c, _mm512_mul_ps(_mm512_loadu_ps(sum_t + d * n + c), shrink));
            }
            for (int64_t k = 0; k < m; k += 2) {
              __m256i pair[2];
              for (int t = 0; t < 2; t++) {
                const __mmask16 see = whole ? 0xffff : visible(documents, j + k + t, i + c);
                const __m512 prob = _mm512_maskz_mov_ps(see, exp_of(_mm512_sub_ps(_mm512_loadu_ps(tile + (k + t) * n + c), most)));
                sum = _mm512_add_ps(sum, prob);
                pair[t] = to_bf16(prob);
              }
              _mm512_storeu_si512(probs_t + k / 2 * n + c, pairs(pair[0], pair[1]));
            }
            _mm512_storeu_ps(top + c, most);
            _mm512_storeu_ps(total + c, sum);
          }
          brgemm(width, n, m, length, n, n, !fresh, values_t + j, reinterpret_cast<BFloat16*>(probs_t), sum_t, true);
        }
        const int64_t real = std::min(n, p.length - i);
        each_column(sum_t, width, n, real, [&](int64_t c, int64_t d, __m512 v) {
          store16(out + (b * p.length + i + c) * p.heads * width + h * width + d, to_bf16(_mm512_div_ps(v, _mm512_set1_ps(total[c]))));
        });
        if (lse) {
          for (int64_t c = 0; c < real; c++) lse[(b * p.heads + h) * p.length + i + c] = top[c] + std::log(total[c]);
        }
      }
    };
  });
}

void backward(const Problem& p, const BFloat16* out, const float* lse, const BFloat16* dout, BFloat16* dqkv) {
  const int64_t length = p.padded_length(), width = p.width, out_stride = p.heads * p.width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  share_out(p.batch * p.groups, [&] {
    using S = Scratch;
    auto scratch = std::make_shared<S>(4 * S::bytes<BFloat16>(length * width) + 4 * S::bytes<BFloat16>(kBlock * width) +
                                       3 * S::bytes<BFloat16>(kBlock * kBlock) + 2 * S::bytes<float>(kBlock * kBlock) +
                                       2 * S::bytes<float>(length * width) + 2 * S::bytes<float>(width * kBlock) + 2 * S::bytes<float>(kBlock));
    auto release = std::make_shared<ReleaseProducts>();
    auto* keys = scratch->take<BFloat16>(length * width);
    auto* keys_t = scratch->take<BFloat16>(length * width);
    auto* values = scratch->take<BFloat16>(length * width);
    auto* queries = scratch->take<BFloat16>(length * width);
    auto* query_t = scratch->take<uint32_t>(kBlock * width / 2);
    auto* query_p = scratch->take<uint32_t>(kBlock * width / 2);
    auto* dout_t = scratch->take<uint32_t>(kBlock * width / 2);
    auto* dout_p = scratch->take<uint32_t>(kBlock * width / 2);
    auto* probs = scratch->take<BFloat16>(kBlock * kBlock);
    auto* dscores = scratch->take<BFloat16>(kBlock * kBlock);
    auto* dscores_p = scratch->take<uint32_t>(kBlock * kBlock / 2);
    auto* tile = scratch->take<float>(kBlock * kBlock);
    auto* dtile = scratch->take<float>(kBlock * kBlock);
    auto* dkeys = scratch->take<float>(length * width);
    auto* dvalues = scratch->take<float>(length * width);
    auto* dquery_t = scratch->take<float>(width * kBlock);
    auto* level = scratch->take<float>(kBlock);
    auto* inner = scratch->take<float>(kBlock);
    auto* dquery = scratch->take<float>(kBlock * width);
    return [=, &p](int64_t item) {
      (void)scratch, (void)release;
      const int64_t b = item / p.groups, g = item % p.groups, per_group = p.heads / p.groups;
      const Documents documents(p, b);
      rotate_rows(p, p.key(b, g), 1.0f, keys);
      transpose_rows(keys, width, length, length, width, keys_t, length);
      copy_rows(p, p.value(b, g), values);
      std::memset(static_cast<void*>(dkeys), 0, length * width * sizeof(float));
      std::memset(static_cast<void*>(dvalues), 0, length * width * sizeof(float));
      BFloat16* to = dqkv + b * p.length * p.stride();
      for (int64_t h = g * per_group; h < (g + 1) * per_group; h++) {
        rotate_rows(p, p.query(b, h), scale, queries);
        for (int64_t i = 0; i < length; i += kBlock) {
          const int64_t n = p.rows(i), real = std::max<int64_t>(0, std::min(n, p.length - i));
          const int64_t at = (b * p.length + i) * out_stride + h * width;
          pack_along_width(queries + i * width, width, n, n, width, query_t);
          pack_along_rows(queries + i * width, width, n, n, width, query_p);
          pack_along_width(dout + at, out_stride, real, n, width, dout_t);
          pack_along_rows(dout + at, out_stride, real, n, width, dout_p);
          for (int64_t c = 0; c < n; c++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; c < real && d < width; d += 16) {
              sum = _mm512_fmadd_ps(to_float(load16(out + at + c * out_stride + d)), to_float(load16(dout + at + c * out_stride + d)), sum);
            }
            inner[c] = _mm512_reduce_add_ps(sum);
            level[c] = c < real ? lse[(b * p.heads + h) * p.length + i + c] : 0.0f;
          }
          bool first = true;
          for (int64_t j = i; j >= 0; j -= kBlock) {
            if (documents.apart(i / kBlock, j / kBlock)) continue;
            const int64_t m = p.rows(j);
            const bool whole = j < i && documents.one(i / kBlock, j / kBlock);
            brgemm(m, n, width, width, n, n, false, keys + j * width, reinterpret_cast<BFloat16*>(query_t), tile, true);
            brgemm(m, n, width, width, n, n, false, values + j * width, reinterpret_cast<BFloat16*>(dout_t), dtile, true);
            for (int64_t c = 0; c < n; c += 16) {
              const __m512 lanes_level = _mm512_loadu_ps(level + c), lanes_inner = _mm512_loadu_ps(inner + c);
              for (int64_t k = 0; k < m; k += 2) {
                __m256i pair[2];
                for (int t = 0; t < 2; t++) {
                  const int64_t place = (k + t) * n + c;
                  const __mmask16 see = whole ? 0xffff : visible(documents, j + k + t, i + c);
                  const __m512 prob = _mm512_maskz_mov_ps(see, exp_of(_mm512_sub_ps(_mm512_loadu_ps(tile + place), lanes_level)));
                  store16(probs + place, to_bf16(prob));
                  pair[t] = to_bf16(_mm512_mul_ps(prob, _mm512_sub_ps(_mm512_loadu_ps(dtile + place), lanes_inner)));
                  store16(dscores + place, pair[t]);
                }
                _mm512_storeu_si512(dscores_p + k / 2 * n + c, pairs(pair[0], pair[1]));
              }
            }
            brgemm(m, width, n, n, width, width, true, probs, reinterpret_cast<BFloat16*>(dout_p), dvalues + j * width, true);
            brgemm(m, width, n, n, width, width, true, dscores, reinterpret_cast<BFloat16*>(query_p), dkeys + j * width, true);
            brgemm(width, n, m, length, n, n, !first, keys_t + j, reinterpret_cast<BFloat16*>(dscores_p), dquery_t, true);
            first = false;
          }
          each_column(dquery_t, width, n, real, [&](int64_t c, int64_t d, __m512 v) { _mm512_storeu_ps(dquery + c * width + d, v); });
          for (int64_t c = 0; c < real; c++) rotate_back(p, i + c, dquery + c * width, scale, to + (i + c) * p.stride() + h * width);
        }
      }
      for (int64_t s = 0; s < p.length; s++) {
        BFloat16* key_to = to + s * p.stride() + (p.heads + g) * width;
        rotate_back(p, s, dkeys + s * width, 1.0f, key_to);
        for (int64_t d = 0; d < width; d += 16) store16(key_to + p.groups * width + d, to_bf16(_mm512_loadu_ps(dvalues + s * width + d)));
      }
    };
  });
}

}  // namespace

extern "C" {

// out [B, S, H N] bf16; lse [B, H, S] keeps what the backward pass needs, or is null.
void moekit_attention_forward(int64_t batch, int64_t length, int64_t heads, int64_t groups, int64_t width, const void* qkv, const float* cos,
                              const float* sin, const int32_t* segment, void* out, float* lse) {
  forward({batch, length, heads, groups, width, static_cast<const BFloat16*>(qkv), cos, sin, segment}, static_cast<BFloat16*>(out), lse);
}

void moekit_attention_backward(int64_t batch, int64_t length, int64_t heads, int64_t groups, int64_t width, const void* qkv, const float* cos,
                               const float* sin, const int32_t* segment, const void* out, const float* lse, const void* dout, void* dqkv) {
  backward({batch, length, heads, groups, width, static_cast<const BFloat16*>(qkv), cos, sin, segment}, static_cast<const BFloat16*>(out), lse,
           static_cast<const BFloat16*>(dout), static_cast<BFloat16*>(dqkv));
}

}  // extern "C"
