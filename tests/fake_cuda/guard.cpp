// A guard for devices of CUDA that does nothing, for builds of torch without CUDA: fake tensors
// then run forward. (Backward asks for streams of the device; see driver.c for builds with CUDA.)
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::DeviceType;
static c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> guard;
extern "C" void put_guard() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}
