// Rows of byte arrays to rows of others: a page of the engine's pool on one side, its part of a record in pinned host
// memory, which the GPU reads and writes directly, on the other.
#include <algorithm>
#include <cstring>
#include <flashinfer/fastdiv.cuh>
#include <optional>
#include <vector>

#include "in_flight.cuh"
#include "tvm_ffi_utils.h"

namespace cached_attention {

using flashinfer::uint_fastdiv;

constexpr int kCopyThreads = 256;
constexpr int kWordsInFlight = 8;        // per thread, 16 bytes each; all are read before any is written
constexpr uint32_t kArraysPerCall = 32;  // as many as fit into a kernel's parameters
constexpr int64_t kFieldsOfArrays = 5;

// Two arrays of which rows are copied. Python writes these; all is in bytes.
struct Arrays {
  int64_t target;
  int64_t target_stride;
  int64_t source;
  int64_t source_stride;
  int64_t size;  // of a row

  bool is_aligned() const { return (target | target_stride | source | source_stride | size) % 16 == 0; }
};
static_assert(sizeof(Arrays) == kFieldsOfArrays * sizeof(int64_t));

template <typename W>
struct WordArrays {
  char* target;
  int64_t target_stride;
  char const* source;
  int64_t source_stride;
  uint32_t words;  // of all rows together
  uint_fastdiv words_per_row;
};

template <typename W>
struct Batch {
  WordArrays<W> items[kArraysPerCall];
};

// A word on its way.
template <typename W>
struct Word {
  W value;
  W const* from;
  W* to;

  __host__ __device__ __forceinline__ void locate(WordArrays<W> const& arrays, uint32_t index,
                                                  int32_t const* target_rows, int32_t const* source_rows) {
    uint32_t row, offset;
    arrays.words_per_row.divmod(index, row, offset);
    from = reinterpret_cast<W const*>(arrays.source + source_rows[row] * arrays.source_stride) + offset;
    to = reinterpret_cast<W*>(arrays.target + target_rows[row] * arrays.target_stride) + offset;
  }

  // Read once, so it need not stay in the caches.
  __host__ __device__ __forceinline__ void load() {
#ifdef __CUDA_ARCH__
    value = __ldcs(from);
#else
    value = *from;
#endif
  }

  __host__ __device__ __forceinline__ void store() const { *to = value; }
};

template <typename W>
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows_kernel(__grid_constant__ Batch<W> const batch, int32_t const* __restrict__ target_rows,
                     int32_t const* __restrict__ source_rows) {
  WordArrays<W> const& arrays = batch.items[blockIdx.y];
  move_items<kCopyThreads, kWordsInFlight, Word<W>>(
      arrays.words,
      [&](Word<W>& word, uint32_t index) { word.locate(arrays, index, target_rows, source_rows); },
      [](Word<W> const& word) { word.store(); });
}

// What the kernel does, word by word.
template <typename W>
void copy_on_host(Batch<W> const& batch, uint32_t arrays, int32_t const* target_rows, int32_t const* source_rows) {
  for (uint32_t i = 0; i < arrays; ++i) {
    for (uint32_t index = 0; index < batch.items[i].words; ++index) {
      Word<W> word;
      word.locate(batch.items[i], index, target_rows, source_rows);
      word.load();
      word.store();
    }
  }
}

template <typename W>
void copy_in_words(TensorView arrays, TensorView target_rows, TensorView source_rows, uint32_t blocks) {
  auto const* items = static_cast<Arrays const*>(arrays.data_ptr());
  auto const* to = static_cast<int32_t const*>(target_rows.data_ptr());
  auto const* from = static_cast<int32_t const*>(source_rows.data_ptr());
  bool const on_host = target_rows.device().device_type == kDLCPU;
  Batch<W> batch;
  uint32_t filled = 0, most = 0;
  uint32_t const fitting = std::min(kArraysPerCall, blocks);  // Each array of a call takes a block at least.
  auto const run = [&] {
    if (on_host) {
      copy_on_host(batch, filled, to, from);
    } else {
      uint32_t const step = kCopyThreads * kWordsInFlight;
      dim3 const grid(std::min((blocks + filled - 1) / filled, (most + step - 1) / step), filled);
      copy_rows_kernel<W><<<grid, kCopyThreads, 0, get_stream(target_rows.device())>>>(batch, to, from);
      cudaError_t const error = cudaGetLastError();
      TVM_FFI_ICHECK(error == cudaSuccess) << "copy_rows: " << cudaGetErrorString(error);
    }
    filled = most = 0;
  };
  for (int64_t i = 0; i < arrays.size(0); ++i) {
    Arrays const& item = items[i];
    if (item.is_aligned() != (sizeof(W) == 16)) continue;
    int64_t const words = target_rows.size(0) * (item.size / static_cast<int64_t>(sizeof(W)));
    TVM_FFI_ICHECK_LT(words, int64_t{1} << 31) << "Too many rows for one call: copy them in parts.";
    batch.items[filled++] = {reinterpret_cast<char*>(item.target), item.target_stride,
                             reinterpret_cast<char const*>(item.source), item.source_stride,
                             static_cast<uint32_t>(words), static_cast<uint32_t>(item.size / sizeof(W))};
    most = std::max(most, static_cast<uint32_t>(words));
    if (filled == fitting) run();
  }
  if (filled > 0) run();
}

// arrays: int64 [n, kFieldsOfArrays] in host memory. target_rows, source_rows: int32 [rows], where the pool lies.
void copy_rows(TensorView arrays, TensorView target_rows, TensorView source_rows, int64_t blocks) {
  TVM_FFI_ICHECK_EQ(arrays.size(1), kFieldsOfArrays);
  TVM_FFI_ICHECK_EQ(target_rows.size(0), source_rows.size(0));
  if (target_rows.size(0) == 0) return;
  std::optional<ffi::CUDADeviceGuard> guard;
  if (target_rows.device().device_type == kDLCUDA) guard.emplace(target_rows.device().device_id);
  copy_in_words<uint4>(arrays, target_rows, source_rows, blocks);
  copy_in_words<uint8_t>(arrays, target_rows, source_rows, blocks);
}

constexpr int64_t kNoStream = -1;

void copy_all(std::vector<void*>& targets, std::vector<void*>& sources, std::vector<size_t>& sizes, int64_t stream) {
  if (stream == kNoStream) {
    for (size_t i = 0; i < sizes.size(); ++i) std::memcpy(targets[i], sources[i], sizes[i]);
    return;
  }
  cudaStream_t const on = reinterpret_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first = 0;
  cudaError_t const error = cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), sizes.size(),
                                                 &attributes, &first, 1, on);
#else
  cudaError_t error = cudaSuccess;
  for (size_t i = 0; i < sizes.size() && error == cudaSuccess; ++i) {
    error = cudaMemcpyAsync(targets[i], sources[i], sizes[i], cudaMemcpyDefault, on);
  }
#endif
  if (error != cudaSuccess) cudaGetLastError();  // Else the next call that asks would be told of it.
  TVM_FFI_ICHECK(error == cudaSuccess) << "copy_rows_batched: " << cudaGetErrorString(error);
}

// The same, by the GPU's copy engines, which leave its cores alone. All tensors lie in host memory.
void copy_rows_batched(TensorView arrays, TensorView target_rows, TensorView source_rows, int64_t stream) {
  TVM_FFI_ICHECK_EQ(arrays.size(1), kFieldsOfArrays);
  TVM_FFI_ICHECK_EQ(target_rows.size(0), source_rows.size(0));
  auto const* items = static_cast<Arrays const*>(arrays.data_ptr());
  auto const* to = static_cast<int32_t const*>(target_rows.data_ptr());
  auto const* from = static_cast<int32_t const*>(source_rows.data_ptr());
  int64_t const rows = target_rows.size(0), copies = rows * arrays.size(0);
  if (copies == 0) return;
  std::vector<void*> targets(copies), sources(copies);
  std::vector<size_t> sizes(copies);
  for (int64_t row = 0, copy = 0; row < rows; ++row) {
    for (int64_t i = 0; i < arrays.size(0); ++i, ++copy) {
      targets[copy] = reinterpret_cast<void*>(items[i].target + to[row] * items[i].target_stride);
      sources[copy] = reinterpret_cast<void*>(items[i].source + from[row] * items[i].source_stride);
      sizes[copy] = items[i].size;
    }
  }
  copy_all(targets, sources, sizes, stream);
}

}  // namespace cached_attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_rows, cached_attention::copy_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_rows_batched, cached_attention::copy_rows_batched);
