// For kernels that wait for memory (decoding): products of weight rows that are read once, in order, and units of work
// that threads take from contiguous parts of a list.

#pragma once

#include "common.h"

#include <thread>

namespace {

constexpr int64_t kLane = 16;        // outputs that are reduced together
constexpr int64_t kAhead = 8 << 10;  // bytes between a weight that is used and one that is asked for

// lane i of the answer: the sum of r[i]
inline __m512 sums(const __m512 r[16]) {
  __m512 t[8], u[4], v[2];
  for (int i = 0; i < 8; i++)
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[i], r[i + 8], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 8], 0xdd));
  for (int i = 0; i < 4; i++)
    u[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd));
  for (int i = 0; i < 2; i++)
    v[i] = _mm512_add_ps(_mm512_shuffle_ps(u[i], u[i + 2], 0x88), _mm512_shuffle_ps(u[i], u[i + 2], 0xdd));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), all);
}

// One weight row by N rows of values. Two sums of each, because one product's latency is more than a load from memory takes.
struct Bf16 {
  using Vector = __m512bh;
  static Vector load(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};
struct Float {
  using Vector = __m512;
  static Vector load(const char* p) { return _mm512_loadu_ps(p); }
  static __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

template <class Type, int64_t N>
void dot(const char* w, const char* const x[N], int64_t bytes, __m512* sum) {
  __m512 a[N][2];
  for (auto& row : a) for (auto& v : row) v = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    _mm_prefetch(w + i + kAhead, _MM_HINT_T0);
    _mm_prefetch(w + i + kAhead + 64, _MM_HINT_T0);
    const typename Type::Vector left = Type::load(w + i), right = Type::load(w + i + 64);
    for (int64_t n = 0; n < N; n++) {
      a[n][0] = Type::add(a[n][0], left, Type::load(x[n] + i));
      a[n][1] = Type::add(a[n][1], right, Type::load(x[n] + i + 64));
    }
  }
  if (i < bytes) for (int64_t n = 0; n < N; n++) a[n][0] = Type::add(a[n][0], Type::load(w + i), Type::load(x[n] + i));
  for (int64_t n = 0; n < N; n++) sum[n * kLane] = _mm512_add_ps(a[n][0], a[n][1]);
}

// Units 0..n of a phase: each thread takes from the front of its own part, then from the back of another's.
class Parts {
 public:
  void reset(int64_t n, int64_t n_threads) {
    n_ = n;
    done_ = 0;
    parts_ = std::vector<Part>(n_threads);
    for (int64_t i = 0; i < n_threads; i++) parts_[i].range = join(n * i / n_threads, n * (i + 1) / n_threads);
  }
  template <class Work>
  void run(int64_t thread, const Work& work) {
    const int64_t n_threads = parts_.size();
    int64_t count = 0;
    for (int64_t i = 0; i < n_threads; i++) {
      auto& range = parts_[(thread + i) % n_threads].range;
      for (uint64_t seen = range.load(std::memory_order_relaxed);;) {
        const uint64_t begin = seen >> 32, end = seen & 0xffffffffu;
        if (begin >= end) break;
        if (!range.compare_exchange_weak(seen, i == 0 ? join(begin + 1, end) : join(begin, end - 1), std::memory_order_relaxed)) continue;
        work(static_cast<int64_t>(i == 0 ? begin : end - 1));
        count++;
        seen = range.load(std::memory_order_relaxed);
      }
    }
    done_.fetch_add(count, std::memory_order_acq_rel);
  }
  // Whoever holds the last units runs, so this ends whatever the number of threads that were started.
  void wait() const {
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < n_; spins++) {
      if (spins < 4096) _mm_pause(); else std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Part { std::atomic<uint64_t> range{0}; };
  static uint64_t join(uint64_t begin, uint64_t end) { return begin << 32 | end; }
  std::vector<Part> parts_;
  std::atomic<int64_t> done_{0};
  int64_t n_ = 0;
};

// One piece of memory that stays with the calling thread from call to call: asking for it anew costs page faults.
class Arena {
 public:
  void reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_ = std::make_unique<Scratch>(bytes);
      base_ = memory_->take<char>(bytes);
      size_ = bytes;
    }
    next_ = base_;
  }
  template <class V>
  V* take(int64_t n) {
    auto* p = reinterpret_cast<V*>(next_);
    next_ += Scratch::bytes<V>(n);
    return p;
  }

 private:
  std::unique_ptr<Scratch> memory_;
  char *base_ = nullptr, *next_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
