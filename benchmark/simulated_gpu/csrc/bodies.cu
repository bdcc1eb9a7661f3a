// The bodies of this package's kernels as work for a stream of the simulated GPU. A grid is as high as there are arrays or
// components; its width only says how many threads share the work.
#include <functional>

#include "kernels.cu"

using Work = std::function<void()>;
extern "C" void simulated_gpu_add_kernel(void const* function, Work (*prepare)(void**, dim3));

namespace cached_attention {

template <typename P>
P parameter(void** arguments, int index) {
  return *static_cast<P const*>(arguments[index]);
}

template <typename W>
Work copy_rows_body(void** arguments, dim3 grid) {
  auto const batch = parameter<Batch<W>>(arguments, 0);
  auto const targets = parameter<int32_t const*>(arguments, 1), sources = parameter<int32_t const*>(arguments, 2);
  return [=] { copy_on_host(batch, grid.y, targets, sources); };
}

template <typename T, int V>
Work rope_on_load_body(void** arguments, dim3 grid) {
  auto const sources = parameter<Sources<T>>(arguments, 0);
  auto const moves = parameter<int32_t const*>(arguments, 1);
  auto const pages = parameter<uint32_t>(arguments, 2);
  auto const table = parameter<float const*>(arguments, 3);
  auto const width = parameter<uint32_t>(arguments, 4);
  return [=] { move_on_host<T, V>(sources, grid.y, moves, pages, table, width); };
}

template <typename T>
void add_rope_on_load() {
  constexpr int V = 16 / sizeof(T);
  simulated_gpu_add_kernel(reinterpret_cast<void const*>(rope_on_load_kernel<T, V>), rope_on_load_body<T, V>);
  simulated_gpu_add_kernel(reinterpret_cast<void const*>(rope_on_load_kernel<T, 1>), rope_on_load_body<T, 1>);
}

void add_kernels() {
  simulated_gpu_add_kernel(reinterpret_cast<void const*>(copy_rows_kernel<uint4>), copy_rows_body<uint4>);
  simulated_gpu_add_kernel(reinterpret_cast<void const*>(copy_rows_kernel<uint8_t>), copy_rows_body<uint8_t>);
  add_rope_on_load<float>();
  add_rope_on_load<nv_half>();
  add_rope_on_load<nv_bfloat16>();
}

}  // namespace cached_attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_kernels, cached_attention::add_kernels);
