/* Stands in for CUDA's driver and for torch's count of devices, so that torch's autograd engine
   works on fake tensors of a device that is not there. Every call of the driver fails (3: not
   initialized). Preloaded under the name libcuda.so.1; see fake_device.py. */
#define FAILS(name) int name(void) { return 3; }
FAILS(cuCtxGetCurrent) FAILS(cuCtxSetCurrent) FAILS(cuCtxGetLimit) FAILS(cuCtxSetLimit)
FAILS(cuDeviceGet) FAILS(cuDeviceGetAttribute) FAILS(cuDevicePrimaryCtxRetain)
FAILS(cuFuncGetAttribute) FAILS(cuFuncSetAttribute) FAILS(cuFuncSetCacheConfig)
FAILS(cuGetErrorString) FAILS(cuLaunchCooperativeKernel) FAILS(cuLaunchKernel)
FAILS(cuLinkAddData_v2) FAILS(cuLinkComplete) FAILS(cuLinkCreate_v2)
FAILS(cuModuleGetFunction) FAILS(cuModuleLoad) FAILS(cuModuleLoadData) FAILS(cuModuleLoadDataEx)
FAILS(cuModuleUnload) FAILS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
FAILS(cuPointerGetAttribute) FAILS(cuTensorMapEncodeTiled)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = *active = 0;
    return 0;
}

static signed char devices = 0; /* none while torch is imported */
void set_devices(int count) { devices = (signed char)count; }
/* c10::cuda::device_count(), device_count_ensure_non_zero(), hasPrimaryContext(DeviceIndex) */
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
signed char _ZN3c104cuda26device_count_ensure_non_zeroEv(void) { return devices; }
_Bool _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 0; }
