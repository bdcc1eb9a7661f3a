// rope_on_load over a pool on the device. Records lie on the device too, or in pinned host memory that it can read.
//
// The pool is FlashInfer's (page.cuh), and so are the vectors (vec_dtypes.cuh). Its rotations (pos_enc.cuh) are not used:
// they read each element twice, for itself and for its pair, where every read may cross a link; and they leave it to the
// compiler to contract products into sums, which then round otherwise than the reference.
#include <algorithm>
#include <cstring>
#include <flashinfer/page.cuh>
#include <flashinfer/vec_dtypes.cuh>
#include <optional>

#include "in_flight.cuh"
#include "rope_on_load.cuh"
#include "tvm_ffi_utils.h"

namespace cached_attention {

using flashinfer::paged_kv_t;
using flashinfer::uint_fastdiv;
using flashinfer::vec_t;

constexpr int kThreads = 256;
constexpr int kUnitsInFlight = 4;     // per thread; 32 bytes each, so that a few blocks keep a PCIe link busy
constexpr int kComponentsPerCall = 16;  // as many as fit into a kernel's parameters

// A component as the kernel wants it: the engine's side is FlashInfer's paged pool.
template <typename T>
struct Source {
  paged_kv_t<T, int32_t> pool;
  T const* records;
  int64_t record_stride;
  Head head;
  uint32_t column;
  uint32_t units;  // of all pages together
  uint_fastdiv units_per_head;
  uint_fastdiv heads;
};

template <typename T>
struct Sources {
  Source<T> items[kComponentsPerCall];
};

template <typename T, int V>
Source<T> source_of(Component const& c, uint32_t page_size, uint32_t pages) {
  int64_t const strides[3] = {page_size * c.slot_stride, c.slot_stride, c.head_stride};
  Source<T> source;
  source.pool = paged_kv_t<T, int32_t>(c.heads, page_size, c.dim, /*batch_size=*/1, flashinfer::QKVLayout::kNHD,
                                       reinterpret_cast<T*>(c.pool), /*v_data=*/nullptr, strides,
                                       /*indices=*/nullptr, /*indptr=*/nullptr, /*last_page_len=*/nullptr);
  source.records = reinterpret_cast<T const*>(c.records);
  source.record_stride = c.record_stride;
  source.head = {static_cast<uint32_t>(c.dim), static_cast<uint32_t>(c.rotary_start),
                 static_cast<uint32_t>(c.rotary_half), c.interleaved != 0};
  source.column = c.column;
  uint32_t const units_per_head = source.head.template units<V>();
  source.units_per_head = units_per_head;
  source.heads = static_cast<uint32_t>(c.heads);
  int64_t const units = static_cast<int64_t>(pages) * page_size * c.heads * units_per_head;
  TVM_FFI_ICHECK_LT(units, int64_t{1} << 31) << "Too many pages for one call: load them in parts.";
  TVM_FFI_ICHECK_LT(strides[0], int64_t{1} << 32) << "A page of the pool spans too many elements.";
  source.units = units;
  return source;
}

// Runs of V elements: on the device FlashInfer's vectors, in 16-byte accesses; on the host the same bytes.
template <typename T, int V>
CA_HOST_DEVICE void read(vec_t<T, V>& run, T const* from) {
#ifdef __CUDA_ARCH__
  run.load(from);
#else
  std::memcpy(&run, from, V * sizeof(T));
#endif
}

template <typename T, int V>
CA_HOST_DEVICE void write(vec_t<T, V> const& run, T* to) {
#ifdef __CUDA_ARCH__
  run.store(to);
#else
  std::memcpy(to, &run, V * sizeof(T));
#endif
}

template <typename To, typename From, int V>
CA_HOST_DEVICE void convert(To* to, From const* from) {
#ifdef __CUDA_ARCH__
  flashinfer::vec_cast<To, From>::template cast<V>(to, from);
#else
  for (int i = 0; i < V; ++i) to[i] = static_cast<To>(from[i]);
#endif
}

// A unit on its way: what was read, where it goes, and by which row of the table it turns.
template <typename T, int V>
struct Lane {
  vec_t<T, V> first, second;
  Unit unit;
  T const* from;
  T* to;
  int32_t row;

  CA_HOST_DEVICE void locate(Source<T> const& source, uint32_t index, int32_t const* moves, uint32_t pages) {
    uint32_t vector, token, head, offset, page, entry;
    source.units_per_head.divmod(index, vector, offset);
    source.heads.divmod(vector, token, head);
    source.pool.page_size.divmod(token, page, entry);
    unit = source.head.template unit<V>(offset);
    from = source.records + moves[pages + page] * source.record_stride +
           (static_cast<int64_t>(entry) * source.pool.num_heads + head) * source.pool.head_dim;
    to = source.pool.k_data + source.pool.get_elem_offset(moves[page], head, entry, 0);
    row = unit.pair < 0 ? -1 : moves[2 * pages + page];
  }

  CA_HOST_DEVICE void load() {
    read<T, V>(first, from + unit.first);
    if (unit.has_second) read<T, V>(second, from + unit.second);
  }

  CA_HOST_DEVICE void store(Source<T> const& source, float const* table, uint32_t width) {
    if (row >= 0) {
      float const* cos_sin = table + static_cast<int64_t>(row) * width + source.column;
      if (source.head.interleaved) {
        turn_all<true>(cos_sin, source.head.half);
      } else {
        turn_all<false>(cos_sin, source.head.half);
      }
    }
    write<T, V>(first, to + unit.first);
    if (unit.has_second) write<T, V>(second, to + unit.second);
  }

 private:
  template <bool interleaved>
  CA_HOST_DEVICE void turn_all(float const* cos_sin, uint32_t half) {
    vec_t<float, V> cos, sin;
    read<float, V>(cos, cos_sin + unit.pair);
    read<float, V>(sin, cos_sin + half + unit.pair);
    float x[2 * V];
    convert<float, T, V>(x, elements(first));
    convert<float, T, V>(x + V, elements(second));
#pragma unroll
    for (int i = 0; i < V; ++i) {
      turn(x[first_of<V, interleaved>(i)], x[second_of<V, interleaved>(i)], elements(cos)[i], elements(sin)[i]);
    }
    convert<T, float, V>(elements(first), x);
    convert<T, float, V>(elements(second), x + V);
  }

  template <typename E>
  CA_HOST_DEVICE static E* elements(vec_t<E, V>& run) {
    return reinterpret_cast<E*>(&run);
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    rope_on_load_kernel(__grid_constant__ Sources<T> const sources, int32_t const* __restrict__ moves, uint32_t pages,
                        float const* __restrict__ table, uint32_t width) {
  Source<T> const& source = sources.items[blockIdx.y];
  move_items<kThreads, kUnitsInFlight, Lane<T, V>>(
      source.units, [&](Lane<T, V>& lane, uint32_t index) { lane.locate(source, index, moves, pages); },
      [&](Lane<T, V>& lane) { lane.store(source, table, width); });
}

// Components of which 16 bytes can be moved at once go together, and those of which they cannot.
template <typename T, int V, typename Run>
void for_each_batch(TensorView components, uint32_t page_size, uint32_t pages, Run run) {
  auto const* items = static_cast<Component const*>(components.data_ptr());
  Sources<T> sources;
  uint32_t filled = 0;
  for (int64_t i = 0; i < components.size(0); ++i) {
    if (is_aligned<16 / sizeof(T)>(items[i]) != (V > 1)) continue;
    sources.items[filled++] = source_of<T, V>(items[i], page_size, pages);
    if (filled == kComponentsPerCall) run(sources, filled), filled = 0;
  }
  if (filled > 0) run(sources, filled);
}

template <typename T, int V>
void load_on_device(TensorView moves, TensorView table, TensorView components, int64_t page_size, uint32_t blocks) {
  uint32_t const pages = moves.size(1), step = kThreads * kUnitsInFlight;
  cudaStream_t const stream = get_stream(moves.device());
  for_each_batch<T, V>(components, page_size, pages, [&](Sources<T> const& sources, uint32_t count) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < count; ++i) most = std::max(most, sources.items[i].units);
    dim3 const grid(std::min((blocks + count - 1) / count, (most + step - 1) / step), count);
    rope_on_load_kernel<T, V><<<grid, kThreads, 0, stream>>>(sources, static_cast<int32_t const*>(moves.data_ptr()),
                                                             pages, static_cast<float const*>(table.data_ptr()),
                                                             table.size(1));
    cudaError_t const error = cudaGetLastError();
    TVM_FFI_ICHECK(error == cudaSuccess) << "rope_on_load: " << cudaGetErrorString(error);
  });
}

// What the kernel does, lane by lane.
template <typename T, int V>
void move_on_host(Sources<T> const& sources, uint32_t count, int32_t const* moves, uint32_t pages, float const* table,
                  uint32_t width) {
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t index = 0; index < sources.items[i].units; ++index) {
      Lane<T, V> lane;
      lane.locate(sources.items[i], index, moves, pages);
      lane.load();
      lane.store(sources.items[i], table, width);
    }
  }
}

template <typename T, int V>
void load_on_host(TensorView moves, TensorView table, TensorView components, int64_t page_size) {
  uint32_t const pages = moves.size(1);
  for_each_batch<T, V>(components, page_size, pages, [&](Sources<T> const& sources, uint32_t count) {
    move_on_host<T, V>(sources, count, static_cast<int32_t const*>(moves.data_ptr()), pages,
                       static_cast<float const*>(table.data_ptr()), table.size(1));
  });
}

template <typename T, int V>
void load(TensorView moves, TensorView table, TensorView components, int64_t page_size, int64_t blocks) {
  if (moves.device().device_type == kDLCPU) {
    load_on_host<T, V>(moves, table, components, page_size);
  } else {
    load_on_device<T, V>(moves, table, components, page_size, blocks);
  }
}

// moves: int32 [3, pages]: page of the pool, record, row of the table (-1: as it is). table: fp32 [rows, width].
// Both lie where the pool lies. components: int64 [n, kFields] in host memory.
void rope_on_load(TensorView moves, TensorView table, TensorView components, int64_t page_size, int64_t element,
                  int64_t blocks) {
  CHECK_DEVICE(moves, table);
  TVM_FFI_ICHECK_EQ(components.size(1), kFields);
  if (moves.size(1) == 0) return;
  auto const load_all = [&](auto zero) {
    using T = decltype(zero);
    load<T, 16 / sizeof(T)>(moves, table, components, page_size, blocks);
    load<T, 1>(moves, table, components, page_size, blocks);
  };
  std::optional<ffi::CUDADeviceGuard> guard;
  if (moves.device().device_type == kDLCUDA) guard.emplace(moves.device().device_id);
  if (element == 0) load_all(float{});
  if (element == 1) load_all(nv_half{});
  if (element == 2) load_all(nv_bfloat16{});
}

}  // namespace cached_attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_on_load, cached_attention::rope_on_load);
