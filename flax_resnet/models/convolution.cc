// The three convolutions of a training step on a CPU: forward, with respect to the input
// ("input_gradient") and with respect to the kernel ("kernel_gradient"), in float32.
//
// Images are [N, H, W, C], kernels [KH, KW, CI, CO]. Every one of the three is a sum of
// products a[row] * b[channel] that `Tile` holds in registers for some rows and one
// block of channels: the channels of b lie side by side in vector registers, the values
// of a are broadcast. What differs is only what the rows are and what is summed over:
//
//                     rows             summed over        b
//   forward           output pixels    (tap, ci)          kernel, packed by blocks of CO
//   input_gradient    input pixels     (tap, co)          transposed kernel, same packing
//   kernel_gradient   (tap, ci)        output pixels      gradient, packed by blocks of CO
//
// A tap is a position (ky, kx) of the kernel. CO (CI for input_gradient) must be a
// multiple of `kLanes`. Most 3x3 convolutions of stride 1 go another way: winograd.h.

#include "winograd.h"

namespace {

// Sizes, chosen by measurement, of what should stay in the caches of a core.
constexpr Index kImageBytes = 256 << 10;   // padded images at a time
constexpr Index kKernelBytes = 128 << 10;  // a block's taps at a time
constexpr Index kPixels = 512;             // output pixels summed over at a time
constexpr Index kTiles = 8;                // tiles of (tap, ci) that share a block of b
constexpr Index kPrivateBytes = 512 << 10; // kernel gradient that every thread may own

struct Border {
  Index top, bottom, left, right;
  bool any() const { return top || bottom || left || right; }
};

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Buffer>;

Shape ShapeOf(const Buffer& b) {
  auto d = b.dimensions();
  return {d[0], d[1], d[2], d[3]};
}

// Images first ... last - 1 with zeros around them.
void Pad(const float* x, Shape s, Border border, Index first, Index last, float* out) {
  const Index row = s.w * s.c, left = border.left * s.c, right = border.right * s.c;
  const Index wide = left + row + right;
  auto zero = [&](Index count) {
    std::memset(out, 0, count * 4);
    out += count;
  };
  for (Index n = first; n < last; ++n) {
    zero(border.top * wide);
    for (Index y = 0; y < s.h; ++y) {
      zero(left);
      std::memcpy(out, x + (n * s.h + y) * row, row * 4);
      out += row;
      zero(right);
    }
    zero(border.bottom * wide);
  }
}

// The output pixels (y + step * i, x + step * j), i < h, j < w, which use the same taps:
// tap t takes the input, counted from the padded pixel input + i * row + j * pixel, at a[t]
// and the packed kernel at b[t].
struct Phase {
  Index y, x, step, h, w;
  Index input, row, pixel;
  std::vector<Index> a, b;
};

// out = the convolution of padded x with `kernel`, of `taps` taps, [tap][ci][co], or
// [tap][co][ci] where it is to be transposed.
void Convolve(ffi::ThreadPool& pool, const float* x, Shape xs, Border border,
              const float* kernel, Index taps, bool transpose, float* out, Shape os,
              const std::vector<Phase>& phases) {
  const Index ci = xs.c, co = os.c, vectors = Vectors(co), block = vectors * kLanes;
  const Index block_size = taps * ci * block;
  const Array packed = Pack(pool, kernel, taps, ci, co, transpose);
  const Index height = xs.h + border.top + border.bottom;
  const Index image = height * (xs.w + border.left + border.right) * ci;
  const Index share = xs.n / (4 * Threads(pool));
  const bool streams = Streams(out, os);
  const Index group = std::max<Index>(1, std::min(kImageBytes / (image * 4), share));
  ParallelFor(pool, (xs.n + group - 1) / group, [&](Index g) {
    const Index first = g * group, last = std::min(first + group, xs.n);
    const float* in = x + first * image;
    if (border.any()) {
      float* padded = Scratch(group * image);
      Pad(x, xs, border, first, last, padded);
      in = padded;
    }
    float* to = out + first * os.h * os.w * co;
    for (const Phase& phase : phases) {
      const Index pixels = (last - first) * phase.h * phase.w, count = phase.a.size();
      const Index chunk = std::max<Index>(1, kKernelBytes / (ci * block * 4));
      for (Index b = 0; b < co / block; ++b)
        // Once at least: a phase without taps is zero.
        for (Index t = 0; t == 0 || t < count; t += chunk) {
          const Sum sum{phase.a.data() + t, phase.b.data() + t, std::min(chunk, count - t),
                        ci, 1, block};
          Index n = 0, i = 0, j = 0;
          for (Index p = 0; p < pixels; p += kTile) {
            const float* a[kTile];
            float* c[kTile];
            const Index rows = std::min(kTile, pixels - p);
            for (Index r = 0; r < kTile; ++r) {
              if (r >= rows) {
                a[r] = a[r - 1], c[r] = c[r - 1];
                continue;
              }
              a[r] = in + n * image + phase.input + i * phase.row + j * phase.pixel;
              const Index y = phase.y + i * phase.step, x = phase.x + j * phase.step;
              c[r] = to + ((n * os.h + y) * os.w + x) * co + b * block;
              if (++j == phase.w) j = 0, ++i;
              if (i == phase.h) i = 0, ++n;
            }
            Tiles(vectors, a, &packed[b * block_size], sum, c, rows, t > 0,
                  streams && t + chunk >= count);
          }
        }
    }
  });
}

// x [N, H, W, CI], kernel [KH, KW, CI, CO] -> [N, OH, OW, CO].
ffi::Error Forward(ffi::ThreadPool pool, Buffer x, Buffer kernel, Result out,
                   std::int64_t stride, std::int64_t padding) {
  const Shape xs = ShapeOf(x), ks = ShapeOf(kernel), os = ShapeOf(*out);
  if (WinogradSuits(ks, stride, os)) {
    Winograd(pool, x.typed_data(), xs, padding, kernel.typed_data(), false, out->typed_data(), os);
    return ffi::Error::Success();
  }
  const Index ci = xs.c, width = xs.w + 2 * padding, block = Vectors(os.c) * kLanes;
  Phase phase{0, 0, 1, os.h, os.w, 0, stride * width * ci, stride * ci, {}, {}};
  for (Index ky = 0; ky < ks.n; ++ky)
    for (Index kx = 0; kx < ks.h; ++kx) {
      phase.a.push_back((ky * width + kx) * ci);
      phase.b.push_back((ky * ks.h + kx) * ci * block);
    }
  Convolve(pool, x.typed_data(), xs, {padding, padding, padding, padding},
           kernel.typed_data(), ks.n * ks.h, false, out->typed_data(), os, {phase});
  return ffi::Error::Success();
}

// gradient [N, OH, OW, CO], kernel [KH, KW, CI, CO] -> [N, H, W, CI].
//
// Input pixel y was used for output pixel (y + padding - ky) / stride by the taps for which
// that is whole: one phase for every remainder of y + padding by the stride.
ffi::Error InputGradient(ffi::ThreadPool pool, Buffer gradient, Buffer kernel, Result out,
                         std::int64_t stride, std::int64_t padding) {
  const Shape gs = ShapeOf(gradient), ks = ShapeOf(kernel), os = ShapeOf(*out);
  if (WinogradSuits(ks, stride, os)) {
    // Every input pixel was under all taps, the last one first.
    Winograd(pool, gradient.typed_data(), gs, 2 - padding, kernel.typed_data(), true,
             out->typed_data(), os);
    return ffi::Error::Success();
  }
  const Index co = gs.c, block = Vectors(os.c) * kLanes;
  auto after = [&](Index size, Index gradient_size) {
    return std::max<Index>(0, (size - 1 + padding) / stride - gradient_size + 1);
  };
  const Border border{(ks.n - 1) / stride, after(os.h, gs.h), (ks.h - 1) / stride,
                      after(os.w, gs.w)};
  const Index width = gs.w + border.left + border.right;
  std::vector<Phase> phases;
  for (Index ry = 0; ry < stride; ++ry)
    for (Index rx = 0; rx < stride; ++rx) {
      const Index y = ((ry - padding) % stride + stride) % stride;
      const Index x = ((rx - padding) % stride + stride) % stride;
      const Index gy = (y + padding) / stride + border.top;
      const Index gx = (x + padding) / stride + border.left;
      Phase phase{y, x, stride, (os.h - y + stride - 1) / stride,
                  (os.w - x + stride - 1) / stride, (gy * width + gx) * co, width * co, co,
                  {}, {}};
      for (Index ky = ry; ky < ks.n; ky += stride)
        for (Index kx = rx; kx < ks.h; kx += stride) {
          phase.a.push_back(-(ky / stride * width + kx / stride) * co);
          phase.b.push_back((ky * ks.h + kx) * co * block);
        }
      phases.push_back(phase);
    }
  Convolve(pool, gradient.typed_data(), gs, border, kernel.typed_data(), ks.n * ks.h, true,
           out->typed_data(), os, phases);
  return ffi::Error::Success();
}

// For the output pixels of rows first ... first + rows - 1, counted over all images, the
// inputs that meet kernel rows (tap, ci) = from ... from + kTile - 1: out[pixel][kTile].
void Gather(const float* x, Shape xs, Shape gs, Shape ks, Index stride, Index padding,
            Index first, Index rows, Index from, float* out) {
  const Index end = std::min(from + kTile, ks.n * ks.h * xs.c);
  for (Index q = from, width; q < end; q += width) {
    const Index tap = q / xs.c, channel = q % xs.c;
    width = std::min(end - q, xs.c - channel);
    const Index ky = tap / ks.h - padding, kx = tap % ks.h - padding;
    // Output columns left ... right - 1 meet a pixel, those beside them the padding.
    const Index left = std::min(gs.w, kx < 0 ? (stride - 1 - kx) / stride : 0);
    const Index right = std::max(left, std::min(gs.w, (xs.w - kx + stride - 1) / stride));
    for (Index row = 0; row < rows; ++row) {
      const Index n = (first + row) / gs.h, y = (first + row) % gs.h * stride + ky;
      const bool inside = y >= 0 && y < xs.h;
      const Index l = inside ? left : gs.w, r = inside ? right : gs.w;
      const float* in = x + ((n * xs.h + y) * xs.w + kx) * xs.c + channel;
      float* to = out + row * gs.w * kTile + (q - from);
      auto copy = [&](Index width) {
        for (Index i = 0; i < l; ++i) std::memset(to + i * kTile, 0, width * 4);
        for (Index i = l; i < r; ++i)
          std::memcpy(to + i * kTile, in + i * stride * xs.c, width * 4);
        for (Index i = r; i < gs.w; ++i) std::memset(to + i * kTile, 0, width * 4);
      };
      // Of a known width a copy is an instruction or two.
      switch (width) {
        case kTile: copy(kTile); break;
        case 8: copy(8); break;
        case 4: copy(4); break;
        case 3: copy(3); break;
        default: copy(width);
      }
    }
  }
}

// x [N, H, W, CI], gradient [N, OH, OW, CO] -> [KH, KW, CI, CO].
//
// A small result is summed by every thread over its share of the pixels, and then over the
// threads; of a large one every thread has its share of the rows (tap, ci).
ffi::Error KernelGradient(ffi::ThreadPool pool, Buffer x, Buffer gradient, Result out,
                          std::int64_t stride, std::int64_t padding) {
  const Shape xs = ShapeOf(x), gs = ShapeOf(gradient), ks = ShapeOf(*out);
  if (WinogradSuits(ks, stride, gs)) {
    WinogradKernelGradient(pool, x.typed_data(), xs, padding, gradient.typed_data(), gs,
                           out->typed_data());
    return ffi::Error::Success();
  }
  const Index co = gs.c, vectors = Vectors(co), block = vectors * kLanes;
  const Index kernel_rows = ks.n * ks.h * xs.c, size = kernel_rows * co;
  const Index tiles = (kernel_rows + kTile - 1) / kTile;
  const Index image_rows = gs.n * gs.h, group = std::max<Index>(1, kPixels / gs.w);
  const Index threads = Threads(pool);
  const bool by_pixels = size * 4 <= kPrivateBytes || tiles < threads;
  const Index splits = by_pixels ? std::min(threads, image_rows) : 1;
  const Index parts = by_pixels ? 1 : threads;
  Array partial = Allocate((splits - 1) * size);
  float* const total = out->typed_data();
  ParallelFor(pool, splits * parts, [&](Index task) {
    const Index split = task / parts, part = task % parts;
    float* const result = split ? &partial[(split - 1) * size] : total;
    const Index begin = image_rows * split / splits, end = image_rows * (split + 1) / splits;
    const Index first_tile = tiles * part / parts, last_tile = tiles * (part + 1) / parts;
    float* const gathered = Scratch(group * gs.w * (kTiles * kTile + co));
    float* const packed = gathered + group * gs.w * kTiles * kTile;
    for (Index first = begin; first < end; first += group) {
      const Index rows = std::min(group, end - first), pixels = rows * gs.w;
      const float* g = gradient.typed_data() + first * gs.w * co;
      if (block < co) {
        for (Index b = 0; b < co / block; ++b)
          for (Index p = 0; p < pixels; ++p)
            std::memcpy(packed + (b * pixels + p) * block, g + p * co + b * block, block * 4);
        g = packed;
      }
      for (Index tile = first_tile; tile < last_tile; tile += kTiles) {
        const Index count = std::min(kTiles, last_tile - tile);
        for (Index i = 0; i < count; ++i)
          Gather(x.typed_data(), xs, gs, ks, stride, padding, first, rows,
                 (tile + i) * kTile, gathered + i * pixels * kTile);
        for (Index b = 0; b < co / block; ++b)
          for (Index i = 0; i < count; ++i) {
            const Index from = (tile + i) * kTile;
            const Index used = std::min(kTile, kernel_rows - from);
            Product(vectors, gathered + i * pixels * kTile, used, 1, pixels, kTile,
                    g + b * pixels * block, result + from * co + b * block, co, first > begin);
          }
      }
    }
  });
  for (Index s = 0; s < splits - 1; ++s)
    for (Index i = 0; i < size; ++i) total[i] += partial[s * size + i];
  return ffi::Error::Success();
}

}  // namespace

#define DEFINE(symbol, function)                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function,    \
                                ffi::Ffi::Bind()     \
                                    .Ctx<ffi::ThreadPool>() \
                                    .Arg<Buffer>()   \
                                    .Arg<Buffer>()   \
                                    .Ret<Buffer>()   \
                                    .Attr<std::int64_t>("stride") \
                                    .Attr<std::int64_t>("padding"))

DEFINE(forward, Forward);
DEFINE(input_gradient, InputGradient);
DEFINE(kernel_gradient, KernelGradient);

extern "C" std::int64_t lanes() { return kLanes; }
