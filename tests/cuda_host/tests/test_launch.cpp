// What launch.cuh asks the CUDA runtime for: the header as nvcc sees it, with the runtime's functions written here.
#include <cstdio>
#include <initializer_list>

#include "cuda/ptx/launch.cuh"

namespace {

int failures = 0;

void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAIL %s\n", what);
  ++failures;
}

int room_for_clusters = 1;
cudaError_t answer = cudaSuccess, last_error = cudaSuccess;  // to a launch, and what is left of it

struct Asked {
  int launches = 0, smem_limit = 0;
  bool large_clusters = false;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[8] = {};

  const cudaLaunchAttributeValue* attribute(cudaLaunchAttributeID id) const {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      if (attributes[i].id == id) return &attributes[i].val;
    }
    return nullptr;
  }
} asked;

}  // namespace

extern "C" {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  ++asked.launches;
  asked.config = *config;
  for (unsigned i = 0; i < config->numAttrs; ++i) asked.attributes[i] = config->attrs[i];
  return last_error = answer;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) asked.smem_limit = value;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) asked.large_clusters = value == 1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  *clusters = asked.large_clusters && config->numAttrs > 0 ? room_for_clusters : 0;
  return cudaSuccess;
}

}  // extern "C"

namespace {

void kernel(int) {}

void test_plain_launches_ask_for_nothing() {
  asked = {};
  check(RNN_EXT_LAUNCH(kernel, dim3(7), dim3(96), 48 * 1024, nullptr, 1) == cudaSuccess, "a plain launch");
  check(asked.launches == 1 && asked.config.gridDim.x == 7 && asked.config.blockDim.x == 96, "its grid and block");
  check(asked.config.dynamicSmemBytes == 48 * 1024 && asked.smem_limit == 0, "no limit raised up to 48 KiB");
  check(asked.config.numAttrs == 0, "no attributes of a plain launch");
}

void test_much_shared_memory_is_asked_for() {
  asked = {};
  RNN_EXT_LAUNCH(kernel, dim3(1), dim3(32), 200 * 1024, nullptr, 1);
  check(asked.smem_limit == 200 * 1024, "the limit is raised");
}

void test_clusters_are_spread() {
  for (const unsigned size : {2u, 8u}) {
    asked = {};
    RNN_EXT_LAUNCH_CLUSTER(kernel, dim3(16), dim3(32), dim3(size), 0, nullptr, 1);
    const auto* const dimension = asked.attribute(cudaLaunchAttributeClusterDimension);
    check(dimension != nullptr && dimension->clusterDim.x == size && dimension->clusterDim.y == 1,
          "the cluster's size");
    const auto* const policy = asked.attribute(cudaLaunchAttributeClusterSchedulingPolicyPreference);
    check(policy != nullptr && policy->clusterSchedulingPolicyPreference == cudaClusterSchedulingPolicySpread,
          "blocks of a cluster each have a multiprocessor");
  }
}

void test_clusters_of_more_than_8_are_launched_where_there_is_room() {
  for (const int room : {0, 1}) {
    asked = {};
    room_for_clusters = room;
    const cudaError_t e = RNN_EXT_LAUNCH_CLUSTER(kernel, dim3(32), dim3(32), dim3(16), 0, nullptr, 1);
    check(e == (room > 0 ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge), "whether there is room");
    check(asked.launches == room, "no launch without");
  }
  asked = {};
  RNN_EXT_LAUNCH_CLUSTER(kernel, dim3(32), dim3(32), dim3(8), 0, nullptr, 1);
  check(!asked.large_clusters, "8 blocks need no permission");
}

void test_early_launches_are_allowed_to_be() {
  for (const bool early : {false, true}) {
    asked = {};
    RNN_EXT_LAUNCH_EARLY(kernel, dim3(16), dim3(32), 0, nullptr, early, 1);
    const auto* const allowed = asked.attribute(cudaLaunchAttributeProgrammaticStreamSerialization);
    check((allowed != nullptr && allowed->programmaticStreamSerializationAllowed == 1) == early, "an early launch");
    check(early || asked.config.numAttrs == 0, "no attributes of one that is not");
  }
}

void test_cooperative_launches_are_refused_without_a_trace() {
  for (const cudaError_t error : {cudaSuccess, cudaErrorCooperativeLaunchTooLarge, cudaErrorInvalidValue}) {
    asked = {};
    answer = error;
    check(RNN_EXT_LAUNCH_COOPERATIVE(kernel, dim3(16), dim3(32), 0, nullptr, 1) == error, "the launch's error");
    const auto* const cooperative = asked.attribute(cudaLaunchAttributeCooperative);
    check(cooperative != nullptr && cooperative->cooperative == 1 && asked.config.numAttrs == 1,
          "all blocks at once, and no other attribute");
    check(cudaGetLastError() == (error == cudaErrorInvalidValue ? error : cudaSuccess), "the error left behind");
  }
  answer = cudaSuccess;
}

}  // namespace

int main() {
  test_plain_launches_ask_for_nothing();
  test_much_shared_memory_is_asked_for();
  test_clusters_are_spread();
  test_clusters_of_more_than_8_are_launched_where_there_is_room();
  test_early_launches_are_allowed_to_be();
  test_cooperative_launches_are_refused_without_a_trace();
  return failures == 0 ? 0 : 1;
}
