#include "cuda/sequence/forward_resident.cuh"
RNN_EXT_INSTANTIATE_RESIDENT_FORWARD(__half)
