// The part of the CUDA runtime that torch and this package call, for a GPU whose memory is host memory. Preloaded, so that
// its functions come before those of libcudart, which answers the rest: that there is no device.
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"

using namespace simulated;

namespace {

constexpr int kDevices = 1;

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }
Graph& graph_of(void* handle) { return *static_cast<Graph*>(handle); }

// The caller wants to wait for what is only recorded, and what is recorded cannot be changed any more.
cudaError_t refused(Stream& stream) {
  stream.recording->is_valid = false;
  return failed(cudaErrorStreamCaptureUnsupported);
}

// As a GPU: what lies in memory that is not pinned is copied before the call returns.
cudaError_t copy(void* target, void const* source, size_t size, cudaStream_t handle) {
  Stream& stream = machine().stream(handle);
  bool const waits =
      machine().find(target).place == Place::kPageable || machine().find(source).place == Place::kPageable;
  if (waits && stream.recording) return refused(stream);
  stream.put([=] { std::memmove(target, source, size); }, stream.transfers);
  if (waits) stream.synchronize();
  return cudaSuccess;
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<CallConfiguration> configurations;

cudaError_t launch(void const* function, dim3 grid, void** arguments, cudaStream_t stream) {
  Machine& gpu = machine();
  Prepare prepare = nullptr;
  {
    std::lock_guard<std::mutex> lock(gpu.mutex);
    auto known = gpu.kernels.find(gpu.kernel_names[function]);
    if (known != gpu.kernels.end()) prepare = known->second;
  }
  if (!prepare) {
    std::string const& name = gpu.kernel_names[function];
    if (std::getenv("SIMULATED_GPU_VERBOSE")) fprintf(stderr, "no kernel here: %s\n", name.c_str());
    return failed(cudaErrorInvalidDeviceFunction);
  }
  Stream& on = gpu.stream(stream);
  on.put(prepare(arguments, grid), on.transfers);
  return cudaSuccess;
}

int no_such_function() { return 801; }

}  // namespace

extern "C" {

void simulated_gpu_mark_transfers(cudaStream_t stream) { machine().stream(stream).transfers = true; }

void simulated_gpu_add_kernel(void const* function, Prepare prepare) {
  Machine& gpu = machine();
  std::lock_guard<std::mutex> lock(gpu.mutex);
  gpu.kernels[gpu.kernel_names[function]] = prepare;
}

void** __cudaRegisterFatBinary(void*) { return new void*(nullptr); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, char const*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, char const* function, char*, char const* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Machine& gpu = machine();
  std::lock_guard<std::mutex> lock(gpu.mutex);
  gpu.kernel_names[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  CallConfiguration const& last = configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, void const* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void** arguments, size_t, cudaStream_t stream) {
  return launch(kernel, grid, arguments, stream);
}
cudaError_t cudaLaunchKernel(void const* function, dim3 grid, dim3, void** arguments, size_t, cudaStream_t stream) {
  return launch(function, grid, arguments, stream);
}
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* function, void** arguments) {
  return launch(function, config->gridDim, arguments, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void const*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void const*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// Of the driver, which torch asks by itself whether a device is in use.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDriverEntryPointByVersion(char const* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool const is_known = !std::strcmp(symbol, "cuDevicePrimaryCtxGetState");
  *function = is_known ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState) : reinterpret_cast<void*>(no_such_function);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "simulated GPU");
  properties->major = 9;
  properties->totalGlobalMem = kMemory;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerMultiprocessor = properties->regsPerBlock = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = properties->sharedMemPerMultiprocessor = 232448;
  properties->l2CacheSize = 50 << 20;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->unifiedAddressing = properties->canMapHostMemory = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (cudaError_t error = cudaGetDeviceProperties(&properties, device)) return error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = properties.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = properties.sharedMemPerMultiprocessor; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, length, "0000:%02d:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  machine().synchronize();
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = kMemory;
  *free = kMemory - machine().allocated;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t size) { return machine().allocate(address, size, Place::kDevice); }
cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  if (!machine().remove(address)) return failed(cudaErrorInvalidValue);
  // The caller may hold a lock that the work of a stream needs: it does not wait.
  std::thread([address] {
    machine().synchronize();
    std::free(address);
  }).detach();
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  return machine().allocate(address, size, Place::kPinned);
}
cudaError_t cudaFreeHost(void* address) { return cudaFree(address); }
cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  if (machine().find(address).place != Place::kPageable) return failed(cudaErrorHostMemoryAlreadyRegistered);
  machine().add(address, size, Place::kPinned);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  return machine().remove(address) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, void const* address) {
  std::memset(attributes, 0, sizeof *attributes);
  Range const range = machine().find(address);
  void* const pointer = const_cast<void*>(address);
  attributes->type = range.place == Place::kDevice   ? cudaMemoryTypeDevice
                     : range.place == Place::kPinned ? cudaMemoryTypeHost
                                                     : cudaMemoryTypeUnregistered;
  attributes->device = range.device;
  if (range.place != Place::kPageable) attributes->devicePointer = pointer;
  if (range.place != Place::kDevice) attributes->hostPointer = pointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* target, void const* source, size_t size, cudaMemcpyKind) {
  copy(target, source, size, nullptr);
  machine().stream(nullptr).synchronize();
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, void const* source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(target, source, size, stream);
}
cudaError_t cudaMemcpyBatchAsync(void* const* targets, void const* const* sources, size_t const* sizes, size_t count,
                                 cudaMemcpyAttributes* attributes, size_t* first, size_t kinds, cudaStream_t stream) {
  if (reinterpret_cast<uintptr_t>(stream) <= 2 || !attributes || kinds != 1 || *first != 0) {
    return failed(cudaErrorInvalidValue);  // The driver refuses the default stream.
  }
  for (size_t i = 0; i < count; ++i) copy(targets[i], sources[i], sizes[i], stream);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  machine().stream(stream).put([=] { std::memset(target, value, size); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* target, int value, size_t size) { return cudaMemsetAsync(target, value, size, nullptr); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  Stream* made = new Stream;
  {
    std::lock_guard<std::mutex> lock(machine().mutex);
    machine().streams.push_back(made);
  }
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return machine().stream(stream).is_idle() ? cudaSuccess : failed(cudaErrorNotReady);
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream& stream = machine().stream(handle);
  if (stream.recording) return refused(stream);
  stream.synchronize();
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, cudaGraphNode_t const** nodes, cudaGraphEdgeData const** edges,
                                     size_t* count) {
  Graph* const recording = machine().stream(stream).recording;
  *status = !recording             ? cudaStreamCaptureStatusNone
            : recording->is_valid ? cudaStreamCaptureStatusActive
                                  : cudaStreamCaptureStatusInvalidated;
  if (id && recording) *id = recording->id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(recording);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  static std::atomic<unsigned long long> graphs{0};
  Stream& stream = machine().stream(handle);
  if (stream.recording) return failed(cudaErrorIllegalState);
  stream.recording = new Graph{{}, ++graphs};
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Graph* const recorded = machine().stream(handle).recording;
  if (!recorded) return failed(cudaErrorIllegalState);
  for (Stream* stream : machine().all_streams()) {
    if (stream->recording == recorded) stream->recording = nullptr;
  }
  *graph = recorded->is_valid ? reinterpret_cast<cudaGraph_t>(recorded) : nullptr;
  return recorded->is_valid ? cudaSuccess : failed(cudaErrorStreamCaptureInvalidated);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return failed(cudaErrorNotSupported);
  *count = graph_of(graph).nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(graph_of(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  machine().stream(stream).launch(graph_of(executable));
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete &graph_of(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete &graph_of(executable);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  machine().stream(stream).put([=] { function(data); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned flags) {
  Event* const event = &event_of(handle);
  Stream& stream = machine().stream(on);
  if (stream.recording && flags & cudaEventRecordExternal) {
    stream.recording->nodes.push_back([event] {
      auto const mark = event->mark = std::make_shared<Mark>();
      return [mark] { mark->happen(); };
    });
  } else {
    event->mark = stream.mark();
  }
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto const mark = event_of(event).mark;
  if (mark && mark->graph) return failed(cudaErrorCapturedEvent);
  return !mark || mark->is_done() ? cudaSuccess : failed(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  auto const mark = event_of(event).mark;
  if (mark && mark->graph) return failed(cudaErrorCapturedEvent);
  if (mark) mark->wait();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  auto const from = event_of(start).mark, to = event_of(end).mark;
  if (!from || !to) return failed(cudaErrorInvalidResourceHandle);
  if (!from->is_done() || !to->is_done()) return failed(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Stream& stream = machine().stream(handle);
  auto const mark = event_of(event).mark;
  if (!mark) return cudaSuccess;
  if (mark->graph) {
    // The stream takes part in the recording; the order of the nodes says what comes before what.
    if (stream.recording && stream.recording != mark->graph) return failed(cudaErrorStreamCaptureMerge);
    stream.recording = mark->graph;
  } else if (stream.recording) {
    stream.recording->is_valid = false;
    return failed(cudaErrorStreamCaptureIsolation);
  } else {
    stream.put([mark] { mark->wait(); }, true);
  }
  return cudaSuccess;
}

}  // extern "C"
