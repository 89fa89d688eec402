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
constexpr Index kStripPixels = 64;         // of an image at least
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
using Bytes = ffi::Buffer<ffi::U8>;

Shape ShapeOf(const Buffer& b) {
  auto d = b.dimensions();
  return {d[0], d[1], d[2], d[3]};
}

// Copies pixels for a set whose lanes have inputs of their own: out[k][lane] is the k-th input
// channel of the lane's output channel.
class Spread {
 public:
  Spread(const Channels& channels, Index set) : depth_(channels.depth) {
    for (Index lane = 0; lane < kLanes; ++lane) {
      first_[lane] = channels.First(set * kLanes + lane);
      from_[lane] = lane / depth_ * depth_;
    }
    // A vector holds whole groups, of as many channels in as out.
    permutes_ = depth_ == channels.out_depth && kLanes % depth_ == 0;
  }

  void operator()(const float* pixel, float* out) const {
#if !defined(__clang__)
    if (permutes_) {
      const Vector v = At(pixel + first_[0]);
      for (int k = 0; k < depth_; ++k) At(out + k * kLanes) = __builtin_shuffle(v, from_ + k);
      return;
    }
#endif
    for (Index lane = 0; lane < kLanes; ++lane)
      for (Index k = 0; k < depth_; ++k) out[k * kLanes + lane] = pixel[first_[lane] + k];
  }

 private:
  typedef int Lanes __attribute__((vector_size(kLanes * 4), aligned(4)));
  Index depth_;
  Index first_[kLanes];
  Lanes from_;
  bool permutes_;
};

// Rows from ... to - 1 of an image with its border of zeros, as a set takes them.
void Fill(const float* x, Shape s, Border border, const Channels& channels, Index set, Index from,
          Index to, float* out) {
  const Index size = channels.pixel;
  const Spread spread(channels, set);
  auto zero = [&](Index pixels) {
    std::memset(out, 0, pixels * size * 4);
    out += pixels * size;
  };
  for (Index y = from - border.top; y < to - border.top; ++y) {
    if (y < 0 || y >= s.h) {
      zero(border.left + s.w + border.right);
      continue;
    }
    zero(border.left);
    const float* const pixels = x + y * s.w * s.c;
    if (channels.own) {
      for (Index i = 0; i < s.w; ++i) spread(pixels + i * s.c, out + i * size);
    } else if (size == s.c) {
      std::memcpy(out, pixels, s.w * size * 4);
    } else {
      for (Index i = 0; i < s.w; ++i)
        std::memcpy(out + i * size, pixels + i * s.c + set * size, size * 4);
    }
    out += s.w * size;
    zero(border.right);
  }
}

// What an output pixel uses of a tap: the input dy rows and dx columns on, and the kernel at it.
struct Tap {
  Index dy, dx, kernel;
};

// The output pixels (y + step * i, x + step * j), i < h, j < w, which use the same taps, of the
// input around the pixel (in_y + in_step * i, in_x + in_step * j) of the padded image.
struct Phase {
  Index y, x, step, h, w;
  Index in_y, in_x, in_step;
  std::vector<Tap> taps;
};

// out = the convolution of padded x with `kernel`, of `taps` taps, [tap][depth][co], or
// [tap][out_depth][ci] where it is to be transposed.
//
// Threads have shares of images or of strips of an image; of few of these, of channels too.
void Convolve(ffi::ThreadPool& pool, const float* x, Shape xs, Border border, const float* kernel,
              Index taps, Index groups, bool transpose, float* out, Shape os,
              const std::vector<Phase>& phases) {
  const Channels channels(xs.c, os.c, groups);
  const Index block = channels.block, block_size = taps * channels.depth * block;
  const Index width = xs.w + border.left + border.right;
  const Index height = xs.h + border.top + border.bottom, line = width * channels.pixel;
  const bool streams = block % kLine == 0 && Streams(out, os);
  const bool in_place = groups == 1 && !border.any();
  Index rows = 0;
  for (const Phase& phase : phases) rows = std::max(rows, phase.h);

  const Index wanted = 4 * Threads(pool);
  const Index images = std::clamp<Index>(kImageBytes / (height * line * 4), 1,
                                         std::max<Index>(1, xs.n / wanted));
  const Index batches = (xs.n + images - 1) / images;
  auto missing = [&](Index tasks, Index most) {
    return std::clamp<Index>((wanted + tasks - 1) / tasks, 1, std::max<Index>(1, most));
  };
  const Index fewest = std::max<Index>(1, rows * phases[0].w / kStripPixels);
  const Index strips = std::min(rows, std::max(missing(batches * channels.sets, fewest),
                                               height * line * 4 / kImageBytes));
  const Index ranges = missing(batches * strips * channels.sets, channels.blocks);

  // What one task alone uses of the kernel, it packs itself.
  const bool shared = batches * strips > 1;
  const Array packed = shared ? Pack(pool, kernel, taps, channels, transpose) : Array();
  ParallelFor(pool, batches * strips * channels.sets * ranges, [&](Index task) {
    const Index range = task % ranges, set = task / ranges % channels.sets;
    const Index strip = task / ranges / channels.sets % strips;
    const Index first = task / ranges / channels.sets / strips * images;
    const Index last = std::min(first + images, xs.n);
    const Index first_block = set * channels.blocks + channels.blocks * range / ranges;
    const Index last_block = set * channels.blocks + channels.blocks * (range + 1) / ranges;
    auto begin = [&](const Phase& phase) { return phase.h * strip / strips; };
    auto end = [&](const Phase& phase) { return phase.h * (strip + 1) / strips; };

    // The rows of the padded images that this strip uses.
    Index top = height, bottom = 0;
    for (const Phase& phase : phases)
      for (const Tap& tap : phase.taps)
        if (begin(phase) < end(phase)) {
          top = std::min(top, phase.in_y + begin(phase) * phase.in_step + tap.dy);
          bottom = std::max(bottom, phase.in_y + (end(phase) - 1) * phase.in_step + tap.dy + 1);
        }
    const Index image = in_place ? height * line : std::max<Index>(0, bottom - top) * line;
    float* const scratch =
        Scratch((in_place ? 0 : (last - first) * image) + (shared ? 0 : block_size));
    const float* in = x + first * image;
    if (in_place) {
      top = 0;
    } else {
      in = scratch + (shared ? 0 : block_size);
      for (Index n = first; n < last; ++n)
        Fill(x + n * xs.h * xs.w * xs.c, xs, border, channels, set, top, bottom,
             scratch + (shared ? 0 : block_size) + (n - first) * image);
    }

    const Index chunk = std::max<Index>(1, kKernelBytes / (channels.depth * block * 4));
    std::vector<Index> a, at;
    for (Index b = first_block; b < last_block; ++b) {
      if (!shared) PackBlock(kernel, taps, channels, transpose, b, scratch);
      const float* const weights = shared ? &packed[b * block_size] : scratch;
      for (const Phase& phase : phases) {
        a.clear(), at.clear();
        for (const Tap& tap : phase.taps) {
          a.push_back(tap.dy * line + tap.dx * channels.pixel);
          at.push_back(tap.kernel * channels.depth * block);
        }
        const Index count = a.size(), from = begin(phase), to = end(phase);
        const Index pixels = (last - first) * (to - from) * phase.w;
        // Once at least: a phase without taps is zero.
        for (Index t = 0; t == 0 || t < count; t += chunk) {
          const Sum sum{a.data() + t, at.data() + t, std::min(chunk, count - t), channels.depth,
                        channels.pixel / channels.depth, block};
          Index n = 0, i = from, j = 0;
          for (Index p = 0; p < pixels; p += kTile) {
            const float* ins[kTile];
            float* outs[kTile];
            const Index used = std::min(kTile, pixels - p);
            for (Index r = 0; r < kTile; ++r) {
              if (r >= used) {
                ins[r] = ins[r - 1], outs[r] = outs[r - 1];
                continue;
              }
              ins[r] = in + n * image + (phase.in_y + i * phase.in_step - top) * line +
                       (phase.in_x + j * phase.in_step) * channels.pixel;
              const Index y = phase.y + i * phase.step, x = phase.x + j * phase.step;
              outs[r] = out + (((first + n) * os.h + y) * os.w + x) * os.c + b * block;
              if (++j == phase.w) j = 0, ++i;
              if (i == to) i = from, ++n;
            }
            Tiles(channels.vectors, channels.own, ins, weights, sum, outs, used, t > 0,
                  streams && t + chunk >= count);
          }
        }
      }
    }
  });
}

// x [N, H, W, CI], kernel [KH, KW, CI, CO] -> [N, OH, OW, CO].
ffi::Error Forward(ffi::ThreadPool pool, Buffer x, Buffer kernel, Result out,
                   std::int64_t stride, std::int64_t padding) {
  const Shape xs = ShapeOf(x), ks = ShapeOf(kernel), os = ShapeOf(*out);
  const Index groups = xs.c / ks.w;
  if (groups == 1 && WinogradSuits(ks, stride, os)) {
    Winograd(pool, x.typed_data(), xs, padding, kernel.typed_data(), false, out->typed_data(), os);
    return ffi::Error::Success();
  }
  Phase phase{0, 0, 1, os.h, os.w, 0, 0, stride, {}};
  for (Index ky = 0; ky < ks.n; ++ky)
    for (Index kx = 0; kx < ks.h; ++kx) phase.taps.push_back({ky, kx, ky * ks.h + kx});
  Convolve(pool, x.typed_data(), xs, {padding, padding, padding, padding}, kernel.typed_data(),
           ks.n * ks.h, groups, false, out->typed_data(), os, {phase});
  return ffi::Error::Success();
}

// gradient [N, OH, OW, CO], kernel [KH, KW, CI, CO] -> [N, H, W, CI].
//
// Input pixel y was used for output pixel (y + padding - ky) / stride by the taps for which
// that is whole: one phase for every remainder of y + padding by the stride.
ffi::Error InputGradient(ffi::ThreadPool pool, Buffer gradient, Buffer kernel, Result out,
                         std::int64_t stride, std::int64_t padding) {
  const Shape gs = ShapeOf(gradient), ks = ShapeOf(kernel), os = ShapeOf(*out);
  const Index groups = os.c / ks.w;
  if (groups == 1 && WinogradSuits(ks, stride, os)) {
    // Every input pixel was under all taps, the last one first.
    Winograd(pool, gradient.typed_data(), gs, 2 - padding, kernel.typed_data(), true,
             out->typed_data(), os);
    return ffi::Error::Success();
  }
  auto after = [&](Index size, Index gradient_size) {
    return std::max<Index>(0, (size - 1 + padding) / stride - gradient_size + 1);
  };
  const Border border{(ks.n - 1) / stride, after(os.h, gs.h), (ks.h - 1) / stride,
                      after(os.w, gs.w)};
  std::vector<Phase> phases;
  for (Index ry = 0; ry < stride; ++ry)
    for (Index rx = 0; rx < stride; ++rx) {
      const Index y = ((ry - padding) % stride + stride) % stride;
      const Index x = ((rx - padding) % stride + stride) % stride;
      Phase phase{y, x, stride, (os.h - y + stride - 1) / stride, (os.w - x + stride - 1) / stride,
                  (y + padding) / stride + border.top, (x + padding) / stride + border.left, 1,
                  {}};
      for (Index ky = ry; ky < ks.n; ky += stride)
        for (Index kx = rx; kx < ks.h; kx += stride)
          phase.taps.push_back({-(ky / stride), -(kx / stride), ky * ks.h + kx});
      phases.push_back(phase);
    }
  Convolve(pool, gradient.typed_data(), gs, border, kernel.typed_data(), ks.n * ks.h, groups, true,
           out->typed_data(), os, phases);
  return ffi::Error::Success();
}

// For the output pixels of rows first ... first + rows - 1, counted over all images, the
// inputs that meet kernel rows (tap, ci) = from ... from + kTile - 1: out[pixel][kTile]. x begins
// with the first channel of a group.
void Gather(const float* x, Shape xs, Shape gs, Shape ks, Index stride, Index padding,
            Index first, Index rows, Index from, float* out) {
  const Index end = std::min(from + kTile, ks.n * ks.h * ks.w);
  for (Index q = from, width; q < end; q += width) {
    const Index tap = q / ks.w, channel = q % ks.w;
    width = std::min(end - q, ks.w - channel);
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

// The gradient of a kernel of channels with inputs of their own: a set's rows (tap, depth) by
// its lanes, summed over the pixels of each strip of an image as a padded copy has them.
void OwnKernelGradient(const float* x, Shape xs, const float* gradient, Shape gs, Shape ks,
                       Index stride, Index padding, const Channels& channels, Index set,
                       Index begin, Index end, float* result) {
  const Index rows = ks.n * ks.h * channels.depth, size = channels.pixel;
  const Index line = (xs.w + 2 * padding) * size;
  const Index most = std::clamp<Index>(kImageBytes / (stride * line * 4), 1, gs.h);
  float* const filled = Scratch((stride * (most - 1) + ks.n) * line + most * gs.w * kLanes);
  float* const packed = filled + (stride * (most - 1) + ks.n) * line;
  std::vector<Index> a, b;
  for (Index r = 0; r < most; ++r) {
    a.push_back(r * stride * line);
    b.push_back(r * gs.w * kLanes);
  }
  // Rows of output pixels, counted over all images.
  for (Index first = begin, last; first < end; first = last) {
    const Index n = first / gs.h, y = first % gs.h;
    last = std::min({end, first + most, (n + 1) * gs.h});
    Fill(x + n * xs.h * xs.w * xs.c, xs, {padding, padding, padding, padding}, channels, set,
         y * stride, (y + last - first - 1) * stride + ks.n, filled);
    const float* from = gradient + first * gs.w * gs.c + set * kLanes;
    for (Index p = 0; p < (last - first) * gs.w; ++p)
      At(packed + p * kLanes) = At(from + p * gs.c);
    const Sum sum{a.data(), b.data(), last - first, gs.w, stride * size, kLanes};
    for (Index q = 0; q < rows; q += kTile) {
      const float* ins[kTile];
      float* outs[kTile];
      for (Index r = 0; r < kTile; ++r) {
        const Index row = std::min(q + r, rows - 1), tap = row / channels.depth;
        ins[r] = filled + tap / ks.h * line + tap % ks.h * size + row % channels.depth * kLanes;
        outs[r] = result + row * gs.c + set * kLanes;
      }
      Tiles(1, true, ins, packed, sum, outs, std::min(kTile, rows - q), first > begin, false);
    }
  }
}

// The same of channels with the inputs of a group, for tiles first_tile ... last_tile - 1 of
// rows (tap, depth), counted over the groups.
void GroupKernelGradient(const float* x, Shape xs, const float* gradient, Shape gs, Shape ks,
                         Index stride, Index padding, const Channels& channels, Index first_tile,
                         Index last_tile, Index begin, Index end, float* result) {
  const Index co = gs.c, block = channels.block, kernel_rows = ks.n * ks.h * channels.depth;
  const Index tiles = (kernel_rows + kTile - 1) / kTile;  // of a group
  const Index group = std::max<Index>(1, kPixels / gs.w);
  float* const gathered = Scratch(group * gs.w * (kTiles * kTile + co));
  float* const packed = gathered + group * gs.w * kTiles * kTile;
  for (Index first = begin; first < end; first += group) {
    const Index rows = std::min(group, end - first), pixels = rows * gs.w;
    const float* g = gradient + first * gs.w * co;
    if (block < co) {
      for (Index b = 0; b < co / block; ++b)
        for (Index p = 0; p < pixels; ++p)
          std::memcpy(packed + (b * pixels + p) * block, g + p * co + b * block, block * 4);
      g = packed;
    }
    for (Index at = first_tile, count; at < last_tile; at += count) {
      const Index set = at / tiles, tile = at % tiles;
      count = std::min({kTiles, last_tile - at, tiles - tile});
      for (Index i = 0; i < count; ++i)
        Gather(x + set * channels.depth, xs, gs, ks, stride, padding, first, rows,
               (tile + i) * kTile, gathered + i * pixels * kTile);
      for (Index b = set * channels.blocks; b < (set + 1) * channels.blocks; ++b)
        for (Index i = 0; i < count; ++i) {
          const Index from = (tile + i) * kTile;
          Product(channels.vectors, gathered + i * pixels * kTile,
                  std::min(kTile, kernel_rows - from), 1, pixels, kTile, g + b * pixels * block,
                  result + from * co + b * block, co, first > begin);
        }
    }
  }
}

// x [N, H, W, CI], gradient [N, OH, OW, CO] -> [KH, KW, CI / groups, CO].
//
// A small result is summed by every thread over its share of the pixels, and then over the
// threads; of a large one every thread has its share of the rows (tap, ci).
ffi::Error KernelGradient(ffi::ThreadPool pool, Buffer x, Buffer gradient, Result out,
                          std::int64_t stride, std::int64_t padding) {
  const Shape xs = ShapeOf(x), gs = ShapeOf(gradient), ks = ShapeOf(*out);
  const Index groups = xs.c / ks.w;
  if (groups == 1 && WinogradSuits(ks, stride, gs)) {
    WinogradKernelGradient(pool, x.typed_data(), xs, padding, gradient.typed_data(), gs,
                           out->typed_data());
    return ffi::Error::Success();
  }
  const Channels channels(xs.c, gs.c, groups);
  const Index kernel_rows = ks.n * ks.h * ks.w, size = kernel_rows * gs.c;
  const Index units = channels.sets * (channels.own ? 1 : (kernel_rows + kTile - 1) / kTile);
  const Index image_rows = gs.n * gs.h, threads = Threads(pool);
  const bool by_pixels = size * 4 <= kPrivateBytes || units < threads;
  const Index splits = by_pixels ? std::min(threads, image_rows) : 1;
  const Index parts = by_pixels ? 1 : threads;
  Array partial = Allocate((splits - 1) * size);
  float* const total = out->typed_data();
  ParallelFor(pool, splits * parts, [&](Index task) {
    const Index split = task / parts, part = task % parts;
    float* const result = split ? &partial[(split - 1) * size] : total;
    const Index begin = image_rows * split / splits, end = image_rows * (split + 1) / splits;
    const Index first = units * part / parts, last = units * (part + 1) / parts;
    if (!channels.own)
      return GroupKernelGradient(x.typed_data(), xs, gradient.typed_data(), gs, ks, stride, padding,
                                 channels, first, last, begin, end, result);
    for (Index set = first; set < last; ++set)
      OwnKernelGradient(x.typed_data(), xs, gradient.typed_data(), gs, ks, stride, padding,
                        channels, set, begin, end, result);
  });
  // Many threads have many sums, so they share this one too.
  if (splits > 1)
    ParallelFor(pool, kernel_rows, [&](Index row) {
      for (Index i = row * gs.c; i < (row + 1) * gs.c; i += kLanes) {
        Vector sum = At(total + i);
        for (Index s = 0; s < splits - 1; ++s) sum += At(&partial[s * size + i]);
        At(total + i) = sum;
      }
    });
  return ffi::Error::Success();
}

// x [N, H, W, C] -> maxima [N, OH, OW, C] of size x size pixels, and the places of the first of
// them in their windows, counted row by row.
ffi::Error MaxPool(ffi::ThreadPool pool, Buffer x, Result out, ffi::Result<Bytes> place,
                   std::int64_t size, std::int64_t stride, std::int64_t padding) {
  typedef int Lanes __attribute__((vector_size(kLanes * 4)));
  const Shape xs = ShapeOf(x), os = ShapeOf(*out);
  ParallelFor(pool, os.n * os.h, [&](Index row) {
    const Index n = row / os.h, top = row % os.h * stride - padding;
    const Index y0 = std::max<Index>(0, top), y1 = std::min<Index>(xs.h, top + size);
    for (Index j = 0; j < os.w; ++j) {
      const Index left = j * stride - padding;
      const Index x0 = std::max<Index>(0, left), x1 = std::min<Index>(xs.w, left + size);
      for (Index c = 0; c < xs.c; c += kLanes) {
        const float* const image = x.typed_data() + n * xs.h * xs.w * xs.c + c;
        Vector best = At(image + (y0 * xs.w + x0) * xs.c);
        Lanes at = Lanes{} + int((y0 - top) * size + x0 - left);
        for (Index y = y0; y < y1; ++y)
          for (Index i = x0; i < x1; ++i) {
            const Vector v = At(image + (y * xs.w + i) * xs.c);
            const Lanes larger = (v > best) | (v != v);  // NaN stays
            best = larger ? v : best;
            at = larger ? Lanes{} + int((y - top) * size + i - left) : at;
          }
        const Index to = (row * os.w + j) * os.c + c;
        At(out->typed_data() + to) = best;
        for (int lane = 0; lane < kLanes; ++lane) place->typed_data()[to + lane] = at[lane];
      }
    }
  });
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool, MaxPool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Bytes>()
                                  .Attr<std::int64_t>("size")
                                  .Attr<std::int64_t>("stride")
                                  .Attr<std::int64_t>("padding"));

extern "C" std::int64_t lanes() { return kLanes; }
