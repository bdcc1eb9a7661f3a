// One page record's way into the engine's paged KV pool: which elements a lane takes, and how they turn.
// CUDA and CPU compile this same source. No product is contracted into a sum, so that both agree to the bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace cached_attention {

// One tensor of one layer (K, V or MLA's latent) on both sides. Python writes these rows; lengths are in elements.
struct Component {
  int64_t pool;  // address of the pool's first slot
  int64_t slot_stride;
  int64_t head_stride;
  int64_t heads;
  int64_t dim;
  int64_t records;  // address of this component in the first record: [token][head][dim]
  int64_t record_stride;
  int64_t rotary_start;
  int64_t rotary_half;  // pairs; 0 = never rotated
  int64_t interleaved;
  int64_t column;  // of this rotation in the table: rotary_half cosines, then as many sines
};
constexpr int64_t kFields = sizeof(Component) / sizeof(int64_t);

// What one lane takes of a head: two runs of V elements.
struct Unit {
  uint32_t first;
  uint32_t second;
  int32_t pair;  // the first pair that the runs form together; -1: they are not rotated
  bool has_second;  // false for the last unit of a head whose copied part is an odd number of runs
};

// How a head's vector is cut into units. A pair always falls into one unit: each element is read once.
struct Head {
  uint32_t dim;
  uint32_t start;
  uint32_t half;
  bool interleaved;

  template <int V>
  CA_HOST_DEVICE uint32_t units() const {
    return half / V + (dim - 2 * half + 2 * V - 1) / (2 * V);
  }

  template <int V>
  CA_HOST_DEVICE Unit unit(uint32_t index) const {
    uint32_t const rotated = half / V;
    if (index < rotated) {
      uint32_t const first = start + index * V * (interleaved ? 2 : 1);
      return {first, first + (interleaved ? V : half), static_cast<int32_t>(index * V), true};
    }
    uint32_t const first = (index - rotated) * 2 * V;
    return {around_slice(first), around_slice(first + V), -1, first + V < dim - 2 * half};
  }

 private:
  CA_HOST_DEVICE uint32_t around_slice(uint32_t element) const {
    return element < start ? element : element + 2 * half;
  }
};

template <typename F>
CA_HOST_DEVICE F product(F a, F b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename F>
CA_HOST_DEVICE F sum(F a, F b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// Turns a pair, or a vector of pairs, by an angle.
template <typename F>
CA_HOST_DEVICE void turn(F& first, F& second, F cos, F sin) {
  F const turned = sum(product(first, cos), -product(second, sin));
  second = sum(product(second, cos), product(first, sin));
  first = turned;
}

// Where, among the 2V elements of a unit, the members of its pair i are.
template <int V, bool interleaved>
CA_HOST_DEVICE constexpr int first_of(int i) {
  return interleaved ? 2 * i : i;
}

template <int V, bool interleaved>
CA_HOST_DEVICE constexpr int second_of(int i) {
  return interleaved ? 2 * i + 1 : V + i;
}

// Whether a head is made of runs of V elements, of which none is rotated in part.
template <int V>
inline bool has_whole_runs(Component const& c) {
  return (c.dim | c.rotary_start | c.rotary_half) % V == 0;
}

// Whether, besides, each of them starts at a multiple of 16 bytes.
template <int V>
inline bool is_aligned(Component const& c) {
  int64_t const strides = c.slot_stride | c.head_stride | c.record_stride;
  return has_whole_runs<V>(c) && strides % V == 0 && (c.pool | c.records) % 16 == 0;
}

}  // namespace cached_attention
