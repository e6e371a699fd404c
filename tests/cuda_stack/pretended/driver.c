/* Libraries of an NVIDIA driver for a machine without one: what vLLM's CUDA build must find to be
 * imported, and a device that answers what is asked of it. Nothing can be computed on it.
 *
 * Compiled twice, as libcuda.so.1 and, with -DNVML, as libnvidia-ml.so.1.
 */

#include <string.h>

#ifndef NVML

#define NO_DEVICE 100 /* CUDA_ERROR_NO_DEVICE */
#define REFUSE(name) \
  int name(void) { return NO_DEVICE; }

/* All that libraries of vLLM, Triton and their dependencies link to. */
REFUSE(cuCtxGetCurrent)
REFUSE(cuCtxSetCurrent)
REFUSE(cuDeviceGetAttribute)
REFUSE(cuDevicePrimaryCtxRetain)
REFUSE(cuDriverGetVersion)
REFUSE(cuGetErrorString)
REFUSE(cuGetProcAddress_v2)
REFUSE(cuMemAddressFree)
REFUSE(cuMemAddressReserve)
REFUSE(cuMemCreate)
REFUSE(cuMemGetAllocationGranularity)
REFUSE(cuMemMap)
REFUSE(cuMemRelease)
REFUSE(cuMemSetAccess)
REFUSE(cuMemUnmap)
REFUSE(cuPointerGetAttribute)
REFUSE(cuTensorMapEncodeTiled)

#else

static int device;

struct memory {
  unsigned long long total, free, used;
};

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 1;
  return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  *handle = &device;
  return index == 0 ? 0 : 2; /* NVML_ERROR_INVALID_ARGUMENT */
}

int nvmlDeviceGetCudaComputeCapability(void* handle, int* major, int* minor) {
  *major = 9;
  *minor = 0;
  return 0;
}

int nvmlDeviceGetName(void* handle, char* name, unsigned length) {
  strncpy(name, "NVIDIA H100 80GB HBM3", length);
  return 0;
}

int nvmlDeviceGetMemoryInfo(void* handle, struct memory* memory) {
  memory->total = memory->free = 80ull << 30;
  memory->used = 0;
  return 0;
}

#endif
