// Cross-entropy of a linear map over the vocabulary in bfloat16, with both gradients formed on the way.
//
// 64 tokens at a time meet the whole vocabulary, transposed (logits^T = W x^T): a register holds 16 tokens, so maximum
// and sum need no work across it. Each tile of logits becomes exp(logit - maximum so far) in bfloat16 while it is in
// the first-level cache; once the sum is known, one pass scales the block and it serves both gradients. Products are
// summed, and softmax computed, in float32; no logit is ever rounded.
//
// Shapes: T tokens, D width (a multiple of 32), V vocabulary. x [T, D], w [V, D], labels [T] (negative: ignored),
// losses [T]; dx [T, D], dw [V, D] float32. A chunk is up to 512 tokens whose gradients by the logits are held at
// once, [V, chunk]; the gradient of the weights is summed chunk by chunk, so its bits depend on no number of threads.

#include "tiles.h"

#include <cmath>

namespace {

constexpr int64_t kTokens = 64;   // tokens of a block
constexpr int64_t kTile = 64;     // vocabulary entries of a tile
constexpr int64_t kColumns = 256; // vocabulary entries of a panel of W^T
constexpr int64_t kSkew = 32;     // keeps rows of a power of two apart in the cache

struct Problem {
  int64_t n_tokens, width, vocabulary;
  const BFloat16 *x, *w;
  const int64_t* labels;
  float scale;  // 1 / number of tokens that count

  int64_t chunk() const { return std::clamp<int64_t>((int64_t{1} << 22) / vocabulary / kTokens * kTokens, kTokens, 512); }
};

// W^T in panels of 256 entries: [V / 256][D][256 + skew], zeros beyond the last entry.
std::vector<BFloat16> transposed_panels(const Problem& p) {
  const int64_t panel = p.width * (kColumns + kSkew), n = padded(p.vocabulary, kColumns) / kColumns;
  std::vector<BFloat16> panels(n * panel);
  at::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t rows = std::min(kColumns, p.vocabulary - i * kColumns);
      transpose_rows(p.w + i * kColumns * p.width, p.width, rows, kColumns, p.width, panels.data() + i * panel, kColumns + kSkew);
    }
  });
  return panels;
}

// Tokens first..first + count: losses, and where wanted dx and the gradients by the logits, rows [V][stride].
template <class Gradient>
void block_of_tokens(const Problem& p, int64_t first, int64_t count, uint32_t* x_t, float* tile, uint32_t* exps, float* tops, float* sum_t,
                     float* losses, Gradient* dx, const BFloat16* panels, BFloat16* dlogits, int64_t stride) {
  const int64_t n = padded(count, 32), n_tiles = padded(p.vocabulary, kTile) / kTile;
  const bool keep = dx || dlogits;
  alignas(64) float top[kTokens], total[kTokens], target[kTokens], factor[kTokens];
  std::fill_n(top, kTokens, -INFINITY);
  std::fill_n(total, kTokens, 0.0f);
  std::fill_n(target, kTokens, 0.0f);
  pack_along_width(p.x + first * p.width, p.width, count, n, p.width, x_t);
  for (int64_t t = 0; t < n_tiles; t++) {
    const int64_t v = t * kTile, m = std::min(kTile, p.vocabulary - v);
    brgemm(m, n, p.width, p.width, n, n, false, p.w + v * p.width, reinterpret_cast<BFloat16*>(x_t), tile, true);
    for (int64_t c = 0; c < count; c++) {
      const int64_t label = p.labels[first + c] - v;
      if (label >= 0 && label < m) target[c] = tile[label * n + c];
    }
    for (int64_t c = 0; c < n; c += 16) {
      const __m512 before = _mm512_load_ps(top + c);
      __m512 most = before;
      for (int64_t i = 0; i < m; i++) most = _mm512_max_ps(_mm512_loadu_ps(tile + i * n + c), most);
      __m512 sum = _mm512_mul_ps(_mm512_load_ps(total + c), exp_of(_mm512_sub_ps(before, most)));
      for (int64_t i = 0; i < m; i += 2) {
        const __m512 a = exp_of(_mm512_sub_ps(_mm512_loadu_ps(tile + i * n + c), most));
        const __m512 b = i + 1 < m ? exp_of(_mm512_sub_ps(_mm512_loadu_ps(tile + (i + 1) * n + c), most)) : _mm512_setzero_ps();
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        if (keep) _mm512_storeu_si512(exps + (v + i) / 2 * n + c, pairs(to_bf16(a), to_bf16(b)));
      }
      _mm512_store_ps(top + c, most);
      _mm512_store_ps(total + c, sum);
      _mm512_storeu_ps(tops + t * n + c, most);
    }
  }
  for (int64_t c = 0; c < n; c++) {
    const bool counts = c < count && p.labels[first + c] >= 0;
    if (c < count) losses[first + c] = counts ? top[c] + std::log(total[c]) - target[c] : 0.0f;
    factor[c] = counts ? p.scale / total[c] : 0.0f;
  }
  if (!keep) return;
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  for (int64_t t = 0; t < n_tiles; t++) {
    const int64_t v = t * kTile, m = std::min(kTile, p.vocabulary - v);
    for (int64_t c = 0; c < n; c += 16) {
      const __m512 by = _mm512_mul_ps(_mm512_load_ps(factor + c), exp_of(_mm512_sub_ps(_mm512_loadu_ps(tops + t * n + c), _mm512_load_ps(top + c))));
      for (int64_t i = 0; i < m; i += 2) {
        uint32_t* place = exps + (v + i) / 2 * n + c;
        const __m512i both = _mm512_loadu_si512(place);
        const __m256i a = to_bf16(_mm512_mul_ps((__m512)_mm512_slli_epi32(both, 16), by));
        const __m256i b = to_bf16(_mm512_mul_ps((__m512)_mm512_and_si512(both, high), by));
        _mm512_storeu_si512(place, pairs(a, b));
        if (!dlogits) continue;
        store16(dlogits + (v + i) * stride + c, a);
        if (i + 1 < m) store16(dlogits + (v + i + 1) * stride + c, b);
      }
    }
  }
  // the target's own entry is probability - 1
  for (int64_t c = 0; c < count; c++) {
    const int64_t label = p.labels[first + c];
    if (label < 0) continue;
    const BFloat16 own = p.scale * (std::exp(target[c] - top[c]) / total[c] - 1.0f);
    reinterpret_cast<BFloat16*>(exps)[(label / 2 * n + c) * 2 + label % 2] = own;
    if (dlogits) dlogits[label * stride + c] = own;
  }
  if (!dx) return;
  for (int64_t v = 0; v < p.vocabulary; v += kColumns) {
    const int64_t k = std::min(kColumns, padded(p.vocabulary - v, 2));
    brgemm(p.width, n, k, kColumns + kSkew, n, n, v > 0, panels + v / kColumns * p.width * (kColumns + kSkew),
           reinterpret_cast<BFloat16*>(exps + v / 2 * n), sum_t, true);
  }
  each_column(sum_t, p.width, n, count, [&](int64_t c, int64_t d, __m512 value) {
    if constexpr (std::is_same_v<Gradient, float>) {
      _mm512_storeu_ps(dx + (first + c) * p.width + d, value);
    } else {
      store16(dx + (first + c) * p.width + d, to_bf16(value));
    }
  });
}

template <class Gradient>
void run(const Problem& p, float* losses, Gradient* dx, float* dw) {
  const int64_t chunk = p.chunk(), stride = chunk + kSkew, entries = padded(p.vocabulary, kTile);
  const auto panels = dx ? transposed_panels(p) : std::vector<BFloat16>();
  std::unique_ptr<Scratch> held;
  BFloat16* dlogits = nullptr;
  uint32_t* x_p = nullptr;
  if (dw) {
    held = std::make_unique<Scratch>(Scratch::bytes<BFloat16>(p.vocabulary * stride) + Scratch::bytes<BFloat16>(chunk * p.width));
    dlogits = held->take<BFloat16>(p.vocabulary * stride);
    x_p = held->take<uint32_t>(chunk * p.width / 2);
  }
  for (int64_t start = 0; start < p.n_tokens; start += chunk) {
    const int64_t here = std::min(chunk, p.n_tokens - start);
    share_out(padded(here, kTokens) / kTokens, [&] {
      using S = Scratch;
      auto scratch = std::make_shared<S>(S::bytes<BFloat16>(kTokens * p.width) + S::bytes<float>(kTile * kTokens) +
                                         S::bytes<BFloat16>(kTokens * entries) + S::bytes<float>(entries) + S::bytes<float>(p.width * kTokens));
      auto release = std::make_shared<ReleaseProducts>();
      auto* x_t = scratch->template take<uint32_t>(kTokens * p.width / 2);
      auto* tile = scratch->template take<float>(kTile * kTokens);
      auto* exps = scratch->template take<uint32_t>(kTokens * entries / 2);
      auto* tops = scratch->template take<float>(entries);
      auto* sum_t = scratch->template take<float>(p.width * kTokens);
      return [=, &p, &panels](int64_t item) {
        (void)scratch, (void)release;
        const int64_t at = item * kTokens;
        block_of_tokens(p, start + at, std::min(kTokens, here - at), x_t, tile, exps, tops, sum_t, losses, dx, panels.data(),
                        dlogits ? dlogits + at : nullptr, stride);
      };
    });
    if (!dw) continue;
    const int64_t inner = padded(here, 32);
    at::parallel_for(0, inner / 32, 4, [&](int64_t first, int64_t last) {
      const int64_t from = first * 32, rows = (last - first) * 32;
      pack_along_rows(p.x + (start + from) * p.width, p.width, std::max<int64_t>(0, here - from), rows, p.width, x_p + from / 2 * p.width);
    });
    share_out(entries / kTile, [&] {
      auto release = std::make_shared<ReleaseProducts>();
      return [=, &p](int64_t item) {
        (void)release;
        const int64_t v = item * kTile, m = std::min(kTile, p.vocabulary - v);
        brgemm(m, p.width, inner, stride, p.width, p.width, start > 0, dlogits + v * stride, reinterpret_cast<BFloat16*>(x_p), dw + v * p.width, true);
      };
    });
  }
  if (dw && p.n_tokens == 0) std::memset(dw, 0, p.vocabulary * p.width * sizeof(float));
}

}  // namespace

extern "C" {

// losses [T] in nats, 0 where ignored. dx (float32 or bf16) and dw (float32) are the gradients of scale times the sum
// of the losses; null where not wanted.
void moekit_cross_entropy(int64_t n_tokens, int64_t width, int64_t vocabulary, const void* x, const void* w, const int64_t* labels, float scale,
                          float* losses, void* dx, int64_t float_dx, float* dw) {
  const Problem p{n_tokens, width, vocabulary, static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(w), labels, scale};
  if (float_dx) {
    run(p, losses, static_cast<float*>(dx), dw);
  } else {
    run(p, losses, static_cast<BFloat16*>(dx), dw);
  }
}

}  // extern "C"
