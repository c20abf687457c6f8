#include "cuda/cell/backward_tiled.cuh"
RNN_EXT_INSTANTIATE_BACKWARD_TILED(__nv_bfloat16)
