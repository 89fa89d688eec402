// What the convolutions are made of: a product of matrices in registers, threads, memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Index = std::ptrdiff_t;

// kRows rows of two vectors each leave registers for two of b and one of a.
#if defined(__AVX512F__)
constexpr Index kLanes = 16, kRows = 8;
#elif defined(__AVX__)
constexpr Index kLanes = 8, kRows = 6;
#elif defined(__ARM_NEON)
constexpr Index kLanes = 4, kRows = 8;
#else
constexpr Index kLanes = 4, kRows = 6;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

const Vector& At(const float* p) { return *reinterpret_cast<const Vector*>(p); }
Vector& At(float* p) { return *reinterpret_cast<Vector*>(p); }

// With `stream` past the caches: the line need not be read first. p is a multiple of a vector's
// size then, and other threads see v after a `Fence` only.
inline __attribute__((always_inline)) void Store(float* p, const Vector& v, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  if (stream) return _mm256_stream_ps(p, (__m256)v);
#endif
  At(p) = v;
}

void Fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

constexpr Index kTile = 2 * kRows;

constexpr Index kStreamed = 2 << 20;  // floats; chosen by measurement
constexpr Index kLine = 16;  // of floats, in a line of the cache

// The sum over segments s < count and steps k < steps of
// a_row[a[s] + k * a_step] * b[b[s] + k * b_step].
struct Sum {
  const Index* a;
  const Index* b;
  Index count, steps, a_step, b_step;
};

// c[row][0 : V * kLanes] (+)= sum, for H * kRows rows of which the first `rows` are stored.
// With H == 2 the second half's a are as far from the first half's for every row. With `own`
// every lane has its own a, side by side as those of b are, in place of one for them all.
template <int V, int H, bool own = false>
__attribute__((noinline)) void Tile(const float* const* a, const float* b, const Sum& sum,
                                    float* const* c, Index rows, bool accumulate,
                                    bool stream) {
  Vector acc[H][kRows][V] = {};
  const float* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = a[r];
  const Index half = H > 1 ? a[kRows] - a[0] : 0;
  for (Index s = 0; s < sum.count; ++s) {
    Index at = sum.a[s];
    const float* bs = b + sum.b[s];
    for (Index k = 0; k < sum.steps; ++k, at += sum.a_step, bs += sum.b_step) {
      Vector w[V];
      for (int v = 0; v < V; ++v) w[v] = At(bs + v * kLanes);
      for (int h = 0; h < H; ++h) {
        const Index p = at + h * half;
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < V; ++v)
            if constexpr (own)
              acc[h][r][v] += At(row[r] + p + v * kLanes) * w[v];
            else
              acc[h][r][v] += row[r][p] * w[v];
      }
    }
  }
  for (int h = 0; h < H; ++h)
    for (int r = 0; r < kRows; ++r)
      if (h * kRows + r < rows)
        for (int v = 0; v < V; ++v) {
          // Added at the end: a sum of sums is more exact than one long sum.
          float* const to = c[h * kRows + r] + v * kLanes;
          Store(to, accumulate ? At(to) + acc[h][r][v] : acc[h][r][v], stream);
        }
}

// Vector registers of a block of channels: two keep the processor's multipliers busy with
// 8 rows; one needs 16.
Index Vectors(Index channels) { return channels / kLanes % 2 == 0 ? 2 : 1; }

// `Tile` for kTile rows; `a` and `c` have kTile entries however many rows count. With `own`
// there is one vector.
void Tiles(Index vectors, bool own, const float* const* a, const float* b, const Sum& sum,
           float* const* c, Index rows, bool accumulate, bool stream) {
  auto halves = [&](auto tile) {
    tile(a, b, sum, c, rows, accumulate, stream);
    if (rows > kRows) tile(a + kRows, b, sum, c + kRows, rows - kRows, accumulate, stream);
  };
  if (vectors == 2) return halves(Tile<2, 1>);
  bool same_distance = rows > kRows;
  for (Index r = 1; r < kRows && same_distance; ++r)
    same_distance = a[kRows + r] - a[r] == a[kRows] - a[0];
  if (same_distance)
    return (own ? Tile<1, 2, true> : Tile<1, 2>)(a, b, sum, c, rows, accumulate, stream);
  halves(own ? Tile<1, 1, true> : Tile<1, 1>);
}

// c[row * c_row + lane] (+)= sum over k of a[row * a_row + k * a_step] * b[k * block + lane].
// Of a, whole tiles of rows are read, whatever lies there.
void Product(Index vectors, const float* a, Index rows, Index a_row, Index steps, Index a_step,
             const float* b, float* c, Index c_row, bool accumulate) {
  const Index start = 0;
  const Sum sum{&start, &start, 1, steps, a_step, vectors * kLanes};
  for (Index first = 0; first < rows; first += kTile) {
    const float* as[kTile];
    float* cs[kTile];
    const Index used = std::min(kTile, rows - first);
    for (Index r = 0; r < kTile; ++r) {
      as[r] = a + (first + r) * a_row;
      cs[r] = c + (first + std::min(r, used - 1)) * c_row;
    }
    Tiles(vectors, false, as, b, sum, cs, used, accumulate, false);
  }
}

// Zero, which the pool says where it cannot tell, will not do.
Index Threads(const ffi::ThreadPool& pool) { return std::max<Index>(1, pool.num_threads()); }

// Calls f(0) ... f(n - 1) on the threads of the pool and on this one.
template <class F>
void ParallelFor(ffi::ThreadPool& pool, Index n, F f) {
  struct State {
    std::atomic<Index> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  auto work = [state, n, &f] {
    // A thread of the pool may come here when all is done and `f` is gone.
    for (Index i; (i = state->next++) < n;) {
      f(i);
      Fence();
      if (++state->done == n) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  for (Index i = 1; i < std::min(n, Threads(pool)); ++i) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == n; });
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Array = std::unique_ptr<float[], Free>;

Array Allocate(Index size) {
  return Array(static_cast<float*>(std::aligned_alloc(64, (size * 4 + 63) / 64 * 64)));
}

// This thread's memory for what one call of f needs.
float* Scratch(Index size) {
  thread_local Array scratch;
  thread_local Index capacity = 0;
#if defined(__SANITIZE_ADDRESS__)
  capacity = 0;  // no more than is asked for, so that what is beyond is noticed
#endif
  if (capacity < size) {
    scratch = Allocate(size);
    capacity = size;
  }
  return scratch.get();
}

// How the channels of an input and an output in groups are taken in turn: in blocks of the
// output's, whose sets share an input. As a rule a set is a group. Where a vector register holds
// channels of several, every lane has its own input, and a block is a set.
struct Channels {
  Index depth, out_depth;  // of a group
  bool own;
  Index vectors, block;
  Index sets, blocks;  // blocks of a set
  Index pixel;         // floats of an input pixel as a set takes it: [depth], or [depth][lane]

  Channels(Index ci, Index co, Index groups)
      : depth(ci / groups),
        out_depth(co / groups),
        own(out_depth % kLanes != 0),
        vectors(own ? 1 : Vectors(out_depth)),
        block(vectors * kLanes),
        sets(own ? co / block : groups),
        blocks(co / block / sets),
        pixel(own ? depth * kLanes : depth) {}

  // The input channel that is the first of those of an output channel.
  Index First(Index channel) const { return channel / out_depth * depth; }
};

// Block b of a kernel [tap][depth][co], or [tap][out_depth][ci] where it is to be transposed, as
// [tap][depth][block].
void PackBlock(const float* kernel, Index taps, const Channels& channels, bool transpose, Index b,
               float* out) {
  const Index depth = channels.depth, block = channels.block, first = b * block;
  const Index groups = channels.sets * channels.blocks * block / channels.out_depth;
  const Index row = transpose ? depth * groups : channels.out_depth * groups;
  for (Index t = 0; t < taps; ++t, out += depth * block) {
    if (!transpose) {
      for (Index k = 0; k < depth; ++k)
        std::memcpy(out + k * block, kernel + (t * depth + k) * row + first, block * 4);
      continue;
    }
    // A few rows of `out` at a time, which stay in the cache while columns fill them.
    for (Index from = 0; from < depth; from += kLine)
      for (Index j = 0; j < block; ++j) {
        const Index channel = (first + j) % channels.out_depth;
        const float* column =
            kernel + (t * channels.out_depth + channel) * row + channels.First(first + j);
        for (Index k = from; k < std::min(depth, from + kLine); ++k) out[k * block + j] = column[k];
      }
  }
}

// All blocks of a kernel: [block][tap][depth][block].
Array Pack(ffi::ThreadPool& pool, const float* kernel, Index taps, const Channels& channels,
           bool transpose) {
  const Index count = channels.sets * channels.blocks;
  const Index size = taps * channels.depth * channels.block;
  Array packed = Allocate(count * size);
  ParallelFor(pool, count, [&](Index b) {
    PackBlock(kernel, taps, channels, transpose, b, &packed[b * size]);
  });
  return packed;
}

struct Shape {
  Index n, h, w, c;
};

// Whether an array is to be streamed: what reads it next would not find it in the caches.
bool Streams(const float* array, Shape s) {
  return s.n * s.h * s.w * s.c >= kStreamed &&
         reinterpret_cast<std::uintptr_t>(array) % sizeof(Vector) == 0;
}

}  // namespace
