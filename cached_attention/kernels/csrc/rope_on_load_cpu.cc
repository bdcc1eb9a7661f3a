// rope_on_load over tensors in host memory.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>
#include <utility>

#include "rope_on_load.cuh"

namespace cached_attention {

using tvm::ffi::TensorView;

#if defined(__aarch64__)
using half = __fp16;
#else
using half = _Float16;
#endif

using bfloat16 = uint16_t;  // its bits

template <typename E, int V>
struct Lanes {
  typedef E Vector __attribute__((vector_size(V * sizeof(E))));
};
template <typename E, int V>
using Vector = typename Lanes<E, V>::Vector;

template <typename E, int V>
inline Vector<float, V> widen(Vector<E, V> x) {
  if constexpr (std::is_same_v<E, bfloat16>) {
    return reinterpret_cast<Vector<float, V>>(__builtin_convertvector(x, Vector<uint32_t, V>) << 16);
#ifdef __F16C__
  } else if constexpr (std::is_same_v<E, half> && V == 8) {
    return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#endif
  } else {
    return __builtin_convertvector(x, Vector<float, V>);
  }
}

template <typename E, int V>
inline Vector<E, V> narrow(Vector<float, V> x) {
  if constexpr (std::is_same_v<E, bfloat16>) {
    auto const bits = reinterpret_cast<Vector<uint32_t, V>>(x);
    auto const rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Vector<bfloat16, V>);
#ifdef __F16C__
  } else if constexpr (std::is_same_v<E, half> && V == 8) {
    return reinterpret_cast<Vector<E, V>>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    return __builtin_convertvector(x, Vector<E, V>);
  }
}

template <typename V>
inline V load(void const* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <int V, bool interleaved, int... i>
inline void turn_vectors(Vector<float, V>& a, Vector<float, V>& b, float const* cos, float const* sin,
                         std::integer_sequence<int, i...>) {
  using F = Vector<float, V>;
  F first = __builtin_shufflevector(a, b, first_of<V, interleaved>(i)...);
  F second = __builtin_shufflevector(a, b, second_of<V, interleaved>(i)...);
  turn(first, second, load<F>(cos), load<F>(sin));
  // Pair i is elements i and V + i of (first, second); back to where they were.
  a = interleaved ? __builtin_shufflevector(first, second, (i / 2 + i % 2 * V)...) : first;
  b = interleaved ? __builtin_shufflevector(first, second, ((V + i) / 2 + (V + i) % 2 * V)...) : second;
}

template <typename E, int V, bool interleaved>
inline void load_head(E const* from, E* to, Head const& head, float const* cos_sin) {
  uint32_t const units = head.units<V>();
  for (uint32_t index = 0; index < units; ++index) {
    Unit const unit = head.unit<V>(index);
    if (unit.pair < 0) {
      std::memcpy(to + unit.first, from + unit.first, V * sizeof(E));
      if (unit.has_second) std::memcpy(to + unit.second, from + unit.second, V * sizeof(E));
      continue;
    }
    auto a = widen<E, V>(load<Vector<E, V>>(from + unit.first));
    auto b = widen<E, V>(load<Vector<E, V>>(from + unit.second));
    float const* cos = cos_sin + unit.pair;
    turn_vectors<V, interleaved>(a, b, cos, cos + head.half, std::make_integer_sequence<int, V>());
    auto const first = narrow<E, V>(a), second = narrow<E, V>(b);
    std::memcpy(to + unit.first, &first, sizeof first);
    std::memcpy(to + unit.second, &second, sizeof second);
  }
}

template <typename T, int V>
void turn_page(Component const& c, T const* from, T* to, int64_t page_size, float const* cos_sin) {
  Head const head{static_cast<uint32_t>(c.dim), static_cast<uint32_t>(c.rotary_start),
                  static_cast<uint32_t>(c.rotary_half), c.interleaved != 0};
  auto const load = head.interleaved ? load_head<T, V, true> : load_head<T, V, false>;
  for (int64_t token = 0; token < page_size; ++token) {
    for (int64_t h = 0; h < c.heads; ++h) {
      load(from + (token * c.heads + h) * c.dim, to + token * c.slot_stride + h * c.head_stride, head, cos_sin);
    }
  }
}

template <typename T>
void copy_page(Component const& c, T const* from, T* to, int64_t page_size) {
  int64_t const row = c.heads * c.dim;
  bool const dense_heads = c.heads == 1 || c.head_stride == c.dim;
  if (dense_heads && c.slot_stride == row) {
    std::memcpy(to, from, page_size * row * sizeof(T));
    return;
  }
  for (int64_t token = 0; token < page_size; ++token) {
    for (int64_t h = 0; h < c.heads; ++h) {
      std::memcpy(to + token * c.slot_stride + h * c.head_stride, from + token * row + h * c.dim,
                  c.dim * sizeof(T));
    }
  }
}

template <typename T>
void load_component(Component const& c, int32_t const* moves, int64_t n, float const* table, int64_t width,
                    int64_t page_size) {
  constexpr int V = 16 / sizeof(T);
  for (int64_t i = 0; i < n; ++i) {
    int64_t const page = moves[i], record = moves[n + i], row = moves[2 * n + i];
    T const* from = reinterpret_cast<T const*>(c.records) + record * c.record_stride;
    T* to = reinterpret_cast<T*>(c.pool) + page * page_size * c.slot_stride;
    if (row < 0 || c.rotary_half == 0) {
      copy_page(c, from, to, page_size);
    } else if (has_whole_runs<V>(c)) {
      turn_page<T, V>(c, from, to, page_size, table + row * width + c.column);
    } else {
      turn_page<T, 1>(c, from, to, page_size, table + row * width + c.column);
    }
  }
}

void rope_on_load(TensorView moves, TensorView table, TensorView components, int64_t page_size, int64_t element,
                  int64_t /*blocks*/) {
  auto const* pages = static_cast<int32_t const*>(moves.data_ptr());
  auto const* rows = static_cast<float const*>(table.data_ptr());
  auto const* items = static_cast<Component const*>(components.data_ptr());
  TVM_FFI_ICHECK_EQ(components.size(1), kFields);
  for (int64_t i = 0; i < components.size(0); ++i) {
    auto const load = element == 0 ? load_component<float> : element == 1 ? load_component<half> : load_component<bfloat16>;
    load(items[i], pages, moves.size(1), rows, table.size(1), page_size);
  }
}

}  // namespace cached_attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_on_load, cached_attention::rope_on_load);
