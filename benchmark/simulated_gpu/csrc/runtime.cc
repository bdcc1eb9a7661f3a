// The part of the CUDA runtime that torch and this package call, over host memory: what a GPU does in the order of its
// streams, a thread per stream does here. Preloaded, so that it goes before libcudart; what is missing here is answered by
// libcudart itself, which says that there is no device.
#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;
using Clock = std::chrono::steady_clock;

int number_from(char const* variable, int otherwise) {
  char const* text = std::getenv(variable);
  return text ? std::atoi(text) : otherwise;
}

int const kDevices = number_from("SIMULATED_GPUS", 1);
int const kDelay = number_from("SIMULATED_GPU_DELAY", 0);  // microseconds by which work is late at most
unsigned const kLate = 4;                              // one of so many works that may be late is
size_t const kMemory = static_cast<size_t>(number_from("SIMULATED_GPU_GIB", 8)) << 30;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last_error = error; }

// What an event knows of its last record.
struct Mark {
  std::mutex mutex;
  std::condition_variable happened;
  bool done = false;
  Clock::time_point at;

  void happen() {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    at = Clock::now();
    happened.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    happened.wait(lock, [&] { return done; });
  }
  bool is_done() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};

class Stream {
 public:
  Stream() : random_(std::random_device{}()) { std::thread([this] { serve(); }).detach(); }

  void put(Work work, bool may_be_late = false) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (kDelay && may_be_late && random_() % kLate == 0) {
      works_.push_back([delay = random_() % kDelay] { std::this_thread::sleep_for(std::chrono::microseconds(delay)); });
    }
    works_.push_back(std::move(work));
    more_.notify_one();
  }
  // Its copies and kernels may be late.
  bool transfers = false;
  std::shared_ptr<Mark> mark() {
    auto mark = std::make_shared<Mark>();
    put([mark] { mark->happen(); });
    return mark;
  }
  void synchronize() { mark()->wait(); }
  bool is_idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return works_.empty();
  }

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      more_.wait(lock, [&] { return !works_.empty(); });
      Work work = works_.front();
      lock.unlock();
      work();
      lock.lock();
      works_.pop_front();
    }
  }

  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<Work> works_;
  std::minstd_rand random_;
};

struct Event {
  std::shared_ptr<Mark> mark;
};

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
  std::unordered_map<std::string, Work (*)(void**, dim3)> kernels;
  size_t allocated = 0;

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
  void synchronize() {
    std::vector<Stream*> all;
    {
      std::lock_guard<std::mutex> lock(mutex);
      all = streams;
    }
    for (Stream* stream : all) stream->synchronize();
  }
};

Machine& machine() {
  static Machine* machine = new Machine;
  return *machine;
}

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

// As a GPU: what lies in memory that is not pinned is copied before the call returns.
cudaError_t copy(void* target, void const* source, size_t size, cudaStream_t handle) {
  Stream& stream = machine().stream(handle);
  bool const waits =
      machine().find(target).place == Place::kPageable || machine().find(source).place == Place::kPageable;
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
  Work (*prepare)(void**, dim3) = nullptr;
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

// How a kernel runs: `prepare` copies its parameters and returns the work.
void simulated_gpu_add_kernel(void const* function, Work (*prepare)(void**, dim3)) {
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
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  machine().stream(stream).synchronize();
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     cudaGraphNode_t const**, cudaGraphEdgeData const**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
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
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  event_of(event).mark = machine().stream(stream).mark();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto const mark = event_of(event).mark;
  return !mark || mark->is_done() ? cudaSuccess : failed(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (auto const mark = event_of(event).mark) mark->wait();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  auto const from = event_of(start).mark, to = event_of(end).mark;
  if (!from || !to) return failed(cudaErrorInvalidResourceHandle);
  if (!from->is_done() || !to->is_done()) return failed(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (auto const mark = event_of(event).mark) machine().stream(stream).put([mark] { mark->wait(); }, true);
  return cudaSuccess;
}

}  // extern "C"
