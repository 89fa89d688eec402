// Compares the functions of convolution.cc with sums in double, without XLA, so that it runs on
// every processor that a compiler and an emulator know. Prints what differs.

#include <cmath>
#include <cstdio>

#include "convolution.cc"

namespace {

using Values = std::vector<float>;

Values Random(Index size) {
  static std::uint32_t state = 1;
  Values values(size);
  for (float& v : values) {
    state = state * 1664525 + 1013904223;
    v = static_cast<float>(state >> 8) / (1 << 23) - 1;
  }
  return values;
}

Buffer Of(Values& values, Shape s) { return {values.data(), {s.n, s.h, s.w, s.c}}; }

bool Close(const char* what, const Values& ours, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    error = std::max(error, std::abs(ours[i] - expected[i]));
    size = std::max(size, std::abs(expected[i]));
  }
  if (error <= 1e-5 * size) return true;  // not so of NaN
  std::printf("%s: error %g of %g\n", what, error, size);
  return false;
}

bool Convolutions(Shape xs, Index co, Index window, Index stride, Index padding, Index groups) {
  const Shape ks{window, window, xs.c / groups, co};
  const Shape os{xs.n, (xs.h + 2 * padding - window) / stride + 1,
                 (xs.w + 2 * padding - window) / stride + 1, co};
  auto size = [](Shape s) { return s.n * s.h * s.w * s.c; };
  Values x = Random(size(xs)), kernel = Random(size(ks)), g = Random(size(os));
  std::vector<double> out(size(os)), by_x(size(xs)), by_kernel(size(ks));
  for (Index n = 0; n < os.n; ++n)
    for (Index i = 0; i < os.h; ++i)
      for (Index j = 0; j < os.w; ++j)
        for (Index ky = 0; ky < window; ++ky)
          for (Index kx = 0; kx < window; ++kx) {
            const Index y = i * stride + ky - padding, xx = j * stride + kx - padding;
            if (y < 0 || y >= xs.h || xx < 0 || xx >= xs.w) continue;
            for (Index c = 0; c < co; ++c)
              for (Index k = 0; k < ks.w; ++k) {
                const Index to = ((n * os.h + i) * os.w + j) * co + c;
                const Index from = ((n * xs.h + y) * xs.w + xx) * xs.c + c / (co / groups) * ks.w + k;
                const Index at = ((ky * window + kx) * ks.w + k) * co + c;
                out[to] += double{x[from]} * kernel[at];
                by_x[from] += double{g[to]} * kernel[at];
                by_kernel[at] += double{x[from]} * g[to];
              }
          }
  Values ours(size(os)), ours_by_x(size(xs)), ours_by_kernel(size(ks));
  Forward({}, Of(x, xs), Of(kernel, ks), {Of(ours, os)}, stride, padding);
  InputGradient({}, Of(g, os), Of(kernel, ks), {Of(ours_by_x, xs)}, stride, padding);
  KernelGradient({}, Of(x, xs), Of(g, os), {Of(ours_by_kernel, ks)}, stride, padding);
  const bool close[] = {Close("forward", ours, out), Close("input gradient", ours_by_x, by_x),
                        Close("kernel gradient", ours_by_kernel, by_kernel)};
  return close[0] && close[1] && close[2];
}

bool Maxima() {
  const Shape xs{2, 7, 6, 32}, os{2, 4, 3, 32};
  Values x = Random(2 * 7 * 6 * 32), maxima(2 * 4 * 3 * 32);
  for (float& v : x) v = std::round(2 * v);  // full of ties
  std::vector<std::uint8_t> places(maxima.size());
  MaxPool({}, Of(x, xs), {Of(maxima, os)}, {{places.data(), {os.n, os.h, os.w, os.c}}}, 3, 2, 1);
  for (Index i = 0; i < Index(maxima.size()); ++i) {
    const Index c = i % os.c, j = i / os.c % os.w, row = i / os.c / os.w;
    float best = -INFINITY;
    int place = 0;
    for (Index p = 0; p < 9; ++p) {
      const Index y = row % os.h * 2 - 1 + p / 3, xx = j * 2 - 1 + p % 3;
      if (y < 0 || y >= xs.h || xx < 0 || xx >= xs.w) continue;
      const float v = x[((row / os.h * xs.h + y) * xs.w + xx) * xs.c + c];
      if (v > best) best = v, place = p;
    }
    if (maxima[i] != best || places[i] != place) {
      std::printf("max-pooling: %g at %d, not %g at %d\n", maxima[i], places[i], best, place);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const bool right[] = {
      Convolutions({1, 9, 7, 16}, 32, 3, 2, 1, 1),
      Convolutions({2, 6, 5, 32}, 48, 1, 1, 0, 1),
      Convolutions({3, 14, 13, 16}, 16, 3, 1, 1, 1),    // by Winograd's way
      Convolutions({2, 9, 7, 32}, 32, 3, 1, 1, 32),     // depthwise
      Convolutions({1, 8, 7, 64}, 64, 3, 2, 1, 16),     // 4 channels a group,
      Convolutions({1, 6, 7, 128}, 128, 3, 1, 1, 16),   // 8,
      Convolutions({2, 5, 4, 64}, 64, 3, 2, 1, 4),      // 16,
      Convolutions({1, 5, 6, 48}, 48, 3, 1, 1, 2),      // and 24
      Maxima(),
  };
  for (bool r : right)
    if (!r) return 1;
  return 0;
}
