// Many reads at once: what hides the latency of memory on the other side of a link.
#pragma once

#include <cstdint>

namespace cached_attention {

// The threads of a row of blocks share `count` items. Each takes kInFlight at a time, reads all of them and then writes
// all of them.
template <int kThreads, int kInFlight, typename Item, typename Locate, typename Store>
__device__ __forceinline__ void move_items(uint32_t count, Locate const& locate, Store const& store) {
  constexpr uint32_t step = kThreads * kInFlight;
  for (uint32_t base = blockIdx.x * step + threadIdx.x; base < count; base += gridDim.x * step) {
    Item items[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      uint32_t const index = base + i * kThreads;
      locate(items[i], index < count ? index : base);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (base + i * kThreads < count) items[i].load();
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (base + i * kThreads < count) store(items[i]);
    }
  }
}

}  // namespace cached_attention
