// What a router's choice costs beside its product: the K best of E values, and the rows of each expert in one list.
//
// Shapes: T tokens, E experts, K choices, R rows.

#include "common.h"

extern "C" {

// index [T, K]: the places of each row's K largest values, the largest first, the lower place at a tie; a NaN counts as
// the largest, as in torch.topk.
void moekit_top_k(int64_t n_tokens, int64_t n_experts, int64_t k, const float* values, int64_t* index) {
  at::parallel_for(0, n_tokens, 256, [&](int64_t first, int64_t last) {
    std::vector<float> best(k);
    for (int64_t t = first; t < last; t++) {
      const float* row = values + t * n_experts;
      int64_t* found = index + t * k;
      int64_t n = 0;
      for (int64_t e = 0; e < n_experts; e++) {
        const float value = row[e] != row[e] ? INFINITY : row[e];
        if (n == k && !(value > best[k - 1])) continue;
        int64_t place = n < k ? n++ : k - 1;
        for (; place > 0 && value > best[place - 1]; place--) {
          best[place] = best[place - 1];
          found[place] = found[place - 1];
        }
        best[place] = value;
        found[place] = e;
      }
    }
  });
}

// order [R]: the rows by expert, within an expert as they come; count [E].
void moekit_sort_by_expert(int64_t n_rows, int64_t n_experts, const int64_t* expert, int64_t* order, int64_t* count) {
  std::fill_n(count, n_experts, 0);
  for (int64_t r = 0; r < n_rows; r++) count[expert[r]]++;
  std::vector<int64_t> next(n_experts, 0);
  for (int64_t e = 1; e < n_experts; e++) next[e] = next[e - 1] + count[e - 1];
  for (int64_t r = 0; r < n_rows; r++) order[next[expert[r]]++] = r;
}

}  // extern "C"
