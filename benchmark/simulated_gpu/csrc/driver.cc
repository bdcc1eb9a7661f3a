// Functions of the driver that libraries are linked with. None of what would call them runs here.
namespace {
constexpr int kNotSupported = 801;
}

#define NOT_HERE(name) \
  extern "C" int name() { return kNotSupported; }

NOT_HERE(cuCtxFromGreenCtx)
NOT_HERE(cuCtxPopCurrent_v2)
NOT_HERE(cuCtxPushCurrent_v2)
NOT_HERE(cuDevResourceGenerateDesc)
NOT_HERE(cuDevSmResourceSplitByCount)
NOT_HERE(cuDeviceGetDevResource)
NOT_HERE(cuDriverGetVersion)
NOT_HERE(cuGetErrorString)
NOT_HERE(cuGetProcAddress_v2)
NOT_HERE(cuGreenCtxCreate)
NOT_HERE(cuGreenCtxDestroy)
NOT_HERE(cuGreenCtxGetDevResource)
NOT_HERE(cuPointerGetAttribute)
NOT_HERE(cuStreamCreate)
