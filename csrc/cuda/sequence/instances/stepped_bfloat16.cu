#include "cuda/sequence/stepped.cuh"
RNN_EXT_INSTANTIATE_STEPPED(__nv_bfloat16)
