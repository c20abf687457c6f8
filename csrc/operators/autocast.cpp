#include "operators/autocast.h"

#include <ATen/autocast_mode.h>

namespace rnn_ext {

bool is_autocast_enabled(at::DeviceType device_type) { return at::autocast::is_autocast_enabled(device_type); }

Tensor autocast(const Tensor& t, at::DeviceType device_type) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device_type), t, device_type);
}
OptTensor autocast(const OptTensor& t, at::DeviceType device_type) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device_type), t, device_type);
}

WithoutAutocastCache::WithoutAutocastCache() : enabled_(at::autocast::is_autocast_cache_enabled()) {
  at::autocast::set_autocast_cache_enabled(false);
}
WithoutAutocastCache::~WithoutAutocastCache() { at::autocast::set_autocast_cache_enabled(enabled_); }

}  // namespace rnn_ext
