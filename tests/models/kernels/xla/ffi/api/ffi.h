// As much of XLA's header as convolution.cc uses, for a program without XLA.

#pragma once

#include <array>
#include <cstdint>
#include <functional>

namespace xla::ffi {

struct ThreadPool {
  std::int64_t num_threads() const { return 3; }
  // One thread does it all in turn, late or at once.
  void Schedule(std::function<void()> work) { work(); }
};

struct Error {
  static Error Success() { return {}; }
};

enum Type { F32, U8 };

template <Type type>
struct Buffer {
  using Element = std::conditional_t<type == F32, float, std::uint8_t>;
  Element* data;
  std::array<std::int64_t, 4> shape;
  Element* typed_data() const { return data; }
  const std::array<std::int64_t, 4>& dimensions() const { return shape; }
};

template <class T>
struct Result {
  T buffer;
  T& operator*() { return buffer; }
  T* operator->() { return &buffer; }
};

}  // namespace xla::ffi

#define XLA_FFI_DEFINE_HANDLER_SYMBOL(...)
