// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3), as Lavin and Gray (2016, section
// 4.1, arXiv:1509.09308) have it: 16 multiplications for 2x2 outputs where the sum over taps
// takes 36.
//
// A patch of 4x4 inputs gives a tile of 2x2 outputs ("tile" is that here, but for `Tile` and
// kTile of tile.h). With both patch and kernel transformed to 4x4 "points", the output is a
// product at every point, summed over the channels and transformed back:
//
//   output = A' [(G kernel G') * (B' patch B)] A         for every tile
//   kernel_gradient = G' [sum of (B' patch B) * (A gradient A') over tiles] G
//
// so 16 products of matrices, one a point, take most of the time. The factors are 0, +-1 and
// +-1/2, so that little is lost in float32: docs/performance.md has the errors.

#pragma once

#include "tile.h"

namespace {

constexpr Index kPoints = 16;

// Sizes, chosen by measurement.
constexpr Index kPointsBytes = 1 << 20;         // of transformed tiles at a time,
constexpr Index kFewestTiles = 64;              // but not fewer
constexpr Index kPrivatePointsBytes = 1 << 20;  // of a gradient that every thread may own
constexpr Index kWorthwhileTiles = 128;         // to transform a kernel for

// Lines of the five transforms: B', G, A', A and G' times a vector.

void TransformPatch(const Vector* d, Vector* out) {
  out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
}

void TransformKernel(const Vector* g, Vector* out) {
  const Vector even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
  out[0] = g[0], out[1] = even + odd, out[2] = even - odd, out[3] = g[2];
}

void RestoreOutput(const Vector* m, Vector* out) {
  out[0] = m[0] + m[1] + m[2], out[1] = m[1] - m[2] - m[3];
}

void TransformGradient(const Vector* y, Vector* out) {
  out[0] = y[0], out[1] = y[0] + y[1], out[2] = y[0] - y[1], out[3] = -y[1];
}

void RestoreKernel(const Vector* m, Vector* out) {
  const Vector even = 0.5f * (m[1] + m[2]), odd = 0.5f * (m[1] - m[2]);
  out[0] = m[0] + even, out[1] = odd, out[2] = even + m[3];
}

// The columns and then the rows of a square of side From, to one of side To.
template <int From, int To, void line(const Vector*, Vector*)>
inline __attribute__((always_inline)) void Transform(const Vector* in, Vector* out) {
  Vector columns[From][To], v[From];
  for (int j = 0; j < From; ++j) {
    for (int i = 0; i < From; ++i) v[i] = in[i * From + j];
    line(v, columns[j]);
  }
  for (int i = 0; i < To; ++i) {
    for (int j = 0; j < From; ++j) v[j] = columns[j][i];
    line(v, out + i * To);
  }
}

// The tiles of 2x2 pixels of images of a shape, one after the other.
struct Place {
  Index n, y, x;  // of the first pixel

  Place(Index tile, Shape s) {
    const Index height = (s.h + 1) / 2, width = (s.w + 1) / 2;
    n = tile / (height * width), y = tile / width % height * 2, x = tile % width * 2;
  }
  void Next(Shape s) {
    if ((x += 2) >= s.w) x = 0, y += 2;
    if (y >= s.h) y = 0, ++n;
  }
};

Index TileCount(Shape s) { return s.n * ((s.h + 1) / 2) * ((s.w + 1) / 2); }

// For `count` tiles of images of shape `grid`, from tile `first` on: transforms the square of
// side Side of x that begins `padding` pixels before the tile; pixels beyond x are zero. Of
// the channels from, from + 1, ... it takes `channels`; out[point * distance] is
// [channels / block][tile][block].
template <int Side, void line(const Vector*, Vector*)>
void TransformSquares(const float* x, Shape s, Shape grid, Index padding, Index first,
                      Index count, Index from, Index channels, Index block, Index distance,
                      float* out) {
  const std::vector<float> zeros(s.c);
  Place place(first, grid);
  for (Index t = 0; t < count; ++t, place.Next(grid)) {
    const float* pixels[Side * Side];
    for (Index i = 0; i < Side; ++i)
      for (Index j = 0; j < Side; ++j) {
        const Index y = place.y - padding + i, xx = place.x - padding + j;
        const bool inside = y >= 0 && y < s.h && xx >= 0 && xx < s.w;
        pixels[i * Side + j] = inside ? x + ((place.n * s.h + y) * s.w + xx) * s.c : zeros.data();
      }
    for (Index c = 0; c < channels; c += kLanes) {
      Vector square[Side * Side], points[kPoints];
      for (int i = 0; i < Side * Side; ++i) square[i] = At(pixels[i] + from + c);
      Transform<Side, 4, line>(square, points);
      float* const to = out + (c / block * count + t) * block + c % block;
      for (int p = 0; p < kPoints; ++p) At(to + p * distance) = points[p];
    }
  }
}

// Whether it can be done so, and is faster than the sum over taps.
bool WinogradSuits(Shape kernel, Index stride, Shape out) {
  const Index tiles = TileCount(out);
  return kernel.n == 3 && kernel.h == 3 && stride == 1 && kernel.w % kLanes == 0 &&
         kernel.c % kLanes == 0 && tiles >= kWorthwhileTiles &&
         tiles * kPoints < out.n * out.h * out.w * 9;
}

// Tiles to transform at a time, of so many channels in all.
Index TilesThatFit(Index channels) {
  return std::max(kFewestTiles, kPointsBytes / (kPoints * 4 * channels));
}

// Floats from one point's array of `size` to the next: were it a power of two, all would meet
// in one place of the cache.
Index Distance(Index size) { return size + kLine; }

// out = x convolved with a kernel [3][3][CI][CO], or, if `transpose`, with the one turned by
// 180 degrees that [3][3][CO][CI] holds.
void Winograd(ffi::ThreadPool& pool, const float* x, Shape xs, Index padding,
              const float* kernel, bool transpose, float* out, Shape os) {
  const Index ci = xs.c, co = os.c, vectors = Vectors(co), block = vectors * kLanes;
  const Array packed = Pack(pool, kernel, 9, Channels(ci, co, 1), transpose);
  const Array points = Allocate(kPoints * ci * co);  // [co / block][point][ci][block]
  ParallelFor(pool, co / block, [&](Index b) {
    const float* const from = &packed[b * 9 * ci * block];
    float* const to = &points[b * kPoints * ci * block];
    for (Index c = 0; c < ci * block; c += kLanes) {
      Vector taps[9], transformed[kPoints];
      for (int t = 0; t < 9; ++t) taps[transpose ? 8 - t : t] = At(from + t * ci * block + c);
      Transform<3, 4, TransformKernel>(taps, transformed);
      for (int p = 0; p < kPoints; ++p) At(to + p * ci * block + c) = transformed[p];
    }
  });

  const Index tiles = TileCount(os), shares = 4 * Threads(pool);
  const Index fit = std::min(TilesThatFit(ci + block), tiles / shares);
  const Index group = std::max(kTile, fit / kTile * kTile);
  const bool streams = Streams(out, os);
  ParallelFor(pool, (tiles + group - 1) / group, [&](Index g) {
    const Index first = g * group, count = std::min(group, tiles - first);
    const Index in_distance = Distance(group * ci), out_distance = Distance(group * block);
    float* const in = Scratch(kPoints * (in_distance + out_distance));
    float* const products = in + kPoints * in_distance;
    TransformSquares<4, TransformPatch>(x, xs, os, padding, first, count, 0, ci, ci,
                                        in_distance, in);
    for (Index b = 0; b < co / block; ++b) {
      for (Index p = 0; p < kPoints; ++p)
        Product(vectors, in + p * in_distance, count, ci, ci, 1,
                &points[(b * kPoints + p) * ci * block], products + p * out_distance, block,
                false);
      Place place(first, os);
      for (Index t = 0; t < count; ++t, place.Next(os))
        for (Index c = 0; c < block; c += kLanes) {
          Vector product[kPoints], tile[4];
          for (int p = 0; p < kPoints; ++p)
            product[p] = At(products + p * out_distance + t * block + c);
          Transform<4, 2, RestoreOutput>(product, tile);
          const Index pixel = (place.n * os.h + place.y) * os.w + place.x;
          float* const to = out + pixel * co + b * block + c;
          const bool right = place.x + 1 < os.w, below = place.y + 1 < os.h;
          Store(to, tile[0], streams);
          if (right) Store(to + co, tile[1], streams);
          if (below) Store(to + os.w * co, tile[2], streams);
          if (right && below) Store(to + (os.w + 1) * co, tile[3], streams);
        }
    }
  });
}

// out = the gradient [3][3][CI][CO] of the kernel.
//
// A small one is summed by every thread over its share of the tiles, and then over the
// threads; of a large one threads have shares of CO, too.
void WinogradKernelGradient(ffi::ThreadPool& pool, const float* x, Shape xs, Index padding,
                            const float* gradient, Shape gs, float* out) {
  const Index ci = xs.c, co = gs.c, vectors = Vectors(co), block = vectors * kLanes;
  const Index tiles = TileCount(gs), threads = Threads(pool), size = kPoints * ci * co;
  const Index parts = size * 4 <= kPrivatePointsBytes ? 1 : std::min(threads, co / block);
  const Index splits = std::min(threads / parts, tiles);
  const Array partial = Allocate(splits * size);  // [split][point][ci][co]
  ParallelFor(pool, splits * parts, [&](Index task) {
    const Index split = task / parts, part = task % parts;
    const Index begin = tiles * split / splits, end = tiles * (split + 1) / splits;
    const Index from = co / block * part / parts * block;
    const Index channels = co / block * (part + 1) / parts * block - from;
    const Index group = std::min(end - begin, TilesThatFit(ci + channels));
    const Index x_distance = Distance(group * ci), g_distance = Distance(group * channels);
    float* const xp = Scratch(kPoints * (x_distance + g_distance));
    float* const gp = xp + kPoints * x_distance;
    for (Index first = begin; first < end; first += group) {
      const Index count = std::min(group, end - first);
      TransformSquares<4, TransformPatch>(x, xs, gs, padding, first, count, 0, ci, ci,
                                          x_distance, xp);
      TransformSquares<2, TransformGradient>(gradient, gs, gs, 0, first, count, from, channels,
                                             block, g_distance, gp);
      for (Index p = 0; p < kPoints; ++p)
        for (Index b = 0; b < channels; b += block)
          Product(vectors, xp + p * x_distance, ci, 1, count, ci, gp + p * g_distance + b * count,
                  &partial[split * size + p * ci * co + from + b], co, first > begin);
    }
  });
  ParallelFor(pool, ci, [&](Index i) {
    for (Index c = 0; c < co; c += kLanes) {
      Vector sums[kPoints], taps[9];
      for (int p = 0; p < kPoints; ++p) {
        const Index at = (p * ci + i) * co + c;
        sums[p] = At(&partial[at]);
        for (Index s = 1; s < splits; ++s) sums[p] += At(&partial[s * size + at]);
      }
      Transform<4, 3, RestoreKernel>(sums, taps);
      for (int t = 0; t < 9; ++t) At(out + (t * ci + i) * co + c) = taps[t];
    }
  });
}

}  // namespace
