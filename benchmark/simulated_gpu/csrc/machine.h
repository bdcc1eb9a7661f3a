// Memory, streams and kernels of the simulated GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "streams.h"

namespace simulated {

constexpr size_t kMemory = size_t{8} << 30;

using Prepare = Work (*)(void** arguments, dim3 grid);  // Copies the parameters of a kernel, and returns its work.

inline thread_local int current_device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t failed(cudaError_t error) { return last_error = error; }

enum class Place { kPageable, kPinned, kDevice };

struct Range {
  size_t size;
  Place place;
  int device;
};

// Never destroyed: threads may use it until the process ends.
struct Machine {
  std::mutex mutex;
  std::map<char*, Range> ranges;
  std::map<int, Stream*> default_streams;
  std::vector<Stream*> streams;
  std::unordered_map<void const*, std::string> kernel_names;
  std::unordered_map<std::string, Prepare> kernels;
  size_t allocated = 0;

  // What an address belongs to.
  Range find(void const* address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = ranges.upper_bound(static_cast<char*>(const_cast<void*>(address)));
    if (after == ranges.begin()) return {0, Place::kPageable, 0};
    auto const& [start, range] = *std::prev(after);
    return static_cast<char const*>(address) < start + range.size ? range : Range{0, Place::kPageable, 0};
  }
  cudaError_t allocate(void** address, size_t size, Place place) {
    if (place == Place::kDevice && allocated + size > kMemory) return failed(cudaErrorMemoryAllocation);
    size_t const whole = (size + 511) / 512 * 512;
    *address = std::aligned_alloc(512, whole ? whole : 512);
    if (!*address) return failed(cudaErrorMemoryAllocation);
    if (place == Place::kDevice) std::memset(*address, 0xA5, whole);  // Nothing on a GPU is zero by itself.
    add(*address, size, place);
    return cudaSuccess;
  }
  void add(void* address, size_t size, Place place) {
    std::lock_guard<std::mutex> lock(mutex);
    ranges[static_cast<char*>(address)] = {size, place, current_device};
    if (place == Place::kDevice) allocated += size;
  }
  bool remove(void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = ranges.find(static_cast<char*>(address));
    if (found == ranges.end()) return false;
    if (found->second.place == Place::kDevice) allocated -= found->second.size;
    ranges.erase(found);
    return true;
  }
  Stream& stream(cudaStream_t handle) {
    if (reinterpret_cast<uintptr_t>(handle) > 2) return *reinterpret_cast<Stream*>(handle);
    std::lock_guard<std::mutex> lock(mutex);
    Stream*& stream = default_streams[current_device];
    if (!stream) streams.push_back(stream = new Stream);
    return *stream;
  }
  std::vector<Stream*> all_streams() {
    std::lock_guard<std::mutex> lock(mutex);
    return streams;
  }
  void synchronize() {
    for (Stream* stream : all_streams()) stream->synchronize();
  }
};

inline Machine& machine() {
  static Machine* machine = new Machine;
  return *machine;
}

}  // namespace simulated
