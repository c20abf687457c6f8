#include "cuda/sequence/backward_resident.cuh"
RNN_EXT_INSTANTIATE_RESIDENT_BACKWARD(__nv_bfloat16)
