// Scratch memory that grows to what was needed once and is then reused by its thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace recalkv {

class Workspace {
 public:
  // At least `bytes` bytes, 64-byte aligned, valid until the next call.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, rounded));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace recalkv
