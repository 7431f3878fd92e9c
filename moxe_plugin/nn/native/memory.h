// Memory for what is of no use after a call.

#pragma once

#include "integers.h"

#include <cstdint>
#include <cstdlib>
#include <new>

namespace moxe {

class Buffer {
 public:
  explicit Buffer(int64_t num_bytes)
      : at_(std::aligned_alloc(kAlignment, (num_bytes / kAlignment + 1) * kAlignment)) {
    if (at_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* bytes() const { return static_cast<char*>(at_); }
  float* floats() const { return static_cast<float*>(at_); }

 private:
  static constexpr int64_t kAlignment = 64;

  void* at_;
};

// Calls a function. Returns 1 if there is no memory, else 0.
template <typename Function>
inline int lacks_memory(Function function) {
  try {
    function();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace moxe
